"""Approximate message passing: an algorithm for one instance, and the theory of its every step.

Each iteration turns the data into one field a weight, `field = mean + X' residual / alpha`, and
takes the mean of the weight's law in that field (`scalar_channel`) as the new estimate. The
residual keeps a memory of the last one, `residual = y - X mean + (slope / alpha) old residual`,
which makes the field look like the teacher's weight plus fresh Gaussian noise. State evolution
follows the size of that noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numba
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from qgen_lab.theory.problem import Instance, TeacherStudent
from qgen_lab.theory.scalar_channel import ground_averages, thermal_averages
from qgen_lab.theory.stability import stationary_motion
from qgen_lab.theory.typical_case import solve_rs

_NEGLIGIBLE = 45.0  # a level whose weight is exp(-45) of the largest is left out
_BLOCK = 1 << 20  # bytes of X that the processor's cache keeps between two products
_FEW = 6  # up to so many problems, vector products on a cached block beat matrix products
_HUGE = 1e100  # stands for an infinite susceptibility, which interpolation leads to
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@dataclass(frozen=True)
class Trajectory:
    """Order parameters iteration by iteration, arrays of shape (iterations,).

    The first entry is the start: every level equally likely. Names as in `RSSolution`, whose
    figures are reached where the iteration settles.

    Attributes
    ----------
    overlap, replica_overlap, self_overlap, susceptibility : ndarray
        Of the weights' means and variances.
    gen_error, gen_error_mean, train_error : ndarray
        The training error is what each sample believes: a mean residual of
        `residual / (1 + susceptibility)` and a variance of
        `temperature * susceptibility / (1 + susceptibility)`. Once the iteration has settled,
        the first is `y - X mean`.
    replicon : ndarray
        1 minus the factor by which the mean square of a small random change of the fields grows
        in an iteration; NaN at the start, minus infinity at temperature 0.
    """

    overlap: NDArray[np.float64]
    replica_overlap: NDArray[np.float64]
    self_overlap: NDArray[np.float64]
    susceptibility: NDArray[np.float64]
    gen_error: NDArray[np.float64]
    gen_error_mean: NDArray[np.float64]
    train_error: NDArray[np.float64]
    replicon: NDArray[np.float64]

    @classmethod
    def _of(cls, entries: list[tuple[float, ...]]) -> "Trajectory":
        return cls(*np.array(entries).T)

    def to_frame(self) -> pd.DataFrame:
        """One row an iteration, one column a field."""
        frame = pd.DataFrame({f.name: getattr(self, f.name) for f in fields(self)})
        return frame.rename_axis("iteration")

    def __repr__(self) -> str:
        return (
            f"Trajectory({len(self.overlap)} iterations, gen_error {self.gen_error[0]:.6g} to"
            f" {self.gen_error[-1]:.6g}, train_error {self.train_error[0]:.6g} to"
            f" {self.train_error[-1]:.6g})"
        )


@dataclass(frozen=True)
class AMPSolution:
    """Where message passing stopped on one instance.

    Attributes
    ----------
    mean, variance : ndarray, shape (N,), dtype of `X`
        Mean and variance of each weight's law; at temperature 0 the means are levels.
    trajectory : Trajectory
        Order parameters on the way; the last entry belongs to `mean` and `variance`.
    changes : ndarray, shape (iterations,)
        What the iteration changes at each entry of the trajectory: the root mean square change of
        the means, or the relative change of `1 + susceptibility` if that is larger.
    converged : bool
        Whether the last change is below the tolerance.
    """

    mean: NDArray[np.floating]
    variance: NDArray[np.floating]
    trajectory: Trajectory
    changes: NDArray[np.float64]
    converged: bool

    @property
    def iterations(self) -> int:
        """Iterations made."""
        return len(self.changes)

    @property
    def residual(self) -> float:
        """What one more undamped iteration changes at the point returned: the last of `changes`."""
        return float(self.changes[-1])

    def __repr__(self) -> str:
        return (
            f"AMPSolution({self.mean.size} weights, iterations={self.iterations},"
            f" gen_error={self.trajectory.gen_error[-1]:.6g},"
            f" train_error={self.trajectory.train_error[-1]:.6g},"
            f" residual={self.residual:.2g}, converged={self.converged})"
        )


def amp(
    instance: Instance,
    problem: TeacherStudent,
    start: ArrayLike | None = None,
    max_iterations: int = 1000,
    tolerance: float | None = None,
) -> AMPSolution:
    """Run approximate message passing on one instance.

    Parameters
    ----------
    instance : Instance
        `X` in double or single precision; all else follows its dtype.
    problem : TeacherStudent
        Codebook, ridge, temperature. `alpha` must be that of the instance; the variances of
        noise and signal play no part.
    start : array_like, shape (N,), optional
        Means to start from, by default the mean of the levels.
    max_iterations : int
        Most iterations, at least 1.
    tolerance : float, optional
        Change of an iteration below which it stops (see `AMPSolution.changes`); by default 1e-9,
        and 1e-5 in single precision.

    Returns
    -------
    AMPSolution
        `converged` is false where the iteration does not settle: where the replicon is negative,
        and at temperature 0 for every codebook.

    Raises
    ------
    ValueError
        If shapes do not match, `X`, `y` or the teacher hold NaN or infinity, `alpha` is not that of
        the instance, `max_iterations` is below 1 or `tolerance` not above 0.
    TypeError
        If `X` is neither float64 nor float32, or an argument has the wrong type.

    Notes
    -----
    Derived in the book's chapter "Message passing". Above temperature 0 an iteration starts with
    the susceptibility of levels that are equally likely, and comes to the branch of `solve_rs`
    reached by cooling; at 0 it starts with none, and comes to that of finite susceptibility.
    The slope is the mean over the instance's weights above temperature 0, and the Gaussian mean at
    the fields' mean square at 0, where the slope of a single weight is zero or infinite.
    """
    starts = None if start is None else np.asarray(start)[None]
    return amp_batch(instance, [problem], starts, max_iterations, tolerance)[0]


def amp_batch(
    instance: Instance,
    problems: Sequence[TeacherStudent],
    starts: ArrayLike | None = None,
    max_iterations: int = 1000,
    tolerance: float | None = None,
) -> list[AMPSolution]:
    """Run approximate message passing for several codebooks or temperatures on one instance.

    As `amp` for each problem, but with matrix-matrix products. Each problem stops on its own.

    Parameters
    ----------
    instance, max_iterations, tolerance
        As in `amp`.
    problems : sequence of TeacherStudent
        At least one.
    starts : array_like, shape (problems, N), optional
        Means to start from, one row a problem.

    Raises
    ------
    ValueError, TypeError
        As `amp`; and if `problems` is empty.
    """
    X, y, teacher = _checked_instance(instance)
    problems = _checked_problems(problems, X.shape)
    if max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}: give at least 1")
    tolerance = _TOLERANCE[X.dtype.name] if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"tolerance = {tolerance!r}: give a number > 0")

    sites = [_Sites(problem, X) for problem in problems]
    means = _start_means(problems, starts, X)
    residuals = np.zeros((len(sites), len(y)), X.dtype)
    done: dict[_Sites, AMPSolution] = {}
    running = list(sites)
    while running:
        memory = np.array([[site.slope / site.alpha] for site in running], X.dtype)
        residuals, shifts = _through_data(X, y, means, memory * residuals)
        unfinished = []
        for k, site in enumerate(running):
            site.record(means[k], residuals[k], teacher)
            mean, variance = site.answer(means[k], means[k] + shifts[k] / X.dtype.type(site.alpha))
            converged = site.changes[-1] <= tolerance
            if converged or len(site.changes) == max_iterations:
                done[site] = site.solution(means[k].copy(), converged)
            else:
                means[k], site.variance = mean, variance
                unfinished.append(k)
        if len(unfinished) < len(running):
            running = [running[k] for k in unfinished]
            means, residuals = means[unfinished], residuals[unfinished]
    return [done[site] for site in sites]


def _checked_instance(instance: Instance) -> tuple[NDArray, NDArray, NDArray]:
    """`X`, `y` in the dtype of `X`, and the teacher in double precision."""
    if not isinstance(instance, Instance):
        raise TypeError(f"instance is a {type(instance).__name__}: give an Instance")
    X, y, teacher = instance.X, instance.y, instance.teacher
    if X.ndim != 2 or y.shape != X.shape[:1] or teacher.shape != X.shape[1:] or X.size == 0:
        raise ValueError(
            f"instance has X of shape {X.shape}, y of shape {y.shape} and a teacher of shape"
            f" {teacher.shape}: give (M, N), (M,) and (N,), M and N at least 1"
        )
    if X.dtype.name not in _TOLERANCE:
        raise TypeError(f"X has dtype {X.dtype}: give float64 or float32")
    for name, array in (("X", X), ("y", y), ("teacher", teacher)):
        if not np.isfinite([array.min(), array.max()]).all():  # no copy; NaN passes through
            raise ValueError(f"{name} holds NaN or infinity: remove those samples or weights")
    return X, y.astype(X.dtype), teacher.astype(np.float64)


def _checked_problems(
    problems: Sequence[TeacherStudent], shape: tuple[int, int]
) -> list[TeacherStudent]:
    if isinstance(problems, TeacherStudent):
        raise TypeError("problems is one TeacherStudent: give a sequence of them, or call amp")
    problems = list(problems)
    if not problems:
        raise ValueError("problems is empty: give at least one TeacherStudent")
    for problem in problems:
        if not isinstance(problem, TeacherStudent):
            raise TypeError(f"{type(problem).__name__} among the problems: give TeacherStudent")
        if max(round(problem.alpha * shape[1]), 1) != shape[0]:
            raise ValueError(
                f"alpha = {problem.alpha} asks for {problem.alpha * shape[1]:g} samples of"
                f" {shape[1]} weights, the instance has {shape[0]}: give"
                f" alpha = {shape[0] / shape[1]:g} or another instance"
            )
    return problems


def _start_means(problems: list[TeacherStudent], starts: ArrayLike | None, X: NDArray) -> NDArray:
    shape = (len(problems), X.shape[1])
    if starts is None:
        flat = np.array([[problem.codebook.levels.mean()] for problem in problems])
        return np.broadcast_to(flat, shape).astype(X.dtype)
    starts = np.array(starts, X.dtype)
    if starts.shape != shape or not np.isfinite(starts).all():
        raise ValueError(f"start has shape {starts.shape}: give finite means of shape {shape}")
    return starts


def _through_data(
    X: NDArray, y: NDArray, means: NDArray, memory: NDArray
) -> tuple[NDArray, NDArray]:
    """Residuals `y - X mean + memory` and `X' residual`, one row a problem; `memory` is used up."""
    residuals = memory
    if len(means) > _FEW:
        residuals += y
        # OpenBLAS: the faster way round differs between precisions.
        residuals -= means @ X.T if X.dtype == np.float64 else (X @ means.T).T
        return residuals, residuals @ X
    shifts = np.zeros_like(means)
    rows = max(_BLOCK // X[0].nbytes, 1)
    for first in range(0, len(y), rows):
        # A residual depends on its own sample alone, so X is read from memory once for both.
        part = slice(first, first + rows)
        for mean, residual, shift in zip(means, residuals, shifts, strict=True):
            residual[part] += y[part] - X[part] @ mean
            shift += residual[part] @ X[part]
    return residuals, shifts


class _Sites:
    """The weights of one problem in their fields, and the record of what became of them."""

    def __init__(self, problem: TeacherStudent, X: NDArray):
        self.problem = problem
        self.alpha = len(X) / X.shape[1]
        self.slope, self.replicon = 0.0, np.nan
        self.spread, self.susceptibility = _start(problem)
        self.variance = np.full(X.shape[1], self.spread, X.dtype)
        self.entries: list[tuple[float, ...]] = []
        self.changes: list[float] = []

    def record(self, mean: NDArray, residual: NDArray, teacher: NDArray) -> None:
        mean = mean.astype(np.float64)
        entry = _entry(
            overlap=(teacher * mean).mean(),
            replica_overlap=np.square(mean).mean(),
            spread=self.spread,
            susceptibility=self.susceptibility,
            gen_error_mean=np.square(mean - teacher).mean(),
            noise=np.square(residual, dtype=np.float64).mean(),
            temperature=self.problem.temperature,
            replicon=self.replicon,
        )
        self.entries.append(entry)

    def answer(self, mean: NDArray, field: NDArray) -> tuple[NDArray, NDArray]:
        """Means and variances of the weights in the field; notes what they change."""
        codebook, ridge = self.problem.codebook, self.problem.ridge
        temperature, before = self.problem.temperature, self.susceptibility
        stiffness = self.alpha / (1 + before)
        if temperature > 0:
            new, variance = np.empty_like(field), np.empty_like(field)
            total, total_square = posterior(
                field, codebook.levels, codebook.thresholds, stiffness / temperature,
                ridge / temperature, new, variance,
            )  # fmt: skip
            self.spread = total / field.size
            self.slope = stiffness / temperature * self.spread
            squared_slope = (stiffness / temperature) ** 2 * total_square / field.size
            self.replicon = 1 - squared_slope / self.alpha
        else:
            shrinkage = 1 + ridge / stiffness
            new, variance = codebook.quantize(field / field.dtype.type(shrinkage)), self.variance
            # Labels of zero give fields of zero, and a slope that is infinite or nothing.
            mean_square = max(np.square(field, dtype=np.float64).mean(), 1e-200)
            self.slope = ground_averages(codebook, shrinkage, mean_square)[0]
            self.replicon = -np.inf
        self.susceptibility = min(self.slope / stiffness, _HUGE)
        change = np.sqrt(np.square(new - mean, dtype=np.float64).mean())
        drift = (1 + before) / (1 + self.susceptibility) - 1
        self.changes.append(float(max(change, abs(drift))))
        return new, variance

    def solution(self, mean: NDArray, converged: bool) -> AMPSolution:
        trajectory = Trajectory._of(self.entries)
        return AMPSolution(mean, self.variance, trajectory, np.array(self.changes), converged)


def _entry(
    overlap, replica_overlap, spread, susceptibility, gen_error_mean, noise, temperature, replicon
) -> tuple[float, ...]:
    """One entry of a trajectory, in the order of its fields; `noise` is the residual's square."""
    damping = 1 / (1 + susceptibility)
    train_error = noise * damping**2 + temperature * (1 - damping)
    return (
        overlap, replica_overlap, replica_overlap + spread, susceptibility,
        gen_error_mean + spread, gen_error_mean, train_error, replicon,
    )  # fmt: skip


