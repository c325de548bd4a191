import json
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad_vec
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory.one_pass import (
    _bernoulli,
    _Diffusion,
    _implicit_step,
    _squared_errors,
    one_pass,
    one_pass_descent,
    one_pass_path,
)

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())
PLAIN = numba.config.DISABLE_JIT  # then only short paths
UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
CODEBOOKS = [uniform(1, 0.7), uniform(3, 1.86), power_of_two(3, 2.0), lloyd_max(2), UNEVEN]


# --- the stationary law -------------------------------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE["one_pass"])
def test_reference_rows(row):
    limit = one_pass(
        uniform(row["bits"], row["width"]), row["learning_rate"], row["noise_variance"]
    )
    assert limit.converged
    assert limit.gen_error == pytest.approx(row["gen_error"], abs=1e-6)


def plain_squared_error(codebook, teacher, temperature):
    """The density `exp(integral of (w0 - nearest level) / temperature)` on a fine grid."""
    u = np.linspace(-15, 15, 300_001)
    error = teacher - codebook.levels[np.searchsorted(codebook.thresholds, u, side="right")]
    height = (np.cumsum(error) - error / 2) * (u[1] - u[0]) / temperature
    density = np.exp(height - height.max())
    return density @ error**2 / density.sum()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_the_kernel_has_the_law_of_a_fine_grid(codebook, temperature):
    teacher = np.array([-0.55, -0.2, 0.013, 0.31, 0.49])
    kernel = _squared_errors(codebook.levels, codebook.thresholds, teacher, temperature)
    plain = [plain_squared_error(codebook, w0, temperature) for w0 in teacher]
    np.testing.assert_allclose(kernel, plain, rtol=1e-3)


def masses(codebook, teacher, temperature):
    """Mass of every cell: the exponential integrated between its ends."""
    levels, edges = codebook.levels, codebook.thresholds
    slope = (teacher - levels) / temperature
    height = np.concatenate([[0], np.cumsum(slope[1:-1] * np.diff(edges))])
    height -= height.max()
    inner = (np.exp(height[1:]) - np.exp(height[:-1])) / slope[1:-1]
    found = np.concatenate([
        [np.exp(height[0]) / slope[0]], inner, [-np.exp(height[-1]) / slope[-1]]
    ])  # fmt: skip
    return found / found.sum()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.5])
def test_the_equation_holds_at_the_error_returned(codebook, rate):
    limit = one_pass(codebook, rate, 0.2, signal_variance=1.5)
    assert limit.converged
    deviation, levels = np.sqrt(1.5), codebook.levels

    def integrand(w0):
        if w0 <= levels[0] or w0 >= levels[-1]:
            clipped = np.clip(w0, levels[0], levels[-1])
            squared, mean = (w0 - clipped) ** 2, clipped
            average = clipped
        else:
            w0 = w0 + 1e-9 * (np.abs(w0 - levels).min() < 1e-9)  # 0 / 0 on a level
            p = masses(codebook, w0, limit.temperature)
            squared, mean = p @ (w0 - levels) ** 2, p @ levels
            average = mean
        nearest = codebook.quantize(average)
        return norm.pdf(w0, scale=deviation) * np.array(
            [squared, (w0 - average) ** 2, (w0 - nearest) ** 2, w0 * mean]
        )

    points = [-12, *levels, *codebook.thresholds, 12]
    expected = quad_vec(integrand, -12, 12, points=points, epsabs=1e-9, limit=2000)[0]
    assert limit.temperature == pytest.approx(rate * (limit.gen_error + 0.2) / 2)
    found = [limit.gen_error, limit.average_gen_error, limit.rounded_gen_error, limit.overlap]
    np.testing.assert_allclose(found, expected, atol=2e-7)


