"""Which width to give a layer whose full-precision weights are at hand.

What the search over widths finds, in the units of those weights, beside the usual choices.
Assumptions and limits: the book's chapter "Optimal width".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import quad
from scipy.special import ndtr

from qgen_lab.codebooks import check_bits, uniform
from qgen_lab.theory.optimal_width import (
    Family,
    LeastError,
    at_widths,
    checked_family,
    gibbs_errors,
    least_over_widths,
    search_range,
)
from qgen_lab.theory.problem import TeacherStudent, checked_number
from qgen_lab.theory.ridge import ridge_solution
from qgen_lab.theory.scalar_channel import ground_averages
from qgen_lab.theory.stability import at_temperature, zero_entropy_temperature
from qgen_lab.theory.straight_through import straight_through
from qgen_lab.theory.typical_case import solve_rs


class Deployment(NamedTuple):
    """Weights that are put to use.

    Attributes
    ----------
    errors : callable
        Function of a sequence of problems to their generalization errors, NaN where there is no
        prediction.
    gap : str
        Why there may be none.
    """

    errors: Callable[[Sequence[TeacherStudent]], NDArray[np.float64]]
    gap: str = "the equations were not solved"


def _straight_through_errors(
    problems: Sequence[TeacherStudent], observable: str
) -> NDArray[np.float64]:
    limit = straight_through(problems)
    return np.where(limit.converged, getattr(limit, observable), np.nan)


def _rounded_ridge_errors(problems: Sequence[TeacherStudent]) -> NDArray[np.float64]:
    """Errors of ridge regression, with the problem's ridge, rounded to the nearest levels.

    The teacher's weight and the ridge solution's are jointly Gaussian.
    """
    errors = []
    for each in problems:
        rho = each.signal_variance
        trained = ridge_solution(each.alpha, each.noise_variance, each.ridge, rho)
        slope, mean_square = ground_averages(each.codebook, 1.0, trained.self_overlap)
        errors.append(rho - 2 * trained.overlap * slope + mean_square)
    return np.array(errors)


_NOT_UNIQUE = "below the box's interpolation threshold the average is not unique"

# What can be put to use, by name.
deployments: dict[str, Deployment] = {
    "ground state": Deployment(gibbs_errors),
    "last iterate": Deployment(
        partial(_straight_through_errors, observable="iterate_gen_error"), _NOT_UNIQUE
    ),
    "rounded average": Deployment(
        partial(_straight_through_errors, observable="rounded_gen_error"), _NOT_UNIQUE
    ),
    "rounded ridge": Deployment(_rounded_ridge_errors),
}

_OFF = 0.1  # relative: how far replica symmetry may be off before that is said


@dataclass(frozen=True)
class WidthRecommendation:
    """Which width to give a layer, and what the usual choices of it would cost.

    Numbers for one number of bits, arrays of shape (n,) for a sequence. Widths, steps and bands
    are in the units of the `weights` that were given. Errors are shares of the signal's variance,
    label noise not included.

    Attributes
    ----------
    bits, deployed : int and str, or ndarray
        As asked for.
    width, step_size : float or ndarray
        Half range of least predicted error, and distance of neighbouring levels there (NaN if they
        are not evenly spaced).
    band_lower, band_upper : float or ndarray
        Interval around `width` in which the error is within the tolerance of the least.
    width_per_weight_std, width_per_signal_std : float or ndarray
        The width in standard deviations of the trained full-precision weights, and of the signal.
    gen_error : float or ndarray
        Predicted error at the width, of what is deployed.
    gen_error_at_freezing : float or ndarray
        For the ground state, a check: the error at the lowest temperature above which replica
        symmetry is sound. Where it holds no further, little can change on cooling on, so a
        ground state comes close to it. NaN where there is no such temperature.
    full_precision_gen_error : float or ndarray
        Error of the full-precision weights.
    mse_width, mse_gen_error : float or ndarray
        The width of least mean squared rounding error for Gaussian weights, and its error.
    min_max_width, min_max_gen_error : float or ndarray
        The width that reaches the largest weight, and its error.
    lsq_width, lsq_gen_error : float or ndarray
        LSQ's first step as a width: half the distance of its outermost levels, and the error of
        the family's codebook at that width.
    caveats : tuple of str or ndarray
        What speaks against trusting the figures; empty if nothing does.
    """

    bits: int
    deployed: str
    width: float
    step_size: float
    band_lower: float
    band_upper: float
    width_per_weight_std: float
    width_per_signal_std: float
    gen_error: float
    gen_error_at_freezing: float
    full_precision_gen_error: float
    mse_width: float
    mse_gen_error: float
    min_max_width: float
    min_max_gen_error: float
    lsq_width: float
    lsq_gen_error: float
    caveats: tuple[str, ...]

    @property
    def trusted(self) -> bool | NDArray[np.bool_]:
        """Whether there are no caveats."""
        if np.ndim(self.width):
            return np.array([not each for each in self.caveats])
        return not self.caveats

    def to_frame(self) -> pd.DataFrame:
        """One row for each number of bits, one column a field."""
        single = not np.ndim(self.width)
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        frame = pd.DataFrame({k: [v] if single else list(v) for k, v in columns.items()})
        frame["caveats"] = frame["caveats"].map("; ".join)
        return frame

    def __repr__(self) -> str:
        if np.ndim(self.width):
            return f"WidthRecommendation({len(self.bits)} rows, {self.trusted.sum()} trusted)"
        return (
            f"WidthRecommendation(bits={self.bits}, deployed={self.deployed!r},"
            f" width={self.width:.4g} ({self.band_lower:.4g} to {self.band_upper:.4g}),"
            f" step_size={self.step_size:.4g}, gen_error={self.gen_error:.4g},"
            f" trusted={self.trusted})"
        )


def recommend_width(
    bits: int | Sequence[int],
    alpha: float,
    noise_variance: float = 0.1,
    ridge: float = 0.0,
    weights: ArrayLike = 1.0,
    n_weights: int | None = None,
    codebook: Family | str = uniform,
    deployed: str = "ground state",
    tolerance: float = 0.05,
) -> WidthRecommendation:
    """Recommend the width of a layer's codebook, beside the usual choices of it.

    The theory speaks of linear regression with independent inputs, Gaussian weights to be found
    and a penalty on the weights; for a layer of a network it is a first guess. It assumes that the
    full-precision weights at hand were trained on as many samples, with the same noise and ridge:
    their spread then tells how large the signal's is.

    Parameters
    ----------
    bits : int or sequence of int
        From 1 to 16.
    alpha : float
        Training samples per weight of one output: samples over fan-in for a linear layer.
    noise_variance : float
        Variance of the labels that no weights could explain, over the variance that the best ones
        do: `(1 - R^2) / R^2`.
    ridge : float
        Penalty `ridge |w|^2 / 2` beside half the squared error, for inputs of variance 1 / fan-in.
    weights : array_like
        The layer's trained full-precision weights; or only their standard deviation, a number.
        1 gives all widths in units of it. Spread and moments are taken about zero.
    n_weights : int, optional
        How many weights there are, for the largest of them. Taken from `weights` if that is an
        array, else 10,000 unless given.
    codebook : callable or str
        The family of codebooks, as in `optimal_width`; levels are taken to scale with the width.
    deployed : str
        What is put to use, a name in `deployments`: "ground state", the best fit on the codebook;
        "last iterate", the end of straight-through training at a rate that stays constant;
        "rounded average", the average of its weights over time, rounded to the nearest levels;
        "rounded ridge", the full-precision weights at hand, rounded to the nearest levels.
    tolerance : float
        The error may be larger by this share within the band.

    Returns
    -------
    WidthRecommendation
        Of numbers for one number of bits, of arrays for a sequence.

    Raises
    ------
    TypeError, ValueError
        As `optimal_width`; if `deployed` is unknown, `weights` is empty, zero or not finite,
        `n_weights` is below 1, or the full-precision weights would diverge (`alpha = 1` without
        a ridge).

    Notes
    -----
    "ground state": at temperature 0 replica symmetry is unstable for every codebook. Down to a
    temperature that shrinks with the levels' spacing it is sound, and the error there
    (`gen_error_at_freezing`) is the better guess; a caveat says where the two differ by more than a
    tenth. "last iterate" and "rounded average": small steps along the full gradient, with the
    same penalty on the quantized weights, see `straight_through`; an iterate after a cooldown of
    the rate has no closed form. "rounded ridge" is exact; with the ridge tuned to the noise,
    `ridge = noise_variance`, no weights on the codebook are expected to be better.

    The theory has nothing to say on correlated inputs.
    """
    if deployed not in deployments:
        raise ValueError(f"deployed = {deployed!r}: give one of {sorted(deployments)}")
    recommend = partial(
        _recommend,
        problem=TeacherStudent(uniform(1, 1.0), alpha, noise_variance, ridge),
        layer=_Layer.of(weights, n_weights),
        family=checked_family(codebook),
        deployed=deployed,
        tolerance=checked_number("tolerance", tolerance, positive=True),
    )
    if np.ndim(bits) == 0:
        return recommend(bits)
    rows = [recommend(each) for each in bits]
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(WidthRecommendation)}
    caveats = np.empty(len(rows), object)
    caveats[:] = columns.pop("caveats")
    return WidthRecommendation(**{k: np.array(v) for k, v in columns.items()}, caveats=caveats)


class _Layer(NamedTuple):
    """What is known of the full-precision weights, moments about zero."""

    std: float
    mean_magnitude: float
    largest: float
    caveats: tuple[str, ...]

    @classmethod
    def of(cls, weights: ArrayLike, n_weights: int | None) -> "_Layer":
        w = np.asarray(weights, dtype=np.float64)
        if w.ndim == 0:
            std = checked_number("weights", weights, positive=True)
            n = 10_000 if n_weights is None else n_weights
            return cls(std, std * np.sqrt(2 / np.pi), std * _largest_of(n), ())
        if w.size == 0 or not np.isfinite(w).all() or not w.any():
            raise ValueError("weights is empty, all zero or not finite: give trained weights")
        std = float(np.sqrt(np.mean(w**2)))
        kurtosis = np.mean((w / std) ** 4)
        caveats = []
        if abs(w.mean()) > 0.2 * std:
            caveats.append("the weights' mean is not small: the theory centres levels at zero")
        if abs(kurtosis - 3) > 1 + 5 * np.sqrt(24 / w.size):
            caveats.append(f"kurtosis {kurtosis:.1f}: the theory takes Gaussian weights, 3")
        return cls(std, float(np.abs(w).mean()), float(np.abs(w).max()), tuple(caveats))


def _recommend(
    bits: int,
    problem: TeacherStudent,
    layer: _Layer,
    family: Family,
    deployed: str,
    tolerance: float,
) -> WidthRecommendation:
    """For one number of bits. The problem's signal has variance 1, and is the unit inside."""
    full_precision = ridge_solution(problem.alpha, problem.noise_variance, problem.ridge)
    if not np.isfinite(full_precision.self_overlap):
        raise ValueError(
            "alpha = 1 with ridge = 0: full-precision weights diverge there, so their spread"
            " says nothing of the signal's; give the ridge that they were trained with"
        )
    unit = layer.std / np.sqrt(full_precision.self_overlap)

    def errors(widths: NDArray) -> NDArray:
        return deployments[deployed].errors(at_widths(problem, family, bits, widths))

    best = least_over_widths(errors, search_range(problem), tolerance)
    usual = {
        "mse": layer.std * _mse_width(family, bits),
        "min_max": layer.largest,
        "lsq": _lsq_width(bits, layer.mean_magnitude),
    }
    usual_errors = errors(np.array(list(usual.values())) / unit)
    chosen = replace(problem, codebook=family(bits, best.width))
    caveats = layer.caveats + _caveats(best, deployments[deployed].gap, tolerance)
    frozen = np.nan
    if deployed == "ground state":
        frozen = _error_at_freezing(chosen)
        caveats += _caveats_of_replica_symmetry(best.gen_error, frozen)
    spacing = chosen.codebook.spacing
    even = np.ptp(spacing) < 1e-9 * spacing.max()
    return WidthRecommendation(
        bits=check_bits(bits),
        deployed=deployed,
        width=best.width * unit,
        step_size=float(spacing[0] * unit) if even else np.nan,
        band_lower=best.band[0] * unit,
        band_upper=best.band[1] * unit,
        width_per_weight_std=best.width * unit / layer.std,
        width_per_signal_std=best.width,
        gen_error=best.gen_error,
        gen_error_at_freezing=frozen,
        full_precision_gen_error=full_precision.gen_error,
        **{f"{name}_width": float(width) for name, width in usual.items()},
        **{f"{name}_gen_error": float(e) for name, e in zip(usual, usual_errors, strict=True)},
        caveats=caveats,
    )


