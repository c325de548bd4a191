from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from qgen_lab.theory.quadrature import gaussian_rule, graded_panels

centres_and_sizes = st.lists(
    st.tuples(st.floats(-12, 12), st.floats(1e-3, 1.0)), min_size=1, max_size=6
)


@given(centres_and_sizes)
def test_panels_cover_the_range_and_keep_to_the_allowed_widths(pairs):
    centres, sizes = (np.array(column) for column in zip(*sorted(pairs), strict=True))
    edges = graded_panels(-9.0, 9.0, 1.5, centres, sizes)
    assert edges[0] == -9.0
    assert edges[-1] == 9.0
    widths = np.diff(edges)
    assert (widths > 0).all()
    assert widths.max() <= 1.5 * (1 + 1e-12)
    left, right = edges[:-1, None], edges[1:, None]
    distance = np.maximum(0.0, np.maximum(left - centres, centres - right))
    assert (widths[:, None] <= (sizes + distance) * (1 + 1e-9)).all()


@pytest.mark.parametrize("deviation", [0.1, 1.0, 7.0])
def test_gaussian_moments(deviation):
    nodes, weights = gaussian_rule(deviation, np.array([0.3]), np.array([0.2]))
    moments = [weights @ (nodes / deviation) ** k for k in range(9)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15, 0, 105], rel=1e-12, abs=1e-12)


def plain_rule(deviation, centres, sizes):
    """The rule panel by panel, with NumPy."""
    edges = graded_panels(-9 * deviation, 9 * deviation, 1.5 * deviation, centres, sizes)
    x, w = np.polynomial.legendre.leggauss(16)
    panels = [
        (low + (high - low) * (1 + x) / 2, (high - low) / 2 * w) for low, high in pairwise(edges)
    ]
    nodes, weights = np.hstack(panels)
    return nodes, weights * norm.pdf(nodes, scale=deviation)


def test_the_rule_equals_its_plain_twin():
    arguments = 1.3, np.array([-1.0, 0.2, 0.9]), np.array([0.01, 0.3, 0.02])
    for ours, plain in zip(gaussian_rule(*arguments), plain_rule(*arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-13, atol=1e-300)


def test_an_even_integrand_needs_half_the_nodes():
    centres, sizes = np.array([-0.8, 0.0, 0.8]), np.array([0.1, 0.02, 0.1])
    whole, half = gaussian_rule(1.7, centres, sizes), gaussian_rule(1.7, centres, sizes, True)
    assert half[0].min() > 0
    assert half[0].size < 0.6 * whole[0].size
    averages = [w @ (1 / (1 + np.cosh(5 * x))) for x, w in (whole, half)]
    assert averages[1] == pytest.approx(averages[0], rel=1e-13)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-5, 1e-9])
def test_a_smoothed_step_is_integrated_to_rounding(scale):
    threshold = 0.7
    nodes, weights = gaussian_rule(1.0, np.array([threshold]), np.array([3 * scale]))
    ours = weights @ np.cosh(np.clip((nodes - threshold) / (2 * scale), -300, 300)) ** -2.0

    def integrand(x):  # in units of the step's own width
        return np.cosh(x / 2) ** -2.0 * norm.pdf(threshold + scale * x) * scale

    reach = [min(9.7 / scale, 300.0), min(8.3 / scale, 300.0)]
    adaptive = sum(
        quad(integrand, low, high, epsabs=0, epsrel=1e-12, limit=200)[0]
        for low, high in ((-reach[0], 0), (0, reach[1]))
    )
    assert ours == pytest.approx(adaptive, rel=1e-12 if scale > 1e-6 else 1e-7)