def _start(problem: TeacherStudent) -> tuple[float, float]:
    """Variance and susceptibility of a weight before any data."""
    if problem.temperature == 0:
        return 0.0, 0.0
    spread = float(problem.codebook.levels.var())
    return spread, min(spread / problem.temperature, _HUGE)


@numba.njit(cache=True, nogil=True)
def posterior(fields, levels, thresholds, pull, shrink, means, variances):
    """Fill in mean and variance of the law `exp(-pull (w - field)^2 / 2 - shrink w^2 / 2)`.

    Returns the sums of the variances and of their squares. Only levels that weigh something are
    visited: outwards from the likeliest, whose weight is set to 1.
    """
    total_variance = total_square = 0.0
    curvature = pull + shrink
    for i in range(fields.size):
        field = np.float64(fields[i])
        home = np.searchsorted(thresholds, field * (pull / curvature))
        centre = levels[home]
        force = pull * (field - centre) - shrink * centre
        total, first, second = 1.0, 0.0, 0.0
        for step in (-1, 1):
            k = home + step
            while 0 <= k < levels.size:
                offset = levels[k] - centre
                exponent = offset * (force - curvature * offset / 2)
                if exponent < -_NEGLIGIBLE:
                    break
                weight = np.exp(exponent)
                total += weight
                first += weight * offset
                second += weight * offset * offset
                k += step
        shift = first / total
        variance = second / total - shift * shift
        means[i] = centre + shift
        variances[i] = variance
        total_variance += variance
        total_square += variance * variance
    return total_variance, total_square


