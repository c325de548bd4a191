import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.integrate import quad
from scipy.stats import norm

from qgen_lab.codebooks import Codebook, families, lloyd_max, lsq_grid, power_of_two, uniform

FAMILIES = {
    "uniform": lambda bits: uniform(bits, 1.7),
    "lsq": lambda bits: lsq_grid(bits, 0.3),
    "power of two": lambda bits: power_of_two(bits, 1.7),
    "lloyd": lloyd_max,
    "lloyd on samples": lambda bits: lloyd_max(bits, np.random.default_rng(0).laplace(size=2000)),
}
ALL = [
    pytest.param(make(bits), id=f"{name}, {bits} bits")
    for name, make in FAMILIES.items()
    for bits in (1, 2, 3, 6)
]
FINITE = st.floats(-1e6, 1e6)
CODEBOOKS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40, unique=True).map(
    lambda levels: Codebook(sorted(levels))
)


def slow_code(codebook, w):
    """The definition: count the thresholds below; at one, take the even index."""
    w = np.asarray(w).astype(np.float64)
    below = np.searchsorted(codebook.thresholds, w)
    at = np.isin(w, codebook.thresholds) & (below % 2 == 1)
    return below + at


@pytest.mark.parametrize("codebook", ALL)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fast_and_slow_agree(codebook, dtype):
    rng = np.random.default_rng(1)
    edges = np.concatenate([codebook.levels, codebook.thresholds, [np.inf, -np.inf, 0.0, -0.0]])
    near = np.concatenate([np.nextafter(edges, -9), edges, np.nextafter(edges, 9)])
    with np.errstate(over="ignore"):  # the largest finite doubles are infinite in fewer bits
        w = np.concatenate([rng.normal(size=5000), near]).astype(dtype)
    code = slow_code(codebook, w)
    np.testing.assert_array_equal(codebook.code(w), code)
    quantized = codebook.quantize(w)
    assert quantized.dtype == dtype
    np.testing.assert_array_equal(quantized, codebook.levels.astype(dtype)[code])
    finite = np.isfinite(w)
    np.testing.assert_array_equal(codebook.noise(w[finite]), w[finite] - quantized[finite])


@given(CODEBOOKS, hnp.arrays(np.float64, st.integers(1, 30), elements=FINITE))
def test_quantizing_picks_the_nearest_level(codebook, w):
    distance = np.abs(w[:, None] - codebook.levels)
    np.testing.assert_array_equal(np.abs(codebook.noise(w)), distance.min(1))
    np.testing.assert_array_equal(codebook.code(w), slow_code(codebook, w))
    np.testing.assert_array_equal(codebook.levels[codebook.code(w)], codebook.quantize(w))


@given(CODEBOOKS)
def test_levels_stay_where_they_are(codebook):
    np.testing.assert_array_equal(codebook.quantize(codebook.levels), codebook.levels)
    np.testing.assert_array_equal(codebook.code(codebook.levels), np.arange(len(codebook)))
    assert not codebook.noise(codebook.levels).any()


@given(CODEBOOKS, hnp.arrays(np.float64, 30, elements=FINITE))
def test_quantizing_keeps_order(codebook, w):
    assert (np.diff(codebook.code(np.sort(w))) >= 0).all()


