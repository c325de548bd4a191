"""Codebooks: ascending sets of levels, rounding to the nearest level, and the noise this leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from operator import index

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_banded
from scipy.special import erfcx, ndtri

MAX_BITS = 16


@dataclass(frozen=True, eq=False, repr=False)
class Codebook:
    """A set of levels that weights are rounded to.

    A weight goes to the nearest level. A weight exactly at a threshold goes to the level of even
    index (0-based), which on the integer grid of two bits or more is rounding half to even.
    Infinite weights go to the outer levels. Comparisons are made in float64, whatever the
    weights' dtype. Two codebooks with equal levels are equal and hash alike.

    Parameters
    ----------
    levels : array_like, shape (K,)
        K >= 2 finite values in strictly ascending order.

    Raises
    ------
    ValueError
        If `levels` is not one-dimensional, has fewer than two entries, or is not finite and
        strictly ascending.
    """

    levels: NDArray[np.float64]

    def __post_init__(self):
        levels = np.array(self.levels, dtype=np.float64) + 0.0  # no -0.0: equal levels hash alike
        if levels.ndim != 1 or levels.size < 2:
            raise ValueError(f"levels has shape {levels.shape}: give a list of at least two levels")
        if not np.isfinite(levels).all():
            raise ValueError("levels holds NaN or infinity: give finite levels")
        with np.errstate(over="ignore"):
            ascending = (np.diff(levels) > 0).all() and np.isfinite(levels[-1] - levels[0])
        if not ascending:
            raise ValueError(
                "levels must ascend strictly over a finite range: sort them and drop repeats,"
                " as np.unique does"
            )
        object.__setattr__(self, "levels", _read_only(levels))

    def __len__(self) -> int:
        return self.levels.size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and np.array_equal(self.levels, other.levels)

    def __hash__(self) -> int:
        return hash(self.levels.tobytes())

    def __reduce__(self):
        return Codebook, (self.levels,)  # a plain pickle would come back writable

    def __repr__(self) -> str:
        shown = [f"{level:.4g}" for level in self.levels[[0, 1, -2, -1]]]
        if len(self) <= 8:
            return f"Codebook([{', '.join(f'{level:.4g}' for level in self.levels)}])"
        return (
            f"Codebook([{shown[0]}, {shown[1]}, ..., {shown[2]}, {shown[3]}], {len(self)} levels)"
        )

    @cached_property
    def thresholds(self) -> NDArray[np.float64]:
        """Midpoints between neighbouring levels, shape (K - 1,)."""
        return _read_only(self.levels[:-1] / 2 + self.levels[1:] / 2)

    @cached_property
    def spacing(self) -> NDArray[np.float64]:
        """Distances between neighbouring levels, shape (K - 1,)."""
        return _read_only(np.diff(self.levels))

    @property
    def bits(self) -> float:
        """Binary logarithm of the number of levels."""
        return float(np.log2(len(self)))

    def with_width(self, width: float) -> "Codebook":
        """The same shape of levels, scaled so that the largest magnitude is `width`.

        Raises
        ------
        ValueError
            If `width` is not a positive finite number.
        """
        outermost = np.abs(self.levels).max()
        return Codebook(_positive("width", width) * (self.levels / outermost))

    def quantize(self, w: ArrayLike) -> NDArray:
        """Round weights to their nearest levels.

        Parameters
        ----------
        w : array_like, any shape
            Weights. Integers are read as float64.

        Returns
        -------
        ndarray, shape and float dtype of `w`
            The levels, themselves rounded to the dtype of `w`.

        Raises
        ------
        ValueError
            If `w` is empty or holds NaN.
        TypeError
            If `w` is not real numbers of at most 64 bits.
        """
        w = _weights(w)
        return self._look_up(w, self.levels.astype(w.dtype))

    def code(self, w: ArrayLike) -> NDArray[np.intp]:
        """Index of the level that each weight goes to; shape of `w`, raises as `quantize`."""
        return self._look_up(_weights(w), np.arange(len(self)))

    def noise(self, w: ArrayLike) -> NDArray:
        """Quantization noise `w - quantize(w)`; shape and float dtype of `w`."""
        w = _weights(w)
        return w - self.quantize(w)

    def _look_up(self, w: NDArray, table: NDArray) -> NDArray:
        """`table[k]` for each weight, k the index of its level."""
        flat = np.ascontiguousarray(_computable(w)).reshape(-1)
        wide_table = _computable(table)
        out = np.empty(flat.shape, wide_table.dtype)
        nans = _find(flat, self.levels, self._padded_thresholds, wide_table, out)
        if nans:
            raise ValueError(f"w holds NaN in {nans} of {w.size} places: remove or replace them")
        return out.astype(table.dtype, copy=False).reshape(w.shape)[()]

    @cached_property
    def _padded_thresholds(self) -> NDArray[np.float64]:
        """Thresholds between minus and plus infinity: level k lies between entries k and k + 1."""
        return np.concatenate([[-np.inf], self.thresholds, [np.inf]])


_BLOCK = 64


@numba.njit(cache=True)
def _find(w, levels, bounds, table, out):
    """Fill `out` with `table[k]`, k the index of each weight's level; return the number of NaN.

    Bisection, a block of weights side by side, so that the searches overlap in the processor.
    """
    nans = 0
    x, k = np.empty(_BLOCK), np.empty(_BLOCK, np.int64)
    for start in range(0, len(w), _BLOCK):
        n = min(_BLOCK, len(w) - start)
        for i in range(n):
            weight = np.float64(w[start + i])
            nans += weight != weight
            x[i] = min(max(weight, levels[0]), levels[-1])
            k[i] = 0
        # The largest k with bounds[k] < x, in a number of steps that is the same for all.
        size = len(levels)
        while size > 1:
            half = size // 2
            for i in range(n):
                k[i] += half if bounds[k[i] + half] < x[i] else 0
            size -= half
        for i in range(n):
            at_odd = (k[i] & 1) and x[i] == bounds[k[i] + 1]
            out[start + i] = table[k[i] + (1 if at_odd else 0)]
    return nans


def uniform(bits: int, width: float, include_zero: bool = False) -> Codebook:
    """Evenly spaced levels from `-width` to `+width`.

    There are `2**bits` levels, so zero is not one of them; with `include_zero` there are
    `2**bits - 1`, zero in the middle (two bits or more).
    """
    bits, width = check_bits(bits), _positive("width", width)
    if include_zero and bits == 1:
        raise ValueError("include_zero leaves one level of one bit: use bits >= 2")
    steps = 2**bits - 1 - include_zero
    return Codebook(width * (np.arange(-steps, steps + 1, 2) / steps))


def lsq_grid(bits: int, step: float) -> Codebook:
    """Learned-step-size levels: `step` times the integers from `-2**(bits-1)` to `2**(bits-1) - 1`.

    From two bits on, quantizing is `step * round(clip(w / step))` with ties to even. One bit is
    `{-step, +step}`; there the even-index rule sends a weight of exactly zero to `-step`, whereas
    the one-bit quantizer of `qgen_lab.qat` takes sign(0) = +1.

    Notes
    -----
    Source: Esser et al., Learned Step Size Quantization, 2020, Eq. 1 and 2.
    """
    bits, step = check_bits(bits), _positive("step", step)
    half = 2 ** (bits - 1)
    codes = np.array([-1, 1]) if bits == 1 else np.arange(-half, half)
    return Codebook(step * codes)


def power_of_two(bits: int, width: float) -> Codebook:
    """Levels `±width * 2**-k` for k = 0 ... `2**(bits-1) - 1`; zero is not one of them."""
    bits, width = check_bits(bits), _positive("width", width)
    positive = np.ldexp(width, -np.arange(2 ** (bits - 1)))
    if positive[-1] < np.finfo(np.float64).tiny:
        raise ValueError(
            f"bits = {bits}: the smallest level, width * 2**-{positive.size - 1}, is too small for"
            " double precision: use fewer bits (at most 10 at width 1)"
        )
    return Codebook(np.concatenate([-positive, positive[::-1]]))


def lloyd_max(bits: int, samples: ArrayLike | None = None) -> Codebook:
    """Levels of least mean squared error: every level is the mean of the weights that go to it.

    Parameters
    ----------
    bits : int
        From 1 to 16; there are `2**bits` levels.
    samples : array_like, any shape, optional
        Weights to fit: the best partition by dynamic programming, then Lloyd's iteration until
        nothing changes. It is deterministic, and the global optimum for up to `2**22 / 2**bits`
        distinct values; beyond, values are grouped first and the result is a local optimum.
        Without samples the weights follow the unit Gaussian, whose optimum is unique.

    Raises
    ------
    ValueError
        If `samples` holds NaN or infinity, or fewer distinct values than there are levels.

    Notes
    -----
    Source: Lloyd, Least squares quantization in PCM, 1982; Max, Quantizing for minimum
    distortion, 1960.
    """
    n_levels = 2 ** check_bits(bits)
    if samples is None:
        negative = _negative_gaussian_levels(n_levels // 2)
        return Codebook(np.concatenate([negative, -negative[::-1]]))
    return Codebook(_lloyd(_weights(samples, "samples").astype(np.float64).ravel(), n_levels))


def _lloyd_max_of_width(bits: int, width: float) -> Codebook:
    return lloyd_max(bits).with_width(width)


# By name: functions of (bits, width) to the codebook whose outermost level lies at the width.
families: dict[str, Callable[[int, float], Codebook]] = {
    "uniform": uniform,
    "uniform with zero": partial(uniform, include_zero=True),
    "power of two": power_of_two,
    "Lloyd-Max": _lloyd_max_of_width,
}


def check_bits(bits: int) -> int:
    """Return `bits` as an int, or raise ValueError unless it is a whole number from 1 to 16."""
    try:
        whole = index(bits)
    except TypeError:
        whole = 0
    if isinstance(bits, bool) or not 1 <= whole <= MAX_BITS:
        raise ValueError(f"bits = {bits!r}: use a whole number from 1 to {MAX_BITS}")
    return whole


def _positive(name: str, value: float) -> float:
    if not (np.isscalar(value) and np.isreal(value) and 0 < value < np.inf):
        raise ValueError(f"{name} = {value!r}: use a positive finite number")
    return float(value)


def _read_only(array: NDArray) -> NDArray:
    array.flags.writeable = False
    return array


def _weights(w: ArrayLike, name: str = "w") -> NDArray[np.floating]:
    """`w` as a float array that is not empty; integers become float64."""
    w = np.asarray(w)
    if w.size == 0:
        raise ValueError(f"{name} is empty (shape {w.shape}): give at least one weight")
    if w.dtype.kind in "iu":
        return w.astype(np.float64)
    if w.dtype.kind != "f" or w.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {w.dtype}: use float16, float32, float64 or integers")
    return w


def _computable(array: NDArray) -> NDArray:
    """The same numbers in a dtype that Numba compiles for: native byte order, no half precision."""
    dtype = np.float32 if array.dtype == np.float16 else array.dtype.newbyteorder("=")
    return array.astype(dtype, copy=False)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)


def _negative_gaussian_levels(n: int) -> NDArray[np.float64]:
    """Lower half of the unit Gaussian's `2 n` optimal levels, by Newton's method.

    The unknowns are the levels; the equations say that each is the mean of its cell.
    """
    levels = np.sqrt(3) * ndtri((np.arange(n) + 0.5) / (2 * n))  # optimal for n to infinity
    for _ in range(20):
        thresholds = (levels[:-1] + levels[1:]) / 2
        means, by_lower, by_upper = _gaussian_cells(np.append(thresholds, 0.0))
        jacobian = np.zeros((3, n))
        # A threshold moves by half of what either of its levels moves; the one at zero is fixed.
        jacobian[0, 1:] = -by_upper[:-1] / 2
        jacobian[2, :-1] = -by_lower[1:] / 2
        jacobian[1] = 1 - by_lower / 2
        jacobian[1, :-1] -= by_upper[:-1] / 2
        residual = means - levels
        levels = levels + solve_banded((1, 1), jacobian, residual)
        if np.abs(residual).max() < 1e-13:
            return levels
    raise RuntimeError(f"Newton's method did not settle for {2 * n} Gaussian levels")


def _gaussian_cells(upper: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Means of the unit Gaussian over cells that begin at minus infinity, and their derivatives.

    Parameters
    ----------
    upper : ndarray, shape (n,)
        Upper ends of the cells, ascending, none positive.

    Returns
    -------
    means, by_lower, by_upper : ndarrays, shape (n,)
        Mean of each cell, and its derivatives by the cell's two ends.
    """
    lower = upper[:-1]
    middle, half = (upper[1:] + lower) / 2, (upper[1:] - lower) / 2
    # Integrals relative to the density at the middle: nothing cancels, however narrow the cell.
    offset = half[:, None] * _NODES
    density = np.exp(-offset * (middle[:, None] + offset / 2))
    mass = half * (density @ _WEIGHTS)
    shift = half * ((offset * density) @ _WEIGHTS) / mass
    edge = np.exp(-half * (half / 2 + [[-1], [1]] * middle)) / mass

    # The outer cell in closed form: its mean is minus density over mass, the inverse Mills ratio.
    hazard = np.sqrt(2 / np.pi) / erfcx(-upper[0] / np.sqrt(2))
    means = np.append(-hazard, middle + shift)
    by_lower = np.append(0.0, edge[0] * (half + shift))
    by_upper = np.append(hazard * (upper[0] + hazard), edge[1] * (half - shift))
    return means, by_lower, by_upper


