import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qgen_lab.experiments.statistics import (
    Interval,
    crossed_interval,
    mean_interval,
    paired_difference,
    ratio_of_means,
)

finite = st.floats(-1e3, 1e3)


def test_mean_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(size=9)
    twin = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    ours = mean_interval(values, level=0.9)
    assert (ours.low, ours.high) == pytest.approx((twin.low, twin.high))
    assert ours.n == 9
    assert ours.removed == 0


def skewed(rng, size):
    return rng.gamma(4.0, size=size) - 4.0


@pytest.mark.parametrize("draw", [np.random.Generator.normal, skewed], ids=["normal", "skewed"])
@pytest.mark.parametrize("runs", [8, 16])
def test_student_covers_where_the_percentile_bootstrap_does_not(draw, runs):
    rng = np.random.default_rng(1)
    samples = draw(rng, size=(2000, runs))
    covered = np.mean([not mean_interval(row).excludes_zero for row in samples])
    assert 0.925 < covered < 0.975  # three standard errors of 2,000 draws are 0.015
    if runs == 8:
        weights = rng.multinomial(8, np.full(8, 1 / 8), size=1000) / 8
        low, high = np.quantile(samples @ weights.T, [0.025, 0.975], axis=1)
        assert np.mean((low < 0) & (high > 0)) < 0.92


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=20), st.floats(-10, 10))
def test_paired_difference_ignores_what_a_pair_shares(pairs, shift):
    treated, control = np.array(pairs).T
    plain, shifted = (
        paired_difference(treated, control),
        paired_difference(treated + shift, control + shift),
    )
    assert plain.estimate == pytest.approx(shifted.estimate, abs=1e-9)
    assert plain.low == pytest.approx(shifted.low, abs=1e-6)
    mirrored = paired_difference(control, treated)
    assert (mirrored.low, mirrored.high) == pytest.approx((-plain.high, -plain.low))


def test_diverged_run_removes_its_whole_pair_and_is_counted():
    treated = [1.0, np.nan, 3.0, np.inf, 5.0]
    control = [0.5, 2.0, np.inf, np.inf, 4.0]
    interval = paired_difference(treated, control)
    assert interval == Interval(**{**vars(paired_difference([1.0, 5.0], [0.5, 4.0])), "removed": 3})
    assert interval.n == 2


def test_ratio_is_bounded_by_those_that_the_pairs_do_not_refute():
    rng = np.random.default_rng(6)
    bottom = rng.normal(2.0, 1.0, 8)
    top = 0.5 * bottom + rng.normal(0.3, 0.8, 8)
    ours = ratio_of_means(top, bottom, level=0.9)
    ratios = np.linspace(-3, 4, 70_001)
    kept = ratios[stats.ttest_1samp(top[:, None] - np.outer(bottom, ratios), 0.0).pvalue >= 0.1]
    assert (ours.low, ours.high) == pytest.approx((kept[0], kept[-1]), abs=1.1e-4)
    assert ours.estimate == pytest.approx(top.mean() / bottom.mean())


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.8])
def test_ratio_of_correlated_means_covers(correlation):
    rng = np.random.default_rng(7)
    pairs = rng.multivariate_normal([2.1, 3.0], [[1, correlation], [correlation, 1]], (4000, 8))
    intervals = [ratio_of_means(*pair.T) for pair in pairs]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])
    assert abs(covered - 0.95) < 0.0134  # 3.9 standard errors: one false alarm in 10,000


def test_ratio_to_nothing_is_unbounded_and_diverged_pairs_are_left_out():
    ours = ratio_of_means([1.0, 2.0, 3.0, np.nan], [-1.0, 0.5, 1.0, 5.0])
    assert (ours.low, ours.high, ours.n, ours.removed) == (-np.inf, np.inf, 3, 1)


def table(rng, runs, images, run_sd, image_sd, rest_sd):
    return (
        run_sd * rng.normal(size=(runs, 1))
        + image_sd * rng.normal(size=images)
        + rest_sd * rng.normal(size=(runs, images))
    )


@pytest.mark.parametrize("spread", [(0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.1, 0.5, 3.0)])
def test_crossed_interval_covers_other_images_where_seeds_alone_do_not(spread):
    rng = np.random.default_rng(2)
    tables = [table(rng, 16, 200, *spread) for _ in range(200)]
    crossed = [crossed_interval(values, resamples=300) for values in tables]
    assert np.mean([not interval.excludes_zero for interval in crossed]) > 0.91
    if spread[0] == 0:
        seeds_alone = [mean_interval(values.mean(axis=1)) for values in tables]
        assert np.mean([not interval.excludes_zero for interval in seeds_alone]) < 0.6


def test_crossed_interval_equals_resampling_by_index():
    values = table(np.random.default_rng(3), 8, 60, 0.3, 1.0, 1.0)
    rng = np.random.default_rng(4)
    means = [
        values[rng.integers(8, size=8)][:, rng.integers(60, size=60)].mean() for _ in range(4000)
    ]
    ours = crossed_interval(values)
    assert (ours.low, ours.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05)


def test_crossed_interval_is_reproducible_and_counts_diverged_rows():
    values = table(np.random.default_rng(5), 6, 30, 0.3, 1.0, 1.0)
    values[2, 7] = np.nan
    interval = crossed_interval(values)
    assert interval == crossed_interval(values)
    assert (interval.n, interval.removed) == (5, 1)


def test_interval_reads_like_a_number():
    interval = Interval(0.12345, -0.1, 0.3, 0.95, 8)
    assert f"{interval:+.2f}" == "+0.12\N{NO-BREAK SPACE}[-0.10,\N{NO-BREAK SPACE}+0.30]"
    assert str(interval).split() == ["0.1235", "[-0.1,", "0.3]"]
    assert not interval.excludes_zero
    assert Interval(-2.0, -3.0, -1.0, 0.95, 8).excludes_zero


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "values has 1 finite entries of 1"),
        (lambda: mean_interval([1.0, np.nan]), "values has 1 finite entries of 2"),
        (lambda: mean_interval([[1.0, 2.0]]), r"values has shape \(1, 2\)"),
        (lambda: mean_interval([1.0, 2.0], level=95), "level = 95"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "pairs need equal shapes"),
        (lambda: ratio_of_means([1.0], [1.0, 2.0]), r"numerator has shape \(1,\), denominator"),
        (lambda: ratio_of_means([1.0, np.nan], [1.0, 2.0]), "values has 1 finite entries of 2"),
        (lambda: crossed_interval([1.0, 2.0]), r"give a table \(runs, images\)"),
        (lambda: crossed_interval([[1.0, 2.0]]), "values has 1 whole rows of 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
