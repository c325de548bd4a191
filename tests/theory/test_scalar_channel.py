from itertools import pairwise

import numpy as np
import pytest
from plain_channel import averages
from scipy.integrate import quad
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, lloyd_max, power_of_two, uniform
from qgen_lab.theory.scalar_channel import (
    channel_averages,
    ground_averages,
    is_even,
    thermal_averages,
)

UNEVEN = Codebook([-1.3, -0.4, -0.35, 0.9, 2.5])
TWO_SPACINGS = Codebook(np.append(np.linspace(-1, 0, 33), np.linspace(0, 1, 65)[1:]))
CHANNELS = [  # codebook, stiffness, variance, ridge, temperature
    (uniform(1, 1.0), 1.0, 1.5, 0.0, 1e-4),
    (uniform(1, 2.0), 0.02, 4.0, 0.3, 0.5),
    (uniform(2, 1.5), 0.7, 1.1, 0.05, 1e-3),
    (uniform(3, 2.0), 1.4, 2.0, 0.0, 0.05),
    (uniform(4, 3.0), 3.0, 1.05, 0.1, 0.3),
    (uniform(4, 3.0), 0.3, 1.05, 2.0, 10.0),
    (uniform(6, 4.0), 1.0, 1.3, 0.1, 0.01),
    (uniform(7, 1.5), 1.0, 1.3, 0.0, 0.1),  # many levels take part at once
    (TWO_SPACINGS, 0.7, 1.6, 0.1, 0.02),
    (power_of_two(3, 2.0), 0.8, 1.6, 0.0, 3e-3),
    (lloyd_max(3), 0.8, 1.6, 0.2, 0.02),
    (UNEVEN, 0.5, 2.0, 0.1, 2e-3),
    (UNEVEN, 0.5, 2.0, 0.1, 0.3),
]


@pytest.mark.parametrize("channel", CHANNELS)
def test_averages_equal_adaptive_quadrature(channel):
    _codebook, stiffness, variance, _ridge, temperature = channel
    field_mean, q, var, var_squared, entropy = averages(*channel)
    ours = thermal_averages(*channel)
    close = {"rel": 1e-9, "abs": 1e-11}
    assert ours.slope == pytest.approx(field_mean / variance, **close)
    assert ours.slope == pytest.approx(stiffness * var / temperature, **close)
    assert ours.mean_square == pytest.approx(q, **close)
    assert ours.squared_slope == pytest.approx(stiffness**2 * var_squared / temperature**2, **close)
    assert ours.entropy == pytest.approx(entropy, **close)


@pytest.mark.parametrize("channel", CHANNELS)
def test_derivatives_equal_finite_differences(channel):
    codebook, stiffness, variance, ridge, temperature = channel
    ours, step = thermal_averages(*channel), 1e-5

    def difference(name, stiffness_share, variance_share):
        up, down = (
            getattr(
                thermal_averages(
                    codebook,
                    stiffness * (1 + sign * step * stiffness_share),
                    variance * (1 + sign * step * variance_share),
                    ridge,
                    temperature,
                ),
                name,
            )
            for sign in (1, -1)
        )
        return (up - down) / (2 * step * (stiffness * stiffness_share + variance * variance_share))

    for name in ("slope", "mean_square"):
        by_stiffness = getattr(ours, f"{name}_by_stiffness")
        by_variance = getattr(ours, f"{name}_by_variance")
        assert by_stiffness == pytest.approx(difference(name, 1, 0), rel=1e-6, abs=1e-8)
        assert by_variance == pytest.approx(difference(name, 0, 1), rel=1e-6, abs=1e-8)


def test_a_half_line_is_enough_for_symmetric_levels():
    for codebook, temperature in ((uniform(3, 2.0, include_zero=True), 0.05), (lloyd_max(2), 1e-3)):
        levels = codebook.levels.copy()
        assert is_even(levels)
        half, whole = (
            channel_averages(levels, even, 0.8, 1.6, 0.1, temperature) for even in (True, False)
        )
        np.testing.assert_allclose(half, whole, rtol=1e-12, atol=1e-13)
    assert not is_even(UNEVEN.levels)


@pytest.mark.parametrize("codebook", [uniform(1, 1.0), uniform(3, 2.0), lloyd_max(2), UNEVEN])
@pytest.mark.parametrize("shrinkage", [1.0, 1.4])
def test_ground_averages_equal_quadrature_of_the_rounded_field(codebook, shrinkage):
    variance = 1.7
    slope, mean_square = ground_averages(codebook, shrinkage, variance)

    def average(f):
        density = norm(scale=np.sqrt(variance)).pdf
        edges = np.concatenate([[-12], codebook.thresholds * shrinkage, [12]])
        return sum(
            quad(lambda r: density(r) * f(r, codebook.quantize([r / shrinkage])[0]), low, high)[0]
            for low, high in pairwise(edges)
        )

    assert mean_square == pytest.approx(average(lambda r, w: w * w), rel=1e-9)
    assert slope == pytest.approx(average(lambda r, w: r * w) / variance, rel=1e-9)


@pytest.mark.parametrize("codebook", [uniform(1, 1.0), uniform(3, 2.0), lloyd_max(2), UNEVEN])
def test_thermal_averages_meet_those_at_temperature_zero(codebook):
    cold = thermal_averages(codebook, 0.8, 1.7, 0.32, 1e-7)
    slope, mean_square = ground_averages(codebook, 1.4, 1.7)
    assert cold.slope == pytest.approx(slope, abs=1e-9)
    assert cold.mean_square == pytest.approx(mean_square, abs=3e-6)


def test_distant_levels_lose_no_precision():
    # Levels a hundred standard deviations out leave one weight to each sign of the field.
    slope, mean_square = ground_averages(uniform(3, 100.0), 1.0, 1.0)
    inner = 100 / 7
    assert mean_square == pytest.approx(inner**2, rel=1e-14)
    assert slope == pytest.approx(2 * inner / np.sqrt(2 * np.pi), rel=1e-14)
