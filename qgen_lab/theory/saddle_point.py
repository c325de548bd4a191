"""Self-consistency: the stiffness and noise that each weight sees, given that all others do.

Two unknowns fix everything: the stiffness `a = alpha / (1 + susceptibility)` and the noise per
weight `v = E / alpha` of its field. One pass of the replica-symmetric map takes

    a -> alpha a / (a + slope),   v -> (noise_variance + rho - 2 rho slope + mean_square) / alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.problem import TeacherStudent
from qgen_lab.theory.ridge import ridge_solution
from qgen_lab.theory.scalar_channel import ChannelAverages, ground_averages, thermal_averages

_TOLERANCE = 1e-9  # on the residual; the iterations go on to rounding where they can
_FLOOR = 1e-6  # in units of the teacher's variance: what counts as no noise at all
_LOG_TINY = -690.0  # exp of it is still a normal number


@dataclass(frozen=True)
class SaddlePoint:
    """A solution; stiffness 0 stands for an infinite susceptibility.

    `slope`, `mean_square`, `second_moment`, `squared_slope` and `entropy` are the averages of one
    weight there. `residual` is the largest relative change of `a` and `alpha v` in one more pass of
    the map (of the slope and `alpha v` where `a` is 0), with a floor under the noise.
    """

    stiffness: float
    noise: float
    slope: float
    mean_square: float
    second_moment: float
    squared_slope: float
    entropy: float
    iterations: int
    residual: float

    @property
    def converged(self) -> bool:
        """Whether one more pass of the map changes nothing; false for NaN."""
        return bool(self.residual <= _TOLERANCE)


class _Exhausted(Exception):
    """The budget of evaluations is spent."""


class _Budget:
    """Counts evaluations and stops at the limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.spent = 0

    def spend(self) -> None:
        if self.spent >= self.limit:
            raise _Exhausted
        self.spent += 1


def _noise(problem: TeacherStudent, slope: float, mean_square: float) -> float:
    """`v` after one pass of the map."""
    rho = problem.signal_variance
    squared_error = rho - 2 * rho * slope + mean_square
    return (problem.noise_variance + squared_error) / problem.alpha


def _drift(problem: TeacherStudent, slope: float, mean_square: float, noise: float) -> float:
    """Relative change of the noise in one pass of the map, as a difference of logarithms."""
    floor = _FLOOR * problem.signal_variance / problem.alpha
    return np.log((_noise(problem, slope, mean_square) + floor) / (noise + floor))


def _saddle_point(
    problem: TeacherStudent,
    stiffness: float,
    noise: float,
    slope: float,
    mean_square: float,
    iterations: int,
    *,
    variance: float = 0.0,
    squared_slope: float = np.inf,
    entropy: float = 0.0,
) -> SaddlePoint:
    pull = np.log((stiffness + slope) / problem.alpha)
    drift = _drift(problem, slope, mean_square, noise)
    return SaddlePoint(
        stiffness=float(stiffness),
        noise=float(noise),
        slope=float(slope),
        mean_square=float(mean_square),
        second_moment=float(mean_square + variance),
        squared_slope=float(squared_slope),
        entropy=float(entropy),
        iterations=iterations,
        residual=float(max(abs(pull), abs(drift))),
    )


def _largest_root(f: Callable[[float], float], top: float, bottom: float) -> float | None:
    """Root of `f`, negative at the top, found by walking down; None if the sign never changes."""
    upper = top
    while upper > bottom:
        lower = max(upper - 0.5, bottom)
        if f(lower) >= 0:
            return brentq(f, lower, upper, xtol=1e-15, rtol=1e-15)
        upper = lower
    return None


# --- temperature zero ---------------------------------------------------------------------------


