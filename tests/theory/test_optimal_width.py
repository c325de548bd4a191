import json
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from qgen_lab.codebooks import families, lloyd_max, uniform
from qgen_lab.theory import TeacherStudent, optimal_width, recommend_width, solve_rs
from qgen_lab.theory.optimal_width import least_over_widths

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())["optimal_width"]
FEW = numba.config.DISABLE_JIT  # smaller sizes where every solution is slow
MSE_WIDTHS = {1: 0.7979, 2: 1.4935, 3: 2.0511, 4: 2.5140}  # of a unit Gaussian


# --- figures from elsewhere, and a dense scan ---------------------------------------------------


@pytest.mark.parametrize("row", REFERENCE[:: 5 if FEW else 1])
def test_reference_rows(row):
    best = optimal_width(row["bits"], row["alpha"], row["noise_variance"])
    assert best.converged
    assert not best.at_edge
    assert best.residual < 1e-9
    assert best.width == pytest.approx(row["optimal_width"], abs=6e-5)  # four decimals are given
    assert best.gen_error == pytest.approx(row["gen_error"], abs=6e-8)


DENSE = [
    (1, {"alpha": 0.3, "noise_variance": 0.5}),
    (2, {"alpha": 0.5, "noise_variance": 0.1}),  # the narrower of two minima
    (3, {"alpha": 0.5, "noise_variance": 0.1}),  # the wider of two minima
    (2, {"alpha": 1.2, "noise_variance": 0.3, "ridge": 0.2, "signal_variance": 2.0}),
    (2, {"alpha": 1.5, "temperature": 0.2}),
    (1, {"alpha": 0.7, "temperature": 0.3, "ridge": 0.05}),
    (3, {"alpha": 1.5, "codebook": "power of two"}),
    (2, {"alpha": 2.0, "codebook": "uniform with zero"}),
    (3, {"alpha": 0.8, "noise_variance": 0.0, "codebook": "Lloyd-Max"}),
]


@pytest.mark.parametrize(("bits", "setting"), DENSE[: 2 if FEW else None])
def test_a_dense_scan_finds_nothing_better(bits, setting):
    best = optimal_width(bits, **setting)
    setting = dict(setting)
    family = families[setting.pop("codebook", "uniform")]
    widths = np.geomspace(*best.searched, 101 if FEW else 1001)
    step = widths[1] / widths[0] - 1
    errors = solve_rs([TeacherStudent(family(bits, w), **setting) for w in widths]).gen_error
    assert best.converged
    assert best.gen_error <= errors.min() * (1 + 1e-9)
    assert best.width == pytest.approx(widths[errors.argmin()], rel=step)
    lowest = 1 + np.flatnonzero((errors[1:-1] < errors[:-2]) & (errors[1:-1] <= errors[2:]))
    found = sorted([best.width, *(width for width, _ in best.rivals)])
    np.testing.assert_allclose(found, widths[lowest], rtol=step)
    # The band is where the error is within 5% of the least, around the best.
    near = errors <= 1.05 * best.gen_error
    first = last = int(errors.argmin())
    while first > 0 and near[first - 1]:
        first -= 1
    while last < widths.size - 1 and near[last + 1]:
        last += 1
    np.testing.assert_allclose(best.band, widths[[first, last]], rtol=step)


# --- limits and units ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1] if FEW else MSE_WIDTHS)
def test_with_many_samples_the_teacher_is_rounded(bits):
    best = optimal_width(bits, alpha=1e7)
    assert best.width == pytest.approx(MSE_WIDTHS[bits], abs=1e-4)

    def rounding_error(width):
        w = np.linspace(-8, 8, 160_001)
        density = np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi) * (w[1] - w[0])
        return np.sum(uniform(bits, width).noise(w) ** 2 * density)

    slow = minimize_scalar(rounding_error, bounds=(0.5, 3.0), method="bounded")
    assert best.width == pytest.approx(slow.x, abs=1e-3)
    assert best.gen_error == pytest.approx(slow.fun, rel=1e-4)


def test_one_bit_has_a_closed_form():
    # Without a ridge at T = 0: error = rho + W^2 - 2 rho D, D = 2 W / sqrt(2 pi tau2),
    # tau2 = rho + (noise + error) / alpha.
    alpha, noise, rho = 1.3, 0.4, 1.7

    def error(width):
        value = rho
        for _ in range(2000):
            tau = np.sqrt(rho + (noise + value) / alpha)
            value = rho + width**2 - 2 * rho * 2 * width / (np.sqrt(2 * np.pi) * tau)
        return value

    slow = minimize_scalar(error, bounds=(0.1, 3.0), method="bounded", options={"xatol": 1e-9})
    best = optimal_width(1, alpha, noise, signal_variance=rho)
    assert best.width == pytest.approx(slow.x, rel=1e-5)
    assert best.gen_error == pytest.approx(slow.fun, rel=1e-9)


