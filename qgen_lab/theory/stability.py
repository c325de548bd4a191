"""Where the replica-symmetric answer can be trusted: three ways to draw the line.

The replicon and the entropy of the solution that cooling reaches turn negative at a temperature;
message passing at temperature zero never quite settles. Derivations: the book's chapter "Phase
diagram".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, elementwise

from qgen_lab.theory.problem import TeacherStudent
from qgen_lab.theory.typical_case import RSSolution, solve_rs

Problems = TeacherStudent | Sequence[TeacherStudent]
Field = Callable[[NDArray, NDArray], NDArray]  # its values at points, each of a numbered line

# Ladder of temperatures on the way down to a change of sign, in units of the first: close together
# where replica symmetry breaks as a rule, then in great strides, for an entropy that falls like
# a small multiple of log T.
_LADDER = np.concatenate([2.0 ** -np.arange(0, 24, 0.5), 2.0**-24 * 1e-3 ** np.arange(80)])
_BLOCK = 8  # rungs that are solved together
_DIVERGED = 1e6  # a susceptibility that will grow for ever on the way down
_JUMP = 1e-6  # a field that is larger where its sign changes jumps there


def replicon(problem: Problems, branch: str | None = None) -> float | NDArray[np.float64]:
    """Stability against replica symmetry breaking, stable if positive.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several.
    branch : {None, "cooled", "heated"}
        As in `solve_rs`.

    Returns
    -------
    float or ndarray
        `1 - E[(d<w>/dr)^2] / alpha`, minus infinity at temperature 0 where the susceptibility is
        finite; the field `replicon` of the solution.
    """
    return solve_rs(problem, branch).replicon


# --- temperatures at which a field turns negative -----------------------------------------------


def at_temperature(problem: Problems) -> float | NDArray[np.float64]:
    """The highest temperature at which the replicon turns negative on the way down.

    The solution is followed by cooling. Replica symmetry is unstable just below that temperature;
    further down it may become stable again.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several; their temperature plays no part.

    Returns
    -------
    float or ndarray
        To a relative 1e-10; the temperature of the jump where the branch ends and the replicon
        jumps over zero. NaN where the replicon stays positive at every temperature, as it can
        where the susceptibility diverges on the way down.

    Raises
    ------
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.
    RuntimeError
        If the equations do not converge at a temperature that is needed.
    """
    return _highest_zero(problem, "replicon")


def zero_entropy_temperature(problem: Problems) -> float | NDArray[np.float64]:
    """The highest temperature at which the entropy turns negative on the way down.

    Discrete weights cannot have a negative entropy: replica symmetry fails there at the latest,
    whatever the replicon says. Arguments, returns and errors as in `at_temperature`; there is
    always such a temperature, so NaN only says that it is below what floats resolve.
    """
    return _highest_zero(problem, "entropy")


def _highest_zero(problem: Problems, criterion: str) -> float | NDArray[np.float64]:
    problems = as_list(problem)

    def at(temperatures: NDArray, index: NDArray) -> list[TeacherStudent]:
        pairs = zip(temperatures.tolist(), index, strict=True)
        return [replace(problems[i], temperature=T) for T, i in pairs]

    def field(temperatures: NDArray, index: NDArray) -> NDArray:
        return getattr(solve_all(at(temperatures, index)), criterion)

    ladder, values = _descend(problems, at, criterion)
    low, high = _brackets(ladder, values, field)
    result = np.full(len(problems), np.nan)
    found = np.flatnonzero(np.isfinite(low))
    result[found], _ = zeros_between(field, low[found], high[found], found)
    return like(problem, result)


def _descend(
    problems: list[TeacherStudent], at: Callable[..., list[TeacherStudent]], criterion: str
) -> tuple[NDArray, NDArray]:
    """Temperatures, falling, and the field there, until it turns negative."""
    first = np.array([_hot(problem) for problem in problems])
    ladder, values = np.empty((len(problems), 0)), np.empty((len(problems), 0))
    pending = np.arange(len(problems))
    for factors in _LADDER.reshape(-1, _BLOCK):
        rungs = first[:, None] * factors
        block = np.full(rungs.shape, np.nan)
        solution = solve_rs(at(rungs[pending].ravel(), np.repeat(pending, _BLOCK)))
        figures = np.where(solution.converged, getattr(solution, criterion), np.nan)
        block[pending] = figures.reshape(-1, _BLOCK)
        chi = solution.susceptibility.reshape(-1, _BLOCK)[:, -1]
        ladder, values = np.hstack([ladder, rungs]), np.hstack([values, block])
        over = (block[pending] < 0).any(axis=1)
        if criterion == "replicon":
            for k in np.flatnonzero(~over & (chi > _DIVERGED)):
                over[k] = _stays_infinite(problems[pending[k]])
        pending = pending[~over]
        if not pending.size:
            break
    # A rung without a figure repeats the one above.
    last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(values.shape[1])), axis=1)
    return np.take_along_axis(ladder, last, axis=1), np.take_along_axis(values, last, axis=1)


def _hot(problem: TeacherStudent) -> float:
    """A temperature above which the replicon and the entropy are positive.

    The variance of a weight is at most a quarter of the range squared; and where many levels take
    part they act as a continuum, in which the slope is at most one.
    """
    levels = problem.codebook.levels
    free = np.sqrt(problem.alpha) * (levels[-1] - levels[0]) ** 2 / 4
    return min(free, 4 * problem.alpha * problem.codebook.spacing.max() ** 2)


def _stays_infinite(problem: TeacherStudent) -> bool:
    """Whether a susceptibility that has grown very large on cooling has no limit.

    A ridge, however small, gives it one, unless it has no choice between weights of one norm.
    """
    ground = replace(problem, temperature=0.0)
    return problem.ridge == 0 or solve_rs(ground).phase == "interpolating"


def _brackets(ladder: NDArray, values: NDArray, field: Field) -> tuple[NDArray, NDArray]:
    """Ends of an interval in which the field turns negative, lower and upper; NaN for none.

    A dip between two rungs is looked for wherever a rung lies below both neighbours.
    """
    rows = np.arange(len(values))
    negative = values < 0
    there = np.where(negative.any(axis=1), negative.argmax(axis=1), 0)
    low, high = ladder[rows, there], ladder[rows, np.maximum(there - 1, 0)]
    low[~negative.any(axis=1)] = np.nan
    before, middle, after = values[:, :-2], values[:, 1:-1], values[:, 2:]
    row, rung = np.nonzero((middle > 0) & (before > middle) & (middle < after))
    if row.size:
        ends = ladder[row, rung + 2], ladder[row, rung + 1], ladder[row, rung]
        lowest = elementwise.find_minimum(field, ends, args=(row,))
        # From the coldest to the hottest, so that the hottest dip is the one that stays.
        for k in np.flatnonzero(lowest.f_x < 0)[::-1]:
            low[row[k]], high[row[k]] = lowest.x[k], ladder[row[k], rung[k]]
    return low, high


def zeros_between(
    field: Field, low: NDArray, high: NDArray, line: NDArray
) -> tuple[NDArray, NDArray]:
    """Where `field(points, line)` changes sign between `low` and `high`, and whether by a jump."""
    if not low.size:
        return low, np.zeros(0, bool)
    exact = {"xatol": 0.0, "xrtol": 1e-12, "fatol": 0.0, "frtol": 0.0}
    found = elementwise.find_root(field, (low, high), args=(line,), tolerances=exact)
    if not found.success.all():
        raise RuntimeError(f"no change of sign between {low} and {high}")
    return found.x, np.abs(found.f_x) > _JUMP


def solve_all(problems: list[TeacherStudent]) -> RSSolution:
    """`solve_rs`, where a figure that is not a solution will not do."""
    solution = solve_rs(problems)
    if not solution.converged.all():
        failed = problems[int(np.argmin(solution.converged))]
        raise RuntimeError(f"the replica-symmetric equations did not converge at {failed}")
    return solution


def as_list(problem: Problems) -> list[TeacherStudent]:
    """The problems as a list; raises TypeError for anything else."""
    problems = [problem] if isinstance(problem, TeacherStudent) else list(problem)
    if not all(isinstance(each, TeacherStudent) for each in problems):
        raise TypeError("problem: give a TeacherStudent or a sequence of them")
    return problems


def like(problem: Problems, values: NDArray) -> float | NDArray[np.float64]:
    """A number for one problem, the array for a sequence."""
    return float(values[0]) if isinstance(problem, TeacherStudent) else values


# --- temperature zero ---------------------------------------------------------------------------


def small_temperature_law(problem: Problems) -> float | NDArray[np.float64]:
    """`T_1` in `1 - replicon = T_1 / T` at low temperature: where it reaches one, to leading order.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several; their temperature plays no part.

    Returns
    -------
    float or ndarray
        `stiffness / (6 alpha) * sum_k spacing_k^3 p(t_k)` at the solution of temperature 0, where
        p is the density of the field and t_k are its thresholds; 0 where the susceptibility is
        infinite.

    Raises
    ------
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.

    Notes
    -----
    Near a threshold the weight is one of two levels, and the slope of its mean is
    `(stiffness spacing^2 / 4 T) sech^2(stiffness spacing (r - t) / 2 T)`, whose square integrates
    to `stiffness spacing^3 / 6 T`. Evenly spaced levels: `spacing^2 slope (1 - slope / alpha) / 6`.
    """
    return like(problem, np.array([_small_temperature_law(each) for each in as_list(problem)]))


def _small_temperature_law(problem: TeacherStudent) -> float:
    staircase = _Staircase.of(problem)
    if staircase is None:
        return 0.0
    jumps, density = problem.codebook.spacing**3, staircase.density()
    return float(staircase.stiffness / (6 * problem.alpha) * (jumps @ density))


def stationary_motion(problem: Problems) -> float | NDArray[np.float64]:
    """How much the weights keep moving in message passing at temperature zero.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several; their temperature plays no part.

    Returns
    -------
    float or ndarray
        Mean squared change of a weight in one iteration, `|w_{t+1} - w_t|^2 / N`, once its mean
        is stationary, for infinitely many weights. "Message passing settles" needs a tolerance,
        and holds where this number is below it. NaN where the susceptibility is infinite.

    Raises
    ------
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.

    Notes
    -----
    The fields of two successive iterations are Gaussian, of variance tau^2 each, and their mean
    squared difference is `v / alpha`. Write it as `4 tau^2 sin^2(angle / 2)`; then the weights
    that they give differ by

        psi(angle) = (1 / pi) int_0^angle sum_kl spacing_k spacing_l exp(
            -(t_k + t_l)^2 / (8 tau^2 cos^2(x / 2)) - (t_k - t_l)^2 / (8 tau^2 sin^2(x / 2))) dx

    and the motion is the `v = psi` above 0. For small v, psi goes like its root: every start,
    however small, grows.
    """
    return like(problem, np.array([_stationary_motion(each) for each in as_list(problem)]))


def _stationary_motion(problem: TeacherStudent) -> float:
    staircase = _Staircase.of(problem)
    if staircase is None:
        return np.nan
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def growth(start: float, end: float) -> float:
        half = (end - start) / 2
        return half * (weights @ staircase.motion_rate(start + half * (1 + nodes)))

    def difference(angle: float) -> float:
        return 4 * problem.alpha * staircase.variance * np.sin(angle / 2) ** 2

    # The angle if neighbouring thresholds did not know of each other: a scale for the panels.
    alone = staircase.motion_rate(np.zeros(1))[0] / (problem.alpha * staircase.variance)
    start, moved, end = 0.0, 0.0, min(1e-3 * alone, 1e-3)
    while end < np.pi and moved + growth(start, end) > difference(end):
        moved += growth(start, end)
        start, end = end, 1.4 * end
    end = min(end, np.pi)
    angle = brentq(
        lambda angle: moved + growth(start, angle) - difference(angle),
        start, end, xtol=1e-15 * end, rtol=1e-14,
    )  # fmt: skip
    return float(difference(angle))


@dataclass(frozen=True)
class _Staircase:
    """The response of a weight to its field at temperature zero: steps at the thresholds."""

    thresholds: NDArray
    heights: NDArray
    variance: float  # of the field
    stiffness: float

    @classmethod
    def of(cls, problem: TeacherStudent) -> "_Staircase | None":
        """The staircase at the solution, None if its susceptibility is infinite."""
        ground = solve_all([replace(problem, temperature=0.0)])
        if ground.phase[0] == "interpolating":
            return None
        rho, codebook = problem.signal_variance, problem.codebook
        stiffness = float(problem.alpha / (1 + ground.susceptibility[0]))
        error = rho + problem.noise_variance - 2 * ground.overlap[0] + ground.replica_overlap[0]
        return cls(
            thresholds=codebook.thresholds * (1 + problem.ridge / stiffness),
            heights=codebook.spacing,
            variance=float(rho + error / problem.alpha),
            stiffness=stiffness,
        )

    def density(self) -> NDArray:
        """Density of the field at the thresholds."""
        scaled = np.exp(-(self.thresholds**2) / (2 * self.variance))
        return scaled / np.sqrt(2 * np.pi * self.variance)

    def motion_rate(self, angle: NDArray) -> NDArray:
        """Growth with the angle of the mean squared difference of two weights."""
        apart = 8 * self.variance * np.sin(angle / 2)[:, None] ** 2
        together = 8 * self.variance * np.cos(angle / 2)[:, None] ** 2
        t, heights, total = self.thresholds, self.heights, np.zeros(angle.size)
        for k in range(t.size):  # pairs of thresholds, k apart
            left, right = t[: t.size - k], t[k:]
            pairs = heights[: t.size - k] * heights[k:] * (1 if k == 0 else 2)
            distance = (right - left) ** 2
            if k and distance.min() > 45 * apart.max():
                break
            exponent = (left + right) ** 2 / together
            total += np.exp(-exponent - (distance / apart if k else 0.0)) @ pairs
        return total / np.pi
