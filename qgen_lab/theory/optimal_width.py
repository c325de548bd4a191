"""Which range a few-bit layer should have: the width of least generalization error.

Wide levels fit the label noise, narrow ones cannot reach the teacher: in between lies the best
half range. It depends on the data, and is not the range that represents the weights best.
Derivations and limits: the book's chapter "Optimal width".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import quad
from scipy.optimize import brentq, elementwise
from scipy.special import ndtr

from qgen_lab.codebooks import Codebook, check_bits, families, uniform
from qgen_lab.theory.problem import TeacherStudent, checked_number
from qgen_lab.theory.ridge import ridge_solution
from qgen_lab.theory.scalar_channel import ground_averages
from qgen_lab.theory.stability import at_temperature, zero_entropy_temperature
from qgen_lab.theory.typical_case import solve_rs

Family = Callable[[int, float], Codebook]

_RATIO = 1.08  # of neighbouring widths in the first look
_SAME = 1e-6  # relative: errors closer than this are equal, and the narrower width is taken


@dataclass(frozen=True)
class OptimalWidth:
    """The width of least generalization error for one problem.

    Attributes
    ----------
    bits : int
        As asked for.
    width : float
        Half range of the best codebook, in the units of the teacher's weights.
    gen_error : float
        Generalization error there, of a weight vector drawn from the Gibbs measure.
    band : tuple of float
        Ends of the interval around `width` in which the error is at most `1 + tolerance` times
        the least; cut at the ends of `searched`.
    rivals : tuple of tuple
        `(width, gen_error)` of the other local minima, the best one first.
    searched : tuple of float
        Ends of the range of widths that was searched.
    at_edge : bool
        Whether the least error was found at an end of that range: then it is no optimum.
    phase : str
        Phase of the solution at the width, as in `RSSolution`.
    converged : bool
        Whether every solution that was looked at converged.
    iterations : int
        Number of widths at which the equations were solved.
    residual : float
        Residual of the solution at the width.
    """

    bits: int
    width: float
    gen_error: float
    band: tuple[float, float]
    rivals: tuple[tuple[float, float], ...]
    searched: tuple[float, float]
    at_edge: bool
    phase: str
    converged: bool
    iterations: int
    residual: float

    def __repr__(self) -> str:
        return (
            f"OptimalWidth(bits={self.bits}, width={self.width:.4g},"
            f" gen_error={self.gen_error:.4g}, band=({self.band[0]:.4g}, {self.band[1]:.4g}),"
            f" phase={self.phase!r}, at_edge={self.at_edge}, converged={self.converged})"
        )


def optimal_width(
    bits: int,
    alpha: float,
    noise_variance: float = 0.1,
    ridge: float = 0.0,
    temperature: float = 0.0,
    signal_variance: float = 1.0,
    codebook: Family | str = uniform,
    tolerance: float = 0.05,
    search: tuple[float, float] | None = None,
) -> OptimalWidth:
    """Find the width of least generalization error, by replica symmetry.

    Parameters
    ----------
    bits : int
        From 1 to 16.
    alpha, noise_variance, ridge, temperature, signal_variance : float
        As in `TeacherStudent`.
    codebook : callable or str
        The family of codebooks: a function of bits and width to a `Codebook` whose outermost
        level lies at the width, or a name in `qgen_lab.codebooks.families`.
    tolerance : float
        The error may be larger by this share of the least within `band`.
    search : tuple of float, optional
        Narrowest and widest width to look at. Unless given, wide enough for any optimum at
        temperature 0.

    Returns
    -------
    OptimalWidth

    Raises
    ------
    TypeError, ValueError
        As `TeacherStudent` and the family; if `codebook` is no family, `tolerance` is not above 0,
        or `search` is not an ascending pair of positive numbers.

    Notes
    -----
    The minimum is global on a grid whose neighbours differ by a factor of 1.08, then refined.
    The error can have several minima, and above temperature 0 it can jump, where the solution
    that cooling reaches changes to another branch. Of equal minima the narrowest is taken.
    """
    family = _family(codebook)
    problem = TeacherStudent(
        family(bits, 1.0), alpha, noise_variance, ridge, temperature, signal_variance
    )
    minimum = _minimum(
        lambda widths: _gibbs_errors(_at_widths(problem, family, bits, widths)),
        _searched(problem, search),
        checked_number("tolerance", tolerance, positive=True),
    )
    solution = solve_rs(replace(problem, codebook=family(bits, minimum.width)))
    return OptimalWidth(
        bits=check_bits(bits),
        **minimum._asdict(),
        phase=solution.phase,
        residual=solution.residual,
    )


def _gibbs_errors(problems: Sequence[TeacherStudent]) -> NDArray[np.float64]:
    """Generalization error of a weight vector drawn from the Gibbs measure; NaN if unsolved."""
    solution = solve_rs(problems)
    return np.where(solution.converged, solution.gen_error, np.nan)


def _at_widths(
    problem: TeacherStudent, family: Family, bits: int, widths: NDArray
) -> list[TeacherStudent]:
    return [replace(problem, codebook=family(bits, float(width))) for width in widths]


def _family(codebook: Family | str) -> Family:
    """The family meant; raises unless it reaches to the width that it is asked for."""
    if isinstance(codebook, str):
        if codebook not in families:
            raise ValueError(f"codebook = {codebook!r}: give one of {sorted(families)}")
        return families[codebook]
    if not callable(codebook):
        raise TypeError(
            f"codebook is a {type(codebook).__name__}: give a function of (bits, width), or one of"
            f" {sorted(families)}"
        )

    def checked(bits: int, width: float) -> Codebook:
        made = codebook(bits, width)
        if not isinstance(made, Codebook):
            raise TypeError(f"codebook(bits, width) gave a {type(made).__name__}, not a Codebook")
        outermost = np.abs(made.levels).max()
        if not np.isclose(outermost, width, rtol=1e-9):
            raise ValueError(
                f"codebook(bits, {width:.6g}) reaches to {outermost:.6g}: its outermost level has"
                " to lie at the width; Codebook.with_width puts it there"
            )
        return made

    return checked


def _searched(problem: TeacherStudent, search: tuple[float, float] | None) -> tuple[float, float]:
    if search is None:
        # The standard deviation of the field that a weight on narrow levels sees.
        rho = problem.signal_variance
        field = np.sqrt(rho + (rho + problem.noise_variance) / problem.alpha)
        return 0.02 * rho / field, 12 * field
    lower, upper = (checked_number("search", end, positive=True) for end in search)
    if lower >= upper:
        raise ValueError(f"search = {search!r}: give the narrower width first")
    return lower, upper


# --- a minimum over widths ----------------------------------------------------------------------


class _Minimum(NamedTuple):
    """Fields as in `OptimalWidth`."""

    width: float
    gen_error: float
    band: tuple[float, float]
    rivals: tuple[tuple[float, float], ...]
    searched: tuple[float, float]
    at_edge: bool
    converged: bool
    iterations: int


class _Curve:
    """Error over the logarithm of the width; infinite where there is no solution."""

    def __init__(self, error: Callable[[NDArray], NDArray]):
        self.error = error
        self.evaluations = 0
        self.complete = True

    def __call__(self, log_width: ArrayLike) -> NDArray:
        errors = self.error(np.exp(np.atleast_1d(log_width)))
        missing = np.isnan(errors)
        self.evaluations += errors.size
        self.complete &= not missing.any()
        return np.where(missing, np.inf, errors)


def _minimum(
    error: Callable[[NDArray], NDArray], searched: tuple[float, float], tolerance: float
) -> _Minimum:
    """Global minimum of `error` over widths: a first look on a grid, then refinement.

    Parameters
    ----------
    error : callable
        Errors at an array of widths; NaN where there is none.
    searched : tuple of float
        Ends of the range.
    tolerance : float
        Relative, for the band.
    """
    curve = _Curve(error)
    lower, upper = np.log(searched)
    grid = np.linspace(lower, upper, max(int((upper - lower) / np.log(_RATIO)) + 2, 8))
    values = curve(grid)
    falls = values[1:] < values[:-1]
    inner = np.flatnonzero(falls[:-1] & ~falls[1:]) + 1
    ends = [k for k, least in ((0, not falls[0]), (grid.size - 1, falls[-1])) if least]
    refined = elementwise.find_minimum(
        curve, (grid[inner - 1], grid[inner], grid[inner + 1]), tolerances=_FINE
    )
    # Where refinement ran into a width without a solution, the point of the grid stays.
    better = refined.f_x < values[inner]
    places = np.append(np.where(better, refined.x, grid[inner]), grid[ends])
    errors = np.append(np.where(better, refined.f_x, values[inner]), values[ends])
    order = np.argsort(errors, kind="stable")
    equal = order[errors[order] <= errors[order[0]] * (1 + _SAME)]
    best = equal[np.argmin(places[equal])]
    band = _band(curve, grid, values, places[best], (1 + tolerance) * errors[best])
    others = [k for k in order if k != best and k < inner.size]
    return _Minimum(
        width=float(np.exp(places[best])),
        gen_error=float(errors[best]),
        band=band,
        rivals=tuple((float(np.exp(places[k])), float(errors[k])) for k in others),
        searched=(float(searched[0]), float(searched[1])),
        at_edge=bool(best >= inner.size),
        converged=curve.complete,
        iterations=curve.evaluations,
    )


_FINE = {"xatol": 1e-7, "xrtol": 0.0, "fatol": 0.0, "frtol": 0.0}


def _band(
    curve: _Curve, grid: NDArray, values: NDArray, best: float, most: float
) -> tuple[float, float]:
    """Widths on either side of the best at which the error first exceeds `most`."""

    def excess(log_width: float) -> float:
        return min(curve(log_width)[0], _HUGE) - most

    lower, upper = grid[0], grid[-1]
    below = np.flatnonzero((grid < best) & (values > most))
    if below.size:
        near = min(grid[below[-1] + 1], best)
        lower = brentq(excess, grid[below[-1]], near, xtol=1e-7)
    above = np.flatnonzero((grid > best) & (values > most))
    if above.size:
        near = max(grid[above[0] - 1], best)
        upper = brentq(excess, near, grid[above[0]], xtol=1e-7)
    return float(np.exp(lower)), float(np.exp(upper))


_HUGE = 1e300  # stands for infinity where differences are taken


# --- a recommendation for a layer ---------------------------------------------------------------

# What is put to use, by name: functions of problems to the generalization errors of it.
deployments: dict[str, Callable[[Sequence[TeacherStudent]], NDArray[np.float64]]] = {
    "ground state": _gibbs_errors,
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
    bits : int or ndarray
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
            f"WidthRecommendation(bits={self.bits}, width={self.width:.4g}"
            f" ({self.band_lower:.4g} to {self.band_upper:.4g}), step_size={self.step_size:.4g},"
            f" gen_error={self.gen_error:.4g}, trusted={self.trusted})"
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
        What is put to use, a name in `deployments`. "ground state": the best fit on the codebook.
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
    At temperature 0 replica symmetry is unstable for every codebook. Down to a temperature that
    shrinks with the levels' spacing it is sound, and the error there (`gen_error_at_freezing`) is
    the better guess for a ground state; a caveat says where the two differ by more than a tenth.
    The theory has nothing to say on correlated inputs, and for the last iterate of training or
    rounded full-precision weights other widths are best.
    """
    if deployed not in deployments:
        raise ValueError(f"deployed = {deployed!r}: give one of {sorted(deployments)}")
    layer = _Layer.of(weights, n_weights)
    problem = TeacherStudent(uniform(1, 1.0), alpha, noise_variance, ridge)
    tolerance = checked_number("tolerance", tolerance, positive=True)
    ask = _Question(problem, layer, _family(codebook), deployed, tolerance)
    if np.ndim(bits) == 0:
        return ask.recommend(bits)
    rows = [ask.recommend(each) for each in bits]
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


