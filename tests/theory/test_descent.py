import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen_lab.codebooks import lloyd_max, power_of_two, uniform
from qgen_lab.theory import Instance, TeacherStudent, sample, schedules
from qgen_lab.theory.descent import (
    largest_stable_rate,
    straight_through_descent,
)
from qgen_lab.theory.straight_through import average_weights

PLAIN = numba.config.DISABLE_JIT  # every rounding is then a slow loop
CODEBOOKS = [uniform(1, 0.7), uniform(2, 1.33), power_of_two(2, 1.6), lloyd_max(2)]
PROBLEM = TeacherStudent(uniform(2, 1.5), 1.5, ridge=0.05)


# --- a slow, obvious twin -----------------------------------------------------------------------


def nearest(levels, latent):
    return levels[np.abs(latent[..., None] - levels).argmin(axis=-1)]


def plain_descent(instance, problem, rates, decay, optimizer, masked, latent):
    """Every formula as written; returns latent and quantized weights before and after each step."""
    X, y, levels = instance.X, instance.y, problem.codebook.levels
    history = []
    velocity = first = second = np.zeros_like(latent)
    for t, rate in enumerate(rates, start=1):
        w = nearest(levels, latent)
        history.append(w)
        g = X.T @ (X @ w - y) + problem.ridge * w
        if masked:
            g[np.abs(latent) > levels[-1]] = 0
        g = g + decay * latent
        if optimizer == "momentum":
            velocity = 0.8 * velocity + g
            g = velocity
        if optimizer == "adam":
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            g = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        latent = latent - rate * g
    return latent, np.array([*history, nearest(levels, latent)])


