"""Intervals for means and paired differences: where the error bars of all chapters are made.

Runs are few (8 to 16 seeds), so intervals come from Student's t: at eight seeds a percentile
bootstrap of the mean covers only about 90% where it promises 95%. Where the same test images serve
every seed, `crossed_interval` resamples images jointly with the seeds.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; format it like a number, ``f"{interval:+.3f}"``.

    Attributes
    ----------
    estimate, low, high : float
        The estimate and the ends of its interval, in the unit of the values.
    level : float
        Confidence level, for instance 0.95.
    n : int
        Number of runs (or pairs of runs) that entered.
    removed : int
        Number of runs (or whole pairs) left out because a value was not finite: they diverged.
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    removed: int = 0

    @property
    def excludes_zero(self) -> bool:
        """True where zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __format__(self, spec: str) -> str:
        text = f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"
        return text.replace(" ", "\N{NO-BREAK SPACE}")  # stays on one line of a table

    def __str__(self) -> str:
        return format(self, ".4g")


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval.

    Parameters
    ----------
    values : array_like, shape (runs,)
        One value a run. Values that are not finite mark diverged runs: left out and counted.
    level : float
        Confidence level, between 0 and 1.

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        If fewer than two finite values remain, or `level` is not between 0 and 1.
    """
    _check_level(level)
    values = np.asarray(values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"values has shape {values.shape}: give one value a run, shape (runs,)")
    kept = values[np.isfinite(values)]
    n = len(kept)
    if n < 2:
        raise ValueError(f"values has {n} finite entries of {len(values)}: two runs are the least")
    mean, error = kept.mean(), kept.std(ddof=1) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return Interval(
        float(mean), float(mean - half), float(mean + half), level, n, removed=len(values) - n
    )


def paired_difference(treated: ArrayLike, control: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``treated - control`` over pairs that share a seed, with Student's t interval.

    Parameters
    ----------
    treated, control : array_like, shape (pairs,)
        Values in the same order of seeds. If either run of a pair diverged (its value is not
        finite), the whole pair is left out and counted.
    level : float
        Confidence level, between 0 and 1.

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        If the shapes differ, fewer than two pairs remain, or `level` is not between 0 and 1.
    """
    treated, control = _whole_pairs(treated=treated, control=control)
    return mean_interval(treated - control, level)


def ratio_of_means(numerator: ArrayLike, denominator: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of one quantity over the mean of another, over pairs that share a seed.

    The interval is Fieller's (1954): it holds each ratio `r` for which zero lies in Student's t
    interval of the mean of ``numerator - r * denominator``. For normal pairs, correlated or not,
    it covers as often as it says.

    Parameters
    ----------
    numerator, denominator : array_like, shape (pairs,)
        Values in the same order of seeds. If either of a pair is not finite, the whole pair is
        left out and counted.
    level : float
        Confidence level, between 0 and 1.

    Returns
    -------
    Interval
        Its ends are infinite where the denominator's own interval contains zero: then nothing
        bounds the ratio.

    Raises
    ------
    ValueError
        If the shapes differ, fewer than two pairs remain, or `level` is not between 0 and 1.
    """
    pairs = np.array(_whole_pairs(numerator=numerator, denominator=denominator))
    whole = mean_interval(pairs[1], level)
    kept = pairs[:, np.isfinite(pairs[0])]
    top, bottom = kept.mean(axis=1)
    # t² times the covariance matrix of the two means
    (tt, tb), (_, bb) = np.cov(kept) * stats.t.ppf((1 + level) / 2, whole.n - 1) ** 2 / whole.n
    a, b, c = bottom**2 - bb, top * bottom - tb, top**2 - tt  # ends: a r² - 2 b r + c = 0
    half = np.sqrt(max(b**2 - a * c, 0))
    low, high = ((b - half) / a, (b + half) / a) if a > 0 else (-np.inf, np.inf)
    return replace(whole, estimate=float(top / bottom), low=float(low), high=float(high))


def crossed_interval(
    values: ArrayLike, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Mean of a table runs x test images, with runs and images resampled independently.

    An interval over seeds alone speaks about other seeds on these very images. This one speaks
    about other images too: the two-way ("pigeonhole") bootstrap of Owen (2007), slightly wide
    by construction. The images are shared by all runs, so a resample draws them once for all.

    Parameters
    ----------
    values : array_like, shape (runs, images)
        For instance the per-image loss of each quantized run minus that of its twin. A run with
        a value that is not finite diverged: its whole row is left out and counted.
    level : float
        Confidence level, between 0 and 1.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    Interval
        `n` counts runs.

    Raises
    ------
    ValueError
        If `values` is not a table, fewer than two runs remain, or `level` is not between 0 and 1.
    """
    _check_level(level)
    values = np.asarray(values, dtype=float)
    if values.ndim != 2:
        raise ValueError(f"values has shape {values.shape}: give a table (runs, images)")
    kept = values[np.isfinite(values).all(axis=1)]
    runs, images = kept.shape
    if runs < 2:
        raise ValueError(f"values has {runs} whole rows of {len(values)}: two runs are the least")
    rng = np.random.default_rng(seed)
    run_weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    image_weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples) / images
    means = np.einsum("ri,ri->r", run_weights @ kept, image_weights)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        float(kept.mean()), float(low), float(high), level, runs, removed=len(values) - runs
    )


def _whole_pairs(**pairs: ArrayLike) -> list[NDArray]:
    """Both rows as floats, NaN in either where one of the pair is not finite."""
    (one, first), (other, second) = ((k, np.asarray(v, dtype=float)) for k, v in pairs.items())
    if first.shape != second.shape:
        raise ValueError(
            f"{one} has shape {first.shape}, {other} {second.shape}: pairs need equal shapes"
        )
    whole = np.isfinite(first) & np.isfinite(second)
    return [np.where(whole, row, np.nan) for row in (first, second)]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: a confidence level lies between 0 and 1")