def _largest_of(n: int) -> float:
    """Expected largest magnitude of `n` standard Gaussian weights."""
    if n != int(n) or n < 1:
        raise ValueError(f"n_weights = {n!r}: give a whole number, at least 1")
    return quad(lambda x: -np.expm1(n * np.log1p(-2 * ndtr(-x))), 0, 40, limit=200)[0]


class _Question(NamedTuple):
    """All but the number of bits."""

    problem: TeacherStudent  # the signal's variance is 1
    layer: _Layer
    family: Family
    deployed: str
    tolerance: float

    def errors(self, bits: int, widths: NDArray) -> NDArray:
        """Of what is deployed; widths in units of the signal's standard deviation."""
        return deployments[self.deployed](_at_widths(self.problem, self.family, bits, widths))

    def recommend(self, bits: int) -> WidthRecommendation:
        problem, layer = self.problem, self.layer
        twin = ridge_solution(problem.alpha, problem.noise_variance, problem.ridge)
        if not np.isfinite(twin.self_overlap):
            raise ValueError(
                "alpha = 1 with ridge = 0: full-precision weights diverge there, so their spread"
                " says nothing of the signal's; give the ridge that they were trained with"
            )
        signal_std = layer.std / np.sqrt(twin.self_overlap)
        best = _minimum(
            lambda widths: self.errors(bits, widths), _searched(problem, None), self.tolerance
        )
        usual = np.array(
            [
                layer.std * _mse_width(self.family, bits),
                layer.largest,
                _lsq_width(bits, layer.mean_magnitude),
            ]
        )
        mse_error, min_max_error, lsq_error = self.errors(bits, usual / signal_std)
        chosen = replace(problem, codebook=self.family(bits, best.width))
        frozen = _error_at_freezing(chosen) if self.deployed == "ground state" else np.nan
        spacing = chosen.codebook.spacing
        even = np.ptp(spacing) < 1e-9 * spacing.max()
        return WidthRecommendation(
            bits=check_bits(bits),
            width=best.width * signal_std,
            step_size=float(spacing[0] * signal_std) if even else np.nan,
            band_lower=best.band[0] * signal_std,
            band_upper=best.band[1] * signal_std,
            width_per_weight_std=best.width * signal_std / layer.std,
            width_per_signal_std=best.width,
            gen_error=best.gen_error,
            gen_error_at_freezing=frozen,
            full_precision_gen_error=twin.gen_error,
            mse_width=float(usual[0]),
            mse_gen_error=float(mse_error),
            min_max_width=float(usual[1]),
            min_max_gen_error=float(min_max_error),
            lsq_width=float(usual[2]),
            lsq_gen_error=float(lsq_error),
            caveats=layer.caveats + self.caveats(best, chosen, frozen),
        )

    def caveats(self, best: _Minimum, chosen: TeacherStudent, frozen: float) -> tuple[str, ...]:
        """What the solution itself says against its figures."""
        said = []
        if not best.converged:
            said.append("some widths have no solution")
        if best.at_edge:
            said.append(f"the error is least at an end of the range searched, {best.searched}")
        if best.gen_error > 1 - _OFF:
            said.append("the error is close to the signal's variance: hardly anything is learned")
        for width, error in best.rivals:
            if error <= best.gen_error * (1 + self.tolerance) and not (
                best.band[0] <= width <= best.band[1]
            ):
                said.append(
                    f"another width, {width / best.width:.2g} times this one, is as good within"
                    f" {self.tolerance:.0%}"
                )
        if self.deployed == "ground state":
            if np.isnan(frozen):
                said.append(
                    "below the interpolation threshold: the answer is that of a vanishing ridge,"
                    " and replica symmetry is far off"
                )
            elif not abs(best.gen_error / frozen - 1) < _OFF:
                said.append(
                    f"replica symmetry is unstable here: {frozen:.3g} where it last holds, against"
                    f" {best.gen_error:.3g} at temperature 0"
                )
        return tuple(said)


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


def _mse_width(family: Family, bits: int) -> float:
    """Width of least mean squared rounding error for standard Gaussian weights."""

    def error(widths: NDArray) -> NDArray:
        figures = [ground_averages(family(bits, float(w)), 1.0, 1.0) for w in widths]
        return np.array([1 - 2 * slope + mean_square for slope, mean_square in figures])

    return _minimum(error, (0.02, 20.0), 0.05).width


def _lsq_width(bits: int, mean_magnitude: float) -> float:
    """Half the distance of the outermost levels of LSQ's grid at its first step."""
    if check_bits(bits) == 1:
        return mean_magnitude  # levels at plus and minus the step
    return 2 * mean_magnitude / np.sqrt(2 ** (bits - 1) - 1) * (2**bits - 1) / 2