def _caveats(best: LeastError, gap: str, tolerance: float) -> tuple[str, ...]:
    """What the minimum itself says against its figures."""
    said = []
    if not best.converged:
        said.append(f"some widths are left out: {gap}")
    if best.at_edge:
        said.append(f"the error is least at an end of the range searched, {best.searched}")
    if best.gen_error > 1 - _OFF:
        said.append("the error is close to the signal's variance: hardly anything is learned")
    for width, error in best.rivals:
        as_good = error <= best.gen_error * (1 + tolerance)
        if as_good and not best.band[0] <= width <= best.band[1]:
            said.append(
                f"another width, {width / best.width:.2g} times this one, is as good within"
                f" {tolerance:.0%}"
            )
    return tuple(said)


def _caveats_of_replica_symmetry(error: float, frozen: float) -> tuple[str, ...]:
    if np.isnan(frozen):
        return (
            "below the interpolation threshold: the answer is that of a vanishing ridge, and"
            " replica symmetry is far off",
        )
    if abs(error / frozen - 1) < _OFF:
        return ()
    return (
        f"replica symmetry is unstable here: {frozen:.3g} where it last holds, against"
        f" {error:.3g} at temperature 0",
    )


def _error_at_freezing(problem: TeacherStudent) -> float:
    """Error at the temperature below which replica symmetry fails, by replicon or by entropy.

    NaN in the interpolating phase, of which the solution that cooling reaches knows nothing.
    """
    if solve_rs(problem).phase == "interpolating":
        return np.nan
    frozen = replace(problem, temperature=float(zero_entropy_temperature(problem)))
    solution = solve_rs(frozen)
    if solution.replicon < 0:  # the replicon came first
        solution = solve_rs(replace(problem, temperature=float(at_temperature(problem))))
    return solution.gen_error


def _largest_of(n: int) -> float:
    """Expected largest magnitude of `n` standard Gaussian weights."""
    if n != int(n) or n < 1:
        raise ValueError(f"n_weights = {n!r}: give a whole number, at least 1")
    return quad(lambda x: -np.expm1(n * np.log1p(-2 * ndtr(-x))), 0, 40, limit=200)[0]


def _mse_width(family: Family, bits: int) -> float:
    """Width of least mean squared rounding error for standard Gaussian weights."""

    def error(widths: NDArray) -> NDArray:
        figures = [ground_averages(family(bits, float(w)), 1.0, 1.0) for w in widths]
        return np.array([1 - 2 * slope + mean_square for slope, mean_square in figures])

    return least_over_widths(error, (0.02, 20.0), tolerance=0.05).width


def _lsq_width(bits: int, mean_magnitude: float) -> float:
    """Half the distance of the outermost levels of LSQ's grid at its first step."""
    if check_bits(bits) == 1:
        return mean_magnitude  # levels at plus and minus the step
    return 2 * mean_magnitude / np.sqrt(2 ** (bits - 1) - 1) * (2**bits - 1) / 2
