from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config
from plain_replica import cool
from scipy.optimize import brentq
from scipy.stats import multivariate_normal

from qgen_lab.codebooks import Codebook, families, lloyd_max, power_of_two, uniform
from qgen_lab.theory import TeacherStudent, sample, solve_rs
from qgen_lab.theory.stability import (
    _brackets,
    at_temperature,
    replicon,
    small_temperature_law,
    stationary_motion,
    zero_entropy_temperature,
    zeros_between,
)

# bits, width, alpha, noise variance, ridge; temperature of the instability, its law, of no
# entropy: found by two independent codes, neither of them this library.
KNOWN = [
    (1, 1.0, 1.5, 0.1, 0.0, 0.25016228, 0.24483197, 0.16271515),
    (1, 0.5, 0.5, 0.1, 0.0, 0.02086318, 0.02080767, 0.01440790),
    (1, 2.0, 2.0, 0.1, 0.0, 1.42145980, 1.33333235, 1.01770591),
    (1, 1.0, 8.0, 0.1, 0.0, 0.46577397, 0.46472008, 0.22686085),
    (2, 1.5, 1.5, 0.1, 0.05, 0.06237410, 0.06221292, 0.04589153),
    (2, 1.0, 1.0, 0.1, 0.0, 0.01810914, 0.01806012, 0.01409092),
    (2, 2.0, 1.0, 0.1, 0.0, 0.03538460, 0.03931932, 0.05146810),
    (2, 2.0, 0.7, 0.2, 0.1, 0.03207752, 0.03216795, 0.03786683),
    (3, 2.0, 1.2, 0.1, 0.0, 0.01225366, 0.01201857, 0.01268750),
    (3, 1.2, 1.0, 0.3, 0.02, 0.00466073, 0.00464689, 0.00379650),
    (4, 2.0, 2.0, 0.1, 0.0, 0.00590968, 0.00590666, 0.00402777),
    (4, 1.0, 0.8, 0.1, 0.0, 0.00052136, 0.00051493, 0.00046824),
]
PROBLEMS = [TeacherStudent(uniform(b, w), *rest[:3]) for b, w, *rest in KNOWN]
UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])


def at(problem, temperature):
    return replace(problem, temperature=float(temperature))


# --- temperatures -------------------------------------------------------------------------------


def test_known_temperatures():
    rows = slice(None, None, 5) if config.DISABLE_JIT else slice(None)
    known, problems = np.array(KNOWN)[rows, 5:], PROBLEMS[rows]
    ours = [at_temperature(problems), small_temperature_law(problems)]
    ours.append(zero_entropy_temperature(problems))
    np.testing.assert_allclose(np.transpose(ours), known, atol=5.1e-9, rtol=0)  # eight decimals


def test_the_temperatures_are_zeros_of_the_solution():
    problems = [*PROBLEMS[::4], TeacherStudent(UNEVEN, 1.2), TeacherStudent(power_of_two(3, 2), 2)]
    for find, field in ((at_temperature, "replicon"), (zero_entropy_temperature, "entropy")):
        solution = solve_rs([at(p, T) for p, T in zip(problems, find(problems), strict=True)])
        np.testing.assert_allclose(getattr(solution, field), 0, atol=1e-9)


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[4]])
def test_a_dense_scan_by_a_plain_solver_finds_the_same(problem):
    found = at_temperature(problem), zero_entropy_temperature(problem)
    scan = np.geomspace(2.0, min(found) / 1.3, 20)
    fields = cool(problem, scan)
    for k, temperature in enumerate(found):
        below = int(np.argmax(fields[:, k] < 0))
        root = brentq(
            lambda T, k=k: cool(problem, [T])[0, k], scan[below], scan[below - 1], xtol=1e-5
        )
        assert temperature == pytest.approx(root, abs=2e-5)


def test_one_problem_and_several_give_the_same():
    for find in (at_temperature, zero_entropy_temperature, stationary_motion, replicon):
        together = find(PROBLEMS[:3])
        assert together.shape == (3,)
        for problem, value in zip(PROBLEMS[:3], together, strict=True):
            alone = find(problem)
            assert isinstance(alone, float)
            assert alone == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 2.0), 0.7),  # between the threshold and its spinodal
        TeacherStudent(uniform(1, 2.0), 0.3, ridge=0.1),  # below: a ridge has nothing to choose
        TeacherStudent(uniform(3, 3.0), 0.5),
    ],
)
def test_where_cooling_diverges_the_replicon_stays_positive(problem):
    assert np.isnan(at_temperature(problem))
    ladder = solve_rs([at(problem, T) for T in np.geomspace(10, 1e-5, 60)])
    assert (ladder.replicon > 0).all()
    assert ladder.susceptibility[-1] > 1e4
    # But the entropy is negative at the end: stable and still wrong.
    frozen = zero_entropy_temperature(problem)
    assert 0 < frozen < 1
    assert solve_rs(at(problem, frozen / 2)).entropy < 0


