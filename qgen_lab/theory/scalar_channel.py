"""One weight on a codebook in a Gaussian field: the problem that the whole model reduces to.

The field `r` is N(0, variance); the weight has the law
`p(w | r) ~ exp(-[stiffness (w - r)^2 / 2 + ridge w^2 / 2] / temperature)` on the codebook.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.quadrature import gaussian_rule

_NEGLIGIBLE = 45.0  # a level whose weight is exp(-45) of the largest is left out
_CHUNK = 1 << 14  # node-level pairs worked on at once: what a cache holds


@dataclass(frozen=True)
class ChannelAverages:
    """Averages over the field; `<.>` is the mean over the weight's law at a given field.

    Attributes
    ----------
    slope : float
        E[d<w>/dr], equal to E[r <w>] / variance by parts.
    mean_square : float
        E[<w>^2].
    squared_slope : float
        E[(d<w>/dr)^2].
    entropy : float
        Mean Shannon entropy of the weight's law, in nats.
    slope_by_stiffness, slope_by_variance : float
        Derivatives of `slope` in the stiffness and in the field's variance.
    mean_square_by_stiffness, mean_square_by_variance : float
        Derivatives of `mean_square`.
    """

    slope: float
    mean_square: float
    squared_slope: float
    entropy: float
    slope_by_stiffness: float
    slope_by_variance: float
    mean_square_by_stiffness: float
    mean_square_by_variance: float


def thermal_averages(
    codebook: Codebook, stiffness: float, variance: float, ridge: float, temperature: float
) -> ChannelAverages:
    """Averages at a temperature above zero, by quadrature graded around the thresholds."""
    curvature = stiffness + ridge
    # The law changes from one level to the next over T / (stiffness * spacing), unless so many
    # levels take part that they act as a continuum: then over the posterior width.
    step = temperature / (stiffness * codebook.spacing)
    continuum = np.sqrt(temperature * curvature) / stiffness
    nodes, weights = gaussian_rule(
        np.sqrt(variance),
        codebook.thresholds * (curvature / stiffness),
        3.0 * np.minimum(step, continuum),
    )
    target = nodes * (stiffness / curvature)
    nearest = codebook.code(target)
    first, last = _active_levels(codebook, target, nearest, temperature / curvature)
    rows = max(_CHUNK // int((last - first).max()), 1)
    sums = np.zeros(8)
    for start in range(0, nodes.size, rows):
        part = slice(start, start + rows)
        law = _Law.of(
            codebook.levels, target[part], nearest[part], first[part], last[part],
            curvature / temperature,
        )  # fmt: skip
        sums += weights[part] @ _integrands(nodes[part], law, stiffness, temperature)
    covariance, mean_square, squared_slope, entropy = sums[:4]
    covariance_by_a, mean_square_by_a, covariance_by_v, mean_square_by_v = sums[4:]
    slope = covariance / variance
    return ChannelAverages(
        slope=slope,
        mean_square=mean_square,
        squared_slope=squared_slope,
        entropy=entropy,
        slope_by_stiffness=covariance_by_a / variance,
        slope_by_variance=(covariance_by_v / (2 * variance) - slope) / variance,
        mean_square_by_stiffness=mean_square_by_a,
        mean_square_by_variance=mean_square_by_v / variance,
    )


def _active_levels(
    codebook: Codebook, target: NDArray, nearest: NDArray, spread: float
) -> tuple[NDArray, NDArray]:
    """Half-open index range, for each target, of the levels whose weight is not negligible.

    The weight of a level is `exp(-(level - target)^2 / (2 spread))`, relative to the nearest one.
    """
    levels = codebook.levels
    radius = np.sqrt((levels[nearest] - target) ** 2 + 2 * _NEGLIGIBLE * spread)
    first = np.searchsorted(levels, target - radius)
    last = np.searchsorted(levels, target + radius, side="right")
    return np.minimum(first, nearest), np.maximum(last, nearest + 1)


@dataclass(frozen=True)
class _Law:
    """The weight's law at each node: arrays of shape (nodes, active levels), or (nodes,)."""

    centre: NDArray  # the nearest level
    offset: NDArray  # level minus centre
    exponent: NDArray  # log-weight relative to the centre's
    probability: NDArray
    log_total: NDArray

    @classmethod
    def of(cls, levels, target, nearest, first, last, sharpness):
        index = first[:, None] + np.arange((last - first).max())
        centre = levels[nearest]
        offset = levels[np.minimum(index, levels.size - 1)] - centre[:, None]
        # Relative to the nearest level, so that nothing large is subtracted from anything large.
        exponent = sharpness * offset * ((target - centre)[:, None] - offset / 2)
        exponent[index >= last[:, None]] = -1000.0
        probability = np.exp(exponent)
        total = probability.sum(axis=1)
        probability /= total[:, None]
        return cls(centre, offset, exponent, probability, np.log(total))

    def moments(self) -> list[NDArray]:
        """First three moments of the offset."""
        weighted, result = self.probability, []
        for _ in range(3):
            weighted = weighted * self.offset
            result.append(weighted.sum(axis=1))
        return result

    def entropy(self) -> NDArray:
        """Shannon entropy, in nats."""
        return self.log_total - np.einsum("ij,ij->i", self.probability, self.exponent)


def _integrands(field: NDArray, law: _Law, stiffness: float, temperature: float) -> NDArray:
    """What `thermal_averages` averages, at each node: shape (n, 8)."""
    first, second, third = law.moments()
    mean = law.centre + first
    variance = second - first**2
    response = stiffness / temperature * variance  # d<w>/dr
    covariance_with_square = 2 * law.centre * variance + third - first * second
    by_stiffness = (field * variance - covariance_with_square / 2) / temperature
    return np.stack(
        [
            field * mean,
            mean**2,
            response**2,
            law.entropy(),
            field * by_stiffness,
            2 * mean * by_stiffness,
            field * mean + field**2 * response,
            mean * field * response,
        ],
        axis=1,
    )


def ground_averages(codebook: Codebook, shrinkage: float, variance: float) -> tuple[float, float]:
    """Slope E[dw*/dr] and mean square E[w*^2] at temperature zero, in closed form.

    `w*` is the level nearest to `r / shrinkage`, where shrinkage is 1 + ridge / stiffness.
    """
    deviation = np.sqrt(variance)
    cut = codebook.thresholds * (shrinkage / deviation)
    density = np.exp(-0.5 * cut**2) / (np.sqrt(2 * np.pi) * deviation)
    # Added up outwards from the level of a vanishing field: no difference of near-equal tails.
    home = codebook.levels[np.searchsorted(cut, 0.0)]
    outward = np.where(cut >= 0, 1.0, -1.0) * np.diff(codebook.levels**2)
    return float(codebook.spacing @ density), float(home**2 + outward @ ndtr(-np.abs(cut)))
