"""Phase diagrams: a grid of solutions over two parameters, and the lines between phases on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import contourpy
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from qgen_lab.codebooks import Codebook, uniform
from qgen_lab.theory.problem import TeacherStudent
from qgen_lab.theory.stability import solve_all, zeros_between
from qgen_lab.theory.typical_case import RSSolution, solve_rs

CRITERIA = ("replicon", "entropy")


@dataclass(frozen=True, eq=False, repr=False)
class Boundary:
    """Where a field of the solution changes sign in a phase diagram.

    Attributes
    ----------
    criterion : str
        The field: "replicon" or "entropy".
    names : tuple of str
        The two parameters.
    points : ndarray, shape (n, 2)
        Values of the two parameters, in order along each line.
    line : ndarray, shape (n,)
        Which line a point belongs to.
    jump : ndarray, shape (n,)
        True where the field jumps over zero instead of passing through: another branch of
        solutions takes over there.
    """

    criterion: str
    names: tuple[str, str]
    points: NDArray[np.float64]
    line: NDArray[np.intp]
    jump: NDArray[np.bool_]

    def lines(self) -> Iterator[NDArray[np.float64]]:
        """The points of one line after the other, each of shape (2, n): `plot(*line)`."""
        for k in np.unique(self.line):
            yield self.points[self.line == k].T

    def to_frame(self) -> pd.DataFrame:
        """One row a point."""
        first, second = self.names
        columns = {first: self.points[:, 0], second: self.points[:, 1]}
        return pd.DataFrame(columns | {"line": self.line, "jump": self.jump})

    def __repr__(self) -> str:
        lines, jumps = np.unique(self.line).size, int(self.jump.sum())
        return (
            f"Boundary({self.criterion!r} over {' x '.join(self.names)}: {len(self.points)} points"
            f" on {lines} lines, {jumps} by a jump)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class PhaseDiagram:
    """Solutions over a grid of two parameters.

    `diagram[field]` is the field of `RSSolution` with that name as an array: row i and column j
    belong to the i-th value of the first parameter and the j-th of the second.

    Attributes
    ----------
    axes : dict of str to ndarray
        The two parameters and their values.
    fixed : dict
        The parameters that stay the same, and the family of codebooks.
    solution : RSSolution
        All solutions, the second parameter running fastest.
    """

    axes: dict[str, NDArray]
    fixed: dict[str, object]
    solution: RSSolution

    def __getitem__(self, field: str) -> NDArray:
        return getattr(self.solution, field).reshape([v.size for v in self.axes.values()])

    def problem(self, first: float, second: float) -> TeacherStudent:
        """The problem at a value of each of the two parameters, on the grid or between."""
        swept = dict(zip(self.axes, (float(first), float(second)), strict=True))
        return _problem(**self.fixed, **swept)

    def boundary(self, criterion: str = "replicon") -> Boundary:
        """The lines on which the replicon or the entropy changes sign.

        The grid says between which neighbours the sign changes; each point is then found by root
        finding between the two. So a line is as exact as the solution, and features smaller than
        a cell of the grid are missed. Over bits, which are whole numbers, there is one point for
        each change of sign at each number of bits, and a line joins the first, or second, ones.

        Parameters
        ----------
        criterion : {"replicon", "entropy"}
            The field.

        Returns
        -------
        Boundary
            Without points where the sign is the same everywhere, as at temperature 0.

        Raises
        ------
        ValueError
            If `criterion` is unknown.
        RuntimeError
            If the equations do not converge at a point that is needed.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"criterion = {criterion!r}: give 'replicon' or 'entropy'")
        sign = np.where(self[criterion] >= 0, 1.0, -1.0)
        sign[~self["converged"]] = np.nan
        names = tuple(self.axes)
        crossed, line = _edges_across_bits(sign, names) if "bits" in names else _edges(sign)
        values = list(self.axes.values())
        low, high = (
            np.stack([v[end(crossed[:, k]).astype(int)] for k, v in enumerate(values)], axis=1)
            for end in (np.floor, np.ceil)
        )
        free = np.where(crossed[:, 0] % 1 > 0, 0, 1)  # which parameter changes along the edge
        rows = np.arange(len(crossed))

        def field(points: NDArray, edge: NDArray) -> NDArray:
            at = low[edge]
            at[np.arange(len(edge)), free[edge]] = points
            solution = solve_all([self.problem(*each) for each in at])
            return np.maximum(getattr(solution, criterion), -1e3)  # minus infinity has a sign only

        low_ends, high_ends = low[rows, free], high[rows, free]
        points = low.copy()
        points[rows, free], jump = zeros_between(field, low_ends, high_ends, rows)
        return Boundary(criterion, names, points, line, jump)

    def to_frame(self) -> pd.DataFrame:
        """One row a point of the grid: the two parameters and every field of the solution."""
        grid = np.meshgrid(*self.axes.values(), indexing="ij")
        columns = dict(zip(self.axes, map(np.ravel, grid), strict=True))
        return pd.concat([pd.DataFrame(columns), self.solution.to_frame()], axis=1)

    def __repr__(self) -> str:
        axes = " x ".join(f"{v.size} {name}" for name, v in self.axes.items())
        converged = self.solution.converged
        return f"PhaseDiagram({axes}, {int(converged.sum())} of {converged.size} converged)"


