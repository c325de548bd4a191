"""Which range a few-bit layer should have: the width of least generalization error.

Wide levels fit the label noise, narrow ones cannot reach the teacher: in between lies the best
half range. It depends on the data, and is not the range that represents the weights best.
Derivations and limits: the book's chapter "Optimal width".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, elementwise

from qgen_lab.codebooks import Codebook, check_bits, families, uniform
from qgen_lab.theory.problem import TeacherStudent, checked_number
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
    family = checked_family(codebook)
    problem = TeacherStudent(
        family(bits, 1.0), alpha, noise_variance, ridge, temperature, signal_variance
    )
    minimum = least_over_widths(
        lambda widths: gibbs_errors(at_widths(problem, family, bits, widths)),
        search_range(problem, search),
        checked_number("tolerance", tolerance, positive=True),
    )
    solution = solve_rs(replace(problem, codebook=family(bits, minimum.width)))
    return OptimalWidth(
        bits=check_bits(bits),
        **minimum._asdict(),
        phase=solution.phase,
        residual=solution.residual,
    )


def gibbs_errors(problems: Sequence[TeacherStudent]) -> NDArray[np.float64]:
    """Generalization error of a weight vector drawn from the Gibbs measure; NaN if unsolved."""
    solution = solve_rs(problems)
    return np.where(solution.converged, solution.gen_error, np.nan)


def at_widths(
    problem: TeacherStudent, family: Family, bits: int, widths: NDArray
) -> list[TeacherStudent]:
    """The same problem on codebooks of several widths."""
    return [replace(problem, codebook=family(bits, float(width))) for width in widths]


def checked_family(codebook: Family | str) -> Family:
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


def search_range(
    problem: TeacherStudent, search: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Ends of the range of widths that is asked for, else one wide enough for any optimum."""
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


class LeastError(NamedTuple):
    """A minimum over widths; fields as in `OptimalWidth`."""

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


def least_over_widths(
    error: Callable[[NDArray], NDArray], searched: tuple[float, float], tolerance: float
) -> LeastError:
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
    return LeastError(
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
