"""Typical-case theory of a linear student whose weights lie on a codebook.

The student's weights are drawn from the Gibbs measure `exp(-H / temperature)` on the codebook,
with `H(w) = |y - X w|^2 / 2 + ridge |w|^2 / 2`. Replica-symmetric equations in our own derivation:
the book's chapter "Typical case". Every convention that others may set differently is an argument.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numba import config
from numpy.typing import NDArray
from scipy.optimize import brentq

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.problem import TeacherStudent
from qgen_lab.theory.ridge import ridge_solution
from qgen_lab.theory.saddle_point import Model, SaddlePoint, cooled, ground_state, heated
from qgen_lab.theory.scalar_channel import ground_averages

_TOLERANCE = 1e-9  # on the residual; the iterations go on to rounding where they can
_TASK = 16  # ladders that a thread takes at once


@dataclass(frozen=True)
class RSSolution:
    """Replica-symmetric order parameters and observables, all per weight unless said.

    Numbers for one problem, arrays of shape (n,) for a sequence of n. `<.>` is the Gibbs mean.

    Attributes
    ----------
    overlap : float or ndarray
        `m = E[w0 <w>]`, with the teacher.
    replica_overlap, self_overlap : float or ndarray
        `q = E[<w>^2]` and `Q = E[<w^2>]`.
    susceptibility : float or ndarray
        `chi = (Q - q) / T`, its limit at T = 0; infinite in the interpolating phase.
    gen_error, gen_error_mean : float or ndarray
        `E|w - w0|^2` of a weight vector drawn from the Gibbs measure, and of the Gibbs mean.
        Label noise is not included.
    train_error : float or ndarray
        `<|y - X w|^2>` per sample.
    free_energy, entropy : float or ndarray
        `f = e - T s` and `s` (in nats); `e` is the mean of H. A negative entropy says that
        replica symmetry does not hold.
    replicon : float or ndarray
        Stability against replica symmetry breaking, stable if positive; minus infinity at T = 0.
    phase : str or ndarray
        "stable", "unstable" (replicon below 0) or "interpolating" (infinite susceptibility,
        training error 0, the other figures in the limit of a vanishing ridge); "none" where the
        branch asked for does not exist.
    branch : str or ndarray
        Which solution it is: "ground" (temperature 0), "cooled" or "heated".
    converged : bool or ndarray
        Whether the residual is below 1e-9. If not, the figures are not a solution.
    iterations : int or ndarray
        Evaluations of the map on the way to it, shared ones included.
    residual : float or ndarray
        Largest relative change of `1 + chi` and of `rho + noise_variance - 2 m + q` (plus
        1e-6 rho) in one undamped pass of the map at the point returned.
    """

    overlap: float
    replica_overlap: float
    self_overlap: float
    susceptibility: float
    gen_error: float
    gen_error_mean: float
    train_error: float
    free_energy: float
    entropy: float
    replicon: float
    phase: str
    branch: str
    converged: bool
    iterations: int
    residual: float

    def to_frame(self) -> pd.DataFrame:
        """One row a problem, one column a field."""
        return pd.DataFrame({f.name: np.atleast_1d(getattr(self, f.name)) for f in fields(self)})

    def __repr__(self) -> str:
        if np.ndim(self.overlap):
            done = int(np.sum(self.converged))
            return f"RSSolution({len(self.overlap)} problems, {done} converged)"
        return (
            f"RSSolution(gen_error={self.gen_error:.6g}, train_error={self.train_error:.6g},"
            f" susceptibility={self.susceptibility:.6g}, replicon={self.replicon:.6g},"
            f" phase={self.phase!r}, converged={self.converged})"
        )


def solve_rs(
    problem: TeacherStudent | Sequence[TeacherStudent],
    branch: str | None = None,
    max_iterations: int = 10_000,
) -> RSSolution:
    """Solve the replica-symmetric equations.

    Between the interpolation threshold and a spinodal above it the equations have several
    solutions at low temperature; `branch` says which one is meant.

    Parameters
    ----------
    problem : TeacherStudent or sequence of TeacherStudent
        One problem, or several, which are solved in `NUMBA_NUM_THREADS` threads. Those that
        differ in temperature only share one path, so that a ladder of temperatures costs far less
        than its rungs one by one. No solution depends on which others are asked for.
    branch : {None, "cooled", "heated"}
        "cooled": reached by lowering the temperature slowly from a high one; needs a temperature
        above 0, and is the default there. "heated": reached by raising the temperature from the
        solution at 0, which is the default at 0. Where that branch ends below the
        temperature asked for, the figures are NaN and `converged` is false.
    max_iterations : int
        Most evaluations of the map for one problem, at least 1.

    Returns
    -------
    RSSolution
        Of numbers for one problem, of arrays for a sequence.

    Raises
    ------
    ValueError
        If `branch` is unknown, or "cooled" at temperature 0; if `max_iterations` is below 1.
    TypeError
        If `problem` is neither a `TeacherStudent` nor a sequence of them.

    Notes
    -----
    Derived in the book's chapter "Typical case". Averages over the field are closed forms in the
    error function at temperature 0, and graded Gauss-Legendre quadrature above.
    """
    if branch not in (None, "cooled", "heated"):
        raise ValueError(f"branch = {branch!r}: give 'cooled', 'heated' or None")
    if max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}: give at least 1")
    if isinstance(problem, TeacherStudent):
        columns = _solve([problem], branch, max_iterations)
        return RSSolution(**{name: column.item() for name, column in columns.items()})
    problems = list(problem)
    if not all(isinstance(each, TeacherStudent) for each in problems):
        raise TypeError("problem: give a TeacherStudent or a sequence of them")
    return RSSolution(**_solve(problems, branch, max_iterations))


def _solve(
    problems: list[TeacherStudent], branch: str | None, max_iterations: int
) -> dict[str, NDArray]:
    """The fields of the solution, one entry a problem."""
    if branch == "cooled" and any(each.temperature == 0 for each in problems):
        raise ValueError(
            "branch = 'cooled' needs a temperature above 0: give a small one, or"
            " branch = 'heated' for the solution at 0"
        )
    branches = ["ground" if p.temperature == 0 else branch or "cooled" for p in problems]
    points = np.empty((len(problems), len(SaddlePoint._fields)))

    def solve_ladders(ladders: list[list[int]]) -> None:
        for members in ladders:
            ladder = [problems[k] for k in members]
            points[members] = _saddle_points(ladder, branches[members[0]], max_iterations)

    ladders = _ladders(problems, branches)
    threads = min(config.NUMBA_NUM_THREADS, len(ladders))
    if threads > 1:
        # Every few are one task: small enough to share out evenly, large enough to cost nothing.
        tasks = [ladders[k : k + _TASK] for k in range(0, len(ladders), _TASK)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(solve_ladders, tasks))
    else:
        solve_ladders(ladders)
    return _observables(problems, SaddlePoint(*points.T)) | {"branch": np.array(branches)}


def _ladders(problems: list[TeacherStudent], branches: list[str]) -> list[list[int]]:
    """Indices of problems that share a path: they differ in temperature only, in path order.

    Nothing is shared between widths or sample ratios: a root followed along those may lead to
    another branch than cooling does.
    """
    ladders: dict[tuple, list[int]] = {}
    for k, (p, branch) in enumerate(zip(problems, branches, strict=True)):
        key = (p.codebook, p.alpha, p.noise_variance, p.ridge, p.signal_variance, branch)
        ladders.setdefault(key, []).append(k)
    for (*_, branch), members in ladders.items():
        members.sort(key=lambda k: problems[k].temperature, reverse=branch == "cooled")
    return list(ladders.values())


def _saddle_points(
    ladder: list[TeacherStudent], branch: str, max_iterations: int
) -> NDArray[np.float64]:
    """One row a problem, one column a field of `SaddlePoint`."""
    problem, model = ladder[0], Model.of(ladder[0])
    if branch == "ground":
        return np.array([ground_state(model, max_iterations)])
    temperatures = np.array([p.temperature for p in ladder])
    spacing = problem.codebook.spacing
    if branch == "heated":
        # So cold that each threshold is much sharper than the levels are apart.
        return heated(model, temperatures, 1e-3 * spacing.min() ** 2, max_iterations)
    # So hot that the weights do not feel that the levels are discrete.
    hot = 4 * problem.alpha * spacing.max() ** 2
    guesses = {t: _hot_guess(problem, t) for t in {max(t, hot) for t in temperatures.tolist()}}
    stiffness, noise = np.array([guesses[max(t, hot)] for t in temperatures.tolist()]).T.copy()
    return cooled(model, temperatures, hot, stiffness, noise, max_iterations)


def _hot_guess(problem: TeacherStudent, temperature: float) -> tuple[float, float]:
    """Ridge regression whose Gaussian prior has, at this temperature, the codebook's spread."""
    prior = problem.ridge + temperature / np.square(problem.codebook.levels).mean()
    ridge = ridge_solution(problem.alpha, problem.noise_variance, prior, problem.signal_variance)
    slope = ridge.overlap / problem.signal_variance
    noise = ridge.self_overlap / slope**2 - problem.signal_variance
    return slope / ridge.susceptibility, max(noise, 0.0)