class _Ground:
    """The equations at temperature zero, with the stiffness eliminated.

    At given noise `v`, `ridge / k + slope(1 + k, v)` falls with the extra shrinkage
    `k = ridge / stiffness`, and has to be `alpha`: a root by bracketing. What is left is one
    equation for `v`. Without a ridge `k = 0` where the susceptibility is finite; where it is not,
    the limit of a vanishing ridge keeps `k` finite while the stiffness goes to zero.
    """

    def __init__(self, problem: TeacherStudent, limit: int):
        self.problem = problem
        self.budget = _Budget(limit)
        self.vanishing_ridge = False
        self.point = (0.0, 1.0)  # extra shrinkage and noise of the last evaluation

    def averages(self, extra: float, noise: float) -> tuple[float, float]:
        self.budget.spend()
        self.point = (extra, noise)
        variance = self.problem.signal_variance + noise
        return ground_averages(self.problem.codebook, 1 + extra, variance)

    def extra_shrinkage(self, noise: float) -> float:
        alpha, ridge = self.problem.alpha, self.problem.ridge
        if ridge == 0 and not self.vanishing_ridge:
            return 0.0

        def excess(log_extra: float) -> float:
            extra = np.exp(log_extra)
            return ridge / extra + self.averages(extra, noise)[0] - alpha

        lower = np.log(ridge / alpha) if ridge > 0 else -40.0
        upper = max(lower, 0.0) + 50.0
        if excess(lower) <= 0:
            return float(np.exp(lower))
        if excess(upper) > 0:
            return float(np.exp(upper))
        return float(np.exp(brentq(excess, lower, upper, xtol=1e-15, rtol=1e-15)))

    def drift(self, log_noise: float) -> float:
        noise = np.exp(log_noise)
        slope, mean_square = self.averages(self.extra_shrinkage(noise), noise)
        return _drift(self.problem, slope, mean_square, noise)

    def solve(self) -> bool:
        """Leave the root with the largest noise in `point`; false if there is none."""
        problem, codebook = self.problem, self.problem.codebook
        outer = np.abs(codebook.levels).max()
        most = (np.sqrt(problem.signal_variance) + outer) ** 2 + problem.noise_variance
        least = problem.noise_variance / problem.alpha
        if problem.ridge > 0 or self.vanishing_ridge:
            # A threshold at zero keeps a slope that no shrinkage takes away.
            kept = codebook.spacing[codebook.thresholds == 0].sum() / problem.alpha
            least = max(least, kept**2 / (2 * np.pi) - problem.signal_variance)
        bottom = max(np.log(least), _LOG_TINY) if least > 0 else _LOG_TINY
        root = _largest_root(self.drift, np.log(2 * most / problem.alpha), bottom)
        if root is None:
            return False
        noise = np.exp(root)
        self.point = (self.extra_shrinkage(noise), noise)
        return True

    def saddle_point(self) -> SaddlePoint:
        problem, (extra, noise) = self.problem, self.point
        slope, mean_square = ground_averages(
            problem.codebook, 1 + extra, problem.signal_variance + noise
        )
        if problem.ridge > 0:
            stiffness = problem.ridge / extra if extra > 0 else np.nan
        else:
            stiffness = 0.0 if self.vanishing_ridge else max(problem.alpha - slope, 0.0)
        return _saddle_point(problem, stiffness, noise, slope, mean_square, self.budget.spent)


def ground_state(problem: TeacherStudent, max_iterations: int) -> SaddlePoint:
    """The saddle point at temperature zero.

    The root with a finite susceptibility where there is one. Else the limit of a vanishing
    ridge: the interpolating weights of least norm; and where all weights that interpolate have
    one norm (they lie on the two innermost levels), their uniform average.
    """
    ground = _Ground(problem, max_iterations)
    try:
        found = ground.solve()
        if found and problem.ridge == 0 and ground.saddle_point().slope >= problem.alpha:
            ground.vanishing_ridge = True
            found = ground.solve()
    except _Exhausted:
        found = True
    if found:
        return ground.saddle_point()
    return _innermost_levels(problem, ground.budget)


