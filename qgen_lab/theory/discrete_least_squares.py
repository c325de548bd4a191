"""Discrete least squares: procedures that look for a good weight vector on the codebook.

A procedure takes an instance and a problem, which gives the codebook and the ridge, and returns a
`Configuration`: weights on the codebook with their energy and errors. It draws nothing at random.
`procedures` has them by name. To add one, write the function and enter it there; the test of the
registry runs it by itself. `anneal` and `straight_through_descent` answer the same question.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from qgen_lab.theory.finite_size import Configuration, configuration, quadratic_form
from qgen_lab.theory.problem import Instance, TeacherStudent


def ridge_weights(
    instance: Instance, problem: TeacherStudent, ridge: float | None = None
) -> NDArray[np.float64]:
    """Full-precision ridge regression on an instance.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the variances of noise and teacher.
    ridge : float, optional
        Strength of the penalty `ridge |w|^2 / 2`, at least 0; by default the tuned one of least
        generalization error, `noise_variance / signal_variance`.

    Returns
    -------
    ndarray, shape (N,)
        The weights.

    Raises
    ------
    TypeError, ValueError
        If `ridge` is not a finite number, at least 0; if it is 0 and the samples do not determine
        the weights; if the instance is not sound (as in `enumerate_states`).
    """
    factor, pull = _factorized(instance, problem, ridge)
    return cho_solve(factor, pull)


def round_ridge(
    instance: Instance, problem: TeacherStudent, ridge: float | None = None
) -> Configuration:
    """Round the ridge solution to the nearest levels.

    With the tuned ridge and inputs that are not correlated this is, given the data, the weight
    vector on the codebook of least expected generalization error.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook, and the ridge that the energy counts.
    ridge : float, optional
        Ridge of the solution to round, the tuned one by default.

    Raises
    ------
    TypeError, ValueError
        As `ridge_weights`.
    """
    weights = ridge_weights(instance, problem, ridge)
    return configuration(instance, problem, problem.codebook.quantize(weights))


def round_compensated(
    instance: Instance,
    problem: TeacherStudent,
    ridge: float | None = None,
    order: str = "surest",
) -> Configuration:
    """Round the ridge solution one weight after the other, the rest refitted after each.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook, and the ridge that the energy counts.
    ridge : float, optional
        Ridge of the solution to round, the tuned one by default.
    order : {"surest", "strongest", "given"}
        Which weight is next: the one farthest from a threshold in units of its standard deviation
        given those already rounded; by falling squared length of its column of inputs; or as they
        stand.

    Raises
    ------
    TypeError, ValueError
        As `ridge_weights`; if `order` is unknown.

    Notes
    -----
    In a fixed order this is Babai's nearest plane, 1986, and what Frantar et al., GPTQ, 2022, do to
    a layer's weights. N**3 operations in the worst case.
    """
    factor, pull = _factorized(instance, problem, ridge)
    covariance = cho_solve(factor, np.eye(pull.size))
    if order == "surest":
        sequence = np.empty(0, np.intp)
    elif order == "strongest":
        sequence = np.argsort(-np.sum(instance.X**2, axis=0), kind="stable")
    elif order == "given":
        sequence = np.arange(pull.size)
    else:
        raise ValueError(f"order = {order!r}: give 'surest', 'strongest' or 'given'")
    weights = cho_solve(factor, pull)
    codebook = problem.codebook
    _round_in_turn(covariance, weights, codebook.levels, codebook.thresholds, sequence)
    return configuration(instance, problem, weights)


def coordinate_descent(
    instance: Instance,
    problem: TeacherStudent,
    start: ArrayLike | None = None,
    order: str = "cyclic",
) -> Configuration:
    """Move single weights to their best level, the others held, until no move lowers the energy.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook and the ridge.
    start : array_like, shape (N,), optional
        Weights to start from, rounded to the codebook; the tuned ridge solution by default.
    order : {"cyclic", "greedy"}
        One weight after the other, or always the move that lowers the energy most.

    Raises
    ------
    TypeError, ValueError
        As `ridge_weights`; if `start` is not N finite numbers, or `order` is unknown.
    """
    if order not in ("cyclic", "greedy"):
        raise ValueError(f"order = {order!r}: give 'cyclic' or 'greedy'")
    gram, pull, _ = quadratic_form(instance, problem)
    start = ridge_weights(instance, problem) if start is None else np.asarray(start, np.float64)
    if start.shape != pull.shape or not np.isfinite(start).all():
        raise ValueError(
            f"start has shape {start.shape}: give {pull.size} finite numbers, one for each weight"
        )
    codebook = problem.codebook
    weights = codebook.quantize(start)
    descend = _descend_in_turn if order == "cyclic" else _descend_steepest
    # Below this, a gain is rounding error.
    least_gain = 1e-12 * np.diag(gram).max() * np.ptp(codebook.levels) ** 2
    gradient = gram @ weights - pull
    descend(gram, gradient, weights, codebook.levels, codebook.thresholds, least_gain)
    return configuration(instance, problem, weights)


procedures: dict[str, Callable[[Instance, TeacherStudent], Configuration]] = {
    "rounded ridge": round_ridge,
    "compensated rounding": round_compensated,
    "coordinate descent": coordinate_descent,
    "greedy coordinate descent": partial(coordinate_descent, order="greedy"),
}


def _factorized(
    instance: Instance, problem: TeacherStudent, ridge: float | None
) -> tuple[tuple, NDArray[np.float64]]:
    """Cholesky factor of `X' X + ridge`, the tuned ridge if None, and `X' y`."""
    ridge = problem.noise_variance / problem.signal_variance if ridge is None else ridge
    gram, pull, _ = quadratic_form(instance, replace(problem, ridge=ridge))
    try:
        if ridge == 0 and instance.y.size < pull.size:
            raise LinAlgError
        return cho_factor(gram), pull
    except LinAlgError:
        raise ValueError(
            f"ridge = {ridge!r}: the samples do not determine the weights; give a ridge above 0"
        ) from None


# --- one weight after the other -----------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _round_in_turn(covariance, weights, levels, thresholds, sequence):
    """Round `weights` in place, in the order of `sequence`, or surest first if that is empty.

    `covariance`, the inverse of the energy's second derivative, is overwritten: what is left of
    it belongs to the weights not rounded yet, those already rounded held.
    """
    n = weights.size
    open_ = np.arange(n)
    for step in range(n):
        count = n - step
        place = 0
        if sequence.size:
            while open_[place] != sequence[step]:
                place += 1
        else:
            surest = -1.0
            for p in range(count):
                i = open_[p]
                distance = np.inf
                for threshold in thresholds:
                    distance = min(distance, abs(weights[i] - threshold))
                sureness = distance / np.sqrt(covariance[i, i])
                if sureness > surest:
                    place, surest = p, sureness
        i = open_[place]
        open_[place : count - 1] = open_[place + 1 : count].copy()
        level = levels[np.searchsorted(thresholds, weights[i])]
        pull = (level - weights[i]) / covariance[i, i]
        weights[i] = level
        for p in range(count - 1):
            j = open_[p]
            weights[j] += pull * covariance[i, j]
            share = covariance[j, i] / covariance[i, i]
            for q in range(count - 1):
                k = open_[q]
                covariance[j, k] -= share * covariance[i, k]


@numba.njit(cache=True, nogil=True)
def _gain(curvature, slope, weight, levels, thresholds):
    """The best level of one weight, and how much lower the energy is there."""
    if curvature <= 0:
        return weight, 0.0
    level = levels[np.searchsorted(thresholds, weight - slope / curvature)]
    change = level - weight
    return level, -change * (slope + curvature * change / 2)


@numba.njit(cache=True, nogil=True)
def _move(gram, gradient, weights, i, level):
    change = level - weights[i]
    weights[i] = level
    for j in range(weights.size):
        gradient[j] += change * gram[i, j]


@numba.njit(cache=True, nogil=True)
def _descend_in_turn(gram, gradient, weights, levels, thresholds, least_gain):
    """Sweeps over all weights until one changes nothing; in place."""
    moved = True
    while moved:
        moved = False
        for i in range(weights.size):
            level, gain = _gain(gram[i, i], gradient[i], weights[i], levels, thresholds)
            if gain > least_gain:
                _move(gram, gradient, weights, i, level)
                moved = True


@numba.njit(cache=True, nogil=True)
def _descend_steepest(gram, gradient, weights, levels, thresholds, least_gain):
    """Always the best single move, until none is left; in place."""
    while True:
        best, best_level, most = 0, weights[0], least_gain
        for i in range(weights.size):
            level, gain = _gain(gram[i, i], gradient[i], weights[i], levels, thresholds)
            if gain > most:
                best, best_level, most = i, level, gain
        if most == least_gain:
            return
        _move(gram, gradient, weights, best, best_level)
