"""Straight-through training with a fresh sample at every step, at a rate that stays finite.

With many weights each latent weight moves by itself in what all others make: with time t = steps
per weight,

    du = rate (w0 - w) dt + rate sqrt(E + noise_variance) dB,    w = the level nearest to u,

where `E` is the mean squared error of the quantized weights. In a cell, where w stays the same,
that is diffusion with a constant drift, so the stationary density is exponential in every cell.
"""

from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.problem import TeacherStudent, checked_number
from qgen_lab.theory.quadrature import graded_panels
from qgen_lab.theory.scalar_channel import ground_averages
from qgen_lab.theory.straight_through import gaussian_averages, stochastic_rounding_error

_TOLERANCE = 1e-9
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_REACH = 9.0  # standard deviations of the teacher; the mass beyond is 2e-19
_RESOLUTION, _GROWTH = 0.1, 0.1  # of cells: at a threshold, and with the distance from it
_STEP_TOLERANCE = 1e-4  # relative, of the error in one time step


@dataclass(frozen=True)
class OnePassLimit:
    """Stationary state of one-pass straight-through training in the limit of many weights.

    Attributes
    ----------
    gen_error : float
        `E|w - w0|^2` per weight of the quantized weights at one time, label noise not included.
    average_gen_error : float
        The same of their time average: the teacher, but for its weights beyond the range.
    rounded_gen_error : float
        The same of that average rounded to the nearest levels.
    overlap : float
        `E[w0 w]`.
    temperature : float
        `rate (gen_error + noise_variance) / 2`: in a cell of level w the latent weight has the
        density `exp((w0 - w) u / temperature)`.
    converged : bool
        Whether the residual is below 1e-9.
    iterations : int
        Evaluations of the stationary law.
    residual : float
        Relative change of `gen_error + noise_variance` in one more pass.
    """

    gen_error: float
    average_gen_error: float
    rounded_gen_error: float
    overlap: float
    temperature: float
    converged: bool
    iterations: int
    residual: float


@dataclass(frozen=True)
class OnePassPath:
    """Error over time: `gen_error` (n,) at `time` (n,), in steps per weight."""

    time: NDArray[np.float64]
    gen_error: NDArray[np.float64]

    def to_frame(self) -> pd.DataFrame:
        """One row a time."""
        return pd.DataFrame({"time": self.time, "gen_error": self.gen_error})

    def __repr__(self) -> str:
        return f"OnePassPath({self.time.size} times, to gen_error={self.gen_error[-1]:.6g})"


def one_pass(
    codebook: Codebook,
    learning_rate: float,
    noise_variance: float = 0.1,
    signal_variance: float = 1.0,
) -> OnePassLimit:
    """Stationary error of straight-through training on fresh samples at a finite rate.

    The updates are `latent -= learning_rate * x (x' w - y)` with inputs x of variance 1 / N, a
    fresh sample each.

    Parameters
    ----------
    codebook : Codebook
        The levels of the quantized weights. Time grows with the square of their number.
    learning_rate : float
        Above 0. Ever finer levels over an ever wider range settle below 2 only.
    noise_variance, signal_variance : float
        As in `TeacherStudent`.

    Returns
    -------
    OnePassLimit

    Raises
    ------
    TypeError, ValueError
        If `codebook` is not a `Codebook`, or a number is out of its range.

    Notes
    -----
    Our own derivation. In the limit of a vanishing rate the stationary law is stochastic rounding
    of the teacher; for ever finer levels the error is `rate noise_variance / (2 - rate)`, that of
    least mean squares. With one bit it does not depend on the rate at all. The equation for the
    error had a single root in every case that we tried.
    """
    rate, noise, rho = _checked(codebook, learning_rate, noise_variance, signal_variance)
    passes = 0

    def error_at(error: float) -> float:
        nonlocal passes
        passes += 1
        return _stationary_error(codebook, rate * (error + noise) / 2, rho)

    least = stochastic_rounding_error(codebook, rho)
    most = stochastic_rounding_error(Codebook(codebook.levels[[0, -1]]), rho)
    # With one bit, and for extreme rates, an end is the root, to rounding.
    error = least if error_at(least) <= least else most
    if error_at(least) > least and error_at(most) < most:
        error = brentq(lambda error: error_at(error) - error, least, most, xtol=1e-300, rtol=1e-14)
    residual = abs(error_at(error) - error) / (error + noise)
    kept, clipped_square = _clipped(codebook, rho)
    slope, rounded_square = ground_averages(codebook, 1.0, rho)
    return OnePassLimit(
        gen_error=float(error),
        average_gen_error=float(rho - 2 * rho * kept + clipped_square),
        rounded_gen_error=float(rho - 2 * rho * slope + rounded_square),
        overlap=float(rho * kept),
        temperature=float(rate * (error + noise) / 2),
        converged=bool(residual <= _TOLERANCE),
        iterations=passes,
        residual=float(residual),
    )


