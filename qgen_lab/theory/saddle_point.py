"""Self-consistency: the stiffness and noise that each weight sees, given that all others do.

Two unknowns fix everything: the stiffness `a = alpha / (1 + susceptibility)` and the noise per
weight `v = E / alpha` of its field. One pass of the replica-symmetric map takes

    a -> alpha a / (a + slope),   v -> (noise_variance + rho - 2 rho slope + mean_square) / alpha.

All is compiled. `left` is an array of one number, the evaluations that may still be made; where
it comes to zero the iterations stop where they are, and the residual says so.
"""

from math import exp, isfinite, log, sqrt
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from qgen_lab.theory.problem import TeacherStudent
from qgen_lab.theory.scalar_channel import channel_averages, is_even, staircase_averages

_FLOOR = 1e-6  # in units of the teacher's variance: what counts as no noise at all
_LOG_TINY = -690.0  # exp of it is still a normal number
_FINEST = 0.01  # smallest step of a logarithm of temperature
_compiled = numba.njit(cache=True, nogil=True)


class Model(NamedTuple):
    """A problem less its temperature, as the compiled code takes it."""

    levels: NDArray
    even: bool  # the levels are symmetric about zero
    outermost: float  # largest magnitude of a level
    innermost: NDArray  # a level of least magnitude, and its mirror image
    alpha: float
    noise_variance: float
    ridge: float
    signal_variance: float

    @classmethod
    def of(cls, problem: TeacherStudent) -> "Model":
        """The numbers of a problem."""
        levels = problem.codebook.levels.copy()
        innermost = np.abs(levels).min()
        return cls(
            levels,
            is_even(levels),
            np.abs(levels).max(),
            np.array([-innermost, innermost]),
            problem.alpha,
            problem.noise_variance,
            problem.ridge,
            problem.signal_variance,
        )


class SaddlePoint(NamedTuple):
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
    residual: float
    iterations: float


_FIELDS = len(SaddlePoint._fields)


@_compiled
def _spend(left):
    left[0] = max(left[0] - 1, 0)


@_compiled
def _write(row, point):
    for k in range(len(point)):
        row[k] = point[k]


@_compiled
def _noise_after(model, slope, mean_square):
    """`v` after one pass of the map."""
    rho = model.signal_variance
    return (model.noise_variance + rho - 2 * rho * slope + mean_square) / model.alpha


@_compiled
def _drift(model, slope, mean_square, noise):
    """Relative change of the noise in one pass of the map, as a difference of logarithms."""
    floor = _FLOOR * model.signal_variance / model.alpha
    return log((_noise_after(model, slope, mean_square) + floor) / (noise + floor))


@_compiled
def _residual(model, stiffness, noise, slope, mean_square):
    pull = log((stiffness + slope) / model.alpha)
    return max(abs(pull), abs(_drift(model, slope, mean_square, noise)))


# --- a root of one equation ---------------------------------------------------------------------


class Bracket(NamedTuple):
    """Two points where a function differs in sign, and where between them to look next."""

    near: float
    f_near: float
    far: float
    f_far: float
    share: float  # of the way from near to far


@_compiled
def next_look(bracket):
    """Where the function should be evaluated next."""
    return bracket.near + bracket.share * (bracket.far - bracket.near)


@_compiled
def is_tight(bracket):
    """Whether nothing lies between the two points but rounding."""
    gap = abs(bracket.far - bracket.near)
    return bracket.f_near == 0 or gap <= 8e-16 * max(1.0, abs(bracket.near))


@_compiled
def narrowed(bracket, x, fx):
    """The bracket after a look: inverse quadratic interpolation where safe, bisection elsewhere.

    Chandrupatla, Adv. Eng. Software 28, 145 (1997).
    """
    if (fx > 0) == (bracket.f_near > 0):
        last, f_last, far, f_far = bracket.near, bracket.f_near, bracket.far, bracket.f_far
    else:
        last, f_last, far, f_far = bracket.far, bracket.f_far, bracket.near, bracket.f_near
    if fx == 0 or fx == f_last:
        return Bracket(x, fx, far, f_far, 0.5)
    share = 0.5
    along, rise = (x - far) / (last - far), (fx - f_far) / (f_last - f_far)
    if rise**2 < along and (1 - rise) ** 2 < 1 - along:
        share = fx / (f_far - fx) * f_last / (f_far - f_last)
        share += (last - x) / (far - x) * fx / (f_last - fx) * f_far / (f_last - f_far)
    least = min(4e-16 * max(1.0, abs(x)) / abs(far - x), 0.5)
    return Bracket(x, fx, far, f_far, min(max(share, least), 1 - least))