def _observables(problems: list[TeacherStudent], point: SaddlePoint) -> dict[str, NDArray]:
    alpha, rho, ridge, temperature = (
        np.array([getattr(p, name) for p in problems])
        for name in ("alpha", "signal_variance", "ridge", "temperature")
    )
    with np.errstate(divide="ignore"):  # where the stiffness is zero
        chi = point.slope / point.stiffness
        damping = point.stiffness / (point.stiffness + point.slope)  # 1 / (1 + chi)
        entropy = point.entropy + alpha / 2 * (np.log(damping) + 1 - damping)
    overlap = rho * point.slope
    train_error = alpha * point.noise * damping**2 + temperature * (1 - damping)
    energy = alpha / 2 * train_error + ridge / 2 * point.second_moment
    heat = temperature * np.where(temperature > 0, entropy, 0.0)  # the entropy may be infinite
    replicon = 1 - point.squared_slope / alpha
    phase = np.where(replicon >= 0, "stable", "unstable").astype("<U13")
    phase[point.stiffness == 0] = "interpolating"
    phase[np.isnan(point.stiffness)] = "none"
    return {
        "overlap": overlap,
        "replica_overlap": point.mean_square,
        "self_overlap": point.second_moment,
        "susceptibility": chi,
        "gen_error": rho - 2 * overlap + point.second_moment,
        "gen_error_mean": rho - 2 * overlap + point.mean_square,
        "train_error": train_error,
        "free_energy": energy - heat,
        "entropy": entropy,
        "replicon": replicon,
        "phase": phase,
        "converged": point.residual <= _TOLERANCE,
        "iterations": point.iterations.astype(int),
        "residual": point.residual,
    }


