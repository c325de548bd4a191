from dataclasses import replace

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad_vec
from scipy.special import log_ndtr
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory import TeacherStudent, solve_rs
from qgen_lab.theory.one_step_rsb import _cluster_sums, _gaussian_mass, solve_1rsb

UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
FIGURES = [
    "energy", "free_energy", "complexity", "gen_error", "train_error", "inter_state_overlap",
    "intra_state_overlap", "overlap", "susceptibility",
]  # fmt: skip


def rs_energy(problem):
    solution = solve_rs(problem)
    return (problem.alpha * solution.train_error + problem.ridge * solution.self_overlap) / 2


# --- figures from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "width", "alpha", "ridge", "rs", "y", "energy", "error"),
    [
        (1, 1.0, 1.5, 0.0, (0.20008, 0.7157), 4.036, 0.20952, 0.6789),
        (1, 1.0, 0.5, 0.0, (0.00665, 1.1461), 18.317, 0.01457, 1.1192),
        (2, 2.0, 2.0, 0.0, (0.13272, 0.3764), 6.760, 0.14240, 0.3256),
        (3, 2.0, 2.0, 0.0, (0.07220, 0.1586), 36.905, 0.07396, 0.1491),
        (3, 2.0, 0.8, 0.0, (0.00006, 1.1453), 207.16, 0.00202, 1.0188),
        (2, 1.5, 1.5, 0.05, (0.09537, 0.3407), None, 0.09981, 0.3119),
        (2, 2.0, 1.0, 0.0, (0.01428, 1.0513), None, 0.02802, 0.8801),
        (1, 1.0, 8.0, 0.0, (1.8192, 0.4570), None, 1.8221, 0.4548),
    ],
)
def test_ground_states_to_the_digits_known(bits, width, alpha, ridge, rs, y, energy, error):
    problem = TeacherStudent(uniform(bits, width), alpha, 0.1, ridge)
    solution = solve_1rsb(problem)
    digit = 5.1e-5 if alpha == 8 else 5.1e-6
    assert solution.converged
    assert solution.phase == "1RSB"
    assert solution.energy == pytest.approx(energy, abs=digit)
    assert solution.gen_error == pytest.approx(error, abs=5.1e-5)
    assert (rs_energy(problem), solve_rs(problem).gen_error) == (
        pytest.approx(rs[0], abs=digit),
        pytest.approx(rs[1], abs=5.1e-5),
    )
    if y is not None:
        assert solution.y == pytest.approx(y, abs=5.1e-3 if y > 100 else 5.1e-4)


# --- the equations at the point returned, as they are defined -----------------------------------

CASES = [
    (TeacherStudent(uniform(1, 1.0), 1.5), None),
    (TeacherStudent(uniform(1, 1.0), 0.5), 60.0),
    (TeacherStudent(uniform(2, 2.0), 2.0, 0.1, 0.05), 2.0),
    (TeacherStudent(UNEVEN, 1.2, 0.2, 0.1, signal_variance=2.0), None),
]


