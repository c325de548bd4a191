import json
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory import TeacherStudent, ridge_solution, sample
from qgen_lab.theory.straight_through import (
    StraightThroughLimit,
    average_weights,
    gaussian_averages,
    straight_through,
)

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())
OBSERVABLES = [
    "average_gen_error", "iterate_gen_error", "rounded_gen_error", "average_train_error",
    "oscillating_share", "overlap", "susceptibility",
]  # fmt: skip
UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
PROBLEMS = [
    (TeacherStudent(uniform(1, 0.7), 2.0), 0.0),
    (TeacherStudent(uniform(1, 1.5), 1.5, 0.3, 0.1, signal_variance=2.0), 0.4),
    (TeacherStudent(uniform(2, 1.5), 1.5, 0.1, 0.2), 0.0),
    (TeacherStudent(uniform(3, 2.0, include_zero=True), 1.2, 0.2), 0.5),
    (TeacherStudent(power_of_two(3, 1.8), 1.4), 0.3),
    (TeacherStudent(lloyd_max(3), 0.7, 0.1, 0.02), 0.05),
    (TeacherStudent(UNEVEN, 2.0, 0.0), 0.0),
    (TeacherStudent(UNEVEN, 1.0, 0.3, 0.1), 0.7),
    (TeacherStudent(uniform(5, 3.0), 3.0, 1.0, 0.0), 1.0),
]


# --- slow, obvious twins ------------------------------------------------------------------------


def penalty_at(levels, v):
    return np.interp(v, levels, levels**2 / 2)


def best_weight(levels, r, shrinkage, pull):
    """argmin of `(v - r)^2 / 2 + (shrinkage - 1) v^2 / 2 + pull envelope(v)`, gap by gap."""
    slope = np.diff(levels**2 / 2) / np.diff(levels)
    inside = (r[:, None] - pull * slope) / shrinkage
    candidates = np.clip(inside, levels[:-1], levels[1:])
    cost = (
        (candidates - r[:, None]) ** 2 / 2
        + (shrinkage - 1) * candidates**2 / 2
        + pull * penalty_at(levels, candidates)
    )
    return candidates[np.arange(r.size), cost.argmin(axis=1)]


def plain_averages(codebook, shrinkage, pull, deviation):
    """Slope, square, variance in time, share moving, rounded overlap and square; fine grid."""
    levels = codebook.levels
    r = np.linspace(-9, 9, 200_001) * deviation
    weight = norm.pdf(r, scale=deviation) * (r[1] - r[0])
    v = best_weight(levels, r, shrinkage, pull)
    above = np.clip(np.searchsorted(levels, v, side="right"), 1, levels.size - 1)
    lower, upper = levels[above - 1], levels[above]
    moving = (v - lower > 1e-12) & (upper - v > 1e-12)
    rounded = codebook.quantize(v)
    return (
        weight @ (r * v) / deviation**2,  # by parts, where the kernel takes the derivative
        weight @ v**2,
        weight @ ((v - lower) * (upper - v)),
        weight @ moving,
        weight @ (r * rounded) / deviation**2,
        weight @ rounded**2,
    )


@pytest.mark.parametrize("codebook", [uniform(1, 0.8), uniform(3, 2.0), lloyd_max(2), UNEVEN])
@pytest.mark.parametrize(("shrinkage", "pull"), [(1.0, 0.0), (1.4, 0.0), (1.0, 0.6), (1.2, 2.5)])
def test_the_kernel_has_the_averages_of_a_fine_grid(codebook, shrinkage, pull):
    # The jumps of `moving` and of the rounded weight cost half a step of the grid.
    kernel = gaussian_averages(codebook.levels, shrinkage, pull, 1.3)
    plain = plain_averages(codebook, shrinkage, pull, 1.3)
    np.testing.assert_allclose(kernel[:3], plain[:3], atol=1e-7)
    assert kernel[3] == pytest.approx(plain[3], abs=1e-4 * len(codebook))


@pytest.mark.parametrize(("problem", "decay"), PROBLEMS)
def test_the_equations_hold_at_the_point_returned(problem, decay):
    limit = straight_through(problem, decay)
    assert limit.converged
    assert limit.phase == "stable"
    alpha, rho = problem.alpha, problem.signal_variance
    stiffness = alpha / (1 + limit.susceptibility)
    effective = limit.average_gen_error + problem.noise_variance
    slope, square, spread, moving, kept, rounded_square = plain_averages(
        problem.codebook,
        1 + problem.ridge / stiffness,
        decay / stiffness,
        np.sqrt(rho + effective / alpha),
    )
    expected = {
        "overlap": rho * slope,
        "susceptibility": slope / (alpha - slope),
        "average_gen_error": rho - 2 * rho * slope + square,
        "iterate_gen_error": rho - 2 * rho * slope + square + spread,
        "average_train_error": effective * (1 - slope / alpha) ** 2,
    }
    for name, value in expected.items():
        assert getattr(limit, name) == pytest.approx(value, abs=1e-6), name
    grid = 1e-4 * len(problem.codebook)
    assert limit.oscillating_share == pytest.approx(moving, abs=grid)
    rounded = rho - 2 * rho * kept + rounded_square
    assert limit.rounded_gen_error == pytest.approx(rounded, abs=3 * grid)