def _innermost_levels(problem: TeacherStudent, budget: _Budget) -> SaddlePoint:
    """Infinite susceptibility on the two levels of least magnitude: `slope = alpha`.

    The temperature goes to zero with the stiffness, and only their ratio `k` matters.
    """
    level = np.abs(problem.codebook.levels).min()
    codebook = Codebook([-level, level])
    alpha, rho = problem.alpha, problem.signal_variance

    def averages(log_ratio: float, noise: float) -> ChannelAverages:
        budget.spend()
        return thermal_averages(codebook, np.exp(log_ratio), rho + noise, 0.0, 1.0)

    def ratio(noise: float) -> float:
        lower = np.log(alpha / level**2) - 1e-9  # the variance of a weight is at most level^2
        upper = lower + 1.0
        while averages(upper, noise).slope < alpha:
            upper += 1.0
        return brentq(
            lambda x: averages(x, noise).slope - alpha, lower, upper, xtol=1e-14, rtol=1e-14
        )

    def drift(log_noise: float) -> float:
        noise = np.exp(log_noise)
        here = averages(ratio(noise), noise)
        return _drift(problem, here.slope, here.mean_square, noise)

    most = (2 * level / alpha) ** 2 / (2 * np.pi) - rho
    least = problem.noise_variance / alpha
    point = (np.log(alpha / level**2), np.log(most))
    try:
        root = _largest_root(drift, np.log(most) - 1e-6, np.log(least) if least > 0 else _LOG_TINY)
        if root is not None:
            point = (ratio(np.exp(root)), root)
    except _Exhausted:
        pass
    noise = np.exp(point[1])
    here = thermal_averages(codebook, np.exp(point[0]), rho + noise, 0.0, 1.0)
    return _saddle_point(
        problem,
        0.0,
        noise,
        here.slope,
        here.mean_square,
        budget.spent,
        variance=level**2 - here.mean_square,
        squared_slope=here.squared_slope,
        entropy=here.entropy,
    )


# --- temperature above zero ---------------------------------------------------------------------


class _Thermal:
    """The equations above temperature zero, and ways to a root.

    A point is `(log a, log(v + floor))`, so that no step leads to a negative stiffness.
    """

    def __init__(self, problem: TeacherStudent, limit: int):
        self.problem = problem
        self.budget = _Budget(limit)
        self.floor = _FLOOR * problem.signal_variance / problem.alpha

    def point(self, stiffness: float, noise: float) -> NDArray:
        return np.log([stiffness, noise + self.floor])

    def unknowns(self, point: NDArray) -> tuple[float, float]:
        stiffness, noise = np.exp(point) - [0.0, self.floor]
        return stiffness, max(noise, 0.0)

    def averages(self, point: NDArray, temperature: float) -> ChannelAverages:
        problem, (stiffness, noise) = self.problem, self.unknowns(point)
        return thermal_averages(
            problem.codebook,
            stiffness,
            problem.signal_variance + noise,
            problem.ridge,
            temperature,
        )

    def defect(self, point: NDArray, temperature: float) -> tuple[NDArray, NDArray]:
        """What one pass of the map changes, and the Jacobian of that in `point`.

        `log a` falls by the first entry, the other coordinate grows by the second.
        """
        self.budget.spend()
        problem, here = self.problem, self.averages(point, temperature)
        alpha, rho = problem.alpha, problem.signal_variance
        stiffness, noise = self.unknowns(point)
        total = stiffness + here.slope
        new_noise = _noise(problem, here.slope, here.mean_square)
        drift = _drift(problem, here.slope, here.mean_square, noise)
        by_stiffness = here.mean_square_by_stiffness - 2 * rho * here.slope_by_stiffness
        by_noise = here.mean_square_by_variance - 2 * rho * here.slope_by_variance
        rows = [
            np.array([1 + here.slope_by_stiffness, here.slope_by_variance]) / total,
            np.array([by_stiffness, by_noise]) / (alpha * (new_noise + self.floor)),
        ]
        jacobian = np.array(rows) * [stiffness, noise + self.floor] - [[0, 0], [0, 1]]
        return np.array([np.log(total / alpha), drift]), jacobian

    def newton(self, guess: NDArray, temperature: float) -> NDArray | None:
        """The root near the guess, or None if Newton's method does not find one close by."""
        point = guess
        for _ in range(12):
            defect, jacobian = self.defect(point, temperature)
            if not np.isfinite(jacobian).all() or np.linalg.det(jacobian) == 0:
                return None
            point = point - np.linalg.solve(jacobian, defect)
            if not np.abs(point - guess).max() < 0.5:
                return None
            if np.abs(defect).max() < 1e-7:  # the last step has left rounding
                return point
        return None

    def flow(self, point: NDArray, temperature: float) -> NDArray:
        """Where the damped map goes from `point`, in longer strides while it goes straight on.

        Just past the end of a root the map lingers where the root was; hence the strides.
        """
        stride, before, near = 0.5, np.zeros(2), 0.02
        while True:
            defect, _ = self.defect(point, temperature)
            size = np.abs(defect).max()
            if size < near:
                found = self.newton(point, temperature)
                if found is not None:
                    return found
            near = min(near, size / 2) if size < 0.02 else 0.02
            step = defect * [-1, 1]
            straight = step @ before > 0.9 * np.linalg.norm(step) * np.linalg.norm(before)
            stride = min(1.5 * stride, 0.5 / size) if straight else 0.5
            point, before = point + stride * step, step

    def follow(self, point: NDArray, start: float, jump: bool) -> NDArray | None:
        """Carry a root from temperature `start` to the problem's; steps adapt to what it does.

        Where the root ends on the way, go where the map goes, or give None if not `jump`.
        """
        end = np.log(self.problem.temperature)
        here, step = np.log(start), np.log(4.0) * np.sign(end - np.log(start))
        velocity = np.zeros(2)
        while here != end:
            there = end if abs(end - here) <= abs(step) else here + step
            temperature = self.problem.temperature if there == end else np.exp(there)
            guess = point + velocity * (there - here)
            found = self.newton(guess, temperature)
            if found is None and abs(step) > 0.01:
                step /= 2
                continue
            if found is None:
                if not jump:
                    return None
                found = self.flow(point, temperature)
            jumped = np.abs(found - guess).max() > 0.5
            velocity = np.zeros(2) if jumped else (found - point) / (there - here)
            if jumped or np.abs(found - guess).max() < 0.1:
                step *= 1.5
            point, here = found, there
        return point

    def saddle_point(self, point: NDArray) -> SaddlePoint:
        here = self.averages(point, self.problem.temperature)
        stiffness, noise = self.unknowns(point)
        return _saddle_point(
            self.problem,
            stiffness,
            noise,
            here.slope,
            here.mean_square,
            self.budget.spent,
            variance=self.problem.temperature * here.slope / stiffness,
            squared_slope=here.squared_slope,
            entropy=here.entropy,
        )