def equations(problem, s):
    """Right-hand sides and free energy at a solution, from their definitions.

    The field of a cluster is `h = h0 + sqrt(v) z`; averages over z carry `exp(y psi(h))`, with
    `psi(h) = max_w [h w - (a + ridge) w^2 / 2]`. Plain composite quadrature over z.
    """
    alpha, rho, y, levels = problem.alpha, problem.signal_variance, s.y, problem.codebook.levels
    q0, q1, chi, m = s.inter_state_overlap, s.intra_state_overlap, s.susceptibility, s.overlap
    d1 = 1 + chi
    d0 = d1 + y * (q1 - q0)
    error = q0 - 2 * m + rho + problem.noise_variance
    a, a0, c0 = alpha / d1, alpha / d0, alpha * error / d0**2
    v = alpha * (q1 - q0) / (d1 * d0)
    c1 = c0 + v
    total = a + problem.ridge
    theta, spacing = total * problem.codebook.thresholds, problem.codebook.spacing
    nodes, weights = np.polynomial.legendre.leggauss(20)

    def inner(h0):
        # In the cell of a level the integrand is a Gaussian around y sqrt(v) times the level.
        largest = np.max(y * (h0 * levels - total * levels**2 / 2) + y**2 * v * levels**2 / 2)
        ends = np.concatenate([[-np.inf], (theta - h0) / np.sqrt(v), [np.inf]])
        moments = np.zeros(3)
        for k, w in enumerate(levels):
            centre = y * np.sqrt(v) * w
            low, high = np.clip(ends[k : k + 2], centre - 9, centre + 9)
            edges = np.linspace(low, high, 12)
            z = (edges[:-1, None] + np.diff(edges)[:, None] * (nodes + 1) / 2).ravel()
            weight = np.repeat(np.diff(edges) / 2, 20) * np.tile(weights, 11)
            psi = (h0 + np.sqrt(v) * z) * w - total * w**2 / 2
            mass = weight @ (norm.pdf(0) * np.exp(y * psi - z**2 / 2 - largest))
            moments += mass * np.array([1, w, w**2])
        kinks = y * (theta * levels[:-1] - total * levels[:-1] ** 2 / 2) - largest
        kinks = np.exp(kinks - (theta - h0) ** 2 / (2 * v)) / np.sqrt(2 * np.pi * v)
        mean, square = moments[1:] / moments[0]
        slope = spacing @ kinks / moments[0]
        return np.array([slope, mean**2, square, h0 * mean, np.log(moments[0]) + largest])

    deviation = np.sqrt(a0**2 * rho + c0)
    reach = 8.5 * deviation
    means = quad_vec(
        lambda h0: norm.pdf(h0, scale=deviation) * inner(h0),
        -reach, reach, epsabs=1e-10, epsrel=1e-10, norm="max", limit=400,
        points=np.clip(theta, -reach, reach),
    )[0]  # fmt: skip
    slope, mean_squared, square, field_mean, log_weight = means
    bracket = a * q1 / 2 - c1 * chi / 2 - y / 2 * (c1 * q1 - c0 * q0) - a0 * m
    y_times_f = alpha / 2 * (np.log(d0 / d1) + y * error / d0) - y * bracket - log_weight
    return {
        "susceptibility": slope,
        "inter_state_overlap": mean_squared,
        "intra_state_overlap": square,
        "overlap": a0 * rho * field_mean / deviation**2,
        "free_energy": y_times_f / y,
    }


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="the same numbers, only slower")
@pytest.mark.parametrize(("problem", "y"), CASES)
def test_the_equations_hold_as_they_are_defined(problem, y):
    solution = solve_1rsb(problem, y)
    assert solution.converged
    for name, value in equations(problem, solution).items():
        assert getattr(solution, name) == pytest.approx(value, rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize(("problem", "y"), CASES)
def test_energy_is_the_slope_of_y_times_the_free_energy(problem, y):
    solution = solve_1rsb(problem, y)
    step = 1e-4 * solution.y
    up, down = solve_1rsb(problem, [solution.y + step, solution.y - step]).to_frame().itertuples()
    slope = (up.y * up.free_energy - down.y * down.free_energy) / (2 * step)
    assert solution.energy == pytest.approx(slope, rel=1e-7)
    assert solution.complexity == pytest.approx(
        solution.y * (solution.energy - solution.free_energy), abs=1e-12
    )


@pytest.mark.parametrize("problem", [case[0] for case in CASES])
def test_the_ground_state_is_the_maximum_of_the_free_energy(problem):
    ground = solve_1rsb(problem)
    around = solve_1rsb(problem, ground.y * np.array([0.9, 0.99, 1.01, 1.1]))
    assert ground.complexity == pytest.approx(0, abs=1e-12)
    assert (around.free_energy < ground.free_energy).all()
    assert (np.sign(around.complexity) == [1, 1, -1, -1]).all()
    assert ground.energy > rs_energy(problem)


# --- limits -------------------------------------------------------------------------------------


TWO_ENDS = [CASES[0][0], CASES[2][0], TeacherStudent(lloyd_max(2), 2.0)]


@pytest.mark.parametrize("problem", TWO_ENDS[: 1 if numba.config.DISABLE_JIT else None])
def test_both_ends_of_y_are_replica_symmetry_at_temperature_zero(problem):
    rs, energy = solve_rs(problem), rs_energy(problem)
    ends = solve_1rsb(problem, [1e-7, 1e7])
    assert ends.converged.all()
    assert ends.energy == pytest.approx([energy] * 2, rel=1e-5)
    assert ends.gen_error == pytest.approx([rs.gen_error] * 2, rel=1e-5)
    # Most clusters near y = 0; none at all at the other end.
    assert ends.susceptibility[0] == pytest.approx(rs.susceptibility, rel=1e-5)
    assert abs(ends.complexity[0]) < 1e-12
    assert ends.complexity[1] == pytest.approx(rs.entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("problem", "y"),
    [
        (TeacherStudent(uniform(1, 1.0), 0.2), None),
        (TeacherStudent(uniform(2, 2.0), 0.3, 0.1, 1e-3), None),
        (TeacherStudent(uniform(2, 1.5), 1.5, 0.1, 0.05), 2000.0),
    ],
)
def test_frozen_is_replica_symmetry_at_temperature_one_over_y(problem, y):
    solution = solve_1rsb(problem, y)
    rs = solve_rs(replace(problem, temperature=1 / solution.y))
    assert solution.phase == "frozen"
    assert solution.inter_state_overlap == pytest.approx(rs.replica_overlap, rel=1e-7)
    assert solution.intra_state_overlap == pytest.approx(rs.self_overlap, rel=1e-7)
    assert solution.free_energy == pytest.approx(rs.free_energy, rel=1e-7)
    assert solution.complexity == pytest.approx(rs.entropy, abs=1e-7)
    assert solution.gen_error == pytest.approx(rs.gen_error, rel=1e-7)


def test_few_samples_at_small_y_have_no_finite_susceptibility():
    problem = TeacherStudent(uniform(1, 1.0), 0.3)  # below the interpolation threshold
    curve = solve_1rsb(problem, [5.0, 50.0])
    assert list(curve.phase) == ["interpolating", "1RSB"]
    assert list(curve.converged) == [False, True]
    assert np.isnan(curve.energy[0])
    assert curve.susceptibility[0] == np.inf
    ground = solve_1rsb(problem)
    assert ground.converged
    assert ground.energy > 0  # replica symmetry says zero


@settings(max_examples=5 if numba.config.DISABLE_JIT else 30)
@given(
    bits=st.integers(1, 2 if numba.config.DISABLE_JIT else 3),
    width=st.floats(0.3, 4.0),
    alpha=st.floats(0.2, 5.0),
    noise_variance=st.sampled_from([0.05, 0.1, 1.0]),
    ridge=st.sampled_from([0.0, 1e-2, 0.2]),
)
def test_invariants(bits, width, alpha, noise_variance, ridge):
    problem = TeacherStudent(uniform(bits, width), alpha, noise_variance, ridge)
    s = solve_1rsb(problem)
    assert s.converged
    assert s.residual < 1e-9
    assert 0 <= s.inter_state_overlap < s.intra_state_overlap <= width**2 * (1 + 1e-12)
    assert s.overlap**2 <= s.inter_state_overlap * (1 + 1e-9)
    assert s.gen_error >= 0
    assert s.energy >= rs_energy(problem) - 1e-9
    # In other units of weight and label nothing changes.
    other = replace(
        problem,
        codebook=uniform(bits, 3 * width),
        noise_variance=9 * noise_variance,
        signal_variance=9.0,
    )
    scaled = solve_1rsb(other, s.y / 9)
    assert scaled.gen_error == pytest.approx(9 * s.gen_error, rel=1e-6)
    assert scaled.energy == pytest.approx(9 * s.energy, rel=1e-6)


# --- one weight ---------------------------------------------------------------------------------


def plain_sums(levels, thresholds, targets, weights, curvature, y, scatter):
    """The law written out for all levels at all targets, masses as logarithms."""
    middle = curvature * (thresholds - targets[:, None]) / scatter
    half = y * scatter * np.diff(levels) / 2
    far = np.full((targets.size, 1), np.inf)
    upper, lower = np.hstack([middle + half, far]), np.hstack([-far, middle - half])
    flip = lower > 0  # the tail in which the difference keeps its digits
    low, high = np.where(flip, -upper, lower), np.where(flip, -lower, upper)
    with np.errstate(divide="ignore"):
        log_mass = log_ndtr(high) + np.log(-np.expm1(log_ndtr(low) - log_ndtr(high)))
    cost = y * curvature / 2 * (levels - targets[:, None]) ** 2
    cost -= cost.min(axis=1, keepdims=True)
    log_law = log_mass - cost
    total = np.exp(log_law).sum(axis=1, keepdims=True)
    law = np.exp(log_law) / total
    jumps = np.exp(-cost[:, :-1] - upper[:, :-1] ** 2 / 2) / total
    mean = law @ levels
    return (
        weights @ (jumps @ np.diff(levels)) / (np.sqrt(2 * np.pi) * scatter),
        weights @ (law @ levels**2 - mean**2),
        weights @ mean**2,
        weights @ (np.log(total[:, 0]) + (law * cost).sum(axis=1)),
    )


@pytest.mark.parametrize("codebook", [uniform(1, 1.0), uniform(3, 2.0), power_of_two(3, 2), UNEVEN])
@pytest.mark.parametrize("curvature", [0.05, 1.3])
@pytest.mark.parametrize("y", [0.01, 3.0, 400.0])
@pytest.mark.parametrize("scatter", [0.03, 0.6])
def test_the_kernel_equals_the_law_written_out(codebook, curvature, y, scatter):
    rng = np.random.default_rng(0)
    targets, weights = rng.normal(0, 2, 40), rng.random(40)
    given_to_both = (codebook.levels, codebook.thresholds, targets, weights, curvature, y, scatter)
    assert _cluster_sums(*given_to_both) == pytest.approx(
        plain_sums(*given_to_both), rel=1e-10, abs=1e-13
    )


@pytest.mark.parametrize(("lower", "upper"), [(-1, 2), (3, 3.1), (-9, -8), (8, 9), (8, np.inf)])
def test_gaussian_mass_keeps_its_digits_in_the_tails(lower, upper):
    low, high = (lower, upper) if lower < 0 else (-upper, -lower)
    expected = np.exp(log_ndtr(high)) * -np.expm1(log_ndtr(low) - log_ndtr(high))
    assert _gaussian_mass(lower, upper) == pytest.approx(expected, rel=1e-12)


# --- what is returned, and what is refused ------------------------------------------------------


def test_sequences_give_arrays_and_a_frame():
    problems = [TeacherStudent(uniform(b, 1.0), 1.0) for b in (1, 2)]
    together = solve_1rsb(problems)
    paired = solve_1rsb(problems, together.y)
    frame = together.to_frame()
    assert list(frame["phase"]) == ["1RSB"] * 2
    for k, problem in enumerate(problems):
        alone = solve_1rsb(problem)
        for name in FIGURES:
            assert getattr(together, name)[k] == getattr(alone, name) == frame[name][k], name
            assert getattr(paired, name)[k] == pytest.approx(getattr(alone, name), abs=1e-9), name
    assert repr(together) == "OneStepRSBSolution(2 points, 2 converged)"
    assert repr(alone).startswith("OneStepRSBSolution(energy=0.05293")
    assert len(solve_1rsb(problems, 3.0).to_frame()) == 2


@pytest.mark.parametrize("y", [None, 5.0])
@pytest.mark.parametrize("max_iterations", [1, 5])
def test_a_budget_too_small_is_said(y, max_iterations):
    problem = TeacherStudent(uniform(2, 1.0), 1.0)
    solution = solve_1rsb(problem, y, max_iterations)
    assert not solution.converged
    assert solution.iterations == max_iterations
    assert solution.residual > 1e-9
    assert solve_1rsb(problem, y).converged


def test_bad_arguments_are_named():
    problem = TeacherStudent(uniform(2, 1.0), 1.0)
    for y in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"^y = {y!r}: give a finite number > 0"):
            solve_1rsb(problem, y)
    with pytest.raises(TypeError, match="y = 'steep' is not a real number"):
        solve_1rsb(problem, "steep")
    with pytest.raises(ValueError, match=r"temperature = 0.1: solve_1rsb is for temperature 0"):
        solve_1rsb(replace(problem, temperature=0.1))
    with pytest.raises(ValueError, match="max_iterations = 0: give at least 1"):
        solve_1rsb(problem, max_iterations=0)
    with pytest.raises(TypeError, match="give a TeacherStudent or a sequence"):
        solve_1rsb([problem, 3])
    with pytest.raises(ValueError, match="y has 3 entries for 2 problems"):
        solve_1rsb([problem, problem], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("levels", "alpha", "noise_variance", "ridge"),
    [
        ([-2.3, 2.7, 3.9], 0.10525100075828744, 0.4217118960595563, 1.928302684901582e-09),
        ([-3.3, -3.2, -0.6, -0.5], 0.13507950107869204, 1.0953167914642847, 3.3e-191),
    ],
)
def test_a_search_that_loses_its_root_ends_and_says_so(levels, alpha, noise_variance, ridge):
    solution = solve_1rsb(TeacherStudent(Codebook(levels), alpha, noise_variance, ridge))
    assert not solution.converged or abs(solution.complexity) < 1e-9