def _lloyd(samples: NDArray[np.float64], n_levels: int) -> NDArray[np.float64]:
    """Lloyd's iteration on sorted samples, from the best partition of groups of them."""
    if not np.isfinite(samples).all():
        raise ValueError("samples holds NaN or infinity: remove or replace them")
    center = samples.mean()
    ordered = np.sort(samples) - center
    starts = np.flatnonzero(np.diff(ordered, prepend=-np.inf))
    if starts.size < n_levels:
        raise ValueError(
            f"samples holds {starts.size} distinct values, fewer than the {n_levels} levels:"
            " use fewer bits or more samples"
        )
    n_groups = min(starts.size, max(n_levels, _PARTITION_WORK // n_levels))
    edges = np.append(starts[_group(ordered[starts], n_groups)], ordered.size)
    sums = np.append(0.0, np.cumsum(ordered))
    squares = np.append(0.0, np.cumsum(ordered**2))
    if n_groups > n_levels:
        edges = edges[_best_partition(edges, sums[edges], squares[edges], n_levels)]
    levels = np.diff(sums[edges]) / np.diff(edges)
    for _ in range(10_000):  # some tens are usual; rounding could in principle cycle
        thresholds = (levels[:-1] + levels[1:]) / 2
        moved = np.concatenate([[0], np.searchsorted(ordered, thresholds), [ordered.size]])
        if np.array_equal(moved, edges):
            break
        edges = moved
        counts = np.diff(edges)
        # A level that nothing goes to stays where it is.
        levels = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), levels)
    return levels + center