def test_a_small_ridge_gives_every_susceptibility_a_limit():
    problem = TeacherStudent(uniform(2, 3.0), 0.7, ridge=1e-4)
    temperature = at_temperature(problem)
    assert 0 < temperature < 1e-3
    assert solve_rs(at(problem, temperature)).replicon == pytest.approx(0, abs=1e-8)


def test_the_replicon_may_cross_zero_just_before_the_branch_ends():
    problem = TeacherStudent(uniform(1, 3.4), 0.92, ridge=0.05)
    temperature = at_temperature(problem)
    near = solve_rs([at(problem, f * temperature) for f in (1.001, 0.999, 0.95)])
    assert (np.sign(near.replicon) == [1, -1, -1]).all()
    assert near.susceptibility[1] > 100
    assert near.susceptibility[2] < 10  # another branch


def test_a_dip_between_two_rungs_is_found():
    def dip(x, line):
        return (x - 1.0) ** 2 - np.where(line == 0, 1e-4, -1e-4) + 0 * x

    ladder = np.array([[2.0, 1.5, 1.05, 0.8, 0.1]] * 2)
    low, high = _brackets(ladder, dip(ladder, np.array([[0], [1]])), dip)
    assert np.isnan(low[1])
    root, jump = zeros_between(dip, low[:1], high[:1], np.array([0]))
    assert root[0] == pytest.approx(1.01, rel=1e-9)
    assert not jump[0]


def test_a_jump_over_zero_is_not_called_a_zero():
    def step(x, line):
        return np.where(x < 0.3, -1.0, 2.0) + 0.0 * line

    root, jump = zeros_between(step, np.zeros(1), np.ones(1), np.zeros(1, int))
    assert root[0] == pytest.approx(0.3, rel=1e-9)
    assert jump[0]


@settings(max_examples=1 if config.DISABLE_JIT else 25)
@given(
    bits=st.integers(2, 3),
    family=st.sampled_from(sorted(families)),
    width=st.floats(0.3, 3.0),
    alpha=st.floats(1.0, 5.0),
    noise_variance=st.sampled_from([0.1, 1.0]),
    ridge=st.sampled_from([0.0, 0.1]),
)
def test_invariants(bits, family, width, alpha, noise_variance, ridge):
    codebook = families[family](bits, width)
    problem = TeacherStudent(codebook, alpha, noise_variance, ridge)
    scaled = TeacherStudent(
        codebook.with_width(3 * width), alpha, 9 * noise_variance, ridge, 0.0, 9.0
    )
    for find in (
        at_temperature,
        zero_entropy_temperature,
        small_temperature_law,
        stationary_motion,
    ):
        assert find(scaled) == pytest.approx(9 * find(problem), rel=1e-8), find.__name__


# --- the law of small temperatures --------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEMS[0],
        PROBLEMS[4],
        TeacherStudent(lloyd_max(3), 2.0, 0.1, 0.01),
        TeacherStudent(power_of_two(3, 2.0), 1.3),
        TeacherStudent(UNEVEN, 1.2, 0.1, 0.1),
    ],
)
def test_the_replicon_diverges_as_the_law_says(problem):
    law = small_temperature_law(problem)
    temperatures = law * np.array([1e-3, 1e-4, 1e-5])
    off = (1 - solve_rs([at(problem, T) for T in temperatures]).replicon) * temperatures / law - 1
    assert abs(off[0]) < 1e-3
    assert off[1] == pytest.approx(off[0] / 10, rel=0.05, abs=1e-9)  # linear in T
    assert off[2] == pytest.approx(off[0] / 100, rel=0.05, abs=1e-9)


def test_the_law_meets_the_root_where_few_weights_are_near_a_threshold():
    # Its relative error is of order T_1 / (stiffness spacing^2) = slope / (6 alpha).
    for bits in (1, 2, 3):
        problems = [TeacherStudent(uniform(bits, 1.5), alpha) for alpha in (2.0, 20.0, 200.0)]
        off = np.abs(at_temperature(problems) / small_temperature_law(problems) - 1)
        assert (off < [0.05, 2e-3, 2e-4]).all()
        assert off[2] < 0.2 * off[1] < 0.04 * off[0] + 1e-4


