from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory import Instance, TeacherStudent, enumerate_states, sample
from qgen_lab.theory.discrete_least_squares import (
    coordinate_descent,
    procedures,
    ridge_weights,
    round_compensated,
    round_ridge,
)

UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
PROBLEMS = [
    TeacherStudent(uniform(2, 1.5), 2.0, 0.1, 0.1),
    TeacherStudent(uniform(1, 1.0), 0.5, 0.1),
    TeacherStudent(lloyd_max(3), 1.0, 0.5, 0.02, signal_variance=2.0),
    TeacherStudent(power_of_two(3, 2.0), 0.7, 0.2, 0.3),
    TeacherStudent(UNEVEN, 3.0, 1.0),
]


def energy(instance, problem, weights):
    residual = instance.y - instance.X @ weights
    return (residual @ residual + problem.ridge * weights @ weights) / 2 / weights.size


# --- what every procedure keeps to --------------------------------------------------------------


@pytest.mark.parametrize("name", procedures)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("covariance_exponent", [0.0, 1.0])
def test_every_procedure_keeps_the_protocol(name, problem, covariance_exponent):
    instance = sample(problem, 40, 7, covariance_exponent)
    before = instance.X.copy(), instance.y.copy()
    found = procedures[name](instance, problem)
    again = procedures[name](instance, problem)
    assert found.weights.shape == (40,)
    assert np.isin(found.weights, problem.codebook.levels).all()
    assert found.energy == pytest.approx(energy(instance, problem, found.weights), rel=1e-12)
    assert found.gen_error == pytest.approx(instance.gen_error(found.weights), rel=1e-12)
    assert (found.weights == again.weights).all()
    assert (before[0] == instance.X).all()
    assert (before[1] == instance.y).all()
    # Far below weights drawn at random.
    random = np.random.default_rng(0).choice(problem.codebook.levels, (20, 40))
    assert found.energy < min(energy(instance, problem, w) for w in random)


@pytest.mark.parametrize("name", procedures)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), bits=st.integers(1, 2))
def test_no_procedure_beats_enumeration(name, seed, bits):
    problem = TeacherStudent(uniform(bits, 1.2), 1.5, 0.2, 0.05)
    instance = sample(problem, 5, seed, 0.5)
    lowest = enumerate_states(instance, problem, 0.0).ground_state
    assert procedures[name](instance, problem).energy >= lowest.energy - 1e-12


@pytest.mark.parametrize("name", procedures)
def test_data_that_the_codebook_fits_exactly_are_fitted(name):
    problem = TeacherStudent(UNEVEN, 2.0, noise_variance=0.0)
    drawn = sample(problem, 30, 3)
    teacher = UNEVEN.quantize(drawn.teacher)
    instance = Instance(drawn.X, drawn.X @ teacher, teacher)
    found = procedures[name](instance, problem)
    assert (found.weights == teacher).all()
    assert found.energy == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("name", procedures)
def test_inputs_without_overlap_are_rounded_one_by_one(name):
    problem = PROBLEMS[0]
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((60, 20)))[0]
    instance = Instance(basis, rng.standard_normal(60), rng.standard_normal(20))
    alone = problem.codebook.quantize(basis.T @ instance.y / (1 + problem.ridge))
    assert (procedures[name](instance, problem).weights == alone).all()


@pytest.mark.parametrize("name", procedures)
def test_every_procedure_refuses_what_is_not_sound(name):
    problem = PROBLEMS[0]
    instance = sample(problem, 10, 0)
    broken = instance.X.copy()
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"instance.X holds NaN or infinity"):
        procedures[name](replace(instance, X=broken), problem)
    with pytest.raises(ValueError, match="instance has X of shape"):
        procedures[name](replace(instance, y=instance.y[:-1]), problem)
    few = replace(problem, alpha=0.5, noise_variance=0.0)
    with pytest.raises(ValueError, match=r"ridge = 0.0: the samples do not determine the weights"):
        procedures[name](sample(few, 10, 0), few)


# --- slow, obvious twins ------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("ridge", [None, 0.7])
def test_rounded_ridge(problem, ridge):
    instance = sample(problem, 30, 5, 0.5)
    strength = problem.noise_variance / problem.signal_variance if ridge is None else ridge
    stacked = np.vstack([instance.X, np.sqrt(strength) * np.eye(30)])
    fit = np.linalg.lstsq(stacked, np.append(instance.y, np.zeros(30)))[0]
    assert ridge_weights(instance, problem, ridge) == pytest.approx(fit, abs=1e-9)
    found = round_ridge(instance, problem, ridge)
    assert (found.weights == problem.codebook.quantize(fit)).all()