def test_one_bit_does_not_depend_on_the_rate():
    errors = [one_pass(uniform(1, 0.8), rate).gen_error for rate in (1e-3, 0.1, 1.0, 10.0)]
    np.testing.assert_allclose(errors, errors[0], rtol=1e-12)
    # E (w - w0)^2 = W^2 - w0^2 within the range: stochastic rounding.
    inside, beyond = 2 * norm.cdf(0.8) - 1, 2 * norm.sf(0.8)
    second = inside - 2 * 0.8 * norm.pdf(0.8)
    outside = beyond * (1 + 0.64) - 2 * 0.8 * norm.pdf(0.8)
    assert errors[0] == pytest.approx(0.64 * inside - second + outside, rel=1e-12)


def test_fine_levels_give_least_mean_squares():
    levels = uniform(6, 6.0) if PLAIN else uniform(7, 8.0)
    limit = one_pass(levels, 0.8, noise_variance=0.5)
    assert limit.gen_error == pytest.approx(0.8 * 0.5 / 1.2, rel=2e-2)


def test_a_small_rate_gives_stochastic_rounding():
    bits, width = (3, 4.0) if PLAIN else (6, 8.0)
    limit = one_pass(uniform(bits, width), 1e-3 if PLAIN else 1e-4)
    spacing = 2 * width / (2**bits - 1)
    assert limit.gen_error == pytest.approx(spacing**2 / 6, rel=1e-2)
    assert limit.rounded_gen_error == pytest.approx(spacing**2 / 12, rel=1e-2)


codebooks = st.lists(st.integers(-40, 40), min_size=2, max_size=8, unique=True).map(
    lambda tenths: Codebook(np.sort(tenths) / 10)
)


@settings(max_examples=30)
@given(codebooks, st.floats(1e-3, 5), st.floats(0, 2))
def test_there_is_always_a_stationary_error(codebook, rate, noise):
    limit = one_pass(codebook, rate, noise)
    assert limit.converged
    assert limit.gen_error >= limit.average_gen_error - 1e-12
    assert limit.gen_error >= limit.rounded_gen_error - 1e-12


# --- the path to it -----------------------------------------------------------------------------


def test_an_implicit_step_solves_the_matrix_equation():
    rng = np.random.default_rng(0)
    mass, drop = rng.random((3, 6)), rng.normal(0, 2, (3, 5))
    distance, width = rng.random(5) + 0.2, rng.random(6) + 0.2
    new = _implicit_step(mass, 0.7, drop, distance, width)
    for row in range(3):
        generator = np.zeros((6, 6))
        for i, z in enumerate(drop[row]):
            flow = np.zeros((6, 6))
            flow[i + 1, i] = -z / np.expm1(-z) / (distance[i] * width[i])
            flow[i, i + 1] = z / np.expm1(z) / (distance[i] * width[i + 1])
            generator += flow - np.diag(flow.sum(axis=0))
        expected = np.linalg.solve(np.eye(6) - 0.7 * generator, mass[row])
        np.testing.assert_allclose(new[row], expected, rtol=1e-12)
    np.testing.assert_allclose(new.sum(axis=1), mass.sum(axis=1))  # none is lost


def test_the_bernoulli_function_is_smooth_at_zero_and_safe_far_out():
    z = np.array([-800.0, -1e-9, 1e-9, 1e-3, 1.0, 800.0])
    expected = [800.0, 1.0, 1.0, 0.99950008333, 1 / (np.e - 1), 0.0]
    np.testing.assert_allclose([_bernoulli(x) for x in z], expected, rtol=1e-8)


def test_cells_end_at_thresholds_and_the_stationary_law_stays():
    codebook = lloyd_max(2)
    limit = one_pass(codebook, 0.5)
    diffusion = _Diffusion(codebook, 0.5, 0.1, 1.0)
    assert np.isin(codebook.thresholds, diffusion.edges).all()
    assert (np.diff(diffusion.edges) > 0).all()
    centres = (diffusion.edges[1:] + diffusion.edges[:-1]) / 2
    fall = np.cumsum(-diffusion.drop, axis=1) / limit.temperature
    height = -np.concatenate([np.zeros((len(fall), 1)), fall], axis=1)
    density = np.exp(height - height.max(axis=1, keepdims=True)) * diffusion.width
    mass = density / density.sum(axis=1, keepdims=True)
    assert centres.size == mass.shape[1]
    assert diffusion.error(mass) == pytest.approx(limit.gen_error, rel=1e-3)
    later, defect = diffusion.advance(mass, 1.0)
    assert diffusion.error(later) == pytest.approx(diffusion.error(mass), rel=1e-3)
    assert defect < 1e-3