_PARTITION_WORK = 2**22  # levels times groups: about a second


def _group(values: NDArray[np.float64], n_groups: int) -> NDArray[np.intp]:
    """First indices of `n_groups` runs of ascending `values`.

    Many optimal levels lie as densely as the cube root of the samples' density, of which the gap
    between neighbours is the inverse; so equal sums of gap**(2/3) make good groups.
    """
    position = np.cumsum(np.diff(values, prepend=values[0]) ** (2 / 3))
    order = np.arange(n_groups)
    first = np.searchsorted(position, order * (position[-1] / n_groups))
    # No group is empty: each begins after the one before, and leaves one value to each after it.
    first = np.maximum.accumulate(first - order) + order
    return np.minimum(first, values.size - n_groups + order)


@numba.njit(cache=True)
def _best_partition(counts, sums, squares, n_cells):
    """Ends of the `n_cells` runs of groups that have the least squared deviation from their means.

    `counts`, `sums`, `squares` are cumulative over groups and begin with zero. Dynamic programming
    over the number of cells; the best last end is monotone, so halving finds all in n log n.
    """
    n = len(counts) - 1
    before = np.zeros((n_cells, n + 1), np.int32)
    best = np.zeros(n + 1)
    best[1:] = squares[1:] - sums[1:] ** 2 / counts[1:]
    for cell in range(1, n_cells):
        last, best = best, np.full(n + 1, np.inf)
        stride = 1
        while stride <= n:
            stride *= 2
        while stride:
            for j in range(stride, n + 1, 2 * stride):
                if j <= cell:
                    continue
                low = max(before[cell, j - stride], cell)
                high = before[cell, j + stride] if j + stride <= n else j - 1
                for i in range(low, min(high, j - 1) + 1):
                    total = sums[j] - sums[i]
                    error = last[i] + squares[j] - squares[i] - total**2 / (counts[j] - counts[i])
                    if error < best[j]:
                        best[j] = error
                        before[cell, j] = i
            stride //= 2
    ends = np.empty(n_cells + 1, np.int64)
    ends[n_cells] = n
    for cell in range(n_cells - 1, -1, -1):
        ends[cell] = before[cell, ends[cell + 1]]
    return ends
