"""What straight-through training finds, for a quadratic loss and small steps.

Straight-through descent rounds latent weights before it takes their gradient, so it never settles.
But the loss is quadratic: the gradient averaged over time is the gradient at the average of the
quantized weights. That average therefore solves a convex problem,

    min  |y - X v|^2 / 2 + ridge |v|^2 / 2 + latent_decay * sum_i envelope(v_i)

over the range of the codebook, where `envelope` joins the points (level, level^2 / 2) by straight
lines. The iterates are a stochastic rounding of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import erfc, exp, log, pi, sqrt

import numba
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.descent import largest_stable_rate
from qgen_lab.theory.problem import Instance, TeacherStudent, checked_number
from qgen_lab.theory.scalar_channel import ground_averages

_TOLERANCE = 1e-9  # on the residual
_FLOOR = 1e-5  # in units of the teacher's variance: rounding errors over it pass the tolerance
_TINY = 1e-300  # a stiffness that is as good as none
_SOFT = 1e100  # penalty over stiffness in the limit of a vanishing stiffness


@dataclass(frozen=True)
class StraightThroughLimit:
    """Observables of straight-through training in the limit of small steps and many weights.

    Numbers for one problem, arrays of shape (n,) for a sequence of n. Label noise is not
    included in the errors.

    Attributes
    ----------
    average_gen_error : float or ndarray
        `E|v - w0|^2` per weight, v the time average of the quantized weights.
    iterate_gen_error : float or ndarray
        The same of the quantized weights at one time, at a rate that stays constant.
    rounded_gen_error : float or ndarray
        The same of the average rounded to the nearest levels.
    average_train_error : float or ndarray
        `|y - X v|^2` per sample.
    oscillating_share : float or ndarray
        Share of the weights that keep moving between two levels.
    overlap : float or ndarray
        `E[w0 v]`, the same for the average and the iterates.
    susceptibility : float or ndarray
        How strongly a weight's average answers a field; infinite in the interpolating phase.
    phase : str or ndarray
        "stable", or "interpolating": the training error is 0 and the average not unique. It then
        depends on the start, and what depends on it is NaN.
    converged : bool or ndarray
        Whether the residual is below 1e-9. If not, the figures are not a solution.
    iterations : int or ndarray
        Evaluations of the one-weight averages.
    residual : float or ndarray
        Largest relative change of `1 + susceptibility` and of `E = average_gen_error +
        noise_variance` (plus 1e-6 rho) in one undamped pass of the equations at the point
        returned; 0 in the interpolating phase, where nothing is left to solve.
    """

    average_gen_error: float
    iterate_gen_error: float
    rounded_gen_error: float
    average_train_error: float
    oscillating_share: float
    overlap: float
    susceptibility: float
    phase: str
    converged: bool
    iterations: int
    residual: float

    def to_frame(self) -> pd.DataFrame:
        """One row a problem, one column a field."""
        return pd.DataFrame({f.name: np.atleast_1d(getattr(self, f.name)) for f in fields(self)})

    def __repr__(self) -> str:
        if np.ndim(self.overlap):
            done = int(np.sum(self.converged))
            return f"StraightThroughLimit({len(self.overlap)} problems, {done} converged)"
        return (
            f"StraightThroughLimit(average_gen_error={self.average_gen_error:.6g},"
            f" iterate_gen_error={self.iterate_gen_error:.6g},"
            f" rounded_gen_error={self.rounded_gen_error:.6g},"
            f" phase={self.phase!r}, converged={self.converged})"
        )


def straight_through(
    problem: TeacherStudent | Sequence[TeacherStudent], latent_decay: ArrayLike = 0.0
) -> StraightThroughLimit:
    """Errors of straight-through training on a quadratic loss, in closed form.

    The updates are `latent -= rate * (X' (X w - y) + ridge w + latent_decay latent)` with `w` the
    latent weights rounded to the codebook, in the limit of small rates, long times and many
    weights. Neither the rate nor the start appears in the result.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several; at temperature 0.
    latent_decay : float or array_like
        Weight decay on the latent weights, at least 0; for a sequence one number, or one a problem.

    Returns
    -------
    StraightThroughLimit
        Of numbers for one problem, of arrays for a sequence.

    Raises
    ------
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.
    ValueError
        If a problem's temperature is above 0; if `latent_decay` is negative, not finite, or not
        one number a problem.

    Notes
    -----
    The convex problem for the average is replica symmetric: with `r ~ N(0, rho + E / alpha)`,

        v(r) = argmin a (v - r)^2 / 2 + ridge v^2 / 2 + latent_decay envelope(v)

    is piecewise linear, and `a = alpha - E v'`, `E = noise_variance + rho - 2 rho E v' + E v^2`.
    All averages are partial moments of a Gaussian. Our own derivation. That binarized training
    averages gradients is known: Dockhorn et al., Demystifying and generalizing BinaryConnect,
    arXiv:2110.13220.
    """
    if isinstance(problem, TeacherStudent):
        return _limit(problem, checked_number("latent_decay", latent_decay))
    problems = list(problem)
    if not all(isinstance(each, TeacherStudent) for each in problems):
        raise TypeError("problem: give a TeacherStudent or a sequence of them")
    if np.shape(latent_decay) not in ((), (len(problems),)):
        raise ValueError(
            f"latent_decay has shape {np.shape(latent_decay)}: give one number, or one for each of"
            f" the {len(problems)} problems"
        )
    decays = np.broadcast_to(latent_decay, len(problems))
    limits = [straight_through(*pair) for pair in zip(problems, decays, strict=True)]
    names = [f.name for f in fields(StraightThroughLimit)]
    return StraightThroughLimit(
        **{name: np.array([getattr(each, name) for each in limits]) for name in names}
    )


def _limit(problem: TeacherStudent, decay: float) -> StraightThroughLimit:
    if problem.temperature != 0:
        raise ValueError(
            f"temperature = {problem.temperature!r}: small steps with the full gradient have"
            " none; give a problem with temperature = 0"
        )
    equations = _Equations(problem, decay)
    point = equations.solve()
    if point is None:
        figures = {f.name: np.nan for f in fields(StraightThroughLimit)}
        return StraightThroughLimit(
            **figures
            | {
                "average_train_error": 0.0,
                "susceptibility": np.inf,
                "phase": "interpolating",
                "converged": True,
                "iterations": equations.spent,
                "residual": 0.0,
            }
        )
    alpha, rho = problem.alpha, problem.signal_variance
    stiffness, noise = point
    slope, mean_square, variance, moving = equations.averages(stiffness, noise)
    average_error = rho * (1 - 2 * slope) + mean_square
    # Rounded to the nearest level: the gap's middle is where v crosses its threshold.
    shrinkage = 1 + (problem.ridge + decay) / stiffness
    kept, rounded_square = ground_averages(problem.codebook, shrinkage, rho + noise)
    floor = _FLOOR * rho
    pull = np.log((stiffness + slope) / alpha)
    drift = np.log((average_error + problem.noise_variance + floor) / (alpha * noise + floor))
    residual = max(abs(pull), abs(drift))
    return StraightThroughLimit(
        average_gen_error=float(average_error),
        iterate_gen_error=float(average_error + variance),
        rounded_gen_error=float(rho * (1 - 2 * kept) + rounded_square),
        average_train_error=float(noise * stiffness**2 / alpha),
        oscillating_share=float(moving),
        overlap=float(rho * slope),
        susceptibility=float(slope / stiffness),
        phase="stable",
        converged=bool(residual <= _TOLERANCE),
        iterations=equations.spent,
        residual=float(residual),
    )


class _Equations:
    """Two unknowns: the stiffness `a` that each weight sees and the noise `E / alpha` of its field.

    At given noise `a + slope(a)` rises with `a`, and has to be `alpha`: a root by bracketing, or
    none where weights stay free however soft the field is. What is left is one equation for
    the noise, to be solved where the stiffness exists: at any noise above some least one.
    """

    def __init__(self, problem: TeacherStudent, decay: float):
        self.problem = problem
        self.decay = decay
        self.spent = 0

    def averages(self, stiffness: float, noise: float) -> tuple[float, float, float, float]:
        self.spent += 1
        return gaussian_averages(
            self.problem.codebook.levels,
            1 + self.problem.ridge / stiffness,
            self.decay / stiffness,
            sqrt(self.problem.signal_variance + noise),
        )

    def free_share(self, noise: float) -> float:
        """The slope in the limit of a vanishing stiffness."""
        self.spent += 1
        deviation = sqrt(self.problem.signal_variance + noise)
        pull = _SOFT if self.decay > 0 else 0.0
        return gaussian_averages(self.problem.codebook.levels, 1.0, pull, deviation)[0]

    def stiffness(self, noise: float) -> float:
        """Root of `a + slope(a) = alpha`; the caller makes sure that there is one."""
        alpha, ridge = self.problem.alpha, self.problem.ridge
        if ridge == self.decay == 0:
            return alpha - self.averages(alpha, noise)[0]

        def excess(log_stiffness: float) -> float:
            stiffness = exp(log_stiffness)
            return stiffness + self.averages(stiffness, noise)[0] - alpha

        # The slope is at most a / (a + ridge).
        lower = log(max(alpha * ridge / (1 + ridge), _TINY)) if ridge > 0 else log(alpha / 2)
        while ridge == 0 and excess(lower) > 0:
            lower -= log(2.0)
        if excess(lower) >= 0:
            return exp(lower)
        upper = log(alpha) + 1e-12  # above the root also after rounding
        return exp(brentq(excess, lower, upper, xtol=1e-15, rtol=1e-15))

    def imbalance(self, noise: float) -> float:
        """Noise that the weights' errors make, less the noise that is there."""
        rho = self.problem.signal_variance
        slope, mean_square, *_ = self.averages(self.stiffness(noise), noise)
        error = self.problem.noise_variance + rho * (1 - 2 * slope) + mean_square
        return error - self.problem.alpha * noise

    def solve(self) -> tuple[float, float] | None:
        """Stiffness and noise, or None where the weights interpolate."""
        alpha, rho = self.problem.alpha, self.problem.signal_variance
        outer = np.abs(self.problem.codebook.levels).max()
        most = ((sqrt(rho) + outer) ** 2 + self.problem.noise_variance) / alpha
        least = self.problem.noise_variance / alpha
        if self.problem.ridge == 0 and self.free_share(least) >= alpha:
            if self.free_share(most) >= alpha:
                return None
            # Just above the noise at which the stiffness vanishes.
            edge = brentq(lambda noise: self.free_share(noise) - alpha, least, most, rtol=1e-14)
            least = edge * (1 + 1e-9)
            if self.imbalance(least) <= 0:
                return None
        noise = least
        if self.imbalance(least) > 0:
            noise = brentq(self.imbalance, least, most, xtol=1e-300, rtol=1e-14)
        return self.stiffness(noise), noise


