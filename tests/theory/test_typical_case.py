import json
from dataclasses import fields, replace
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_channel import map_once

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory import (
    TeacherStudent,
    interpolation_threshold,
    ridge_solution,
    solve_rs,
)
from qgen_lab.theory.scalar_channel import thermal_averages

PLAIN = bool(numba.config.DISABLE_JIT)  # everything is hundreds of times slower then
FINE_BITS = 10 if PLAIN else 14
REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())
OBSERVABLES = [
    "overlap", "replica_overlap", "self_overlap", "susceptibility", "gen_error",
    "gen_error_mean", "train_error", "free_energy", "entropy", "replicon",
]  # fmt: skip


# --- figures from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE["replica_symmetric"])
def test_reference_rows(row):
    problem = TeacherStudent(
        uniform(row["bits"], row["width"]),
        row["alpha"], row["noise_variance"], row["ridge"], row["temperature"],
    )  # fmt: skip
    solution = solve_rs(problem)
    assert solution.converged
    for name in OBSERVABLES:
        expected = -np.inf if row[name] is None else row[name]
        assert getattr(solution, name) == pytest.approx(expected, abs=1e-7), name


@pytest.mark.parametrize("row", REFERENCE["interpolation_threshold"])
def test_reference_thresholds(row):
    threshold = interpolation_threshold(uniform(row["bits"], row["width"]), row["noise_variance"])
    assert threshold == pytest.approx(row["interpolation_threshold"], abs=1e-6)


def test_one_bit_threshold_has_a_closed_form():
    width, noise = 1.7, 0.3
    c = interpolation_threshold(uniform(1, width), noise)
    assert c * (width**2 + noise + 1 - c) == pytest.approx(2 / np.pi * width**2, rel=1e-12)


# --- the map at the point returned, by adaptive quadrature --------------------------------------

UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
MAP_PROBLEMS = [
    TeacherStudent(uniform(1, 1.0), 1.5, temperature=1e-4),
    TeacherStudent(uniform(1, 2.0), 0.7, temperature=1e-3),
    TeacherStudent(uniform(1, 0.7), 0.4, 0.2, 0.05, 10.0),
    TeacherStudent(uniform(2, 1.5), 1.2, 0.1, 0.01, 1e-4),
    TeacherStudent(uniform(2, 2.0), 0.75, 0.1, 0.0, 0.01),
    TeacherStudent(uniform(2, 4.0), 2.0, 0.5, 0.1, 1.0),
    TeacherStudent(uniform(3, 2.0), 1.1, 0.0, 0.0, 1e-3),
    TeacherStudent(uniform(3, 3.0), 3.0, 0.1, 0.0, 0.1, 2.0),
    TeacherStudent(uniform(4, 2.0), 2.0, 1.0, 0.5, 3e-3),
    TeacherStudent(uniform(4, 4.0), 0.9, 0.1, 0.1, 10.0),
    TeacherStudent(uniform(6, 4.0), 1.5, 0.2, 0.0, 0.02),
    TeacherStudent(uniform(2, 1.5, include_zero=True), 1.0, 0.1, 0.02, 5e-3),
    TeacherStudent(power_of_two(3, 2.0), 1.3, 0.1, 0.0, 1e-3),
    TeacherStudent(lloyd_max(3), 0.8, 0.1, 0.01, 0.03),
    TeacherStudent(UNEVEN, 1.0, 0.1, 0.0, 2e-3),
    TeacherStudent(UNEVEN, 0.5, 0.3, 0.2, 0.4),
]


@pytest.mark.parametrize("problem", MAP_PROBLEMS)
def test_the_map_gives_back_the_point_returned(problem):
    solution = solve_rs(problem)
    assert solution.converged
    error = (
        problem.signal_variance
        + problem.noise_variance
        - 2 * solution.overlap
        + solution.replica_overlap
    )
    mapped = map_once(problem, solution.susceptibility, error)
    for name in OBSERVABLES:
        expected = mapped[name]
        tolerance = 1e-8 * max(abs(expected), 1e-2)
        assert getattr(solution, name) == pytest.approx(expected, abs=tolerance), name


