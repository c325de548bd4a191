"""Ground states beyond replica symmetry: one step of replica symmetry breaking at temperature 0.

The low-energy weight vectors fall into clusters; `exp(N complexity)` of them have a given energy.
Each cluster counts with weight `exp(-y N energy)`, so `y` selects an energy, as an inverse
temperature would. For one weight that means: at each value `r` of a field N(0, variance) it sits
on a level with the law

    p(w | r) ~ exp(-y [stiffness (w - r)^2 + ridge w^2] / 2) * P(w is best in its cluster's field),

that is, replica symmetry at temperature 1 / y, but for the last factor: the field of a cluster
scatters around the common one, with standard deviation `scatter / stiffness`.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import erf, erfc, exp, inf, log, pi, sqrt

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.problem import TeacherStudent, checked_number
from qgen_lab.theory.quadrature import gaussian_rule

_TOLERANCE = 1e-9  # on the residual; the iterations go on to rounding where they can
_FROZEN = 1e-6  # a susceptibility below this changes nothing any more
_DIVERGED = log(1e10)  # a susceptibility above this is infinite
_LOG_HUGE = 690.0  # exp of it is still finite
_NEGLIGIBLE = 45.0  # a level whose weight is exp(-45) of the largest is left out


@dataclass(frozen=True)
class OneStepRSBSolution:
    """Ground state, or metastable states of one energy, with one step of symmetry breaking.

    Numbers for one problem and one `y`, else arrays of shape (n,). All per weight unless said.

    Attributes
    ----------
    energy : float or ndarray
        Energy `|y - X w|^2 / 2 + ridge |w|^2 / 2` of the states that `y` selects.
    free_energy : float or ndarray
        `F = energy - complexity / y`; its maximum over `y` is the energy of the ground state.
    complexity : float or ndarray
        Logarithm of the number of such states; below zero there are none.
    gen_error : float or ndarray
        `E|w - w0|^2` of a state; label noise is not included.
    train_error : float or ndarray
        `|y - X w|^2` per sample.
    inter_state_overlap, intra_state_overlap : float or ndarray
        `q0`, of weight vectors from two clusters, and `q1`, from one: at temperature 0 the mean
        squared weight.
    overlap : float or ndarray
        `m`, with the teacher.
    susceptibility : float or ndarray
        `chi`, how strongly a weight answers a field while it stays in its cluster.
    y : float or ndarray
        Parisi's parameter over the temperature, 1 / energy.
    phase : str or ndarray
        "1RSB"; "frozen" where the susceptibility is below 1e-6, so that the equations are those of
        replica symmetry at temperature 1 / y; "interpolating" where there is no solution of
        finite susceptibility at this `y`: the other figures are NaN.
    converged : bool or ndarray
        Whether the residual is below 1e-9. If not, the figures are not a solution.
    iterations : int or ndarray
        Evaluations of the map that were made.
    residual : float or ndarray
        Largest relative change of `1 + chi`, `q1 - q0` and `rho + noise_variance - 2 m + q0` in one
        undamped pass of the map at the point returned; for a ground state also the complexity.
    """

    energy: float
    free_energy: float
    complexity: float
    gen_error: float
    train_error: float
    inter_state_overlap: float
    intra_state_overlap: float
    overlap: float
    susceptibility: float
    y: float
    phase: str
    converged: bool
    iterations: int
    residual: float

    def to_frame(self) -> pd.DataFrame:
        """One row a problem, one column a field."""
        return pd.DataFrame({f.name: np.atleast_1d(getattr(self, f.name)) for f in fields(self)})

    def __repr__(self) -> str:
        if np.ndim(self.energy):
            done = int(np.sum(self.converged))
            return f"OneStepRSBSolution({len(self.energy)} points, {done} converged)"
        return (
            f"OneStepRSBSolution(energy={self.energy:.6g}, gen_error={self.gen_error:.6g},"
            f" complexity={self.complexity:.4g}, y={self.y:.6g}, phase={self.phase!r},"
            f" converged={self.converged})"
        )


def solve_1rsb(
    problem: TeacherStudent | Sequence[TeacherStudent],
    y: float | Sequence[float] | None = None,
    max_iterations: int = 100_000,
) -> OneStepRSBSolution:
    """Solve the equations of one-step replica symmetry breaking at temperature 0.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several; temperature 0.
    y : float, sequence of float or None
        Parisi's parameter over the temperature, above 0, which selects an energy; several for one
        problem trace its complexity. None: the ground state, where the complexity is zero.
    max_iterations : int
        Most evaluations of the map for one problem and `y`, at least 1.

    Returns
    -------
    OneStepRSBSolution
        Of numbers for one problem and at most one `y`, else of arrays.

    Raises
    ------
    ValueError
        If a temperature is above 0, `y` is not above 0 and finite, `max_iterations` is below 1, or
        `problem` and `y` are sequences of different lengths.
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.

    Notes
    -----
    For y -> 0 and for y -> infinity the energy is that of replica symmetry at temperature 0. A
    codebook of finitely many levels never falls back to one overlap: near `q1 = q0` the map
    returns the square root of their difference. Where the equations have several roots at one
    `y`, it is the one reached from a small susceptibility.

    Within a cluster the field's averages close in the error function; the average over the common
    field is a graded Gauss-Legendre rule. Method: Mezard, Parisi, Virasoro, Spin Glass Theory and
    Beyond, 1987; the equations are our own derivation.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}: give at least 1")
    single = isinstance(problem, TeacherStudent) and np.ndim(y) == 0
    problems, ys = _paired(problem, y)
    solutions = [
        _solve(each, its_y, max_iterations) for each, its_y in zip(problems, ys, strict=True)
    ]
    if single:
        return solutions[0]
    return OneStepRSBSolution(
        **{
            f.name: np.array([getattr(s, f.name) for s in solutions])
            for f in fields(OneStepRSBSolution)
        }
    )


