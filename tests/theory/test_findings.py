"""The typical-case paper's findings: each with the region in which it holds, and where it fails."""

import itertools

import numba
import numpy as np
import pytest

from qgen_lab.theory import optimal_width, ridge_solution

FEW = numba.config.DISABLE_JIT  # smaller sizes where every solution is slow

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
