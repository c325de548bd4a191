"""The typical-case paper's findings: each with the region in which it holds, and where it fails."""

import itertools
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq, minimize_scalar

from qgen_lab.codebooks import families, lloyd_max, uniform
from qgen_lab.theory import (
    TeacherStudent,
    at_temperature,
    interpolation_threshold,
    optimal_width,
    phase_diagram,
    ridge_solution,
    solve_rs,
    stationary_motion,
    zero_entropy_temperature,
)

FEW = numba.config.DISABLE_JIT  # smaller sizes where every solution is slow

RESULTS = Path(__file__).parents[2] / "book" / "results"

# --- (i) replica symmetry breaks at few bits and large width ------------------------------------


def is_few_bits_and_large_width(broken):
    """Whether a set over (bits, width) keeps each point if bits are taken away or width added."""
    wider = (broken[:, 1:] >= broken[:, :-1]).all()
    fewer_bits = (broken[:-1] >= broken[1:]).all()
    return wider, fewer_bits


@pytest.mark.parametrize("criterion", ["replicon", "entropy"])
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 8.0])
def test_i_holds_at_a_temperature_from_one_sample_per_weight_on(criterion, alpha, temperature):
    widths = np.geomspace(0.02, 60, 6 if FEW else 48)
    broken = phase_diagram([1, 2, 3, 4], widths, alpha, temperature)[criterion] < 0
    assert broken.any()
    assert not broken.all()
    assert is_few_bits_and_large_width(broken) == (True, True)


@pytest.mark.parametrize("temperature", [1e-3, 0.02])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
def test_i_holds_for_few_bits_but_not_for_large_width_below(alpha, temperature):
    widths = np.geomspace(0.02, 60, 6 if FEW else 48)
    broken = phase_diagram([1, 2, 3, 4], widths, alpha, temperature)["replicon"] < 0
    wider, fewer_bits = is_few_bits_and_large_width(broken)
    assert fewer_bits
    if broken.any():
        assert not wider
        assert not broken[:, -1].any()  # stable again at the widest


def test_i_in_numbers():
    widths = np.geomspace(0.1, 10, 6 if FEW else 48)
    diagram = phase_diagram([1, 2, 3, 4], widths, 1.5, 0.01)
    by_replicon, by_entropy = (diagram.boundary(c).points[:, 1] for c in ("replicon", "entropy"))
    np.testing.assert_allclose(by_replicon, [0.2990, 0.6630, 1.4014, 3.1586], atol=6e-5)
    np.testing.assert_allclose(by_entropy, [0.3772, 0.8126, 1.6106, 3.3781], atol=6e-5)
    # Below the spinodal one bit is unstable between two widths only.
    window = phase_diagram([1, 2], widths, 0.6, 0.005).boundary().points
    np.testing.assert_allclose(window[window[:, 0] == 1, 1], [0.2677, 1.3881], atol=6e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 8.0])
def test_i_holds_for_message_passing_with_a_tolerance(alpha):
    widths = np.geomspace(0.1, 10, 24)
    motion = np.array(
        [
            [stationary_motion(TeacherStudent(uniform(b, w), alpha)) for w in widths]
            for b in (1, 2, 3, 4)
        ]
    )
    assert (np.diff(motion, axis=1) > 0).all()
    assert (np.diff(motion, axis=0) < 0).all()


def test_i_has_no_boundary_at_temperature_zero():
    widths = np.geomspace(0.1, 10, 24)
    for alpha in (1.0, 1.5, 8.0):
        ground = phase_diagram([1, 2, 3, 4], widths, alpha)
        assert (ground["replicon"] == -np.inf).all()
        assert (ground["entropy"] < 0).all()


def test_replica_symmetry_ends_by_a_jump_close_to_interpolation():
    """Entropy vanishes before the replicon does: many fine levels below 1.344 samples a weight."""

    def lead(alpha):
        problem = TeacherStudent(uniform(7, 6.0), alpha)
        return zero_entropy_temperature(problem) / at_temperature(problem) - 1

    assert brentq(lead, 1.2, 1.5, xtol=1e-6) == pytest.approx(1.3441, abs=2e-3)


# --- (ii) an optimal width ----------------------------------------------------------------------

MSE_WIDTHS = {1: 0.7979, 2: 1.4935, 3: 2.0511, 4: 2.5140}  # least rounding error of a Gaussian
ALPHAS = (2.0,) if FEW else (1.0, 1.5, 2.0, 4.0, 20.0)
NOISES = (0.1,) if FEW else (0.0, 0.01, 0.1, 0.5, 2.0)