def test_evenly_spaced_levels_have_the_law_in_one_line():
    problem = PROBLEMS[10]
    slope = solve_rs(problem).overlap
    spacing = problem.codebook.spacing[0]
    expected = spacing**2 * slope * (1 - slope / problem.alpha) / 6
    assert small_temperature_law(problem) == pytest.approx(expected, rel=1e-12)


def test_where_the_susceptibility_is_infinite_there_is_no_law():
    problem = TeacherStudent(uniform(2, 2.0), 0.5)
    assert small_temperature_law(problem) == 0
    assert np.isnan(stationary_motion(problem))


# --- message passing at temperature zero --------------------------------------------------------


def squared_difference(problem, motion):
    """E of the squared difference of two rounded Gaussians, from bivariate cell probabilities."""
    ground = solve_rs(problem)
    stiffness = problem.alpha / (1 + ground.susceptibility)
    error = 1 + problem.noise_variance - 2 * ground.overlap + ground.replica_overlap
    variance = 1 + error / problem.alpha
    common = variance - motion / (2 * problem.alpha)
    law = multivariate_normal(
        cov=[[variance, common], [common, variance]], abseps=1e-11, releps=1e-11
    )
    levels = problem.codebook.levels
    edges = problem.codebook.thresholds * (1 + problem.ridge / stiffness)
    edges = np.concatenate([[-40.0], edges, [40.0]])
    below = np.array([[law.cdf([x, y]) for y in edges] for x in edges])
    cells = np.diff(np.diff(below, axis=0), axis=1)
    return np.sum(cells * (levels[:, None] - levels) ** 2)


@pytest.mark.parametrize(
    "problem", [PROBLEMS[0], PROBLEMS[4], PROBLEMS[7], TeacherStudent(UNEVEN, 1.2, 0.1, 0.1)]
)
def test_the_motion_is_a_fixed_point_of_two_copies(problem):
    motion = stationary_motion(problem)
    assert squared_difference(problem, motion) == pytest.approx(motion, rel=1e-6)
    # It is the only one: below it copies part, above it they come together.
    for factor in (1e-3, 0.5):
        assert squared_difference(problem, factor * motion) > factor * motion
    for factor in (1.2, 1.5):
        assert squared_difference(problem, factor * motion) < factor * motion


def test_one_bit_has_the_motion_in_one_line():
    width, alpha = 1.0, 1.5
    problem = TeacherStudent(uniform(1, width), alpha)
    slope = solve_rs(problem).overlap
    variance = (2 * width / slope) ** 2 / (2 * np.pi)
    angle = brentq(
        lambda x: 4 * width**2 * x / np.pi - 4 * alpha * variance * np.sin(x / 2) ** 2, 0.1, 3
    )
    expected = 4 * width**2 * angle / np.pi
    assert stationary_motion(problem) == pytest.approx(expected, rel=1e-12)


def rounded_message_passing(problem, seed, n, iterations):
    """Mean squared change of the weights at each iteration, from the equations as they stand."""
    drawn = sample(problem, n, seed)
    w, residual, slope = np.zeros(n), np.zeros(len(drawn.y)), 0.0
    moved = []
    for _ in range(iterations):
        residual = drawn.y - drawn.X @ w + slope / problem.alpha * residual
        field = w + drawn.X.T @ residual / problem.alpha
        # The mean slope of rounding, with the field's own variance.
        variance = np.mean(field**2)
        density = np.exp(-(problem.codebook.thresholds**2) / (2 * variance))
        slope = problem.codebook.spacing @ density / np.sqrt(2 * np.pi * variance)
        new = problem.codebook.quantize(field)
        moved.append(np.mean((new - w) ** 2))
        w = new
    return np.array(moved)


@pytest.mark.parametrize(
    "problem", [TeacherStudent(uniform(2, 1.5), 2.0), TeacherStudent(uniform(4, 2.0), 2.0)]
)
def test_message_passing_keeps_the_weights_in_motion(problem):
    n, instances = 1500, 6
    runs = np.array(
        [rounded_message_passing(problem, seed, n, 50)[25:].mean() for seed in range(instances)]
    )
    error = runs.std(ddof=1) / np.sqrt(instances)
    # A t of 5 degrees of freedom passes 6.9 once in a thousand runs.
    assert abs(runs.mean() - stationary_motion(problem)) < 6.9 * error
    assert 6.9 * error < 0.2 * runs.mean()  # the check has teeth


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "find", [at_temperature, zero_entropy_temperature, small_temperature_law, stationary_motion]
)
def test_bad_arguments_are_named(find):
    with pytest.raises(TypeError, match="give a TeacherStudent or a sequence"):
        find([PROBLEMS[0], 3])