def random_problem(rng, largest_bits, coldest):
    """A tenth without noise, a third without a ridge."""
    return TeacherStudent(
        uniform(int(rng.integers(1, largest_bits + 1)), rng.uniform(0.3, 4.0)),
        10 ** rng.uniform(-1, 1),
        noise_variance=rng.uniform(0, 1) * (rng.random() > 0.1),
        ridge=rng.uniform(0, 1) * (rng.random() > 1 / 3),
        temperature=10 ** rng.uniform(coldest, 1),
    )


def test_the_map_gives_back_the_point_at_random_problems():
    rng = np.random.default_rng(13)
    n, largest_bits, coldest = (10, 3, -2) if PLAIN else (200, 8, -5)
    problems = [random_problem(rng, largest_bits, coldest) for _ in range(n)]
    solution = solve_rs(problems)
    assert solution.converged.all()
    assert (solution.branch == "cooled").all()
    noise = np.array([p.noise_variance for p in problems])
    error = 1 + noise - 2 * solution.overlap + solution.replica_overlap
    mapped = [
        map_once(*args) for args in zip(problems, solution.susceptibility, error, strict=True)
    ]
    for name in OBSERVABLES:
        expected = np.array([each[name] for each in mapped])
        gap = np.abs(getattr(solution, name) - expected) / np.maximum(np.abs(expected), 1e-2)
        assert gap.max() < 1e-8, (name, problems[gap.argmax()])


# --- identities and limits ----------------------------------------------------------------------


@pytest.mark.parametrize("problem", MAP_PROBLEMS[4:10])
def test_entropy_is_minus_the_slope_of_the_free_energy(problem):
    T, step = problem.temperature, 1e-4 * problem.temperature
    up, down = solve_rs([replace(problem, temperature=T + d) for d in (step, -step)]).free_energy
    assert (down - up) / (2 * step) == pytest.approx(solve_rs(problem).entropy, rel=1e-6, abs=1e-6)


# One branch only: above the spinodals, or with a ridge that keeps the susceptibility small.
@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 1.0), 1.5),
        TeacherStudent(uniform(2, 1.5), 1.5, 0.1, 0.05),
        TeacherStudent(uniform(3, 2.0), 2.0, 0.3),
        TeacherStudent(uniform(4, 2.0), 1.2, 0.1, 0.1),
        TeacherStudent(lloyd_max(2), 2.0, 0.1, 0.01),
    ],
)
def test_cooling_meets_temperature_zero(problem):
    ground = solve_rs(problem)
    temperatures = np.array([1e-4, 1e-5, 1e-6])
    cold = solve_rs([replace(problem, temperature=T) for T in temperatures])
    assert cold.converged.all()
    for name in OBSERVABLES[:-1]:
        gap = np.abs(getattr(cold, name) - getattr(ground, name))
        assert gap[-1] < 1e-3, name
        assert gap[-1] <= 0.2 * gap[0] + 1e-9, name  # closes at least linearly, with some play
    assert ground.replicon == -np.inf
    # The replicon diverges as 1 / T.
    assert temperatures[1] * cold.replicon[1] == pytest.approx(
        temperatures[2] * cold.replicon[2], rel=0.02
    )


def test_many_levels_over_a_wide_range_are_ridge_regression_at_zero_temperature():
    for alpha, ridge in ((2.0, 0.1), (0.5, 0.3), (1.0, 0.05)):
        solution = solve_rs(TeacherStudent(uniform(FINE_BITS, 12.0), alpha, 0.1, ridge))
        exact = ridge_solution(alpha, 0.1, ridge)
        spacing = 24 / (2**FINE_BITS - 1)
        for name in ("overlap", "self_overlap", "susceptibility", "gen_error", "train_error"):
            gap = abs(getattr(solution, name) - getattr(exact, name))
            assert gap < 0.25 * spacing**2, name


@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_many_levels_over_a_wide_range_are_ridge_regression_above_it(temperature):
    alpha, ridge = 2.0, 0.1
    exact = ridge_solution(alpha, 0.1, ridge)
    solution = solve_rs(TeacherStudent(uniform(FINE_BITS, 12.0), alpha, 0.1, ridge, temperature))
    stiffness = alpha / (1 + exact.susceptibility)
    variance = temperature / (stiffness + ridge)
    assert solution.susceptibility == pytest.approx(exact.susceptibility, rel=1e-6)
    assert solution.replica_overlap == pytest.approx(exact.self_overlap, rel=1e-6)
    assert solution.self_overlap == pytest.approx(exact.self_overlap + variance, rel=1e-6)
    assert solution.gen_error_mean == pytest.approx(exact.gen_error, rel=1e-6)