def stochastic_rounding_error(codebook: Codebook, variance: float) -> float:
    """Mean squared error of rounding N(0, variance) at random to a neighbour, without bias inside.

    What is beyond the range goes to the outer levels.
    """
    slope, square, spread, _ = gaussian_averages(codebook.levels, 1.0, 0.0, sqrt(variance))
    return variance * (1 - 2 * slope) + square + spread


@numba.njit(cache=True)
def gaussian_averages(levels, shrinkage, pull, deviation):
    """Averages over `r ~ N(0, deviation^2)`: slope and square of v, variance in time, moving share.

    Between levels l and u, whose middle is t, `v = (r - pull t) / shrinkage`; it rests on a level
    in between. The variance in time is that of stochastic rounding, `(v - l) (u - v)`.
    """
    square = variance = moving = 0.0
    left = -np.inf  # where the level's rest begins, in standard deviations
    for k in range(levels.size - 1):
        level, upper = levels[k], levels[k + 1]
        middle = 0.5 * level + 0.5 * upper
        begin = (shrinkage * level + pull * middle) / deviation
        end = (shrinkage * upper + pull * middle) / deviation
        square += level**2 * _mass(left, begin)
        left = end
        mass = _mass(begin, end)
        if mass == 0.0:
            continue
        # First and second partial moments of the unit Gaussian.
        low, high = _density(begin), _density(end)
        first = low - high
        second = mass + begin * low - end * high
        scale = deviation / shrinkage
        spread = scale**2 * ((begin + end) * first - second - begin * end * mass)
        mean = scale * (first - pull * middle / deviation * mass)
        moving += mass
        variance += spread
        # (v - l) (u - v) = 2 t v - l u - v^2.
        square += 2 * middle * mean - level * upper * mass - spread
    square += levels[-1] ** 2 * _mass(left, np.inf)
    return moving / shrinkage, square, variance, moving