def state_evolution(problem: TeacherStudent, iterations: int) -> Trajectory:
    """Order parameters of message passing iteration by iteration, for infinitely many weights.

    Parameters
    ----------
    problem : TeacherStudent
        The problem.
    iterations : int
        Number of entries, at least 1; the first is the start.

    Returns
    -------
    Trajectory
        Comparable entry by entry with that of `amp`.

    Raises
    ------
    ValueError
        If `iterations` is below 1.

    Notes
    -----
    One iteration is one pass of the replica-symmetric map, so what does not change any more is
    a solution of `solve_rs`. Derived in the book's chapter "Message passing".
    """
    if iterations < 1:
        raise ValueError(f"iterations = {iterations!r}: give at least 1")
    alpha, rho, temperature = problem.alpha, problem.signal_variance, problem.temperature
    overlap, replica_overlap, replicon = 0.0, float(problem.codebook.levels.mean()) ** 2, np.nan
    spread, susceptibility = _start(problem)
    entries = []
    for _ in range(iterations):
        gen_error_mean = rho - 2 * overlap + replica_overlap
        noise = problem.noise_variance + gen_error_mean
        entry = _entry(
            overlap, replica_overlap, spread, susceptibility, gen_error_mean, noise, temperature,
            replicon,
        )  # fmt: skip
        entries.append(entry)
        stiffness, variance = alpha / (1 + susceptibility), rho + noise / alpha
        if temperature > 0:
            here = thermal_averages(
                problem.codebook, stiffness, variance, problem.ridge, temperature
            )
            slope, replica_overlap = here.slope, here.mean_square
            replicon = 1 - here.squared_slope / alpha
        else:
            shrinkage = 1 + problem.ridge / stiffness
            slope, replica_overlap = ground_averages(problem.codebook, shrinkage, variance)
            replicon = -np.inf
        overlap, susceptibility = rho * slope, min(slope / stiffness, _HUGE)
        spread = temperature * susceptibility
    return Trajectory._of(entries)