def test_free_weights_at_high_temperature():
    codebook = uniform(3, 1.0)
    hot = solve_rs(TeacherStudent(codebook, 1.0, temperature=1e8))
    assert hot.self_overlap == pytest.approx(np.mean(codebook.levels**2), rel=1e-6)
    assert hot.entropy == pytest.approx(3 * np.log(2), rel=1e-6)


# --- branches and phases ------------------------------------------------------------------------


def cooled_slowly(problem, steps=60):
    """Susceptibility reached by the damped map on a fine ladder of temperatures: a slow twin."""
    alpha, rho, levels = problem.alpha, problem.signal_variance, problem.codebook.levels
    stiffness, noise = alpha, (levels**2).max() / alpha
    hot = max(10 * (levels[-1] - levels[0]) ** 2, 2 * problem.temperature)
    for temperature in np.geomspace(hot, problem.temperature, steps):
        for _ in range(1000):
            here = thermal_averages(
                problem.codebook, stiffness, rho + noise, problem.ridge, temperature
            )
            pull = np.log((stiffness + here.slope) / alpha)
            after = problem.noise_variance + rho - 2 * rho * here.slope + here.mean_square
            drift = np.log(after / alpha / noise)
            stiffness, noise = stiffness * np.exp(-0.6 * pull), noise * np.exp(0.6 * drift)
            if max(abs(pull), abs(drift)) < 1e-8:
                break
    return alpha / stiffness - 1


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 2.0), 0.7, temperature=0.02),  # several solutions, stays
        TeacherStudent(uniform(1, 3.4), 0.92, 0.1, 0.05, 0.03),  # its branch has ended: jumps
        TeacherStudent(UNEVEN, 0.6, temperature=0.05),
    ][: 1 if PLAIN else 3],
)
def test_cooling_equals_slow_cooling(problem):
    solution = solve_rs(problem)
    assert solution.converged
    assert solution.susceptibility == pytest.approx(cooled_slowly(problem), rel=1e-5)


def test_between_threshold_and_spinodal_the_branches_differ():
    problem = TeacherStudent(uniform(1, 2.0), 0.7, temperature=1e-3)
    cooled, heated = solve_rs(problem), solve_rs(problem, branch="heated")
    ground = solve_rs(replace(problem, temperature=0.0))
    assert cooled.converged
    assert heated.converged
    assert (cooled.branch, heated.branch, ground.branch) == ("cooled", "heated", "ground")
    assert cooled.susceptibility == pytest.approx(2950, rel=1e-2)
    assert cooled.gen_error == pytest.approx(3.6005, abs=1e-4)
    assert cooled.phase == "stable"
    assert ground.susceptibility == pytest.approx(8.467, abs=1e-3)
    assert ground.gen_error == pytest.approx(3.7479, abs=1e-4)
    assert heated.gen_error == pytest.approx(ground.gen_error, abs=2e-3)
    assert heated.phase == ground.phase == "unstable"


def test_where_there_is_one_branch_heating_and_cooling_agree():
    problem = TeacherStudent(uniform(2, 1.5), 1.5, 0.1, 0.05, 0.1)
    cooled, heated = solve_rs(problem), solve_rs(problem, branch="heated")
    for name in OBSERVABLES:
        assert getattr(cooled, name) == pytest.approx(getattr(heated, name), rel=1e-10), name


@pytest.mark.parametrize("alpha", [0.2, 0.7])  # infinite at T = 0; ends on the way
def test_a_branch_that_is_not_there_is_said(alpha):
    problem = TeacherStudent(uniform(1, 2.0), alpha, temperature=5.0)
    missing = solve_rs(problem, branch="heated")
    assert not missing.converged
    assert missing.phase == "none"
    assert np.isnan(missing.gen_error)


@pytest.mark.parametrize(
    ("problem", "limit"),
    [
        # Newton's method and the flow at ends of branches, where plain damping crawls or circles.
        (TeacherStudent(uniform(1, 3.154236778153992), 0.8213951849906671, 0.40225901591132396,
                        temperature=0.012151265657477794), 300),
        (TeacherStudent(uniform(1, 2.220156451677801), 1.0373711943581094, 0.0,
                        temperature=0.2086468215166064), 300),
        (TeacherStudent(uniform(2, 4.44866618, include_zero=True), 0.9720627317803276, 0.0,
                        temperature=0.00251864732259291), 1000),
    ],
)  # fmt: skip
def test_a_branch_that_ends_is_left_in_few_evaluations(problem, limit):
    solution = solve_rs(problem)
    assert solution.converged
    assert solution.iterations < limit