@given(CODEBOOKS)
def test_a_weight_at_a_threshold_goes_to_the_even_index(codebook):
    code = codebook.code(codebook.thresholds)
    k = np.arange(len(codebook) - 1)
    np.testing.assert_array_equal(code, k + k % 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("step", [0.25, 0.1, 0.0137, float(np.float32(0.3))])
def test_lsq_grid_rounds_half_to_even(bits, step, dtype):
    half = 2 ** (bits - 1)
    w = np.random.default_rng(bits).normal(scale=half * step, size=100_000).astype(dtype)
    codes = np.round(np.clip(w.astype(np.float64) / step, -half, half - 1))
    np.testing.assert_array_equal(lsq_grid(bits, step).code(w), codes + half)
    np.testing.assert_array_equal(lsq_grid(bits, step).quantize(w), (codes * step).astype(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_grid_rounds_half_to_even_at_every_tie(bits):
    half = 2 ** (bits - 1)
    w = np.arange(-half - 2, half + 2, 0.5) / 8
    codes = np.round(np.clip(w * 8, -half, half - 1))
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(lsq_grid(bits, 1 / 8).quantize(w.astype(dtype)), codes / 8)


def test_one_bit_has_two_levels_and_zero_goes_to_the_even_index():
    codebook = lsq_grid(1, 0.5)
    np.testing.assert_array_equal(codebook.levels, [-0.5, 0.5])
    np.testing.assert_array_equal(
        codebook.quantize([-2, -1e-300, 0, 1e-300, 2]) * 2, [-1, -1, -1, 1, 1]
    )
    assert codebook == uniform(1, 0.5)


def test_float32_weights_are_compared_in_double_precision():
    # One float32 step beside a threshold that float32 cannot hold.
    codebook = Codebook([0.0, 0.2])
    below = np.float32(0.1)
    assert float(below) > codebook.thresholds[0]
    assert codebook.code(below) == 1
    assert codebook.code(np.nextafter(below, np.float32(0))) == 0


@pytest.mark.parametrize("codebook", [uniform(3, 1), lloyd_max(3)])
def test_any_shape_and_memory_layout(codebook):
    w = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    expected = codebook.levels.astype(np.float32)[slow_code(codebook, w)]
    views = [
        lambda a: a,
        np.asfortranarray,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[::-1, 1::2, ::-2],
        lambda a: np.broadcast_to(a[0], (3, 5, 6)),
        lambda a: a.astype(a.dtype.newbyteorder()),
        lambda a: a[0, 0, 0],
        lambda a: a[:1, :1, :1],
    ]
    for view in views:
        np.testing.assert_array_equal(codebook.quantize(view(w)), view(expected))
        assert codebook.quantize(view(w)).shape == np.shape(view(w))
        assert codebook.code(view(w)).shape == np.shape(view(w))
    read_only = w.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(codebook.quantize(read_only), expected)


def test_scalars_lists_and_integers():
    codebook = uniform(2, 3)
    assert codebook.quantize(0.7) == 1.0
    assert codebook.quantize(0.7).shape == ()
    assert codebook.code(9) == 3
    quantized = codebook.quantize([1, 2, -7])
    assert quantized.dtype == np.float64
    np.testing.assert_array_equal(quantized, [1, 1, -3])
    np.testing.assert_array_equal(codebook.noise(np.array([1, 3], np.int8)), [0, 0])


def test_input_is_left_alone():
    w = np.linspace(-1, 1, 9)
    before = w.copy()
    uniform(2, 1).noise(w)
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize("codebook", [uniform(2, 1), lloyd_max(2)])
@pytest.mark.parametrize("method", ["quantize", "code", "noise"])
def test_bad_weights(codebook, method):
    call = getattr(codebook, method)
    with pytest.raises(ValueError, match="NaN in 2 of 4 places"):
        call([[np.nan, 1.0], [0.0, np.nan]])
    with pytest.raises(ValueError, match="NaN in 1 of 1"):
        call(np.float16("nan"))
    with pytest.raises(ValueError, match=r"empty \(shape \(0, 3\)\)"):
        call(np.empty((0, 3)))
    for wrong in (["a"], np.array([1j]), np.array([True]), np.array([1], np.longdouble), [None]):
        with pytest.raises(TypeError, match="dtype"):
            call(wrong)


def test_infinite_weights_go_to_the_outer_levels():
    for codebook in (uniform(2, 1), lloyd_max(2)):
        np.testing.assert_array_equal(codebook.code([-np.inf, np.inf]), [0, 3])


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1.0], "at least two"),
        ([], "at least two"),
        ([[0.0, 1.0]], r"shape \(1, 2\)"),
        (3.0, "shape"),
        ([0.0, np.nan], "finite"),
        ([0.0, np.inf], "finite"),
        ([1.0, 0.0], "ascend"),
        ([0.0, 0.0, 1.0], "ascend"),
        ([-1.7e308, 1.7e308], "finite range"),
    ],
)
def test_bad_levels(levels, message):
    with pytest.raises(ValueError, match=message):
        Codebook(levels)