def _paired(problem, y) -> tuple[list[TeacherStudent], list[float | None]]:
    """Problems and their `y` side by side, checked."""
    problems = [problem] if isinstance(problem, TeacherStudent) else list(problem)
    if not all(isinstance(each, TeacherStudent) for each in problems):
        raise TypeError("problem: give a TeacherStudent or a sequence of them")
    for each in problems:
        if each.temperature > 0:
            raise ValueError(
                f"temperature = {each.temperature!r}: solve_1rsb is for temperature 0;"
                " solve_rs and the stability boundary are there for higher ones"
            )
    ys = [y] if np.ndim(y) == 0 else list(y)
    ys = [each if each is None else checked_number("y", each, positive=True) for each in ys]
    if isinstance(problem, TeacherStudent):
        problems = problems * len(ys)
    elif np.ndim(y) == 0:
        ys = ys * len(problems)
    if len(problems) != len(ys):
        raise ValueError(f"y has {len(ys)} entries for {len(problems)} problems: give one for each")
    return problems, ys


class _Exhausted(Exception):
    """The budget of evaluations is spent."""


@dataclass(frozen=True)
class _Surroundings:
    """What one weight sees of all others, at one point of the equations."""

    d1: float  # 1 + susceptibility
    d0: float  # 1 + susceptibility + y (q1 - q0)
    error: float  # rho + noise_variance - 2 m + q0
    stiffness: float
    scatter: float  # deviation of a cluster's field around the common one, times the stiffness

    @classmethod
    def at(cls, point: NDArray, alpha: float, y: float) -> "_Surroundings":
        susceptibility, variance, error = np.exp(point)
        d1 = 1 + susceptibility
        d0 = d1 + y * variance
        return cls(d1, d0, error, alpha / d0, sqrt(alpha / d0 * (variance / d1)))


@dataclass(frozen=True)
class Averages:
    """Averages over one weight's law: the new order parameters, and what the complexity needs.

    `variance` is `q1 - q0`, `mean_square` is `q0`. The entropy of the choice of levels counts each
    level relative to its chance of being the best in its cluster's field.
    """

    susceptibility: float
    variance: float
    mean_square: float
    entropy: float