def _stationary_error(codebook: Codebook, temperature: float, rho: float) -> float:
    """`E|w - w0|^2` of the stationary law at a given temperature."""
    levels, deviation = codebook.levels, np.sqrt(rho)
    lower, upper = np.clip(levels[[0, -1]], -_REACH * deviation, _REACH * deviation)
    kept, clipped_square = _clipped(codebook, rho)
    beyond = rho - 2 * rho * kept + clipped_square  # weights beyond the range sit on its ends
    if lower == upper:
        return beyond
    # Near a level the law changes over the temperature divided by the spacing.
    nearer = np.minimum(np.append(codebook.spacing, np.inf), np.append(np.inf, codebook.spacing))
    edges = graded_panels(lower, upper, 1.5 * deviation, levels, temperature / nearer)
    half = np.diff(edges)[:, None] / 2
    teacher = (edges[:-1, None] + half * (1 + _NODES)).ravel()
    density = np.exp(-np.square(teacher / deviation) / 2) / (np.sqrt(2 * np.pi) * deviation)
    squared = _squared_errors(levels, codebook.thresholds, teacher, temperature)
    return float(beyond + ((half * _WEIGHTS).ravel() * density) @ squared)


@numba.njit(cache=True)
def _squared_errors(levels, thresholds, teacher, temperature):
    """`E (w - w0)^2` of the stationary law at each value of the teacher within the range.

    The density is `exp((w0 - level) u / temperature)` in a cell; its logarithm at the thresholds
    is followed from cell to cell, and the sums are rescaled whenever it reaches a new maximum.
    """
    out = np.empty_like(teacher)
    last = levels.size - 1
    for j in range(teacher.size):
        height = highest = 0.0
        total = temperature / (teacher[j] - levels[0])
        summed = total * (teacher[j] - levels[0]) ** 2
        for k in range(1, last + 1):
            error = teacher[j] - levels[k]
            if k < last:
                length = thresholds[k] - thresholds[k - 1]
                rise = error * length / temperature
                top = height + max(rise, 0.0)
                fall = abs(rise)
                mass = length * (-np.expm1(-fall) / fall if fall > 1e-8 else 1 - fall / 2)
                height += rise
            else:
                top, mass = height, temperature / -error
            if top > highest:
                shrink = np.exp(highest - top)
                total, summed, highest = total * shrink, summed * shrink, top
            mass *= np.exp(top - highest)
            total += mass
            summed += mass * error**2
        out[j] = summed / total
    return out


def _clipped(codebook: Codebook, rho: float) -> tuple[float, float]:
    """Slope and mean square of the teacher clipped to the range."""
    slope, square, _, _ = gaussian_averages(codebook.levels, 1.0, 0.0, np.sqrt(rho))
    return slope, square