def interpolation_threshold(
    codebook: Codebook, noise_variance: float = 0.1, signal_variance: float = 1.0
) -> float:
    """Samples per weight below which the student fits noisy labels exactly, without a ridge.

    Replica symmetry at temperature 0: the susceptibility diverges there. The equations
    `alpha = slope` and `alpha v = noise_variance + rho - 2 rho slope + mean_square` become one
    for the variance `rho + v` of the field.

    Parameters
    ----------
    codebook : Codebook
        The student's levels.
    noise_variance, signal_variance : float
        As in `TeacherStudent`.

    Returns
    -------
    float
        alpha_c, below 1.

    Raises
    ------
    TypeError, ValueError
        As `TeacherStudent`.
    """
    problem = TeacherStudent(codebook, 1.0, noise_variance, signal_variance=signal_variance)
    rho = problem.signal_variance

    def excess(log_v: float) -> float:
        v = np.exp(log_v)
        slope, mean_square = ground_averages(codebook, 1.0, rho + v)
        return problem.noise_variance + rho - 2 * rho * slope + mean_square - slope * v

    lower = upper = np.log(rho) - 40.0  # hardly any noise: alpha is far above the threshold
    while excess(upper) > 0:
        lower, upper = upper, upper + 1.0
    root = brentq(excess, lower, upper, xtol=1e-15, rtol=1e-15)
    return float(ground_averages(codebook, 1.0, rho + np.exp(root))[0])