def _edges(sign: NDArray) -> tuple[NDArray, NDArray]:
    """Edges of the grid that the lines cross, in order, and the line of each.

    An edge is a pair of grid indices one of which is a half: between signs of the same size a
    contour passes through the middle.
    """
    filled = np.ma.masked_invalid(sign)
    lines = contourpy.contour_generator(z=filled, corner_mask=False).lines(0.0)
    if not lines:
        return np.empty((0, 2)), np.empty(0, int)
    line = np.repeat(np.arange(len(lines)), [len(each) for each in lines])
    return np.vstack(lines)[:, ::-1], line


def _edges_across_bits(sign: NDArray, names: tuple[str, str]) -> tuple[NDArray, NDArray]:
    """The same where one parameter is whole: every change of sign along the other."""
    along = 1 - names.index("bits")
    by_bits = np.moveaxis(sign, along, 1)
    bit, step = np.nonzero(by_bits[:, 1:] * by_bits[:, :-1] < 0)
    rank = np.arange(bit.size) - np.searchsorted(bit, bit)
    order = np.lexsort([bit, rank])
    crossed = np.stack([bit, step + 0.5], axis=1)[order]
    return crossed if along == 1 else crossed[:, ::-1], rank[order]


def phase_diagram(
    bits: ArrayLike,
    width: ArrayLike,
    alpha: ArrayLike,
    temperature: ArrayLike = 0.0,
    noise_variance: ArrayLike = 0.1,
    ridge: ArrayLike = 0.0,
    signal_variance: float = 1.0,
    codebook: Callable[[int, float], Codebook] = uniform,
) -> PhaseDiagram:
    """Solve the replica-symmetric equations over a grid of two parameters.

    Parameters
    ----------
    bits, width, alpha, temperature, noise_variance, ridge : float or array_like
        As in `TeacherStudent` and `codebook`. Exactly two are ascending arrays of two values or
        more, the rest are numbers. An axis of temperatures starts above 0: at 0 itself the
        equations have another branch.
    signal_variance : float
        Variance of the teacher's weights.
    codebook : callable
        Family of codebooks: gives a `Codebook` for bits and width, such as
        `codebooks.families["Lloyd-Max"]`.

    Raises
    ------
    ValueError
        If not exactly two parameters are arrays, or an array does not ascend; as
        `TeacherStudent` and `codebook`.
    TypeError
        As `TeacherStudent` and `codebook`.
    """
    given = {
        "bits": bits, "width": width, "alpha": alpha, "temperature": temperature,
        "noise_variance": noise_variance, "ridge": ridge,
    }  # fmt: skip
    axes = {name: _axis(name, value) for name, value in given.items() if np.ndim(value)}
    if len(axes) != 2:
        raise ValueError(f"{', '.join(axes) or 'none'} given as arrays: give exactly two arrays")
    fixed = {name: value for name, value in given.items() if name not in axes}
    fixed |= {"signal_variance": signal_variance, "codebook": lru_cache(maxsize=4096)(codebook)}
    grid = product(*(values.tolist() for values in axes.values()))
    problems = [_problem(**fixed, **dict(zip(axes, at, strict=True))) for at in grid]
    return PhaseDiagram(axes, fixed, solve_rs(problems))


def _axis(name: str, values: ArrayLike) -> NDArray:
    """The values of a parameter as an ascending array, or a ValueError."""
    array = np.array(values, dtype=float)
    if array.ndim != 1 or array.size < 2 or not (np.diff(array) > 0).all():
        raise ValueError(f"{name} has shape {array.shape}: give two or more ascending values")
    if name == "temperature" and array[0] <= 0:
        raise ValueError("temperature: give an axis of temperatures above 0, or 0 alone")
    return array


def _problem(bits, width, alpha, temperature, noise_variance, ridge, signal_variance, codebook):
    levels = codebook(int(bits) if bits == int(bits) else bits, width)
    return TeacherStudent(levels, alpha, noise_variance, ridge, temperature, signal_variance)