class _Equations:
    """The map of `log [chi, q1 - q0, rho + noise_variance - 2 m + q0]`, and its roots.

    `point` moves to the last root found, from where the next search starts.
    """

    def __init__(self, problem: TeacherStudent, limit: int):
        self.problem = problem
        self.limit, self.spent = limit, 0
        error = problem.signal_variance + problem.noise_variance
        self.point = np.log([1e-3, np.square(problem.codebook.levels).mean() / 2, error])

    def at(self, point: NDArray, y: float) -> tuple[_Surroundings, Averages]:
        problem = self.problem
        seen = _Surroundings.at(point, problem.alpha, y)
        variance = problem.signal_variance + seen.error / problem.alpha
        return seen, cluster_averages(
            problem.codebook, seen.stiffness, variance, problem.ridge, y, seen.scatter
        )

    def map(self, point: NDArray, y: float) -> NDArray:
        """One undamped pass."""
        problem, (seen, here) = self.problem, self.at(point, y)
        slope = seen.stiffness * (here.susceptibility + y * here.variance)
        error = problem.noise_variance + problem.signal_variance * (1 - 2 * slope)
        new = [here.susceptibility, here.variance, error + here.mean_square]
        return np.log(np.maximum(new, 1e-300))

    def change(self, point: NDArray, y: float) -> NDArray:
        """What one undamped pass adds to a point; counted."""
        if self.spent >= self.limit:
            raise _Exhausted
        self.spent += 1
        return self.map(point, y) - point

    def solve(self, y: float) -> bool:
        """Move to the root that the damped map reaches; false if the susceptibility diverges.

        The strides grow while the map goes straight on: a susceptibility may diverge slowly.
        """
        start, self.y, near = self.point, y, 0.1
        stride, before = 0.5, np.zeros(3)
        while self.point[0] < _DIVERGED:
            change = self.change(self.point, y)
            size = np.abs(change).max()
            if size < near:
                found = self.newton(y)
                if found is not None:
                    self.point = found
                    return True
                near = size / 4
            straight = change @ before > 0.9 * np.linalg.norm(change) * np.linalg.norm(before)
            stride = 1.5 * stride if straight else 0.5
            self.point = self.point + np.clip(stride * change, -1, 1)
            before = change
        self.point = start
        return False

    def newton(self, y: float) -> NDArray | None:
        """The root near `point`, or None if Newton's method does not find one close by."""
        point, small = self.point, 1e-6 * np.eye(3)
        for _ in range(10):
            change = self.change(point, y)
            jacobian = np.transpose([self.change(point + d, y) - change for d in small]) / 1e-6
            point = point - np.linalg.lstsq(jacobian, change)[0]
            if not np.abs(point - self.point).max() < 0.5:
                return None
            if np.abs(change).max() < 1e-7:  # the last step has left rounding
                return point
        return None

    def residual(self) -> float:
        """Largest relative change that one undamped pass makes to the last root."""
        new = self.map(self.point, self.y)
        change = np.abs(new - self.point)
        change[0] = abs(log((1 + exp(new[0])) / (1 + exp(self.point[0]))))
        return float(change.max())

    def complexity(self) -> float:
        """Complexity at the last root: no large terms that cancel."""
        alpha, (seen, here) = self.problem.alpha, self.at(self.point, self.y)
        scatter = self.y * seen.scatter**2 / alpha * (2 - seen.d1)
        return here.entropy - alpha / 2 * (log(seen.d0 / seen.d1) - scatter)

    def ground_state(self) -> bool:
        """Move to the `y` where the complexity falls through zero, and to the root there."""
        problem = self.problem

        def complexity(log_y: float) -> float:
            # Without a finite susceptibility there are more states than any y selects.
            found = self.solve(exp(log_y))
            return self.complexity() if found else log(len(problem.codebook))

        octave = log(2)
        upper = log(25 / (problem.alpha * np.median(problem.codebook.spacing) ** 2))
        while complexity(upper) > 0:
            upper += octave
            if upper > _LOG_HUGE:
                return False
        while complexity(upper - octave) <= 0:  # coming down: the root of small susceptibility
            upper -= octave
        # Where another root took over on the way back, the complexity that is left says so.
        with suppress(ValueError):
            upper = brentq(complexity, upper - octave, upper, xtol=1e-13)
        return self.solve(exp(upper))


def _solve(problem: TeacherStudent, y: float | None, limit: int) -> OneStepRSBSolution:
    equations = _Equations(problem, limit)
    try:
        found = equations.ground_state() if y is None else equations.solve(y)
    except _Exhausted:
        found = True
    if not found:
        return _interpolating(equations)
    return _observables(equations, must_vanish=equations.complexity() if y is None else 0.0)


def _interpolating(equations: _Equations) -> OneStepRSBSolution:
    figures = {f.name: np.nan for f in fields(OneStepRSBSolution)}
    return OneStepRSBSolution(
        **figures
        | {
            "susceptibility": np.inf,
            "y": equations.y,
            "phase": "interpolating",
            "converged": False,
            "iterations": equations.spent,
        }
    )