@pytest.mark.parametrize("optimizer", ["gradient", "momentum", "adam"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_every_step_is_the_one_written_down(optimizer, masked, decay):
    instance = sample(PROBLEM, 20, seed=1)
    start = 1.2 * np.random.default_rng(2).standard_normal(20)
    rates = schedules.cooldown(0.1, 40, power=2)
    run = straight_through_descent(
        instance, PROBLEM, rates, latent_decay=decay, optimizer=optimizer, momentum=0.8,
        masked=masked, start=start, record_at=range(0, 41, 4), average_from=10,
    )  # fmt: skip
    latent, history = plain_descent(instance, PROBLEM, rates, decay, optimizer, masked, start)
    np.testing.assert_allclose(run.latent, latent, atol=1e-12)
    assert (run.weights == history[-1]).all()
    np.testing.assert_allclose(run.average, history[10:].mean(axis=0), atol=1e-12)
    assert (run.rounded == nearest(PROBLEM.codebook.levels, run.average)).all()
    moved = history[1:] != history[:-1]
    last = [max(np.flatnonzero(column) + 1, default=0) for column in moved.T]
    assert run.last_change.tolist() == last
    recorded = history[::4]
    errors = instance.y - recorded @ instance.X.T
    np.testing.assert_allclose(run.train_error, np.square(errors).mean(axis=1), rtol=1e-12)
    energy = (np.square(errors).sum(axis=1) + 0.05 * np.square(recorded).sum(axis=1)) / 40
    np.testing.assert_allclose(run.energy, energy, rtol=1e-12)
    distance = np.square(recorded - instance.teacher).mean(axis=1)
    np.testing.assert_allclose(run.gen_error, distance, rtol=1e-12)
    np.testing.assert_allclose(run.flip_share[1:], moved.reshape(10, 4, 20).mean(axis=(1, 2)))
    assert np.isnan(run.flip_share[0])


def test_one_product_a_step_or_two_is_the_same():
    instance = sample(PROBLEM, 30, seed=3)
    rates = schedules.constant(0.1, 60)  # many steps: X' X is formed; few: it is not
    long = straight_through_descent(instance, PROBLEM, rates, record_at=[5])
    short = straight_through_descent(instance, PROBLEM, rates[:5])
    np.testing.assert_allclose(long.energy, short.energy, rtol=1e-12)


def test_several_starts_are_several_runs():
    instance = sample(PROBLEM, 30, seed=3)
    starts = np.random.default_rng(0).standard_normal((3, 30))
    rates = schedules.cosine(0.1, 25)
    record_at = [0, 10, 25]
    together = straight_through_descent(
        instance, PROBLEM, rates, start=starts, record_at=record_at, latent_decay=0.1
    )
    for k, start in enumerate(starts):
        alone = straight_through_descent(
            instance, PROBLEM, rates, start=start, record_at=record_at, latent_decay=0.1
        )
        np.testing.assert_allclose(together.latent[k], alone.latent, atol=1e-12)
        for name in ("gen_error", "train_error", "energy", "flip_share"):
            np.testing.assert_allclose(getattr(together, name)[:, k], getattr(alone, name))
    frame = together.to_frame()
    assert len(frame) == 9
    assert frame.query("step == 10 and run == 2").energy.item() == together.energy[1, 2]
    assert list(alone.to_frame().step) == record_at
    assert repr(together) == "Descent(3 runs of 30 weights, 3 records)"
    assert repr(alone) == "Descent(30 weights, 3 records)"


# --- batches ------------------------------------------------------------------------------------


def test_the_batches_of_a_pass_add_up_to_the_full_gradient():
    """With a rate so small that nothing flips, a pass of batches is that many full steps."""
    instance = sample(PROBLEM, 20, seed=1)
    start = np.full(20, 0.3)
    rates = schedules.constant(1e-6, 6)
    batched = straight_through_descent(instance, PROBLEM, rates, batch_size=5, start=start, seed=4)
    full = straight_through_descent(instance, PROBLEM, rates, start=start)
    assert batched.last_change.max() == 0
    np.testing.assert_allclose(batched.latent, full.latent, rtol=1e-12)
    one = straight_through_descent(
        instance, PROBLEM, rates[:1], batch_size=5, start=start, seed=4
    ).latent  # fmt: skip
    assert np.abs(one - start - (full.latent - start) / 6).max() > 1e-8


def test_a_seed_repeats_the_batches():
    instance = sample(PROBLEM, 20, seed=1)
    rates = schedules.constant(0.05, 30)
    latents = [
        straight_through_descent(instance, PROBLEM, rates, batch_size=7, seed=s).latent
        for s in (1, 1, 2)
    ]
    assert (latents[0] == latents[1]).all()
    assert (latents[0] != latents[2]).any()


def test_a_batch_of_all_samples_is_full_descent():
    instance = sample(PROBLEM, 20, seed=1)
    rates = schedules.constant(0.1, 30)
    batched = straight_through_descent(instance, PROBLEM, rates, batch_size=30)
    assert (batched.latent == straight_through_descent(instance, PROBLEM, rates).latent).all()


# --- what training finds ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("codebook", CODEBOOKS[:1] if PLAIN else CODEBOOKS)
def test_the_average_is_convex_and_the_iterates_are_its_stochastic_rounding(codebook, decay):
    n, steps = (100, 1500) if PLAIN else (600, 6000)
    problem = TeacherStudent(codebook, 2.0)
    instance = sample(problem, n, seed=0)
    bound = largest_stable_rate(instance, problem, decay)
    approach = [
        schedules.constant(bound / 2, steps // 8),
        schedules.constant(bound / 10, steps // 8),
    ]
    rates = np.concatenate([*approach, schedules.constant(0.02 * bound, steps)])
    begin = rates.size - steps // 2
    run = straight_through_descent(
        instance, problem, rates, latent_decay=decay, average_from=begin,
        record_at=np.arange(begin, rates.size + 1, 5),
    )  # fmt: skip
    solution = average_weights(instance, problem, decay)
    assert solution.converged
    v = solution.weights
    assert np.square(run.average - v).mean() < 1e-5
    upper = np.clip(np.searchsorted(codebook.levels, v, side="right"), 1, len(codebook) - 1)
    above, below = codebook.levels[upper], codebook.levels[upper - 1]
    predicted = instance.gen_error(v) + ((v - below) * (above - v)).mean()
    assert run.gen_error.mean() == pytest.approx(predicted, abs=5e-3 if PLAIN else 2e-3)
    # Not because nothing moves: the average itself is much better.
    assert run.gen_error.mean() - instance.gen_error(run.average) > 0.03


def test_a_cooldown_settles_lower_than_a_constant_rate():
    instance = sample(PROBLEM, 100, seed=5)
    rate = largest_stable_rate(instance, PROBLEM) / 2
    constant = straight_through_descent(instance, PROBLEM, schedules.constant(rate, 400))
    cooled = straight_through_descent(instance, PROBLEM, schedules.cooldown(rate, 400, power=4))
    assert cooled.energy[0] < 0.8 * constant.energy[0]
    assert np.median(cooled.last_change) < 400


def test_rates_below_rounding_still_move_the_weights():
    """A slow exponential changes nothing, however small the rate becomes."""
    instance = sample(PROBLEM, 100, seed=5)
    rates = 0.2 * 0.95 ** np.arange(2000)  # down to 1e-45
    run = straight_through_descent(instance, PROBLEM, rates, record_at=[100, 1900, 2000])
    early, _, late = run.flip_share
    assert late > 0.5 * early


def test_latent_weights_on_a_threshold_begin_on_the_level_of_even_index():
    for bits in (1, 2, 3):
        problem = TeacherStudent(uniform(bits, 1.0), 2.0)
        instance = sample(problem, 20, seed=1)
        run = straight_through_descent(instance, problem, [0.0])
        assert (run.weights == problem.codebook.quantize(np.zeros(20))).all()


def test_the_bound_of_the_rate_is_where_fine_levels_begin_to_oscillate():
    problem = TeacherStudent(uniform(12, 50.0), 2.0)
    instance = sample(problem, 40, seed=2)
    for momentum in (0.0, 0.5):
        bound = largest_stable_rate(instance, problem, 0.1, momentum)
        below, above = (
            straight_through_descent(
                instance, problem, schedules.constant(factor * bound, 1500), latent_decay=0.1,
                optimizer="momentum", momentum=momentum, allow_unstable=True,
            ).energy[0]
            for factor in (0.98, 1.02)
        )  # fmt: skip
        assert above > 100 * below


@settings(max_examples=20)
@given(st.integers(1, 15), st.floats(0.2, 4), st.floats(0, 1))
def test_the_bound_is_two_over_the_largest_eigenvalue(n, alpha, ridge):
    problem = TeacherStudent(uniform(1, 1.0), alpha, ridge=ridge)
    X = sample(problem, n, seed=0).X
    bound = largest_stable_rate(sample(problem, n, seed=0), problem)
    assert bound == pytest.approx(2 / (np.linalg.eigvalsh(X.T @ X)[-1] + ridge), rel=1e-5)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": [1.0]}, r"rates reach 1: descent is linearly unstable from 0\.\d+ on; give"),
        ({"rates": [0.1, -0.1]}, r"rates has shape \(2,\): give a list of finite"),
        ({"rates": []}, r"rates has shape \(0,\)"),
        ({"rates": [np.nan]}, "finite numbers >= 0, one a step"),
        ({"latent_decay": -1}, "latent_decay = -1: give a finite number >= 0"),
        ({"batch_size": 0}, "batch_size = 0: give a number from 1 to 30"),
        ({"batch_size": 31}, "batch_size = 31: give a number from 1 to 30"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd': give 'gradient', 'momentum' or 'adam'"),
        ({"optimizer": "momentum", "momentum": 1.0}, "momentum = 1.0: give a number from 0"),
        ({"start": np.zeros(19)}, r"start has shape \(19,\): give finite numbers of shape \(20,\)"),
        ({"start": np.full(20, np.inf)}, r"start has shape \(20,\): give finite"),
        ({"record_at": [3]}, r"record_at = \[3\]: give numbers of steps from 0 to 2"),
        ({"average_from": 3}, "average_from = 3: give a number from 0 to 2"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments, message):
    instance = sample(PROBLEM, 20, seed=1)
    with pytest.raises(ValueError, match=message):
        straight_through_descent(instance, PROBLEM, **{"rates": [0.1, 0.1]} | arguments)


def test_an_instance_that_does_not_fit_is_refused():
    drawn = sample(PROBLEM, 20, seed=1)
    with pytest.raises(ValueError, match=r"instance has X \(30, 20\), y \(29,\) and teacher"):
        largest_stable_rate(Instance(drawn.X, drawn.y[1:], drawn.teacher), PROBLEM)
    X = drawn.X.copy()
    X[3, 4] = np.nan
    with pytest.raises(ValueError, match="instance holds NaN or infinity in X or y"):
        straight_through_descent(Instance(X, drawn.y, drawn.teacher), PROBLEM, [0.1])