@settings(max_examples=1 if FEW else 10)
@given(
    bits=st.integers(1, 4),
    alpha=st.floats(0.3, 5.0),
    noise=st.floats(0.01, 1.0),
    temperature=st.sampled_from([0.0] if FEW else [0.0, 0.1]),
    unit=st.floats(0.1, 10.0),
)
def test_other_units_scale_the_width(bits, alpha, noise, temperature, unit):
    plain = optimal_width(bits, alpha, noise, 0.01, temperature)
    scaled = optimal_width(
        bits, alpha, noise * unit**2, 0.01, temperature * unit**2, signal_variance=unit**2
    )
    assert scaled.width == pytest.approx(unit * plain.width, rel=1e-4)
    assert scaled.gen_error == pytest.approx(unit**2 * plain.gen_error, rel=1e-6)
    assert scaled.band == pytest.approx([unit * end for end in plain.band], rel=1e-4)


def test_heat_takes_the_optimum_away():
    # Narrow levels: error = rho + E[w^2] (1 - 2 rho alpha / T) to first order in E[w^2], so from
    # T = 2 rho alpha on no width is better than none at all.
    hot = optimal_width(2, alpha=2.0, temperature=4.01)
    assert hot.at_edge
    assert hot.width == pytest.approx(hot.searched[0])
    assert hot.gen_error == pytest.approx(1.0, abs=1e-3)
    assert "at_edge=True" in repr(hot)
    assert not optimal_width(2, alpha=2.0, temperature=3.9).at_edge


def test_the_range_searched_is_an_argument():
    inside = optimal_width(2, 2.0, search=(1.0, 2.0))
    assert inside.width == pytest.approx(optimal_width(2, 2.0).width, rel=1e-5)
    assert inside.searched == (1.0, 2.0)
    short = optimal_width(2, 2.0, search=(0.1, 0.5))
    assert short.at_edge
    assert short.width == short.band[1] == 0.5


# --- the search itself --------------------------------------------------------------------------


def search(error, lower=0.01, upper=100.0, tolerance=0.05):
    return least_over_widths(error, (lower, upper), tolerance)


def test_several_minima():
    def error(w):
        return 2 + np.cos(3 * np.log(w)) + 0.05 * np.log(w)

    found = search(error)
    minima = [found.width, *(width for width, _ in found.rivals)]
    assert minima == sorted(minima)  # the narrower the better
    assert len(minima) == 4
    slow = [np.pi * k / 3 for k in (-3, -1, 1, 3)]
    slow = [minimize_scalar(lambda x: error(np.exp(x)), (x - 0.1, x + 0.1)).x for x in slow]
    np.testing.assert_allclose(np.log(minima), slow, atol=1e-6)


def test_of_equal_minima_the_narrowest():
    found = search(lambda w: 2 + np.cos(3 * np.log(w)))
    assert found.width == min([found.width, *(width for width, _ in found.rivals)])
    assert len(found.rivals) == 3


def test_a_jump_between_branches():
    # The minimum lies right at the jump, from the left.
    found = search(lambda w: np.where(w < 1.234, 3 - w, 2 + w))
    assert found.width == pytest.approx(1.234, rel=1e-5)
    assert found.gen_error == pytest.approx(3 - 1.234, rel=1e-5)
    assert found.band == pytest.approx((3 - 1.05 * (3 - 1.234), 1.234), rel=1e-5)


def test_a_minimum_at_either_end():
    for error, end in ((lambda w: 1 + w, 0.01), (lambda w: 1 + 1 / w, 100.0)):
        found = search(error)
        assert found.at_edge
        assert found.width == pytest.approx(end)
        assert found.rivals == ()
        assert search(error, tolerance=1e9).band == pytest.approx((0.01, 100.0))


def test_missing_solutions_are_said_and_passed_over():
    def error(w):
        return np.where((w > 0.5) & (w < 0.8), np.nan, 1 + np.log(w / 2) ** 2)

    found = search(error)
    assert not found.converged
    assert found.width == pytest.approx(2.0, rel=1e-5)
    hole = search(lambda w: np.where(w > 1.9, np.nan, 1 + np.log(w / 2) ** 2))
    assert not hole.converged
    assert 1.7 < hole.width < 1.9


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits = 0: use a whole number from 1 to 16"),
        ({"alpha": -1.0}, ValueError, "alpha = -1.0: give a finite number > 0"),
        ({"noise_variance": np.nan}, ValueError, "noise_variance = nan"),
        ({"codebook": "cubic"}, ValueError, "codebook = 'cubic': give one of .*'Lloyd-Max'"),
        ({"codebook": uniform(2, 1.0)}, TypeError, "codebook is a Codebook: give a function of"),
        ({"codebook": lambda b, w: [0, w]}, TypeError, "gave a list, not a Codebook"),
        ({"codebook": lambda b, w: lloyd_max(b)}, ValueError, "reaches to 1.51.*with_width"),
        ({"codebook": "uniform with zero", "bits": 1}, ValueError, "bits >= 2"),
        ({"tolerance": 0}, ValueError, "tolerance = 0: give a finite number > 0"),
    ],
)
@pytest.mark.parametrize("function", [optimal_width, recommend_width])
def test_bad_arguments(function, setting, error, message):
    with pytest.raises(error, match=message):
        function(**{"bits": 2, "alpha": 2.0} | setting)


@pytest.mark.parametrize("search", [(1.0, 0.5), (0.0, 1.0), (1.0, np.inf)])
def test_bad_range(search):
    with pytest.raises(ValueError, match="search"):
        optimal_width(2, 2.0, search=search)
