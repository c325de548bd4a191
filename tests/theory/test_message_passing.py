import tracemalloc
from dataclasses import replace

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_channel import map_once
from scipy.stats import t as student_t

from qgen_lab.codebooks import Codebook, families, uniform
from qgen_lab.theory import Instance, TeacherStudent, sample, solve_rs
from qgen_lab.theory.message_passing import (
    amp,
    amp_batch,
    motion_at_temperature,
    posterior,
    state_evolution,
)

JIT = not numba.config.DISABLE_JIT
UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
WARM = TeacherStudent(uniform(2, 1.5), 1.5, ridge=0.05, temperature=0.2)
PROBLEMS = [
    WARM,
    TeacherStudent(UNEVEN, 1.5, ridge=0.1, temperature=0.05),
    TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.5),
    replace(WARM, temperature=0.0),
    TeacherStudent(UNEVEN, 1.5, ridge=0.3),
]
OBSERVABLES = ["overlap", "gen_error", "train_error"]


def single(instance):
    return Instance(instance.X.astype(np.float32), instance.y, instance.teacher)


# --- slow, obvious twins ------------------------------------------------------------------------


def plain_law(levels, fields, stiffness, ridge, temperature):
    """Mean and variance of a weight at each of the fields."""
    energy = stiffness * (levels - fields[:, None]) ** 2 / 2 + ridge * levels**2 / 2
    weight = np.exp(-(energy - energy.min(axis=1, keepdims=True)) / temperature)
    p = weight / weight.sum(axis=1, keepdims=True)
    mean = p @ levels
    return mean, (p * (levels - mean[:, None]) ** 2).sum(axis=1)


def plain_amp(instance, problem, iterations):
    """Message passing written out; means, variances and susceptibility of each iteration."""
    X, y, _ = instance
    T, ridge, levels = problem.temperature, problem.ridge, problem.codebook.levels
    alpha = X.shape[0] / X.shape[1]
    w = np.full(X.shape[1], levels.mean())
    V = levels.var() if T > 0 else 0.0
    chi, g, onsager, history = V / T if T > 0 else 0.0, 0.0, 0.0, []
    for _ in range(iterations):
        z = y - X @ w + onsager * g
        history.append((w, V, chi, np.square(z).mean()))
        a = alpha / (1 + chi)
        r = w + X.T @ z / alpha
        if T > 0:
            w, variances = plain_law(levels, r, a, ridge, T)
            V = variances.mean()
            chi_new = V / T
        else:
            w = levels[np.abs(levels - (a / (a + ridge) * r)[:, None]).argmin(axis=1)]
            cuts = problem.codebook.thresholds * (a + ridge) / a
            v = np.mean(r**2)
            slope = np.diff(levels) @ np.exp(-(cuts**2) / (2 * v)) / np.sqrt(2 * np.pi * v)
            chi_new = slope / a
        chi, onsager, g = chi_new, chi_new / (1 + chi), z
    return history


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("n", [1, 40])
def test_equals_message_passing_written_out(problem, n):
    instance = sample(problem, n, 1)
    X, y, teacher = instance.X, instance.y, instance.teacher
    history = plain_amp((X, y, teacher), problem, 12)
    run = amp(instance, problem, max_iterations=12, tolerance=1e-300)
    w, V = history[run.iterations - 1][:2]
    np.testing.assert_allclose(run.mean, w, atol=1e-9)
    assert run.variance.mean() == pytest.approx(V, rel=1e-9, abs=1e-12)
    for k, name in enumerate(["overlap", "replica_overlap", "self_overlap"]):
        expected = [(w @ teacher, w @ w, w @ w + n * V)[k] / n for w, V, *_ in history]
        ours = getattr(run.trajectory, name)
        np.testing.assert_allclose(ours, expected[: run.iterations], atol=1e-9)
    T = problem.temperature
    train = [noise / (1 + chi) ** 2 + T * chi / (1 + chi) for _, _, chi, noise in history]
    np.testing.assert_allclose(run.trajectory.train_error, train[: run.iterations], rtol=1e-9)
    error = [np.square(w - teacher).mean() + V for w, V, *_ in history]
    np.testing.assert_allclose(run.trajectory.gen_error, error[: run.iterations], rtol=1e-9)