@_compiled
def best(bracket):
    """The point of the two that is nearer to the root."""
    return bracket.near if abs(bracket.f_near) < abs(bracket.f_far) else bracket.far


# --- temperature zero ---------------------------------------------------------------------------
#
# The stiffness is eliminated first, then one equation for the noise is left. How it goes depends:
# - finite susceptibility: at given noise `v`, `ridge / k + slope(1 + k, v)` falls with the extra
#   shrinkage `k = ridge / stiffness`, and has to be `alpha`. Without a ridge `k = 0`;
# - a vanishing ridge where the susceptibility is infinite: `k` is finite as both go to zero;
# - the two innermost levels, where all weights that interpolate have one norm and a ridge does
#   not choose: the temperature goes to zero with the stiffness, at a finite ratio, `slope = alpha`.

_FINITE, _VANISHING_RIDGE, _INNERMOST = 0, 1, 2


@_compiled
def _extra_shrinkage(model, noise, case, left):
    if case == _FINITE and model.ridge == 0:
        return 0.0
    ridge, alpha, variance = model.ridge, model.alpha, model.signal_variance + noise
    lower = log(ridge / alpha) if ridge > 0 else -40.0
    upper = max(lower, 0.0) + 50.0
    _spend(left)
    slope, _ = staircase_averages(model.levels, 1 + exp(lower), variance)
    f_lower = ridge / exp(lower) + slope - alpha
    if f_lower <= 0:
        return exp(lower)
    if slope < alpha and ridge > 0:  # the slope only falls from here
        upper = min(upper, log(ridge / (alpha - slope)))
    if left[0] == 0:
        return exp(lower)
    _spend(left)
    slope, _ = staircase_averages(model.levels, 1 + exp(upper), variance)
    f_upper = ridge / exp(upper) + slope - alpha
    if f_upper >= 0:
        return exp(upper)
    bracket = Bracket(upper, f_upper, lower, f_lower, 0.5)
    while left[0] > 0 and not is_tight(bracket):
        _spend(left)
        extra = exp(next_look(bracket))
        slope, _ = staircase_averages(model.levels, 1 + extra, variance)
        bracket = narrowed(bracket, next_look(bracket), ridge / extra + slope - alpha)
    return exp(best(bracket))


@_compiled
def _two_level_averages(model, ratio, noise):
    symmetric = model.innermost[0] == -model.innermost[1]
    variance = model.signal_variance + noise
    return channel_averages(model.innermost, symmetric, ratio, variance, 0.0, 1.0)


@_compiled
def _stiffness_over_temperature(model, noise, left):
    alpha = model.alpha
    lower = log(alpha / model.innermost[1] ** 2) - 1e-9  # a weight's variance is at most level^2
    if left[0] == 0:
        return exp(lower)
    _spend(left)
    f_lower = _two_level_averages(model, exp(lower), noise).slope - alpha
    upper, f_upper = lower, f_lower
    while f_upper < 0 and left[0] > 0:
        _spend(left)
        lower, f_lower, upper = upper, f_upper, upper + 1.0
        f_upper = _two_level_averages(model, exp(upper), noise).slope - alpha
    bracket = Bracket(upper, f_upper, lower, f_lower, 0.5)
    while left[0] > 0 and not is_tight(bracket):
        _spend(left)
        here = _two_level_averages(model, exp(next_look(bracket)), noise)
        bracket = narrowed(bracket, next_look(bracket), here.slope - alpha)
    return exp(best(bracket))


@_compiled
def _ground_drift(model, log_noise, case, left):
    """Change of the noise in one pass of the map, at the stiffness that belongs to it."""
    noise = exp(log_noise)
    if case == _INNERMOST:
        here = _two_level_averages(model, _stiffness_over_temperature(model, noise, left), noise)
        return _drift(model, here.slope, here.mean_square, noise)
    extra = _extra_shrinkage(model, noise, case, left)
    _spend(left)
    slope, mean_square = staircase_averages(model.levels, 1 + extra, model.signal_variance + noise)
    return _drift(model, slope, mean_square, noise)