def one_pass_path(
    codebook: Codebook,
    learning_rate: float,
    times: ArrayLike,
    noise_variance: float = 0.1,
    signal_variance: float = 1.0,
    start_deviation: float = 0.0,
) -> OnePassPath:
    """The way to the stationary state: a plateau, then a drop.

    Solves the diffusion equation of the latent weights for many values of the teacher at once,
    coupled by their common error.

    Parameters
    ----------
    codebook, learning_rate, noise_variance, signal_variance
        As in `one_pass`.
    times : array_like, shape (n,)
        Ascending times, at least 0, in steps per weight.
    start_deviation : float
        Standard deviation of the latent weights at the start.

    Returns
    -------
    OnePassPath
        Within 1e-3 of the error, relative.

    Raises
    ------
    TypeError, ValueError
        As `one_pass`; if `times` is empty, negative or does not ascend.

    Notes
    -----
    Finite volumes that hold the stationary law (Scharfetter and Gummel, 1969); implicit Euler steps
    extrapolated to second order, as long as the error allows.
    """
    rate, noise, rho = _checked(codebook, learning_rate, noise_variance, signal_variance)
    deviation = checked_number("start_deviation", start_deviation)
    times = _checked_times(times)
    diffusion = _Diffusion(codebook, rate, noise, rho)
    mass = diffusion.start(deviation)
    now, step, errors = 0.0, 1e-3 / rate, []
    for time in times:
        while now < time:
            ahead = min(step, time - now)
            new, defect = diffusion.advance(mass, ahead)
            if defect <= _STEP_TOLERANCE:
                mass, now = new, now + ahead if ahead < time - now else time
            # The defect of a step grows like its square; a step that was cut short says less.
            factor = np.clip(0.8 * np.sqrt(_STEP_TOLERANCE / max(defect, 1e-12)), 0.3, 2.0)
            if ahead == step or factor < 1:
                step = ahead * factor
        errors.append(diffusion.error(mass))
    return OnePassPath(times, np.array(errors))


class _Diffusion:
    """Latent weights spread over cells, for each of many values of the teacher.

    `mass` has shape (teachers, cells). Cells are fine around thresholds and coarser away from them.
    """

    def __init__(self, codebook: Codebook, rate: float, noise: float, rho: float):
        self.rate, self.noise = rate, noise
        deviation = np.sqrt(rho)
        self.teacher, self.weight = _teacher_nodes(codebook, deviation)
        least = stochastic_rounding_error(codebook, rho)
        temperature = rate * (least + noise) / 2
        self.edges = _cell_edges(codebook, temperature, deviation)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        drift = self.teacher[:, None] - codebook.quantize(centres)
        self.squared_error = drift**2
        width = np.diff(self.edges)
        # Potential drop between neighbouring centres, and their distance.
        self.drop = (drift[:, 1:] * width[1:] + drift[:, :-1] * width[:-1]) / 2
        self.distance = (width[1:] + width[:-1]) / 2
        self.width = width

    def start(self, deviation: float) -> NDArray[np.float64]:
        """A Gaussian around zero; without deviation half the mass on each side of zero."""
        below = ndtr(self.edges / max(deviation, 1e-200))
        below[0], below[-1] = 0.0, 1.0
        return np.tile(np.diff(below), (self.teacher.size, 1))

    def error(self, mass: NDArray) -> float:
        return float(self.weight @ (mass * self.squared_error).sum(axis=1))

    def advance(self, mass: NDArray, step: float) -> tuple[NDArray, float]:
        """Mass a step later, and how much one step and two halves differ, relative."""
        whole = self._implicit(mass, step)
        half = self._implicit(self._implicit(mass, step / 2), step / 2)
        coarse, fine = self.error(whole), self.error(half)
        return 2 * half - whole, abs(coarse - fine) / (fine + self.noise)

    def _implicit(self, mass: NDArray, step: float) -> NDArray:
        temperature = self.rate * (self.error(mass) + self.noise) / 2
        return _implicit_step(
            mass, self.rate * step * temperature, self.drop / temperature, self.distance, self.width
        )


@numba.njit(cache=True)
def _implicit_step(mass, spread, drop, distance, width):
    """Implicit Euler step of the diffusion, row by row: a tridiagonal system each.

    `drop` is the potential drop over temperature between neighbouring centres, `spread` the step
    times the diffusion constant.
    """
    rows, n = mass.shape
    out = np.empty_like(mass)
    up, down = np.empty(n), np.empty(n)  # rates out of a cell, to the right and to the left
    scaled = np.empty(n)
    up[n - 1] = down[0] = 0.0
    for row in range(rows):
        for i in range(n - 1):
            z = drop[row, i]
            forward, backward = _bernoulli(-z), _bernoulli(z)
            up[i] = spread * forward / (distance[i] * width[i])
            down[i + 1] = spread * backward / (distance[i] * width[i + 1])
        pivot = 1 + up[0] + down[0]
        out[row, 0] = mass[row, 0] / pivot
        for i in range(1, n):
            scaled[i] = -down[i] / pivot
            pivot = 1 + up[i] + down[i] + up[i - 1] * scaled[i]
            out[row, i] = (mass[row, i] + up[i - 1] * out[row, i - 1]) / pivot
        for i in range(n - 2, -1, -1):
            out[row, i] -= scaled[i + 1] * out[row, i + 1]
    return out