# --- figures from elsewhere, limits -------------------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE["straight_through"])
def test_reference_rows(row):
    problem = TeacherStudent(
        uniform(row["bits"], row["width"]), row["alpha"], row["noise_variance"], row["ridge"]
    )
    limit = straight_through(problem, row["latent_decay"])
    assert limit.converged
    for name in OBSERVABLES:
        assert getattr(limit, name) == pytest.approx(row[name], abs=1e-7), name


@pytest.mark.parametrize(("alpha", "ridge"), [(2.0, 0.0), (1.2, 0.1), (0.6, 0.05)])
def test_a_wide_range_gives_ridge_regression(alpha, ridge):
    limit = straight_through(TeacherStudent(uniform(12, 40.0), alpha, 0.2, ridge))
    expected = ridge_solution(alpha, 0.2, ridge)
    assert limit.average_gen_error == pytest.approx(expected.gen_error, rel=1e-9)
    assert limit.average_train_error == pytest.approx(expected.train_error, rel=1e-9)
    assert limit.susceptibility == pytest.approx(expected.susceptibility, rel=1e-9)
    # Fine levels: stochastic rounding costs spacing^2 / 6, rounding to nearest half of it.
    cell = (80.0 / (2**12 - 1)) ** 2 / 12
    assert limit.iterate_gen_error - limit.average_gen_error == pytest.approx(2 * cell, rel=1e-3)
    assert limit.rounded_gen_error - limit.average_gen_error == pytest.approx(cell, rel=1e-2)


def test_without_latent_decay_bits_do_not_change_the_average():
    limit = straight_through([TeacherStudent(uniform(b, 1.5), 1.5) for b in (1, 2, 3, 8)])
    np.testing.assert_allclose(limit.average_gen_error, limit.average_gen_error[0], rtol=1e-10)
    assert (np.diff(limit.iterate_gen_error) < 0).all()


def test_many_levels_turn_latent_decay_into_a_ridge():
    decayed = straight_through(TeacherStudent(uniform(12, 2.0), 1.5), 0.3)
    ridge = straight_through(TeacherStudent(uniform(12, 2.0), 1.5, ridge=0.3))
    assert decayed.average_gen_error == pytest.approx(ridge.average_gen_error, abs=1e-6)


def box_threshold(width, noise_variance):
    """Samples per weight at which box-constrained least squares begins to fit exactly."""
    r = np.linspace(-9, 9, 100_001)
    weight = norm.pdf(r) * (r[1] - r[0])

    def excess(noise):
        field = r * np.sqrt(1 + noise)
        v = np.clip(field, -width, width)
        share = 2 * norm.cdf(width / np.sqrt(1 + noise)) - 1
        error = noise_variance + 1 - 2 * weight @ (field * v) / (1 + noise) + weight @ v**2
        return error - share * noise

    return 2 * norm.cdf(width / np.sqrt(1 + brentq(excess, 1e-3, 1e3))) - 1


@pytest.mark.parametrize("width", [0.7, 1.5])
def test_below_the_threshold_of_the_box_the_phase_is_named(width):
    threshold = box_threshold(width, 0.1)
    above, below = straight_through(
        [TeacherStudent(uniform(2, width), threshold * f) for f in (1 + 1e-4, 1 - 1e-4)]
    ).to_frame().to_dict("records")  # fmt: skip
    assert above["phase"] == "stable"
    assert above["converged"]
    assert above["susceptibility"] > 1e3
    assert below["phase"] == "interpolating"
    assert below["converged"]
    assert below["average_train_error"] == 0
    assert below["susceptibility"] == np.inf
    unknown = [*OBSERVABLES[:3], "overlap", "oscillating_share"]
    assert np.isnan([below[name] for name in unknown]).all()


def test_latent_decay_leaves_only_the_gap_around_zero_free_to_interpolate():
    problem = TeacherStudent(uniform(2, 3.0), 0.05)
    assert straight_through(problem, 0.1).phase == "interpolating"
    assert straight_through(TeacherStudent(uniform(2, 3.0), 0.6), 0.1).phase == "stable"
    assert straight_through(TeacherStudent(lloyd_max(2), 0.05, ridge=1e-3)).phase == "stable"


codebooks = st.lists(st.integers(-40, 40), min_size=2, max_size=9, unique=True).map(
    lambda tenths: Codebook(np.sort(tenths) / 10)
)


def test_no_noise_and_a_wide_box_is_solved_to_rounding():
    limit = straight_through(TeacherStudent(uniform(1, 8.25), 1.2, 0.0))
    assert limit.converged
    assert limit.average_gen_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ridge", [1e-12, 1e-100, 2e-275, 5e-324])
