import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, lloyd_max, uniform
from qgen_lab.theory import TeacherStudent
from qgen_lab.theory.saddle_point import (
    Bracket,
    Model,
    Point,
    best,
    defect,
    ground_state,
    is_tight,
    narrowed,
    next_look,
)

UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])


# --- a root of one equation ---------------------------------------------------------------------


def root(f, lower, upper):
    """Root by the bracket, and how often it looked."""
    bracket, looks = Bracket(lower, f(lower), upper, f(upper), 0.5), 0
    while not is_tight(bracket):
        x = next_look(bracket)
        assert min(bracket.near, bracket.far) <= x <= max(bracket.near, bracket.far)
        bracket, looks = narrowed(bracket, x, f(x)), looks + 1
        assert looks < 200
    return best(bracket), looks


@settings(max_examples=50)
@given(st.floats(-4, 4), st.floats(0.1, 4), st.floats(0.1, 9), st.sampled_from([1, 3, 9]))
def test_the_bracket_finds_the_root_that_brentq_finds(place, left, right, power):
    def f(x):
        return (x - place) ** power + np.expm1((x - place) / 2)

    ours, looks = root(f, place - left, place + right)
    expected = brentq(f, place - left, place + right, xtol=1e-15, rtol=1e-15)
    assert ours == pytest.approx(expected, rel=1e-14, abs=1e-14)
    assert looks < 60


def test_the_bracket_needs_few_looks_at_a_smooth_function_and_bisects_a_step():
    ours, looks = root(lambda x: np.cos(x) - x, 0.0, 2.0)
    assert ours == pytest.approx(0.7390851332151607, rel=1e-15)
    assert looks < 12
    ours, looks = root(lambda x: np.sign(x - 0.3), 0.0, 1.0)
    assert ours == pytest.approx(0.3, rel=1e-14)
    assert looks < 70
    assert root(lambda x: x - 0.5, 0.0, 1.0) == (0.5, 1)


# --- temperature zero ---------------------------------------------------------------------------


def slow_ground_state(problem, passes=2000):
    """Stiffness and noise by plain damping of the map from a large noise: a slow twin."""
    levels, alpha, rho = problem.codebook.levels, problem.alpha, problem.signal_variance
    stiffness, noise = alpha, ((np.abs(levels).max() + 1) ** 2 + problem.noise_variance) / alpha
    for _ in range(passes):
        deviation = np.sqrt(rho + noise)
        cuts = problem.codebook.thresholds * (1 + problem.ridge / stiffness) / deviation
        slope = problem.codebook.spacing @ np.exp(-(cuts**2) / 2) / np.sqrt(2 * np.pi) / deviation
        mass = np.diff(ndtr(np.concatenate([[-np.inf], cuts, [np.inf]])))
        error = problem.noise_variance + rho - 2 * rho * slope + mass @ levels**2
        stiffness = 0.5 * stiffness + 0.5 * alpha * stiffness / (stiffness + slope)
        noise = 0.5 * noise + 0.5 * error / alpha
    return stiffness, noise, slope, mass @ levels**2


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 1.0), 1.5),
        TeacherStudent(uniform(2, 1.5), 1.2, 0.0),
        TeacherStudent(uniform(2, 1.5), 0.4, 0.1, 0.1),
        TeacherStudent(uniform(3, 2.0, include_zero=True), 0.9, 0.1, 0.5),
        TeacherStudent(lloyd_max(3), 3.0, 1.0, 0.01, signal_variance=2.0),
        TeacherStudent(UNEVEN, 2.0, 0.3, 0.0),
        TeacherStudent(UNEVEN, 0.5, 0.3, 0.2),
    ],
)
def test_ground_state_equals_the_damped_map(problem):
    ours = ground_state(Model.of(problem), 10_000)
    stiffness, noise, slope, mean_square = slow_ground_state(problem)
    assert ours.residual < 1e-12
    assert ours.stiffness == pytest.approx(stiffness, rel=1e-9)
    assert ours.noise == pytest.approx(noise, rel=1e-9)
    assert ours.slope == pytest.approx(slope, rel=1e-9)
    assert ours.mean_square == ours.second_moment == pytest.approx(mean_square, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.2, 0.45])
def test_uniform_average_over_interpolating_weights_of_one_norm(alpha):
    # One bit below its threshold: `slope = alpha`, on two levels of equal magnitude.
    problem = TeacherStudent(uniform(1, 2.0), alpha)
    ours = ground_state(Model.of(problem), 10_000)
    assert ours.stiffness == 0
    assert ours.residual < 1e-10
    assert ours.second_moment == pytest.approx(4.0, rel=1e-14)
    z = np.linspace(-10, 10, 4001) * np.sqrt(1 + ours.noise)
    density = norm.pdf(z, scale=np.sqrt(1 + ours.noise)) * (z[1] - z[0])

    def mean(ratio):
        return 2 * np.tanh(2 * ratio * z)

    ratio = brentq(lambda r: r * (density @ (4 - mean(r) ** 2)) - alpha, 1e-9, 50.0, xtol=1e-14)
    assert ours.mean_square == pytest.approx(density @ mean(ratio) ** 2, rel=1e-8)
    error = 1.1 - 2 * alpha + ours.mean_square
    assert ours.noise == pytest.approx(error / alpha, rel=1e-8)


# --- temperature above zero ---------------------------------------------------------------------


@pytest.mark.parametrize("problem", [TeacherStudent(uniform(2, 1.5), 1.2, ridge=0.1),
                                     TeacherStudent(UNEVEN, 0.6, 0.0)])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.01, 0.4])
def test_derivatives_of_the_map_equal_finite_differences(problem, temperature):
    model, left, step = Model.of(problem), np.array([100]), 1e-6
    point = Point(-0.7, 0.2)
    here = defect(model, point, temperature, left)
    for shift, pull_slope, drift_slope in (
        ((step, 0), here.pull_by_x, here.drift_by_x),
        ((0, step), here.pull_by_y, here.drift_by_y),
    ):
        up, down = (
            defect(model, Point(point.x + s * shift[0], point.y + s * shift[1]), temperature, left)
            for s in (1, -1)
        )
        assert (up.pull - down.pull) / (2 * step) == pytest.approx(pull_slope, abs=1e-7)
        assert (up.drift - down.drift) / (2 * step) == pytest.approx(drift_slope, abs=1e-7)
    assert left[0] == 95


def test_compiled_code_lets_other_threads_run():
    if not numba.config.DISABLE_JIT:
        assert ground_state.targetoptions["nogil"]