def _hot_guess(problem: TeacherStudent, temperature: float) -> tuple[float, float]:
    """Ridge regression whose Gaussian prior has, at this temperature, the codebook's spread."""
    prior = problem.ridge + temperature / np.square(problem.codebook.levels).mean()
    ridge = ridge_solution(problem.alpha, problem.noise_variance, prior, problem.signal_variance)
    slope = ridge.overlap / problem.signal_variance
    noise = ridge.self_overlap / slope**2 - problem.signal_variance
    return slope / ridge.susceptibility, max(noise, 0.0)


def cooled(problem: TeacherStudent, max_iterations: int) -> SaddlePoint:
    """The saddle point reached by cooling slowly from a high temperature, where it is unique."""
    thermal = _Thermal(problem, max_iterations)
    # So hot that the weights do not feel that the levels are discrete.
    hot = max(problem.temperature, 4 * problem.alpha * problem.codebook.spacing.max() ** 2)
    point = thermal.point(*_hot_guess(problem, hot))
    try:
        point = thermal.flow(point, hot)
        point = thermal.follow(point, hot, jump=True)
    except _Exhausted:
        pass
    return thermal.saddle_point(point)


def heated(problem: TeacherStudent, max_iterations: int) -> SaddlePoint | None:
    """The saddle point reached by heating that of temperature zero.

    None if that has an infinite susceptibility, or if the root ends before the temperature.
    """
    ground = ground_state(problem, max_iterations)
    if ground.stiffness == 0 or not ground.converged:
        return None
    thermal = _Thermal(problem, max_iterations)
    # So cold that each threshold is much sharper than the levels are apart.
    cold = 1e-3 * ground.stiffness * problem.codebook.spacing.min() ** 2
    start = min(problem.temperature, cold)
    try:
        point = thermal.newton(thermal.point(ground.stiffness, ground.noise), start)
        point = point if point is None else thermal.follow(point, start, jump=False)
    except _Exhausted:
        return None
    return point if point is None else thermal.saddle_point(point)