@given(
    levels=st.lists(st.floats(-3, 3), min_size=2, max_size=9, unique=True),
    field=st.floats(-20, 20),
    pull=st.floats(1e-3, 1e4),
    shrink=st.floats(0, 1e3),
)
@settings(max_examples=200)
def test_posterior_equals_the_law_written_out(levels, field, pull, shrink):
    levels = np.sort(levels)
    if np.diff(levels).min() < 1e-6:
        return
    mean, variance = np.empty(1), np.empty(1)
    total, squares = posterior(
        np.array([field]), levels, (levels[:-1] + levels[1:]) / 2, pull, shrink, mean, variance
    )
    (expected_mean,), (expected_variance,) = plain_law(levels, np.array([field]), pull, shrink, 1.0)
    # A tie of large log-weights is decided by their rounding.
    slack = 1e-15 * (pull * (20 + 3) ** 2 + shrink * 9)
    span = np.ptp(levels)
    assert mean[0] == pytest.approx(expected_mean, abs=(1e-12 + slack) * span)
    assert variance[0] == pytest.approx(expected_variance, abs=(1e-12 + slack) * span**2)
    assert (total, squares) == (variance[0], variance[0] ** 2)


@pytest.mark.parametrize("problem", [*PROBLEMS[:3], replace(PROBLEMS[1], alpha=0.4)])
def test_an_iteration_of_state_evolution_is_one_pass_of_the_map(problem):
    path = state_evolution(problem, 6)
    noise = problem.noise_variance + path.gen_error_mean
    for t in range(5):
        expected = map_once(problem, path.susceptibility[t], noise[t])
        for name in ("overlap", "replica_overlap", "self_overlap", "susceptibility", "replicon",
                     "gen_error", "gen_error_mean"):  # fmt: skip
            assert getattr(path, name)[t + 1] == pytest.approx(expected[name], abs=1e-9), name


# --- where it leads -----------------------------------------------------------------------------

SETTLED = [
    *PROBLEMS,
    replace(WARM, temperature=0.03),  # unstable: state evolution settles all the same
    replace(WARM, temperature=0.0, ridge=0.0),
    TeacherStudent(uniform(1, 2.0), 0.7, temperature=0.02),  # below it has two branches
    *[TeacherStudent(make(3, 2.0), 2.0, 0.3, 0.02, 0.1) for make in families.values()],
]


@pytest.mark.parametrize("problem", SETTLED)
def test_state_evolution_settles_where_replica_symmetry_says(problem):
    path, solution = state_evolution(problem, 400), solve_rs(problem)
    for name in ("overlap", "replica_overlap", "self_overlap", "susceptibility", "gen_error",
                 "gen_error_mean", "train_error", "replicon"):  # fmt: skip
        assert getattr(path, name)[-1] == pytest.approx(getattr(solution, name), rel=1e-8), name


def test_interpolation_shows_as_a_susceptibility_without_bound():
    problem = TeacherStudent(uniform(1, 1.0), 0.2)
    assert solve_rs(problem).phase == "interpolating"
    path = state_evolution(problem, 1500)
    assert path.susceptibility[-1] == 1e100
    assert path.train_error[-1] < 1e-100


@pytest.mark.parametrize("name", families)
def test_instances_follow_state_evolution_iteration_by_iteration(name):
    problem = TeacherStudent(families[name](2, 1.5), 1.5, ridge=0.05, temperature=0.2)
    n, runs, iterations = (2000, 8, 12) if JIT else (400, 6, 8)
    theory = state_evolution(problem, iterations)
    paths = [
        amp(sample(problem, n, [7, seed]), problem, max_iterations=iterations).trajectory
        for seed in range(runs)
    ]
    # Of all comparisons here, one in a thousand such tests would have one beyond the bound.
    bound = student_t.isf(1e-3 / (2 * 3 * iterations * len(families)), runs - 1)
    for observable in OBSERVABLES:
        drawn = np.array([getattr(path, observable) for path in paths])
        error = drawn.std(axis=0, ddof=1) / np.sqrt(runs) + 1e-12
        deviation = np.abs(drawn.mean(axis=0) - getattr(theory, observable)) / error
        assert (deviation < bound).all(), (observable, deviation)


def test_many_fine_levels_give_ridge_regression():
    # The law of a weight is Gaussian there, and what settles solves the normal equations.
    problem = TeacherStudent(uniform(10 if JIT else 7, 8.0), 1.5, ridge=0.2, temperature=0.1)
    instance = sample(problem, 400, 3)
    X, y = instance.X, instance.y
    run = amp(instance, problem)
    assert run.converged
    expected = np.linalg.solve(X.T @ X + 0.2 * np.eye(400), X.T @ y)
    np.testing.assert_allclose(run.mean, expected, atol=1e-7)