def refitted_in_turn(instance, problem, ridge, order):
    """Compensated rounding by fitting all that is left anew, from the data, after every weight."""
    n, codebook = instance.teacher.size, problem.codebook
    X = np.vstack([instance.X, np.sqrt(ridge) * np.eye(n)])
    target = np.append(instance.y, np.zeros(n))
    weights, left = np.zeros(n), list(range(n))
    length = np.linalg.norm(instance.X, axis=0)
    while left:
        fixed = [i for i in range(n) if i not in left]
        rest = target - X[:, fixed] @ weights[fixed]
        fit = np.linalg.lstsq(X[:, left], rest)[0]
        deviation = np.sqrt(np.diag(np.linalg.inv(X[:, left].T @ X[:, left])))
        if order == "surest":
            distance = np.abs(fit[:, None] - codebook.thresholds).min(axis=1)
            chosen = int(np.argmax(distance / deviation))
        elif order == "strongest":
            chosen = int(np.argmax(length[left]))
        else:
            chosen = 0
        weights[left[chosen]] = codebook.quantize(fit[chosen])
        del left[chosen]
    return weights


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("order", ["surest", "strongest", "given"])
@pytest.mark.parametrize("covariance_exponent", [0.0, 1.5])
def test_compensated_rounding_equals_refitting(problem, order, covariance_exponent):
    instance = sample(problem, 24, 11, covariance_exponent)
    found = round_compensated(instance, problem, 0.1, order)
    assert (found.weights == refitted_in_turn(instance, problem, 0.1, order)).all()


def descended(instance, problem, weights, order):
    """Coordinate descent by computing the energy of every candidate anew."""
    weights = weights.copy()

    def candidates(i):
        for level in problem.codebook.levels:
            other = weights.copy()
            other[i] = level
            yield energy(instance, problem, other), i, level

    moved = True
    while moved:
        moved = False
        here = energy(instance, problem, weights)
        if order == "greedy":
            lowest, i, level = min(c for k in range(weights.size) for c in candidates(k))
            if lowest < here - 1e-13:
                weights[i], moved = level, True
            continue
        for k in range(weights.size):
            lowest, i, level = min(candidates(k))
            if lowest < here - 1e-13:
                weights[i], moved, here = level, True, lowest
    return weights


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("order", ["cyclic", "greedy"])
def test_coordinate_descent_equals_trying_every_move(problem, order):
    instance = sample(problem, 20, 13, 0.5)
    start = np.random.default_rng(2).normal(size=20)
    found = coordinate_descent(instance, problem, start, order)
    slow = descended(instance, problem, problem.codebook.quantize(start), order)
    assert (found.weights == slow).all()


@pytest.mark.parametrize("order", ["cyclic", "greedy"])
def test_coordinate_descent_never_climbs_and_stays_where_it_ends(order):
    problem = PROBLEMS[0]
    instance = sample(problem, 200, 17, 1.0)
    start = round_compensated(instance, problem)
    found = coordinate_descent(instance, problem, start.weights, order)
    assert found.energy <= start.energy
    # No single weight has a better level.
    gradient = instance.X.T @ (instance.X @ found.weights - instance.y)
    gradient += problem.ridge * found.weights
    curvature = np.sum(instance.X**2, axis=0) + problem.ridge
    change = problem.codebook.levels - found.weights[:, None]
    assert (change * gradient[:, None] + curvature[:, None] * change**2 / 2).min() > -1e-9
    assert (coordinate_descent(instance, problem, found.weights).weights == found.weights).all()


def test_an_input_that_is_always_zero_does_not_stop_the_descent():
    problem = replace(PROBLEMS[0], ridge=0.0)
    instance = sample(problem, 20, 19)
    instance.X[:, 4] = 0.0
    start = np.full(20, -1.5)
    assert coordinate_descent(instance, problem, start).weights[4] == -1.5


# --- what is refused ----------------------------------------------------------------------------


def test_bad_arguments_are_named():
    problem = PROBLEMS[0]
    instance = sample(problem, 10, 0)
    with pytest.raises(ValueError, match="order = 'best': give 'surest', 'strongest' or 'given'"):
        round_compensated(instance, problem, order="best")
    with pytest.raises(ValueError, match="order = 'best': give 'cyclic' or 'greedy'"):
        coordinate_descent(instance, problem, order="best")
    with pytest.raises(ValueError, match="ridge = -1: give a finite number >= 0"):
        round_ridge(instance, problem, -1)
    with pytest.raises(ValueError, match=r"start has shape \(9,\): give 10 finite numbers"):
        coordinate_descent(instance, problem, np.zeros(9))
    with pytest.raises(ValueError, match=r"give 10 finite numbers"):
        coordinate_descent(instance, problem, np.full(10, np.nan))
