"""The learning rate of every step of a recipe, by the pure schedules of `theory.schedules`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qgen_lab.theory import schedules

if TYPE_CHECKING:
    from qgen_lab.qat.recipes import Recipe

__all__ = ["Cooldown", "learning_rates"]


@dataclass(frozen=True)
class Cooldown:
    """Multiplies a schedule by `(1 - t / T)**power` over the last steps, t of T: to zero at T.

    Parameters
    ----------
    power : float
        1 is linear. Positive.
    share : float
        Share of all steps that the cooldown takes, in (0, 1]; at least one step.

    Raises
    ------
    ValueError
        If `power` or `share` is out of its range.
    """

    power: float = 1.0
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be positive and finite, got {self.power!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")


def learning_rates(recipe: "Recipe", steps_per_epoch: int) -> NDArray[np.float64]:
    """Learning rate of each step of a whole training run.

    Parameters
    ----------
    recipe : Recipe
        Its fields `epochs`, `learning_rate`, `schedule`, `milestones`, `gamma` and `cooldown`.
    steps_per_epoch : int
        Optimizer steps in each epoch; with 1 the rate changes from epoch to epoch.

    Returns
    -------
    ndarray of shape (epochs * steps_per_epoch,)
        Rates at the beginning of each step. What falls to zero gets there after the last step.

    Raises
    ------
    ValueError
        If `steps_per_epoch` is not positive.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be a positive integer, got {steps_per_epoch!r}")
    rates = SCHEDULES[recipe.schedule](recipe, steps_per_epoch)
    if recipe.cooldown is not None:
        length = max(1, round(recipe.cooldown.share * len(rates)))
        rates[-length:] *= schedules.cooldown(1.0, length, recipe.cooldown.power)
    return rates


def _multi_step(recipe: "Recipe", steps_per_epoch: int) -> NDArray[np.float64]:
    reached = [epoch for epoch in recipe.milestones if epoch < recipe.epochs]
    lengths = np.diff([0, *reached, recipe.epochs]) * steps_per_epoch
    return schedules.stepped(recipe.learning_rate, lengths, recipe.gamma)


SCHEDULES: dict[str, Callable[["Recipe", int], NDArray[np.float64]]] = {
    "constant": lambda recipe, steps: schedules.constant(
        recipe.learning_rate, recipe.epochs * steps
    ),
    "multi-step": _multi_step,
    "exponential": lambda recipe, steps: schedules.exponential(
        recipe.learning_rate, recipe.epochs * steps, decades=-math.log10(recipe.gamma)
    ),
    "cosine": lambda recipe, steps: schedules.cosine(recipe.learning_rate, recipe.epochs * steps),
}
