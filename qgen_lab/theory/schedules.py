"""Learning rates as arrays, one a step: put schedules one after the other with `np.concatenate`.

`np.concatenate([constant(0.2, 1000), cooldown(0.2, 400, power=4)])` is a constant rate that is
then cooled down. Every function gives an array of shape (steps,) that begins at `rate`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def constant(rate: float, steps: int) -> NDArray[np.float64]:
    """The same rate at every step."""
    return np.full(steps, float(rate))


def stepped(rate: float, lengths: Sequence[int], factor: float = 0.1) -> NDArray[np.float64]:
    """Constant for the first of the lengths, then times `factor` for each of the others."""
    return np.repeat(rate * factor ** np.arange(len(lengths)), lengths)


def exponential(rate: float, steps: int, decades: float) -> NDArray[np.float64]:
    """Falls by the same factor at every step, by `decades` powers of ten over all."""
    return rate * 10.0 ** (-decades * np.arange(steps) / steps)


def inverse_time(rate: float, steps: int, fold: float) -> NDArray[np.float64]:
    """`rate / (1 + fold t / steps)` at step t."""
    return rate / (1 + fold * np.arange(steps) / steps)


def cosine(rate: float, steps: int) -> NDArray[np.float64]:
    """Half a period of a cosine; it ends like a cooldown of power 2."""
    return rate * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


def cooldown(rate: float, steps: int, power: float = 1.0) -> NDArray[np.float64]:
    """`rate (1 - t / steps) ** power` at step t: linear by default."""
    return rate * (1 - np.arange(steps) / steps) ** power