@_compiled
def _noise_range(model, case):
    """Logarithms of bounds on the noise."""
    alpha, rho = model.alpha, model.signal_variance
    least = model.noise_variance / alpha
    if case == _INNERMOST:
        most = (2 * model.innermost[1] / alpha) ** 2 / (2 * np.pi) - rho
        upper = log(most) - 1e-6
    else:
        most = (sqrt(rho) + model.outermost) ** 2 + model.noise_variance
        upper = log(2 * most / alpha)
        if model.ridge > 0 or case == _VANISHING_RIDGE:
            # A threshold at zero keeps a slope that no shrinkage takes away.
            kept = 0.0
            for k in range(model.levels.size - 1):
                if model.levels[k] == -model.levels[k + 1]:
                    kept = 2 * model.levels[k + 1] / alpha
            least = max(least, kept**2 / (2 * np.pi) - rho)
    return (max(log(least), _LOG_TINY) if least > 0 else _LOG_TINY), upper


@_compiled
def _largest_noise(model, case, left):
    """Logarithm of the largest root, found by walking down; whether there is one.

    Where the evaluations run out on the way, the place that was reached.
    """
    bottom, upper = _noise_range(model, case)
    f_upper = -np.inf  # the map lowers a noise that is above all bounds
    while upper > bottom and left[0] > 0:
        lower = max(upper - 0.5, bottom)
        f_lower = _ground_drift(model, lower, case, left)
        if f_lower >= 0:
            if f_upper == -np.inf and left[0] > 0:
                f_upper = _ground_drift(model, upper, case, left)
            bracket = Bracket(lower, f_lower, upper, f_upper, 0.5)
            while left[0] > 0 and not is_tight(bracket):
                look = next_look(bracket)
                bracket = narrowed(bracket, look, _ground_drift(model, look, case, left))
            return best(bracket), True
        upper, f_upper = lower, f_lower
    return upper, left[0] == 0


@_compiled
def ground_state(model, limit):
    """The saddle point at temperature zero.

    The root with a finite susceptibility where there is one. Else the limit of a vanishing
    ridge: the interpolating weights of least norm; and where all weights that interpolate have
    one norm (they lie on the two innermost levels), their uniform average.
    """
    left = np.array([limit])
    for case in range(3):
        log_noise, found = _largest_noise(model, case, left)
        point = _ground_point(model, log_noise, case, limit - left[0])
        interpolates = case == _FINITE and model.ridge == 0 and point.slope >= model.alpha
        if left[0] == 0 or (found and not interpolates):
            break
    return point


@_compiled
def _ground_point(model, log_noise, case, iterations):
    noise = exp(log_noise)
    if case == _INNERMOST:
        return _innermost_point(model, noise, iterations)
    extra = _extra_shrinkage(model, noise, case, np.array([1000]))
    slope, mean_square = staircase_averages(model.levels, 1 + extra, model.signal_variance + noise)
    if model.ridge > 0:
        stiffness = model.ridge / extra
    else:
        stiffness = 0.0 if case == _VANISHING_RIDGE else max(model.alpha - slope, 0.0)
    residual = _residual(model, stiffness, noise, slope, mean_square)
    return SaddlePoint(
        stiffness, noise, slope, mean_square, mean_square, np.inf, 0.0, residual, float(iterations)
    )


@_compiled
def _innermost_point(model, noise, iterations):
    ratio = _stiffness_over_temperature(model, noise, np.array([1000]))
    here = _two_level_averages(model, ratio, noise)
    return SaddlePoint(
        0.0,
        noise,
        here.slope,
        here.mean_square,
        model.innermost[1] ** 2,
        here.squared_slope,
        here.entropy,
        _residual(model, 0.0, noise, here.slope, here.mean_square),
        float(iterations),
    )


# --- temperature above zero ---------------------------------------------------------------------


class Point(NamedTuple):
    """Logarithms of `a` and of `v` plus a floor, so that no step leads to a negative stiffness."""

    x: float
    y: float


@_compiled
def _point(model, stiffness, noise):
    return Point(log(stiffness), log(noise + _FLOOR * model.signal_variance / model.alpha))


@_compiled
def unknowns(model, point):
    """Stiffness and noise at a point."""
    floor = _FLOOR * model.signal_variance / model.alpha
    return exp(point.x), max(exp(point.y) - floor, 0.0)


class Defect(NamedTuple):
    """What one pass of the map changes, and the derivatives of that in the point.

    `x` falls by `pull`, `y` grows by `drift`.
    """

    pull: float
    drift: float
    pull_by_x: float
    pull_by_y: float
    drift_by_x: float
    drift_by_y: float