@numba.njit(cache=True)
def _bernoulli(z):
    """`z / (exp(z) - 1)`."""
    if abs(z) < 1e-8:
        return 1 - z / 2
    if z > 700:
        return 0.0
    return z / np.expm1(z)


def _teacher_nodes(codebook: Codebook, deviation: float) -> tuple[NDArray, NDArray]:
    """Gauss-Legendre nodes of the teacher between its levels, with the Gaussian density."""
    reach = 6 * deviation
    inside = codebook.levels[np.abs(codebook.levels) < reach]
    edges = np.unique(np.concatenate([np.linspace(-reach, reach, 17), inside]))
    x, w = np.polynomial.legendre.leggauss(5)
    half = np.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half * (1 + x)).ravel()
    weights = (half * w).ravel() * np.exp(-np.square(nodes / deviation) / 2)
    return nodes, weights / weights.sum()


def _cell_edges(codebook: Codebook, temperature: float, deviation: float) -> NDArray:
    """Edges with every threshold among them, as fine there as the stationary law is."""
    levels, thresholds = codebook.levels, codebook.thresholds
    span = levels[-1] - levels[0]
    far = 10 * (span + deviation)
    points = np.concatenate([[thresholds[0] - far], thresholds, [thresholds[-1] + far]])
    finest = _RESOLUTION * temperature / (span / 2 + 2 * deviation)
    edges = [points[:1]]
    for left, right in pairwise(points):
        # Geometric from both ends: a cell is a share _GROWTH of its distance from the threshold.
        half = (right - left) / 2
        count = int(np.ceil(np.log1p(half / finest * _GROWTH) / _GROWTH))
        offsets = half * np.expm1(_GROWTH * np.arange(1, count + 1)) / np.expm1(_GROWTH * count)
        edges += [left + offsets, right - offsets[-2::-1], [right]]
    return np.concatenate(edges)


def one_pass_descent(
    codebook: Codebook,
    learning_rate: float,
    times: ArrayLike,
    n: int,
    seed: int | np.random.Generator,
    noise_variance: float = 0.1,
    signal_variance: float = 1.0,
    start_deviation: float = 0.0,
) -> OnePassPath:
    """Train `n` weights on fresh samples: what `one_pass` and `one_pass_path` have the limit of.

    Parameters
    ----------
    codebook, learning_rate, times, noise_variance, signal_variance, start_deviation
        As in `one_pass_path`; a unit of time is `n` steps.
    n : int
        Number of weights.
    seed : int or numpy.random.Generator
        Seed, or a generator to draw from.

    Raises
    ------
    TypeError, ValueError
        As `one_pass_path`; if `n` is not a positive whole number.
    """
    rate, noise, rho = _checked(codebook, learning_rate, noise_variance, signal_variance)
    deviation = checked_number("start_deviation", start_deviation)
    times = _checked_times(times)
    if n != int(n) or n < 1:
        raise ValueError(f"n = {n!r}: give a whole number of weights, at least 1")
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0.0, np.sqrt(rho), int(n))
    latent = rng.normal(0.0, deviation, int(n))
    errors, done = [], 0
    for time in times:
        for _ in range(done, round(time * n)):
            x = rng.standard_normal(int(n)) / np.sqrt(n)
            residual = x @ (codebook.quantize(latent) - teacher) - rng.normal(0.0, np.sqrt(noise))
            latent -= rate * residual * x
        done = max(done, round(time * n))
        errors.append(np.square(codebook.quantize(latent) - teacher).mean())
    return OnePassPath(times, np.array(errors))


def _checked(codebook, learning_rate, noise_variance, signal_variance):
    """Rate, noise and signal variance as floats."""
    problem = TeacherStudent(codebook, 1.0, noise_variance, signal_variance=signal_variance)
    rate = checked_number("learning_rate", learning_rate, positive=True)
    return rate, problem.noise_variance, problem.signal_variance


def _checked_times(times: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or times[0] < 0 or not (np.diff(times) > 0).all():
        raise ValueError(f"times has shape {times.shape}: give ascending numbers, at least 0")
    return times