@pytest.mark.parametrize("codebook", [uniform(1, 2.0), uniform(2, 2.0), lloyd_max(3), UNEVEN])
@pytest.mark.parametrize("temperature", [1e-4, 1e-2])
def test_no_crawling_around_the_interpolation_threshold(codebook, temperature):
    alphas = interpolation_threshold(codebook) + np.array([-1e-1, -1e-3, 0.0, 1e-5, 1e-2])
    for branch in (None, "heated"):
        solution = solve_rs(
            [TeacherStudent(codebook, a, temperature=temperature) for a in alphas], branch
        )
        assert (solution.converged | (solution.phase == "none")).all()
        assert solution.iterations.max() < 200


@pytest.mark.parametrize("codebook", [uniform(2, 2.0), lloyd_max(3), uniform(3, 4.0), UNEVEN])
@pytest.mark.parametrize("offset", [1e-9, 1e-5, 1e-2])
def test_the_susceptibility_diverges_at_the_interpolation_threshold(codebook, offset):
    threshold = interpolation_threshold(codebook)
    above = solve_rs(TeacherStudent(codebook, threshold + offset))
    below = solve_rs(TeacherStudent(codebook, threshold - offset))
    assert above.converged
    assert below.converged
    assert above.iterations < 100  # no crawling
    assert above.phase == "unstable"
    assert below.phase == "interpolating"
    assert below.susceptibility == np.inf
    assert below.train_error == 0
    assert above.susceptibility > 0.1 / offset
    if offset < 1e-8:  # the fit's end is approached like a square root from below
        assert above.gen_error == pytest.approx(below.gen_error, rel=1e-3)


@pytest.mark.parametrize(
    ("codebook", "alpha"),
    [(uniform(2, 2.0), 0.5), (uniform(3, 2.0, include_zero=True), 0.3), (UNEVEN, 0.2)],
)
def test_interpolation_is_the_limit_of_a_vanishing_ridge(codebook, alpha):
    limit = solve_rs(TeacherStudent(codebook, alpha))
    small = solve_rs(TeacherStudent(codebook, alpha, ridge=1e-8))
    assert limit.phase == "interpolating"
    assert small.converged
    assert small.susceptibility > 1e6
    for name in ("overlap", "replica_overlap", "self_overlap", "gen_error", "train_error"):
        assert getattr(small, name) == pytest.approx(getattr(limit, name), abs=1e-6), name


def test_one_bit_interpolation_is_the_limit_of_cooling():
    problem = TeacherStudent(uniform(1, 1.0), 0.2)
    limit = solve_rs(problem)
    cold = solve_rs(replace(problem, temperature=1e-7))
    assert limit.phase == "interpolating"
    assert limit.entropy == -np.inf
    for name in ("overlap", "replica_overlap", "self_overlap", "gen_error", "replicon"):
        assert getattr(cold, name) == pytest.approx(getattr(limit, name), abs=1e-6), name


def test_few_samples_leave_the_two_innermost_levels():
    inner = solve_rs(TeacherStudent(uniform(2, 2.0), 0.1))
    assert inner.converged
    assert inner.self_overlap == pytest.approx((2 / 3) ** 2, rel=1e-12)
    one_bit = solve_rs(TeacherStudent(uniform(1, 2 / 3), 0.1))
    assert inner.replica_overlap == pytest.approx(one_bit.replica_overlap, rel=1e-9)