@_compiled
def _averages(model, point, temperature):
    stiffness, noise = unknowns(model, point)
    variance = model.signal_variance + noise
    return channel_averages(model.levels, model.even, stiffness, variance, model.ridge, temperature)


@_compiled
def defect(model, point, temperature, left):
    """One evaluation of the map."""
    _spend(left)
    alpha, rho = model.alpha, model.signal_variance
    stiffness, noise = unknowns(model, point)
    here = _averages(model, point, temperature)
    total = stiffness + here.slope
    by_stiffness = here.mean_square_by_stiffness - 2 * rho * here.slope_by_stiffness
    by_noise = here.mean_square_by_variance - 2 * rho * here.slope_by_variance
    after = alpha * _noise_after(model, here.slope, here.mean_square) + _FLOOR * rho
    floored = exp(point.y)
    return Defect(
        log(total / alpha),
        _drift(model, here.slope, here.mean_square, noise),
        stiffness * (1 + here.slope_by_stiffness) / total,
        floored * here.slope_by_variance / total,
        stiffness * by_stiffness / after,
        floored * by_noise / after - 1,
    )


@_compiled
def newton(model, guess, temperature, left):
    """The root near the guess, and whether Newton's method found one close by."""
    point = guess
    for _ in range(12):
        if left[0] == 0:
            break
        d = defect(model, point, temperature, left)
        determinant = d.pull_by_x * d.drift_by_y - d.pull_by_y * d.drift_by_x
        if determinant == 0 or not isfinite(determinant):
            break
        point = Point(
            point.x - (d.drift_by_y * d.pull - d.pull_by_y * d.drift) / determinant,
            point.y - (d.pull_by_x * d.drift - d.drift_by_x * d.pull) / determinant,
        )
        if not _distance(point, guess) < 0.5:
            break
        if max(abs(d.pull), abs(d.drift)) < 1e-7:  # the last step has left rounding
            return point, True
    return guess, False


@_compiled
def _distance(one, other):
    return max(abs(one.x - other.x), abs(one.y - other.y))