def test_where_it_settles_the_training_error_is_that_of_the_means_and_their_spread():
    instance = sample(WARM, 300, 5)
    run = amp(instance, WARM)
    chi = run.trajectory.susceptibility[-1]
    fit = np.square(instance.y - instance.X @ run.mean).mean()
    expected = fit + WARM.temperature * chi / (1 + chi)
    assert run.converged
    assert run.trajectory.train_error[-1] == pytest.approx(expected, rel=1e-7)


def test_settles_where_stable_and_not_where_unstable():
    n = 2000 if JIT else 300
    instance = sample(WARM, n, 0)
    warm, cold, frozen = amp_batch(
        instance,
        [replace(WARM, temperature=T) for T in (0.15, 0.03, 0.0)],
        max_iterations=150,
    )
    assert warm.converged
    assert warm.residual <= 1e-9
    for run in (cold, frozen):
        assert not run.converged
        assert run.residual > 0.05
    assert np.isin(frozen.mean, WARM.codebook.levels).all()
    assert (frozen.variance == 0).all()


def test_two_starts_settle_at_one_point():
    instance = sample(WARM, 200, 2)
    start = np.random.default_rng(3).normal(size=200)
    run, other = amp(instance, WARM), amp(instance, WARM, start=start)
    assert run.converged
    assert other.converged
    np.testing.assert_allclose(run.mean, other.mean, atol=1e-7)
    assert other.trajectory.replica_overlap[0] == pytest.approx(start @ start / 200)


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 1.0), 1.5),
        TeacherStudent(UNEVEN, 1.5, ridge=0.3),
        TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.2),
        replace(WARM, temperature=0.03),
        TeacherStudent(UNEVEN, 1.5, temperature=0.01),
    ],
)
def test_the_motion_reproduces_itself_among_random_pairs_of_fields(problem):
    solution, motion = solve_rs(problem), motion_at_temperature(problem)
    assert motion > 0.01
    n = 100_000 if JIT else 3000
    noise = problem.noise_variance + solution.gen_error_mean
    private = motion / (2 * problem.alpha)
    rng = np.random.default_rng(0)
    common = rng.normal(0, np.sqrt(1 + noise / problem.alpha - private), n)
    stiffness, levels = problem.alpha / (1 + solution.susceptibility), problem.codebook.levels
    T = max(problem.temperature, 1e-9)
    first, second = (
        plain_law(levels, fields, stiffness, problem.ridge, T)[0]
        for fields in common + rng.normal(0, np.sqrt(private), (2, n))
    )
    squares = np.square(first - second)
    # Five such tests; one in a thousand times one of them is beyond the bound.
    assert abs(squares.mean() - motion) < 3.72 * squares.std() / np.sqrt(n)


def test_motion_goes_to_that_at_temperature_zero():
    ground, warmer, warm = (
        motion_at_temperature(replace(PROBLEMS[2], temperature=T)) for T in (0.0, 1e-3, 2e-3)
    )
    assert 2 * warmer - warm == pytest.approx(ground, rel=1e-4)


def test_nothing_moves_where_replica_symmetry_is_stable():
    assert solve_rs(WARM).replicon > 0
    assert motion_at_temperature(WARM) == 0


def test_motion_of_interpolating_weights_is_refused():
    with pytest.raises(ValueError, match="susceptibility = inf"):
        motion_at_temperature(TeacherStudent(uniform(1, 1.0), 0.2))