@settings(max_examples=10 if PLAIN else 40)
@given(
    bits=st.integers(1, 4),
    width=st.floats(0.3, 5.0),
    alpha=st.floats(0.05, 5.0),
    noise_variance=st.sampled_from([0.0, 0.1, 1.0]),
    ridge=st.sampled_from([0.0, 1e-3, 0.2]),
    log_temperature=st.one_of(st.none(), st.floats(-3.0, 1.0)),
)
def test_invariants(bits, width, alpha, noise_variance, ridge, log_temperature):
    temperature = 0.0 if log_temperature is None else 10.0**log_temperature
    problem = TeacherStudent(uniform(bits, width), alpha, noise_variance, ridge, temperature)
    s = solve_rs(problem)
    assert s.converged
    assert s.residual < 1e-9
    assert -1e-12 <= s.replica_overlap <= s.self_overlap * (1 + 1e-12) <= width**2 * (1 + 1e-9)
    assert s.overlap**2 <= s.replica_overlap * (1 + 1e-9)
    assert s.gen_error >= s.gen_error_mean >= 0
    assert s.train_error >= 0
    assert s.phase == (
        "interpolating"
        if s.susceptibility == np.inf
        else "stable"
        if s.replicon >= 0
        else "unstable"
    )
    # In other units of weight and label nothing changes.
    scaled = solve_rs(
        TeacherStudent(
            uniform(bits, 3 * width), alpha, 9 * noise_variance, ridge, 9 * temperature, 9.0
        )
    )
    assert scaled.gen_error == pytest.approx(9 * s.gen_error, rel=1e-6)


# --- what is returned, and what is refused ------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(2, 1.0), 1.0, temperature=0.01),
        TeacherStudent(uniform(2, 1.0), 1.0, ridge=0.1),
        TeacherStudent(uniform(2, 1.0), 1.0),
        TeacherStudent(uniform(2, 1.0), 0.1),
    ],
)
@pytest.mark.parametrize("max_iterations", [1, 4])
def test_a_budget_too_small_is_said(problem, max_iterations):
    solution = solve_rs(problem, max_iterations=max_iterations)
    assert not solution.converged
    assert solution.iterations <= max_iterations
    assert solution.residual > 1e-9
    assert solve_rs(problem).converged


def test_a_sequence_gives_arrays_and_a_frame():
    problems = [TeacherStudent(uniform(b, 1.0), 1.0, temperature=T) for b in (1, 2) for T in (0, 1)]
    together = solve_rs(problems)
    frame = together.to_frame()
    assert len(frame) == 4
    assert list(frame["phase"]) == ["unstable", "stable"] * 2
    assert list(frame["branch"]) == ["ground", "cooled"] * 2
    for k, problem in enumerate(problems):
        assert together.gen_error[k] == solve_rs(problem).gen_error == frame["gen_error"][k]
    assert repr(together) == "RSSolution(4 problems, 4 converged)"
    assert "phase='stable'" in repr(solve_rs(problems[1]))
    assert len(solve_rs(problems[1]).to_frame()) == 1
    assert len(solve_rs([]).to_frame()) == 0


@pytest.mark.parametrize("branch", [None, "heated"])
def test_a_solution_does_not_depend_on_its_company_or_on_threads(branch, monkeypatch):
    rng = np.random.default_rng(3)
    problems = [
        TeacherStudent(codebook, alpha, ridge=ridge, temperature=temperature)
        for codebook in (uniform(1, 2.0), uniform(2, 1.5))
        for alpha, ridge in ((0.7, 0.0), (1.2, 0.05))
        for temperature in rng.permutation([0.0, 1e-4, 1e-3, 0.02, 0.021, 0.5, 0.5, 40.0])
    ]
    if PLAIN:
        problems = problems[:8]
    alone = [solve_rs(problem, branch) for problem in problems]
    for threads in (1, 3):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
        together = solve_rs(problems, branch)
        for field in fields(together):
            expected = [getattr(each, field.name) for each in alone]
            np.testing.assert_array_equal(getattr(together, field.name), expected)


def test_bad_arguments_are_named():
    problem = TeacherStudent(uniform(2, 1.0), 1.0)
    with pytest.raises(ValueError, match="branch = 'coldest': give 'cooled', 'heated' or None"):
        solve_rs(problem, branch="coldest")
    with pytest.raises(ValueError, match="branch = 'cooled' needs a temperature above 0"):
        solve_rs(problem, branch="cooled")
    with pytest.raises(ValueError, match="max_iterations = 0: give at least 1"):
        solve_rs(problem, max_iterations=0)
    with pytest.raises(TypeError, match="give a TeacherStudent or a sequence"):
        solve_rs([problem, 3])
    with pytest.raises(ValueError, match="noise_variance = -1: give a finite number >= 0"):
        interpolation_threshold(uniform(2, 1.0), -1)
    with pytest.raises(TypeError, match="codebook is a float: give a Codebook"):
        interpolation_threshold(1.0)