@pytest.mark.parametrize("bits", MSE_WIDTHS)
def test_without_a_ridge_one_width_is_best_and_it_is_narrow(bits):
    """From one sample per weight on, without a ridge: one interior minimum, below the width of
    least rounding error, and the further below the more noise and the fewer samples."""
    ratios = np.empty((len(NOISES), len(ALPHAS)))
    for (i, noise), (j, alpha) in itertools.product(enumerate(NOISES), enumerate(ALPHAS)):
        best = optimal_width(bits, alpha, noise)
        assert best.converged
        assert not best.at_edge
        assert best.rivals == ()
        assert best.searched[0] < best.band[0] < best.width < best.band[1] < best.searched[1]
        ratios[i, j] = best.width / MSE_WIDTHS[bits]
    assert (ratios < 1).all()
    assert (np.diff(ratios, axis=0) < 0).all()
    assert (np.diff(ratios, axis=1) > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_fewer_samples_than_weights_two_widths_compete(bits):
    """The wider minimum is that of the least-norm fit: another mechanism, and another width."""
    best = optimal_width(bits, alpha=0.5, noise_variance=0.1)
    assert len(best.rivals) == 1
    narrow, wide = sorted([best.width, best.rivals[0][0]])
    assert wide > 2 * narrow
    assert best.phase == ("unstable" if bits == 2 else "interpolating")
    if bits == 4:  # the best width may even be above that of least rounding error
        assert optimal_width(4, alpha=0.9, noise_variance=0.01).width > MSE_WIDTHS[4]


@pytest.mark.parametrize("bits", [2] if FEW else [2, 3, 4])
def test_with_the_tuned_ridge_the_best_width_is_that_of_rounding(bits):
    """In units of the full-precision weights: a narrow range is a substitute for a ridge."""
    for noise, alpha in itertools.product(NOISES[-3:], ALPHAS[:3]):
        for ridge, low, high in ((0.0, 0.0, 0.95), (noise, 0.93, 1.001)):
            weights = ridge_solution(alpha, noise, ridge).self_overlap
            ratio = optimal_width(bits, alpha, noise, ridge).width / np.sqrt(weights)
            assert low <= ratio / MSE_WIDTHS[bits] <= high


def test_four_bits_beat_least_squares_but_not_the_tuned_ridge():
    best = optimal_width(4, alpha=2.0, noise_variance=0.5)
    assert best.gen_error == pytest.approx(0.3754, abs=5e-5)
    assert ridge_solution(2.0, 0.5, ridge=0.0).gen_error == pytest.approx(0.5, rel=1e-12)
    assert ridge_solution(2.0, 0.5, ridge=0.5).gen_error == pytest.approx(0.2808, abs=5e-5)
    tuned = optimal_width(4, 2.0, 0.5, ridge=0.5)
    assert tuned.gen_error == pytest.approx(0.2919, abs=5e-5)


def test_at_a_high_temperature_no_width_is_best():
    """Narrow levels: error = rho + E[w^2] (1 - 2 rho alpha / T), to first order."""
    for bits, alpha in ((1, 1.0), (2, 2.0), (4, 1.5)):
        assert optimal_width(bits, alpha, temperature=2.02 * alpha).at_edge
        if not FEW:
            assert not optimal_width(bits, alpha, temperature=1.9 * alpha).at_edge


# --- (iii) the interpolation threshold, and the peak at it ----------------------------------------

GRID = np.geomspace(0.1, 50, 9 if FEW else 25)


def thresholds(family, noise_variance):
    """Interpolation threshold by bits (rows, ascending) and width."""
    least = 2 if family == "uniform with zero" else 1
    books = [[families[family](bits, w) for w in GRID] for bits in range(least, 7)]
    return np.array([[interpolation_threshold(c, noise_variance) for c in row] for row in books])


@pytest.mark.parametrize("noise_variance", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("family", families)
def test_fewer_bits_and_narrower_ranges_delay_interpolation(family, noise_variance):
    found = thresholds(family, noise_variance)
    assert found.max() < 1
    by_bits, by_width = np.diff(found, axis=0), np.diff(found, axis=1)
    if family == "power of two":  # new levels crowd at zero; and look alike at twice the scale
        assert (by_bits > -1e-15).all()
        assert (by_width[:, GRID[1:] < 14] > 0).all()
    else:
        assert (by_bits > 0).all()
        assert (by_width > 0).all()


def test_power_of_two_thresholds_are_not_monotone_in_a_wide_range():
    family = families["power of two"]
    found = [interpolation_threshold(family(5, w), 0.0) for w in np.geomspace(14, 50, 30)]
    assert np.diff(found).min() < -1e-4


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_threshold_of_wide_and_narrow_ranges(bits):
    def distortion(width):
        """Mean squared error for a unit Gaussian, cell by cell, by quadrature."""
        codebook = uniform(bits, width)
        w = np.linspace(-9, 9, 20_001)
        square = codebook.noise(w) ** 2 * np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)
        return np.trapezoid(square, w)

    least = minimize_scalar(distortion, bounds=(0.3, 4), method="bounded").fun
    assert interpolation_threshold(uniform(bits, 1e4)) == pytest.approx(1 - least, abs=1e-6)
    narrow = interpolation_threshold(uniform(bits, 0.01))
    assert narrow == pytest.approx(2 * 0.01**2 / (np.pi * 1.1), rel=1e-3)


# Threshold and error there with a ridge of 1e-6, from an independent code.
@pytest.mark.parametrize(
    ("bits", "width", "threshold", "height"),
    [(2, 2.0, 0.73677, 1.591), (3, 4.0, 0.92350, 3.599), (4, 2.0, 0.79376, 1.061)],
)
def test_height_of_the_peak(bits, width, threshold, height):
    codebook = uniform(bits, width)
    at = interpolation_threshold(codebook)
    assert at == pytest.approx(threshold, abs=1e-5)
    ridged = [TeacherStudent(codebook, at, ridge=r) for r in (1e-6, 1e-9, 1e-12)]
    errors = solve_rs(ridged).gen_error
    assert errors[0] == pytest.approx(height, abs=1e-3)
    limit = solve_rs(TeacherStudent(codebook, at + 1e-10)).gen_error
    # The cusp is sharp: a ridge lowers it like its third root, fewer samples like the square root.
    assert np.log10((limit - errors[1]) / (limit - errors[2])) / 3 == pytest.approx(1 / 3, abs=0.01)
    fewer = solve_rs([TeacherStudent(codebook, at - d) for d in (1e-5, 1e-7)]).gen_error
    assert np.log10((limit - fewer[0]) / (limit - fewer[1])) / 2 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_error_peaks_at_the_threshold(bits):
    for width in np.geomspace(0.25, 8, 11):
        codebook = uniform(bits, width)
        at = interpolation_threshold(codebook)
        around = [TeacherStudent(codebook, at * f) for f in (0.99, 1 + 1e-9, 1.01)]
        fewer, there, more = solve_rs(around).gen_error
        assert fewer < there < np.inf
        assert more < there


@pytest.mark.parametrize("width", [2.0] if FEW else [0.5, 1.0, 2.0, 8.0])
def test_one_bit_has_no_peak(width):
    alphas = np.linspace(0.02, 3, 80)
    for ridge in (0.0, 1e-3):
        line = solve_rs([TeacherStudent(uniform(1, width), a, ridge=ridge) for a in alphas])
        assert (np.diff(line.gen_error) < 0).all()


def local_maxima(values):
    return np.flatnonzero((values[1:-1] > values[:-2]) & (values[1:-1] >= values[2:])) + 1


def test_a_small_ridge_moves_and_rounds_the_peak():
    codebook = uniform(2, 2.0)
    alphas = np.arange(0.5, 1.2, 0.005)
    tops = []
    for ridge in (1e-3, 1e-2):
        error = solve_rs([TeacherStudent(codebook, a, ridge=ridge) for a in alphas]).gen_error
        (top,) = local_maxima(error)
        tops.append((alphas[top], error[top]))
    np.testing.assert_allclose(tops, [(0.780, 1.418), (0.835, 1.060)], atol=6e-3)


def test_without_a_ridge_cooling_meets_no_cusp():
    codebook = uniform(2, 2.0)
    step = 0.802  # here the solution that cooling follows gives way to another
    gap = 0.1 if FEW else 0.02
    for alphas in (np.arange(0.2, step - 0.03, gap), np.arange(step + 0.03, 1.6, gap)):
        cold = solve_rs([TeacherStudent(codebook, a, temperature=1e-3) for a in alphas])
        assert cold.converged.all()
        assert (np.diff(cold.gen_error) < 0).all()


TRUSTED = [  # bits, width, whether the error of a drawn student and of the mean one has a peak
    (2, 2, False, False), (3, 4, False, True),
    (1, 2, False, False), (3, 2, False, False), (4, 2, False, True), (6, 2, True, True),
    (2, 4, False, False), (6, 4, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "width", "drawn", "mean"), TRUSTED[: 2 if FEW else None])
def test_where_replica_symmetry_is_not_refuted_few_bits_have_no_peak(bits, width, drawn, mean):
    codebook = uniform(bits, width)
    alphas = np.linspace(0.1, 1.6, 31 if FEW else 61)
    temperature = codebook.spacing[0] ** 2 / 6
    line = solve_rs(
        [TeacherStudent(codebook, a, ridge=1e-3, temperature=temperature) for a in alphas]
    )
    assert line.replicon.min() > 0
    assert line.entropy.min() > 0
    assert bool(local_maxima(line.gen_error).size) is drawn
    assert bool(local_maxima(line.gen_error_mean).size) is mean


def test_regression_within_a_box_has_the_delayed_peak():
    """Convex, solved exactly; five standard errors: false alarm below 1e-5 (t of 23) a point."""
    stored = pd.read_csv(RESULTS / "double_descent" / "instances.csv")
    box = stored[(stored.n == 200) & (stored.ridge == 1e-3)]
    problems = [TeacherStudent(uniform(9, 2.0), a, ridge=1e-3) for a in box.alpha]
    off = (box.box_gen_error - solve_rs(problems).gen_error).abs()
    assert (off < 5 * box.box_gen_error_se).all()
    assert box.set_index("alpha").box_gen_error.iloc[1:].idxmax() == pytest.approx(5 / 6, abs=1e-5)


def test_exact_ground_states_do_not_follow_the_peak():
    stored = pd.read_csv(RESULTS / "double_descent" / "instances.csv")
    exact = stored[(stored.n == 12) & (stored.ridge == 1e-3) & (stored.alpha < 0.6)]
    problems = [TeacherStudent(uniform(2, 2.0), a, ridge=1e-3) for a in exact.alpha]
    above = exact.gen_error - solve_rs(problems).gen_error
    assert (above.iloc[1:] > 5 * exact.gen_error_se.iloc[1:]).all()
    assert (exact.train_error > 0.1 / np.e * 4 ** (-2 / exact.alpha)).all()  # the counting bound


# --- (iv) levels that are not evenly spaced -----------------------------------------------------


def temperatures(codebooks, alpha):
    return at_temperature([TeacherStudent(codebook, alpha) for codebook in codebooks])


@pytest.mark.parametrize(("bits", "crossing"), [(2, 1.0869), (3, 1.5570), (4, 1.9946)])
def test_iv_lloyd_max_is_more_stable_at_large_width_and_less_at_small(bits, crossing):
    alpha, shape = 3.0, lloyd_max(bits)

    def ratio(width):
        lloyd, even = temperatures([shape.with_width(width), uniform(bits, width)], alpha)
        return lloyd / even - 1

    assert brentq(ratio, 0.5, 4.0, xtol=1e-8) == pytest.approx(crossing, abs=1e-4)
    for width in (0.3, 0.7, 0.95 * crossing):
        assert ratio(width) > 0
    for width in (1.05 * crossing, 3.0, 6.0):
        assert ratio(width) < 0


@pytest.mark.parametrize(
    ("bits", "ratios"), [(2, (0.965, 1.007)), (3, (0.889, 1.044)), (4, (0.870, 1.157))]
)
def test_iv_at_equal_error_lloyd_max_is_more_stable_only_close_to_the_least_error(bits, ratios):
    """Widths below the best; errors 1% and 50% above that of the best evenly spaced levels."""
    alpha, shape, even = 3.0, lloyd_max(bits), optimal_width(bits, 3.0)

    def narrow(family, error):
        def excess(width):
            return solve_rs(TeacherStudent(family(width), alpha)).gen_error - error

        return family(brentq(excess, 0.2, even.width))

    for above, expected in zip((1.01, 1.5), ratios, strict=True):
        families = shape.with_width, lambda width: uniform(bits, width)
        pair = [narrow(family, above * even.gen_error) for family in families]
        assert np.divide(*temperatures(pair, alpha)) == pytest.approx(expected, abs=1e-3)


def test_iv_two_bits_gain_nothing_close_to_one_sample_per_weight():
    alpha, shape = 1.05, lloyd_max(2)
    widths = np.geomspace(0.4, 5, 12)
    lloyd = temperatures([shape.with_width(w) for w in widths], alpha)
    assert (lloyd > temperatures([uniform(2, w) for w in widths], alpha)).all()
