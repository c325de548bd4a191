"""One weight on a codebook in a Gaussian field: the problem that the whole model reduces to.

The field `r` is N(0, variance); the weight has the law
`p(w | r) ~ exp(-[stiffness (w - r)^2 / 2 + ridge w^2 / 2] / temperature)` on the codebook.
"""

from math import erfc, exp, log, sqrt
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.quadrature import gaussian_rule

_NEGLIGIBLE = -45.0  # a level whose weight is exp(-45) of the largest is left out


class ChannelAverages(NamedTuple):
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
    levels = codebook.levels.copy()
    return channel_averages(levels, is_even(levels), stiffness, variance, ridge, temperature)


def ground_averages(codebook: Codebook, shrinkage: float, variance: float) -> tuple[float, float]:
    """Slope E[dw*/dr] and mean square E[w*^2] at temperature zero, in closed form.

    `w*` is the level nearest to `r / shrinkage`, where shrinkage is 1 + ridge / stiffness.
    """
    return staircase_averages(codebook.levels.copy(), shrinkage, variance)


def is_even(levels: NDArray) -> bool:
    """Whether the levels are symmetric about zero: then all averages are of even functions."""
    return bool((levels == -levels[::-1]).all())


@numba.njit(cache=True, nogil=True)
def channel_averages(levels, even, stiffness, variance, ridge, temperature):
    """`thermal_averages`, compiled."""
    curvature = stiffness + ridge
    centres, sizes = transitions(levels, stiffness, ridge, temperature)
    nodes, weights = gaussian_rule(sqrt(variance), centres, sizes, even)
    nearest = 0
    covariance = mean_square = squared_slope = entropy = 0.0
    covariance_by_a = covariance_by_v = mean_square_by_a = mean_square_by_v = 0.0
    for field, weight in zip(nodes, weights):  # noqa: B905, `strict` does not compile
        target = field * (stiffness / curvature)
        while nearest < levels.size - 1 and 2 * target > levels[nearest] + levels[nearest + 1]:
            nearest += 1
        first, second, third, shannon = _law(levels, nearest, target, curvature / temperature)
        centre = levels[nearest]
        mean = centre + first
        spread = second - first**2
        response = stiffness / temperature * spread  # d<w>/dr
        covariance_with_square = 2 * centre * spread + third - first * second
        by_stiffness = (field * spread - covariance_with_square / 2) / temperature
        covariance += weight * field * mean
        mean_square += weight * mean**2
        squared_slope += weight * response**2
        entropy += weight * shannon
        covariance_by_a += weight * field * by_stiffness
        mean_square_by_a += weight * 2 * mean * by_stiffness
        covariance_by_v += weight * field * (mean + field * response)
        mean_square_by_v += weight * mean * field * response
    slope = covariance / variance
    return ChannelAverages(
        slope,
        mean_square,
        squared_slope,
        entropy,
        covariance_by_a / variance,
        (covariance_by_v / (2 * variance) - slope) / variance,
        mean_square_by_a,
        mean_square_by_v / variance,
    )


@numba.njit(cache=True, nogil=True)
def transitions(levels, stiffness, ridge, temperature):
    """Fields at which the law changes from one level to the next, and panels narrow enough there.

    The change takes `temperature / (stiffness * spacing)`. Where many levels take part at once,
    those of even spacing act as a smooth continuum; where the spacing changes, and at the two
    ends, the law changes over the posterior width.
    """
    curvature = stiffness + ridge
    posterior_width = sqrt(temperature * curvature) / stiffness
    centres, sizes = np.empty(levels.size - 1), np.empty(levels.size - 1)
    for k in range(centres.size):
        below, above = levels[k], levels[k + 1]
        centres[k] = (below / 2 + above / 2) * (curvature / stiffness)
        sizes[k] = 3 * temperature / (stiffness * (above - below))
        inside = 0 < k < centres.size - 1
        if not (inside and _is_even_row(levels[k - 1 : k + 3])):
            sizes[k] = min(sizes[k], 3 * posterior_width)
    return centres, sizes


@numba.njit(cache=True, nogil=True)
def _is_even_row(row):
    """Whether four levels are equally far apart."""
    spacing = row[2] - row[1]
    unevenness = max(abs(row[1] - row[0] - spacing), abs(row[3] - row[2] - spacing))
    return unevenness < 1e-9 * spacing


@numba.njit(cache=True, nogil=True)
def _law(levels, nearest, target, sharpness):
    """First three moments of level minus nearest level, and Shannon entropy.

    The weight of a level is `exp(-sharpness (level - target)^2 / 2)`, relative to the nearest one,
    so that nothing large is subtracted from anything large. It falls away from there.
    """
    total, first, second, third, log_weight = 1.0, 0.0, 0.0, 0.0, 0.0
    distance = target - levels[nearest]
    for way in (1, -1):
        k = nearest + way
        while 0 <= k < levels.size:
            offset = levels[k] - levels[nearest]
            exponent = sharpness * offset * (distance - offset / 2)
            if exponent < _NEGLIGIBLE:
                break
            weight = exp(exponent)
            total += weight
            first += weight * offset
            second += weight * offset * offset
            third += weight * offset * offset * offset
            log_weight += weight * exponent
            k += way
    shannon = log(total) - log_weight / total
    return first / total, second / total, third / total, shannon


@numba.njit(cache=True, nogil=True)
def staircase_averages(levels, shrinkage, variance):
    """`ground_averages`, compiled."""
    deviation = sqrt(variance)
    slope, mean_square = 0.0, 0.0
    # Added up outwards from the level of a vanishing field: no difference of near-equal tails.
    home = levels[0]
    for k in range(levels.size - 1):
        cut = (levels[k] / 2 + levels[k + 1] / 2) * (shrinkage / deviation)
        gain = levels[k + 1] ** 2 - levels[k] ** 2
        if cut < 0:
            home, gain = levels[k + 1], -gain
        slope += (levels[k + 1] - levels[k]) * exp(-0.5 * cut**2)
        mean_square += gain * erfc(abs(cut) / sqrt(2.0)) / 2
    return slope / (sqrt(2 * np.pi) * deviation), home**2 + mean_square