# --- precision, batches, memory -----------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_batch_equals_single_runs(copies, dtype):
    instance = sample(WARM, 200, 4)
    instance = instance if dtype == np.float64 else single(instance)
    problems = [replace(p, temperature=T) for p in PROBLEMS[:3] for T in (0.5, 0.7, 1.0)]
    for first in range(0, 9, 9 // copies):  # one large batch, or three small ones
        chosen = problems[first : first + 9 // copies]
        for problem, run in zip(chosen, amp_batch(instance, chosen), strict=True):
            alone = amp(instance, problem)
            assert run.converged
            assert abs(run.iterations - alone.iterations) <= (2 if dtype == np.float32 else 0)
            assert run.mean.dtype == run.variance.dtype == dtype
            close = 1e-9 if dtype == np.float64 else 1e-4
            np.testing.assert_allclose(run.mean, alone.mean, atol=close)
            np.testing.assert_allclose(run.variance, alone.variance, atol=close)


def test_single_precision_is_close_to_double():
    instance = sample(WARM, 500, 4)
    double, half = amp(instance, WARM), amp(single(instance), WARM)
    assert half.converged
    assert half.mean.dtype == np.float32
    np.testing.assert_allclose(half.mean, double.mean, atol=2e-4)
    for name in OBSERVABLES:
        expected = getattr(double.trajectory, name)[: half.iterations]
        np.testing.assert_allclose(getattr(half.trajectory, name), expected, rtol=1e-4)


def test_columns_of_any_layout_are_read():
    instance = sample(WARM, 60, 4)
    turned = Instance(np.asfortranarray(instance.X), instance.y, instance.teacher)
    np.testing.assert_allclose(amp(turned, WARM).mean, amp(instance, WARM).mean, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_needs_a_tenth_of_the_memory_of_the_inputs(dtype):
    instance = sample(WARM, 1000, 4)
    instance = instance if dtype == np.float64 else single(instance)
    amp(instance, WARM, max_iterations=1)  # compile
    tracemalloc.start()
    amp(instance, WARM, max_iterations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * instance.X.nbytes


def test_results_say_what_they_are():
    instance = sample(WARM, 50, 4)
    run = amp(instance, WARM, max_iterations=3)
    assert repr(run).startswith("AMPSolution(50 weights, iterations=3, gen_error=")
    assert repr(run).endswith("converged=False)")
    assert repr(run.trajectory).startswith("Trajectory(3 iterations, gen_error ")
    frame = run.trajectory.to_frame()
    assert frame.shape == (3, 8)
    assert frame.overlap.tolist() == run.trajectory.overlap.tolist()


# --- bad input ----------------------------------------------------------------------------------


def changed(**arrays):
    instance = sample(WARM, 20, 0)
    return replace(instance, **{name: f(getattr(instance, name)) for name, f in arrays.items()})


def holed(array):
    array = array.copy()
    array.flat[7] = np.nan
    return array


@pytest.mark.parametrize(
    ("instance", "error", "message"),
    [
        (changed(y=lambda y: y[:-1]), ValueError, r"y of shape \(29,\)"),
        (changed(teacher=lambda w: w[:-1]), ValueError, r"teacher of shape \(19,\)"),
        (changed(X=lambda X: X[:, :-1]), ValueError, r"X of shape \(30, 19\)"),
        (changed(X=lambda X: X.ravel()), ValueError, r"X of shape \(600,\)"),
        (changed(X=lambda X: X[:0], y=lambda y: y[:0]), ValueError, "at least 1"),
        (changed(X=holed), ValueError, "X holds NaN"),
        (changed(X=lambda X: X * np.inf), ValueError, "X holds NaN or infinity"),
        (changed(y=holed), ValueError, "y holds NaN"),
        (changed(teacher=holed), ValueError, "teacher holds NaN"),
        (changed(X=lambda X: X.astype(np.float16)), TypeError, "float16"),
        (changed(X=lambda X: (9 * X).astype(int)), TypeError, "int64"),
        (changed(X=lambda X: X[:20], y=lambda y: y[:20]), ValueError, "alpha = 1.5 asks for 30"),
        ("data", TypeError, "instance is a str"),
    ],
)
def test_bad_instances(instance, error, message):
    with pytest.raises(error, match=message):
        amp(instance, WARM)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"problems": []}, ValueError, "problems is empty"),
        ({"problems": [WARM, "other"]}, TypeError, "str among the problems"),
        ({"problems": WARM}, TypeError, "sequence"),
        ({"max_iterations": 0}, ValueError, "max_iterations = 0"),
        ({"tolerance": 0.0}, ValueError, r"tolerance = 0\.0"),
        ({"tolerance": np.nan}, ValueError, "tolerance = nan"),
        ({"starts": np.zeros((1, 19))}, ValueError, r"shape \(1, 19\)"),
        ({"starts": np.full((1, 20), np.nan)}, ValueError, "finite"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        amp_batch(sample(WARM, 20, 0), **{"problems": [WARM]} | arguments)


def test_state_evolution_needs_an_iteration():
    with pytest.raises(ValueError, match="iterations = 0"):
        state_evolution(WARM, 0)


@pytest.mark.parametrize("temperature", [0.0, 1e-12, 1e6])
def test_labels_of_zero_and_extreme_temperatures_give_numbers(temperature):
    problem = replace(WARM, temperature=temperature)
    instance = changed(y=np.zeros_like)
    run = amp(instance, problem, max_iterations=20)
    assert np.isfinite(run.mean).all()
    assert np.isfinite(run.trajectory.gen_error).all()