@_compiled
def flow(model, point, temperature, left):
    """Where the damped map goes from `point`: implicit Euler steps along `(-pull, drift)`.

    Just past the end of a root the map lingers where the root was; so the time step doubles while
    the path is straight, as long as it resolves how fast the path leaves. Where the map runs in
    circles around a root, the noise is slowed down until it settles there.
    """
    step, near, before_x, before_y = 0.5, 0.02, 0.0, 0.0
    begin = left[0]
    while left[0] > 0:
        pace = 0.5 ** ((begin - left[0]) // 100)
        d = defect(model, point, temperature, left)
        size = max(abs(d.pull), abs(d.drift))
        if size >= 0.02:
            near = 0.02
        elif size < near:
            root, found = newton(model, point, temperature, left)
            if found:
                return root
            near = size / 2
        drift, by_x, by_y = pace * d.drift, pace * d.drift_by_x, pace * d.drift_by_y
        half_trace = (by_y - d.pull_by_x) / 2
        determinant = d.pull_by_y * by_x - d.pull_by_x * by_y
        growth = half_trace + sqrt(max(half_trace**2 - determinant, 0.0))
        if step * growth > 0.5:
            step = 0.5 / growth
        scale = 1 / step**2 - 2 * half_trace / step + determinant
        x = ((by_y - 1 / step) * d.pull - d.pull_by_y * drift) / scale
        y = ((1 / step + d.pull_by_x) * drift - by_x * d.pull) / scale
        longest = max(abs(x), abs(y), 0.5)
        x, y = x / (2 * longest), y / (2 * longest)
        point = Point(point.x + x, point.y + y)
        along = x * before_x + y * before_y
        straight = along > 0.9 * sqrt((x * x + y * y) * (before_x**2 + before_y**2))
        step = 2 * step if straight else 0.5
        before_x, before_y = x, y
    return point


class Track(NamedTuple):
    """A root on its way from one temperature to another; temperatures as logarithms."""

    point: Point
    velocity: Point
    temperature: float
    step: float
    alive: bool


@_compiled
def _stepped(model, track, there, left):
    """The track after a try to carry its root to the temperature `there`.

    If that fails the next try is half as far. Where the root ends, cooling goes on to where the
    map goes, and heating is over.
    """
    point, distance = track.point, there - track.temperature
    guess = Point(point.x + track.velocity.x * distance, point.y + track.velocity.y * distance)
    found, success = newton(model, guess, exp(there), left)
    if not success:
        if abs(distance) > _FINEST or left[0] == 0:
            return Track(point, track.velocity, track.temperature, distance / 2, True)
        if distance > 0:
            return Track(point, track.velocity, track.temperature, track.step, False)
        found = flow(model, point, exp(there), left)
    error = _distance(found, guess)
    velocity = Point((found.x - point.x) / distance, (found.y - point.y) / distance)
    step = track.step
    if error > 0.5:
        velocity = Point(0.0, 0.0)
    if error > 0.5 or error < 0.1:
        step *= 1.5
    return Track(found, velocity, there, step, True)


@_compiled
def _approached(model, track, end, left):
    """The track once `end` is within its next step: a path that does not depend on `end`."""
    while track.alive and left[0] > 0 and abs(end - track.temperature) > abs(track.step):
        track = _stepped(model, track, track.temperature + track.step, left)
    return track


@_compiled
def _arrived(model, track, end, left):
    """The track at `end`."""
    while track.alive and left[0] > 0 and track.temperature != end:
        within = abs(end - track.temperature) <= abs(track.step)
        there = end if within else track.temperature + track.step
        track = _stepped(model, track, there, left)
    return track


@_compiled
def _thermal_point(model, point, temperature, iterations):
    here = _averages(model, point, temperature)
    stiffness, noise = unknowns(model, point)
    return SaddlePoint(
        stiffness,
        noise,
        here.slope,
        here.mean_square,
        here.mean_square + temperature * here.slope / stiffness,
        here.squared_slope,
        here.entropy,
        _residual(model, stiffness, noise, here.slope, here.mean_square),
        float(iterations),
    )


@_compiled
def cooled(model, temperatures, hot, stiffness, noise, limit):
    """Saddle points reached by cooling slowly from a high temperature, where there is only one.

    `temperatures` descends. All that are below `hot` share one path, and each leaves it for its
    own last step: so none of them depends on the others. `stiffness` and `noise` are guesses at
    `max(temperature, hot)`.
    """
    rows = np.empty((temperatures.size, _FIELDS))
    shared = np.array([limit])
    track = Track(Point(0.0, 0.0), Point(0.0, 0.0), log(hot), -log(4.0), False)
    for k in range(temperatures.size):
        left, start = np.array([limit]), max(temperatures[k], hot)
        point = _point(model, stiffness[k], noise[k])
        if temperatures[k] >= hot or not track.alive:
            point, found = newton(model, point, start, left)
            if not found:
                point = flow(model, point, start, left)
        if temperatures[k] < hot:
            if not track.alive:
                track = Track(point, track.velocity, track.temperature, track.step, True)
                shared = left
            end = log(temperatures[k])
            track = _approached(model, track, end, shared)
            left = shared.copy()
            point = _arrived(model, track, end, left).point
        _write(rows[k], _thermal_point(model, point, temperatures[k], limit - left[0]))
    return rows


@_compiled
def heated(model, temperatures, cold, limit):
    """Saddle points reached by heating that of temperature zero; `temperatures` ascends.

    NaN where that has an infinite susceptibility, or where its root ends before the temperature.
    Paths are shared as in `cooled`; they start at `cold` times the stiffness.
    """
    rows = np.full((temperatures.size, _FIELDS), np.nan)
    rows[:, -1] = 0.0
    ground = ground_state(model, limit)
    if ground.stiffness == 0 or not ground.residual < 1e-9:
        return rows
    start = cold * ground.stiffness
    guess = _point(model, ground.stiffness, ground.noise)
    shared = np.array([limit])
    point, alive = newton(model, guess, start, shared)
    track = Track(point, Point(0.0, 0.0), log(start), log(4.0), alive)
    for k in range(temperatures.size):
        left = np.array([limit])
        if temperatures[k] <= start:
            point, alive = newton(model, guess, temperatures[k], left)
        else:
            end = log(temperatures[k])
            track = _approached(model, track, end, shared)
            left[0] = shared[0]
            arrived = _arrived(model, track, end, left)
            point, alive = arrived.point, arrived.alive and arrived.temperature == end
        if alive:
            _write(rows[k], _thermal_point(model, point, temperatures[k], limit - left[0]))
    return rows