def motion_at_temperature(problem: TeacherStudent) -> float:
    """Mean square change of a weight's mean in an iteration, once the order parameters are settled.

    Zero where message passing settles. Where the replicon is negative the order parameters settle
    all the same, and the weights keep moving; `stationary_motion` is the limit at temperature 0.

    Parameters
    ----------
    problem : TeacherStudent
        The problem; not in the interpolating phase.

    Returns
    -------
    float
        The largest motion that reproduces itself; 0 if there is none above 1e-10 rho.

    Raises
    ------
    ValueError
        If `solve_rs` finds no solution of finite susceptibility.

    Notes
    -----
    Fields of consecutive iterations are jointly Gaussian, and differ by the variance
    `motion / alpha`. Derived in the book's chapter "Message passing".
    """
    solution, alpha = solve_rs(problem), problem.alpha
    if not (solution.converged and np.isfinite(solution.susceptibility)):
        raise ValueError(
            f"susceptibility = {solution.susceptibility:g} of {problem}: the weights interpolate;"
            " give a larger alpha or ridge"
        )
    if problem.temperature == 0:
        return stationary_motion(problem)
    noise = problem.noise_variance + solution.gen_error_mean
    variance = problem.signal_variance + noise / alpha
    stiffness = alpha / (1 + solution.susceptibility)
    fields, answer = _answer_on_grid(problem, stiffness, np.sqrt(variance))
    transform = np.fft.rfft(answer)
    wave_numbers = 2 * np.pi * np.fft.rfftfreq(len(fields), fields[1] - fields[0])

    def excess(log_motion: float) -> float:
        # Half of the variance by which the two fields differ is private to each of them.
        private = np.exp(log_motion) / (2 * alpha)
        damped = transform * np.exp(-0.5 * private * wave_numbers**2)
        density = np.exp(-(fields**2) / (2 * (variance - private)))
        common = density @ np.fft.irfft(damped, len(fields)) ** 2 / density.sum()
        return np.log(2 * max(solution.replica_overlap - common, 1e-300)) - log_motion

    upper, bottom = np.log(2 * noise), np.log(1e-10 * problem.signal_variance)
    while upper > bottom:
        lower = upper - 0.5
        if excess(lower) > 0:
            return float(np.exp(brentq(excess, lower, upper, xtol=1e-10)))
        upper = lower
    return 0.0


def _answer_on_grid(
    problem: TeacherStudent, stiffness: float, deviation: float
) -> tuple[NDArray, NDArray]:
    """Evenly spaced fields, and the weight's mean there."""
    codebook, temperature = problem.codebook, problem.temperature
    reach = 20 * deviation  # so far out that the wrap-around of a Fourier transform is not seen
    step = min(deviation / 400, temperature / (4 * stiffness * codebook.spacing.max()))
    size = 1 << int(np.ceil(np.log2(2 * reach / step)))
    fields = np.linspace(-reach, reach, size, endpoint=False)
    mean, variance = np.empty(size), np.empty(size)
    posterior(
        fields, codebook.levels, codebook.thresholds, stiffness / temperature,
        problem.ridge / temperature, mean, variance,
    )  # fmt: skip
    return fields, mean