def test_a_ridge_however_small_is_solved_and_has_a_limit(ridge):
    limit = straight_through(TeacherStudent(uniform(1, 1.0), 0.25, 1.0, ridge))
    assert limit.converged
    small = straight_through(TeacherStudent(uniform(1, 1.0), 0.25, 1.0, 1e-9))
    assert limit.average_gen_error == pytest.approx(small.average_gen_error, rel=1e-6)


@settings(max_examples=60)
@given(
    codebooks,
    st.floats(0.05, 8),
    st.floats(0, 2),
    st.sampled_from([0.0, 1e-3, 0.3]),
    st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
)
def test_every_problem_is_solved_or_its_phase_named(codebook, alpha, noise, ridge, decay):
    limit = straight_through(TeacherStudent(codebook, alpha, noise, ridge), decay)
    assert limit.converged
    if ridge > 0:
        assert limit.phase == "stable"
    if limit.phase == "stable":
        assert 0 <= limit.average_gen_error <= limit.iterate_gen_error + 1e-12
        assert 0 <= limit.oscillating_share <= 1 + 1e-12


# --- the convex problem on an instance ----------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("codebook", [uniform(2, 1.33), power_of_two(2, 1.6), lloyd_max(2)])
def test_the_convex_solver_agrees_with_bounded_quasi_newton(codebook, decay):
    """Each weight as the lowest level plus one part of every gap: then the penalty is linear."""
    problem = TeacherStudent(codebook, 1.5, ridge=0.05)
    instance = sample(problem, 60, seed=4)
    found = average_weights(instance, problem, decay)
    assert found.converged
    spacing, slope = codebook.spacing, codebook.thresholds

    def cost(parts):
        parts = parts.reshape(60, -1)
        v = codebook.levels[0] + parts.sum(axis=1)
        error = instance.X @ v - instance.y
        gradient = instance.X.T @ error + problem.ridge * v
        value = (error @ error + problem.ridge * v @ v) / 2 + decay * (parts @ slope).sum()
        return value, (gradient[:, None] + decay * slope).ravel()

    solution = minimize(
        cost, np.zeros(60 * spacing.size), jac=True, method="L-BFGS-B",
        bounds=[(0, s) for s in np.tile(spacing, 60)],
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-9},
    )  # fmt: skip
    v = codebook.levels[0] + solution.x.reshape(60, -1).sum(axis=1)
    np.testing.assert_allclose(found.weights, v, atol=2e-5)


def test_the_theory_is_that_of_the_convex_solver():
    n, seeds = (600, range(8)) if not numba.config.DISABLE_JIT else (200, range(4))
    for problem, decay in PROBLEMS[:6]:
        limit = straight_through(problem, decay)
        rows = []
        for seed in seeds:
            instance = sample(problem, n, seed)
            v = average_weights(instance, problem, decay).weights
            nearest = problem.codebook.quantize(v)
            rows.append([
                np.square(v - instance.teacher).mean(),
                np.square(nearest - instance.teacher).mean(),
                np.square(instance.y - instance.X @ v).mean(),
                instance.teacher @ v / n,
            ])  # fmt: skip
        expected = [
            limit.average_gen_error,
            limit.rounded_gen_error,
            limit.average_train_error,
            limit.overlap,
        ]
        rows = np.array(rows)
        error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
        # 24 comparisons, Student's t of seven (three) degrees: false alarm below 1e-3 in all.
        bound = 9.0 if len(rows) == 8 else 40.0
        # A bias of order 1 / n is allowed for.
        np.testing.assert_array_less(np.abs(rows.mean(axis=0) - expected), bound * error + 3 / n)


# --- arguments ----------------------------------------------------------------------------------


def test_a_sequence_gives_arrays_and_a_frame():
    problems = [problem for problem, _ in PROBLEMS]
    decays = [decay for _, decay in PROBLEMS]
    together = straight_through(problems, decays)
    one = straight_through(problems[3], decays[3])
    assert isinstance(together, StraightThroughLimit)
    assert together.iterate_gen_error[3] == one.iterate_gen_error
    assert list(together.to_frame()) == list(one.to_frame())
    assert len(together.to_frame()) == len(problems)
    assert repr(together) == "StraightThroughLimit(9 problems, 9 converged)"
    assert "rounded_gen_error=0." in repr(one)


def test_arguments_are_checked():
    problem = TeacherStudent(uniform(1, 1.0), 2.0)
    with pytest.raises(ValueError, match=r"temperature = 0.1: .* give a problem with"):
        straight_through(TeacherStudent(uniform(1, 1.0), 2.0, temperature=0.1))
    with pytest.raises(ValueError, match=r"latent_decay = -0.1: give a finite number >= 0"):
        straight_through(problem, -0.1)
    with pytest.raises(ValueError, match=r"latent_decay has shape \(3,\): give one number, or"):
        straight_through([problem] * 2, [0.1] * 3)
    with pytest.raises(TypeError, match="problem: give a TeacherStudent or a sequence"):
        straight_through([uniform(1, 1.0)])
    with pytest.raises(ValueError, match="latent_decay = nan"):
        average_weights(sample(problem, 5, 0), problem, np.nan)