def test_equality_hash_copy_and_pickle():
    a, b = Codebook([-1.0, 0.0, 1.0]), Codebook((-1, -0.0, 1))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Codebook([-1, 0, 2])
    assert a != [-1, 0, 1]
    copied = pickle.loads(pickle.dumps(a))
    assert copied == a
    for array in (a.levels, a.thresholds, a.spacing, copied.levels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5.0
    with pytest.raises(AttributeError):
        a.levels = np.zeros(2)


def test_levels_are_copied():
    levels = np.array([0.0, 1.0])
    codebook = Codebook(levels)
    levels[0] = -5.0
    assert codebook.levels[0] == 0.0


def test_repr_is_short():
    assert repr(uniform(2, 1)) == "Codebook([-1, -0.3333, 0.3333, 1])"
    assert repr(uniform(14, 2)) == "Codebook([-2, -2, ..., 2, 2], 16384 levels)"


def test_derived_quantities():
    codebook = Codebook([0.0, 1.0, 4.0])
    np.testing.assert_array_equal(codebook.thresholds, [0.5, 2.5])
    np.testing.assert_array_equal(codebook.spacing, [1.0, 3.0])
    assert codebook.bits == np.log2(3)
    assert len(codebook) == 3
    assert uniform(5, 1).bits == 5


@pytest.mark.parametrize("bits", [1, 2, 5, 16, np.int64(3)])
def test_uniform(bits):
    codebook = uniform(bits, 1.3)
    assert len(codebook) == 2**bits
    np.testing.assert_array_equal(codebook.levels, -codebook.levels[::-1])
    assert codebook.levels[-1] == 1.3
    np.testing.assert_allclose(codebook.spacing, 2.6 / (2**bits - 1), rtol=1e-10)
    if bits > 1:
        with_zero = uniform(bits, 1.3, include_zero=True)
        assert len(with_zero) == 2**bits - 1
        assert with_zero.levels[len(with_zero) // 2] == 0.0
        assert with_zero.levels[-1] == 1.3


def test_power_of_two():
    np.testing.assert_array_equal(
        power_of_two(3, 2.0).levels, [-2, -1, -0.5, -0.25, 0.25, 0.5, 1, 2]
    )
    assert len(power_of_two(10, 1.0)) == 1024
    with pytest.raises(ValueError, match="fewer bits"):
        power_of_two(12, 1.0)


@pytest.mark.parametrize("bits", [0, -1, 17, 40, 1.5, 2.0, True, "4", None, np.nan])
@pytest.mark.parametrize(
    "make",
    [lambda b: uniform(b, 1), lambda b: lsq_grid(b, 1), lambda b: power_of_two(b, 1), lloyd_max],
)
def test_bad_bits(make, bits):
    with pytest.raises(ValueError, match="use a whole number from 1 to 16"):
        make(bits)


@given(CODEBOOKS, st.floats(1e-3, 1e3))
def test_another_width_keeps_the_shape(codebook, width):
    scaled = codebook.with_width(width)
    assert np.abs(scaled.levels).max() == width
    factor = width / np.abs(codebook.levels).max()
    np.testing.assert_allclose(scaled.levels, factor * codebook.levels, rtol=1e-14)


@pytest.mark.parametrize("name", families)
def test_every_family_keeps_the_contract(name):
    """A family makes, of (bits, width), a codebook for those bits that reaches to the width."""
    family = families[name]
    for bits in range(2, 9):
        codebook = family(bits, 1.3)
        assert isinstance(codebook, Codebook)
        assert 2 ** (bits - 1) < len(codebook) <= 2**bits
        assert np.abs(codebook.levels).max() == 1.3
        np.testing.assert_allclose(family(bits, 2.6).levels, 2 * codebook.levels, rtol=1e-14)
    for bits in (0, 17, 2.5):
        with pytest.raises(ValueError, match=f"bits = {bits}: use a whole number"):
            family(bits, 1.0)
    for width in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"width = {width}: use a positive finite number"):
            family(2, width)


def test_families_are_the_named_constructors():
    assert families["uniform"](3, 1.7) == uniform(3, 1.7)
    assert families["uniform with zero"](3, 1.7) == uniform(3, 1.7, include_zero=True)
    assert families["power of two"](3, 1.7) == power_of_two(3, 1.7)
    fitted = lloyd_max(3)
    assert families["Lloyd-Max"](3, fitted.levels[-1]) == fitted


@pytest.mark.parametrize("value", [0, -1.0, np.inf, np.nan, "1", None, 1j])
@pytest.mark.parametrize(
    ("make", "name"), [(uniform, "width"), (lsq_grid, "step"), (power_of_two, "width")]
)
def test_bad_width(make, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*positive finite"):
        make(2, value)


def test_one_bit_cannot_include_zero():
    with pytest.raises(ValueError, match="bits >= 2"):
        uniform(1, 1.0, include_zero=True)


def test_gaussian_levels_are_those_of_the_literature():
    # Max, 1960, table I: outputs and mean squared errors.
    published = {
        1: ([0.7980], 0.3634),
        2: ([0.4528, 1.510], 0.1175),
        3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
        4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    }
    for bits, (levels, error) in published.items():
        codebook = lloyd_max(bits)
        np.testing.assert_allclose(codebook.levels[2 ** (bits - 1) :], levels, atol=6e-4)
        assert gaussian_error(codebook) == pytest.approx(error, rel=6e-4)


def gaussian_error(codebook):
    """Mean squared error on the unit Gaussian by adaptive quadrature."""
    ends = [-np.inf, *codebook.thresholds, np.inf]
    return sum(
        quad(lambda x, level=level: (x - level) ** 2 * norm.pdf(x), a, b)[0]
        for level, a, b in zip(codebook.levels, ends, ends[1:], strict=False)
    )


@pytest.mark.parametrize("bits", range(1, 8))
def test_gaussian_levels_are_means_of_their_cells(bits):
    codebook = lloyd_max(bits)
    ends = np.concatenate([[-np.inf], codebook.thresholds, [np.inf]])
    # Mass of a cell from the tail on its own side, so that nothing is lost far out.
    low, high = np.minimum(ends[:-1], -ends[1:]), np.minimum(ends[1:], -ends[:-1])
    mass = norm.cdf(high) - norm.cdf(low)
    means = -np.diff(norm.pdf(ends)) / mass
    np.testing.assert_allclose(codebook.levels, means, atol=1e-12)
    np.testing.assert_array_equal(codebook.levels, -codebook.levels[::-1])


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_many_gaussian_levels_follow_the_high_resolution_law(bits):
    # Panter and Dite: error * 4**bits -> sqrt(3) pi / 2; level density ~ density**(1/3).
    codebook = lloyd_max(bits)
    x = (np.arange(400_000) + 0.5) / 400_000 * 20 - 10
    error = np.sum(codebook.noise(x) ** 2 * norm.pdf(x)) * (x[1] - x[0])
    assert error * 4**bits == pytest.approx(np.sqrt(3) * np.pi / 2, rel=0.03)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lloyd_on_samples_is_a_fixed_point(bits):
    samples = np.random.default_rng(2).standard_t(5, size=(100, 40)) + 1000.0
    codebook = lloyd_max(bits, samples)
    code = slow_code(codebook, samples)
    means = [samples[code == k].mean() for k in range(2**bits)]
    np.testing.assert_allclose(codebook.levels, means, rtol=1e-12)
    assert codebook == lloyd_max(bits, np.random.default_rng(3).permutation(samples.ravel()))


def least_error(samples, n_levels):
    """Least sum of squared errors over all partitions into runs, by trying every one."""
    ordered = np.sort(samples)
    return min(
        sum(((run - run.mean()) ** 2).sum() for run in np.split(ordered, cuts))
        for cuts in itertools.combinations(range(1, len(ordered)), n_levels - 1)
    )


@given(
    hnp.arrays(np.float64, st.integers(4, 11), elements=st.floats(-9, 9, width=16), unique=True),
    st.sampled_from([1, 2]),
)
def test_lloyd_on_few_samples_is_the_global_optimum(samples, bits):
    error = (lloyd_max(bits, samples).noise(samples) ** 2).sum()
    assert error == pytest.approx(least_error(samples, 2**bits), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", [8, 11, 13])
def test_lloyd_on_many_samples_fits_them_better_than_the_levels_of_their_law(bits):
    # So many levels that samples are grouped first.
    samples = np.random.default_rng(0).normal(size=30_000)
    fitted, of_the_law = (
        np.square(c.noise(samples)).mean() for c in (lloyd_max(bits, samples), lloyd_max(bits))
    )
    assert fitted < of_the_law


def test_lloyd_copes_with_outliers_and_repeats():
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.normal(size=20_000).round(3), [1e6, -1e9]])
    codebook = lloyd_max(9, samples)
    assert codebook.levels[0] == pytest.approx(-1e9)
    assert codebook.levels[-1] == pytest.approx(1e6)
    assert np.abs(codebook.noise(samples)).max() < 0.5


def test_lloyd_on_gaussian_samples_approaches_the_gaussian_levels():
    samples = np.random.default_rng(0).normal(size=200_000)
    np.testing.assert_allclose(lloyd_max(2, samples).levels, lloyd_max(2).levels, atol=0.02)


def test_lloyd_on_exactly_as_many_values_as_levels():
    codebook = lloyd_max(2, [3, 1, 1, 1, 2, 10, 10])
    np.testing.assert_allclose(codebook.levels, [1, 2, 3, 10], rtol=1e-15)


def test_lloyd_survives_an_empty_cell():
    samples = np.concatenate([-np.arange(50.0) - 40, [0.0, 10.0], np.arange(50.0) + 50])
    for bits in (1, 2, 3, 4):
        assert len(lloyd_max(bits, samples)) == 2**bits


def test_bad_samples():
    with pytest.raises(ValueError, match="3 distinct values, fewer than the 4 levels"):
        lloyd_max(2, [1, 1, 2, 3])
    with pytest.raises(ValueError, match="samples holds NaN"):
        lloyd_max(1, [1.0, np.nan, 2.0])
    with pytest.raises(ValueError, match="samples holds NaN"):
        lloyd_max(1, [1.0, np.inf, 2.0])
    with pytest.raises(ValueError, match="samples is empty"):
        lloyd_max(1, [])


def test_without_compilation_the_results_are_the_same():
    script = (
        "import numpy as np; from qgen_lab.codebooks import uniform, lloyd_max\n"
        "w = np.linspace(-3, 3, 101, dtype=np.float32)\n"
        "print(uniform(3, 1).code(w).sum(), lloyd_max(3).code(w).sum())"
    )
    w = np.linspace(-3, 3, 101, dtype=np.float32)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [uniform(3, 1).code(w).sum(), lloyd_max(3).code(w).sum()]
    assert list(map(int, done.stdout.split())) == expected