@numba.njit(cache=True)
def _mass(lower, upper):
    """Mass of the unit Gaussian between two points; no difference of near-equal numbers near 1."""
    if lower > 0:
        lower, upper = -upper, -lower
    return 0.5 * (erfc(-upper / sqrt(2.0)) - erfc(-lower / sqrt(2.0)))


@numba.njit(cache=True)
def _density(x):
    return exp(-0.5 * x * x) / sqrt(2.0 * pi)


# --- the same average on an instance ------------------------------------------------------------


@dataclass(frozen=True)
class AverageWeights:
    """Solution of the convex problem on an instance.

    `weights` has shape (N,); `residual` is the largest change of a weight in one more pass.
    """

    weights: NDArray[np.float64]
    converged: bool
    iterations: int
    residual: float

    def __repr__(self) -> str:
        return f"AverageWeights({self.weights.size} weights, converged={self.converged})"


def average_weights(
    instance: Instance,
    problem: TeacherStudent,
    latent_decay: float = 0.0,
    max_iterations: int = 20_000,
) -> AverageWeights:
    """Time average of straight-through training on an instance, without training.

    Solves the convex problem by accelerated proximal gradient descent. Where the average is not
    unique (fewer samples than free weights, no ridge) it is one of the solutions.

    Parameters
    ----------
    instance : Instance
        Inputs and labels.
    problem : TeacherStudent
        Gives the codebook and the ridge.
    latent_decay : float
        Weight decay on the latent weights, at least 0.
    max_iterations : int
        Most gradient steps.

    Raises
    ------
    TypeError, ValueError
        If `latent_decay` is not a finite number, at least 0; if the instance's shapes do not match
        or it holds NaN.

    Notes
    -----
    Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009, with the restarts of
    O'Donoghue and Candès, 2015.
    """
    decay = checked_number("latent_decay", latent_decay)
    step = 0.49 * largest_stable_rate(instance, problem)  # just below one over the curvature
    gram, target = instance.X.T @ instance.X, instance.X.T @ instance.y
    gram[np.diag_indices_from(gram)] += problem.ridge
    knots, values = _penalty_knots(problem.codebook, step * decay)
    v = ahead = np.zeros(target.size)
    inertia = 1.0
    residual, iteration = np.inf, 0
    while residual >= 1e-12 and iteration < max_iterations:
        new = np.interp(ahead - step * (gram @ ahead - target), knots, values)
        residual = float(np.abs(new - ahead).max())
        if (ahead - new) @ (new - v) > 0:  # the momentum points uphill
            inertia = 1.0
        grown = (1 + sqrt(1 + 4 * inertia**2)) / 2
        ahead = new + (inertia - 1) / grown * (new - v)
        v, inertia = new, grown
        iteration += 1
    return AverageWeights(v, residual < 1e-9, iteration, residual)


def _penalty_knots(codebook: Codebook, decay: float) -> tuple[NDArray, NDArray]:
    """Corners of the map `r -> argmin (v - r)^2 / 2 + decay envelope(v)` over the range."""
    shift = decay * codebook.thresholds
    knots = np.stack([codebook.levels[:-1] + shift, codebook.levels[1:] + shift], axis=1)
    values = np.stack([codebook.levels[:-1], codebook.levels[1:]], axis=1)
    return knots.ravel(), values.ravel()