def _observables(equations: _Equations, must_vanish: float) -> OneStepRSBSolution:
    problem, point, y = equations.problem, equations.point, equations.y
    rho = problem.signal_variance
    seen, here = equations.at(point, y)
    complexity = equations.complexity()
    mean_square = here.mean_square + here.variance
    overlap = rho * seen.stiffness * (here.susceptibility + y * here.variance)
    train_error = seen.error / seen.d0**2 + seen.scatter**2 / problem.alpha
    energy = (problem.alpha * train_error + problem.ridge * mean_square) / 2
    residual = max(equations.residual(), abs(must_vanish))
    return OneStepRSBSolution(
        energy=energy,
        free_energy=energy - complexity / y,
        complexity=complexity,
        gen_error=rho - 2 * overlap + mean_square,
        train_error=train_error,
        inter_state_overlap=here.mean_square,
        intra_state_overlap=mean_square,
        overlap=overlap,
        susceptibility=here.susceptibility,
        y=y,
        phase="frozen" if here.susceptibility < _FROZEN else "1RSB",
        converged=bool(residual < _TOLERANCE),
        iterations=equations.spent,
        residual=residual,
    )


# --- one weight ---------------------------------------------------------------------------------


def cluster_averages(
    codebook: Codebook, stiffness: float, variance: float, ridge: float, y: float, scatter: float
) -> Averages:
    """Averages over one weight's law and the common field, by graded quadrature."""
    curvature = stiffness + ridge
    # The law changes from one level to the next like that of a weight at temperature 1 / y, or
    # over the clusters' scatter, whichever is narrower.
    step = 1 / (y * stiffness * codebook.spacing)
    continuum = sqrt(curvature / y) / stiffness
    sizes = np.minimum(3.0 * np.minimum(step, continuum), 1.5 * scatter / stiffness)
    nodes, weights = gaussian_rule(
        sqrt(variance), codebook.thresholds * (curvature / stiffness), sizes
    )
    return Averages(
        *_cluster_sums(
            codebook.levels, codebook.thresholds, nodes * (stiffness / curvature), weights,
            curvature, y, scatter,
        )
    )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _cluster_sums(levels, thresholds, targets, weights, curvature, y, scatter):
    """Weighted sums over the common field; `targets` are the weights that it asks for.

    Given its level, the field of a weight's cluster is Gaussian, centred on the level's cell.
    """
    last = levels.size - 1
    susceptibility = variance = mean_square = entropy = 0.0
    for i in range(targets.size):
        target = targets[i]
        nearest = np.searchsorted(thresholds, target)
        centre = levels[nearest]
        best = (centre - target) ** 2
        reach = best + 2 * _NEGLIGIBLE / (y * curvature)
        k = nearest
        while k > 0 and (levels[k - 1] - target) ** 2 < reach:
            k -= 1
        total = first = second = cost = jumps = 0.0
        lower = -inf
        if k > 0:
            gap = levels[k] - levels[k - 1]
            lower = curvature * (thresholds[k - 1] - target) / scatter - y * scatter * gap / 2
        while k <= last and (k <= nearest or (levels[k] - target) ** 2 < reach):
            exponent = y * curvature / 2 * ((levels[k] - target) ** 2 - best)
            upper = next_lower = inf
            gap = 0.0
            if k < last:
                gap = levels[k + 1] - levels[k]
                middle = curvature * (thresholds[k] - target) / scatter
                upper = middle + y * scatter * gap / 2
                next_lower = middle - y * scatter * gap / 2
            law = exp(-exponent) * _gaussian_mass(lower, upper)
            offset = levels[k] - centre
            total += law
            first += law * offset
            second += law * offset**2
            cost += law * exponent
            jumps += gap * exp(-exponent - upper**2 / 2) if k < last else 0.0
            lower = next_lower
            k += 1
        mean = first / total
        susceptibility += weights[i] * jumps / (total * sqrt(2 * pi) * scatter)
        variance += weights[i] * (second / total - mean**2)
        mean_square += weights[i] * (centre + mean) ** 2
        entropy += weights[i] * (log(total) + cost / total)
    return susceptibility, variance, mean_square, entropy


@numba.njit(cache=True, nogil=True)
def _gaussian_mass(lower, upper):
    """Mass of N(0, 1) between two points, without cancellation in either tail."""
    if lower > 0:
        return (erfc(lower / sqrt(2)) - erfc(upper / sqrt(2))) / 2
    if upper < 0:
        return (erfc(-upper / sqrt(2)) - erfc(-lower / sqrt(2))) / 2
    return (erf(upper / sqrt(2)) - erf(lower / sqrt(2))) / 2