@pytest.mark.skipif(PLAIN, reason="a long path takes minutes without compilation")
@pytest.mark.parametrize("codebook", [uniform(2, 1.33), UNEVEN])
def test_the_path_ends_in_the_stationary_state(codebook):
    path = one_pass_path(codebook, 1.0, [300.0])
    assert path.gen_error[0] == pytest.approx(one_pass(codebook, 1.0).gen_error, rel=2e-3)


def test_a_path_begins_at_the_start_and_does_not_depend_on_the_times_asked_for():
    codebook = uniform(2, 1.5, include_zero=True)
    end = 0.01 if PLAIN else 4.0
    many = one_pass_path(codebook, 0.5, np.linspace(0, end, 3))
    few = one_pass_path(codebook, 0.5, [end])
    assert many.gen_error[0] == pytest.approx(1.0, rel=1e-6)  # all weights are zero
    assert many.gen_error[-1] == pytest.approx(few.gen_error[0], rel=1e-3)
    assert list(many.to_frame()) == ["time", "gen_error"]
    assert repr(few).startswith("OnePassPath(1 times, to gen_error=")


def test_training_follows_the_path():
    """A plateau while all weights are zero, then a drop; eight trainings at six times."""
    codebook = uniform(2, 3.0, include_zero=True)
    times = np.array([0.5, 2.0, 4.0, 8.0, 16.0, 30.0])
    runs, n = 8, 300
    if PLAIN:
        times, n = times[:1], 50
    path = one_pass_path(codebook, 0.5, times, start_deviation=0.1)
    assert path.gen_error[0] > 0.95
    trained = np.array([
        one_pass_descent(codebook, 0.5, times, n, seed, start_deviation=0.1).gen_error
        for seed in range(runs)
    ])  # fmt: skip
    error = trained.std(axis=0, ddof=1) / np.sqrt(runs)
    # Six comparisons, Student's t of seven degrees: false alarm below 1e-3 in all.
    assert (np.abs(trained.mean(axis=0) - path.gen_error) < 6.9 * error).all()


@pytest.mark.parametrize(("codebook", "rate"), [(uniform(1, 0.8), 0.5), (lloyd_max(2), 1.0)])
def test_training_ends_in_the_stationary_state(codebook, rate):
    runs, n, times = 6, 200, np.arange(30, 60)
    if PLAIN:
        n, times = 30, np.arange(10, 20)
    trained = np.array([
        one_pass_descent(codebook, rate, times, n, seed).gen_error.mean() for seed in range(runs)
    ])  # fmt: skip
    error = trained.std(ddof=1) / np.sqrt(runs)
    # Student's t of five degrees: false alarm 1e-3 each.
    assert abs(trained.mean() - one_pass(codebook, rate).gen_error) < 6.9 * error


# --- arguments ----------------------------------------------------------------------------------


def test_arguments_are_checked():
    codebook = uniform(1, 1.0)
    with pytest.raises(ValueError, match=r"learning_rate = 0: give a finite number > 0"):
        one_pass(codebook, 0)
    with pytest.raises(ValueError, match="noise_variance = -1: give a finite number >= 0"):
        one_pass(codebook, 0.1, -1)
    with pytest.raises(TypeError, match="codebook is a list: give a Codebook"):
        one_pass([-1, 1], 0.1)
    for times in ([], [2.0, 1.0], [-1.0], 3.0):
        with pytest.raises(ValueError, match=r"times has shape .*: give ascending numbers"):
            one_pass_path(codebook, 0.1, times)
    with pytest.raises(ValueError, match="n = 0: give a whole number of weights"):
        one_pass_descent(codebook, 0.1, [1.0], 0, seed=0)
    with pytest.raises(ValueError, match=r"start_deviation = -1: give a finite number >= 0"):
        one_pass_path(codebook, 0.1, [1.0], start_deviation=-1)
