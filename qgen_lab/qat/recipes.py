"""How to train, as data: one frozen `Recipe`, and the papers' recipes by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch

from qgen_lab.data import augmentations
from qgen_lab.qat.schedules import SCHEDULES, Cooldown

__all__ = ["Recipe", "qgen_pool", "recipes"]

OPTIMIZERS: dict[str, Callable[[list[dict], "Recipe"], torch.optim.Optimizer]] = {
    "sgd": lambda groups, recipe: torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True
    ),
    "adam": lambda groups, recipe: torch.optim.Adam(
        groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999), fused=True
    ),
    "adamw": lambda groups, recipe: torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999), fused=True
    ),
    "rmsprop": lambda groups, recipe: torch.optim.RMSprop(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum
    ),
}
_KEEP = ("lowest-train-loss", "last")
_PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the model, the data and the seed.

    Change one with ``dataclasses.replace(recipe, epochs=30)``.

    Parameters
    ----------
    epochs : int
        Passes over the training set.
    batch_size : int
        Samples per step; the last batch of an epoch may be shorter.
    optimizer : {"sgd", "adam", "adamw", "rmsprop"}
        As in `torch.optim`.
    learning_rate : float
        Rate of the first step.
    momentum : float
        Decay of the running mean of the gradients, in [0, 1): the momentum of SGD and RMSprop (0
        for the plain RMSprop), the first beta of Adam and AdamW.
    weight_decay : float
        Added to the gradient as ``weight_decay * parameter``; AdamW takes ``learning_rate *
        weight_decay * parameter`` off the parameter instead. It acts on every parameter, biases
        and batch norm too, as in the papers, but not on the step sizes of quantizers.
    schedule : {"constant", "multi-step", "exponential", "cosine"}
        With "multi-step" the rate is multiplied by `gamma` after each epoch in `milestones`; the
        others change it at every step: "exponential" by the same factor, by `gamma` over all
        training, "cosine" by half a period, to zero.
    milestones : tuple of int
        Ascending numbers of epochs; those beyond `epochs` are never reached.
    gamma : float
        Factor on the learning rate at a milestone, or over all of an exponential schedule.
    cooldown : Cooldown, optional
        Takes the rate to zero over the last steps, after any schedule.
    augmentation : str
        A name in `qgen_lab.data.augmentations`, applied to training batches only.
    keep : {"lowest-train-loss", "last"}
        The epoch whose weights the model holds when `fit` returns.
    stop_at_loss : float, optional
        Stop after the first epoch whose training loss is at most this.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward and backward pass in training, by `torch.autocast`. Weights, quantizers,
        optimizer, loss and clean passes are in float32 whatever it is. "float16" needs a GPU, and
        scales the loss so that small gradients survive.
    sharpness_radius : float
        Sharpness-aware minimization (SAM) if positive: each step uses the gradient at the point
        that lies this far up the gradient, over all parameters but what quantizers learn (their
        float weights are moved). Batch norm takes in the first of the two passes only.
    average_codes_from : float, optional
        Share of the steps, in [0, 1), after which `CodeAverage` goes along; the model then ends as
        its rounded average. With `keep` "last" only, and without `stop_at_loss`.
    reestimate_batch_norm : bool
        At the end, replace the statistics of batch norm by those of a clean pass over the training
        data (`reestimate_batch_norm`).

    Raises
    ------
    ValueError
        If a field is out of its range.

    References
    ----------
    Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-aware minimization for efficiently improving
    generalization" (2021), for `sharpness_radius`.
    """

    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    cooldown: Cooldown | None = None
    augmentation: str = "none"
    keep: str = "lowest-train-loss"
    stop_at_loss: float | None = None
    precision: str = "float32"
    sharpness_radius: float = 0.0
    average_codes_from: float | None = None
    reestimate_batch_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        steps, average_from = self.milestones, self.average_codes_from
        ascending = all(map(_is_count, steps)) and list(steps) == sorted(set(steps))
        rules = {
            "epochs": (_is_count(self.epochs), "a positive integer"),
            "batch_size": (_is_count(self.batch_size), "a positive integer"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {sorted(OPTIMIZERS)}"),
            "learning_rate": (0 < self.learning_rate < math.inf, "positive"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "zero or positive"),
            "schedule": (self.schedule in SCHEDULES, f"one of {sorted(SCHEDULES)}"),
            "milestones": (
                ascending and (steps or self.schedule != "multi-step"),
                "ascending positive integers, at least one for the schedule 'multi-step'",
            ),
            "gamma": (0 < self.gamma < math.inf, "positive"),
            "cooldown": (
                self.cooldown is None or isinstance(self.cooldown, Cooldown),
                "None or Cooldown(power, share)",
            ),
            "augmentation": (self.augmentation in augmentations, f"one of {sorted(augmentations)}"),
            "keep": (self.keep in _KEEP, f"one of {_KEEP}"),
            "stop_at_loss": (self.stop_at_loss is None or self.stop_at_loss > 0, "positive"),
            "precision": (self.precision in _PRECISIONS, f"one of {_PRECISIONS}"),
            "sharpness_radius": (
                0 <= self.sharpness_radius < math.inf
                and (self.sharpness_radius == 0 or self.precision != "float16"),
                "zero or positive, and zero for the precision 'float16' (use 'bfloat16')",
            ),
            "average_codes_from": (
                average_from is None
                or (0 <= average_from < 1 and self.keep == "last" and self.stop_at_loss is None),
                "in [0, 1), and None unless keep='last' and stop_at_loss=None, "
                "since the average takes the place of the last epoch's weights",
            ),
            "reestimate_batch_norm": (
                isinstance(self.reestimate_batch_norm, bool),
                "True or False",
            ),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


class _Recipes(dict[str, Recipe]):
    """Recipes by name, that says which there are when asked for another."""

    def __missing__(self, name: str) -> Recipe:
        raise KeyError(f"recipe {name!r} is not known; the names are: {', '.join(self)}")


recipes: dict[str, Recipe] = _Recipes(
    {
        # arXiv 2404.11769, appendix B.1.
        "qgen-nin": Recipe(epochs=300, schedule="multi-step", milestones=(100, 200)),
        "qgen-resnet": Recipe(epochs=200, schedule="multi-step", milestones=(80, 160)),
        # Appendix C.1: fine-tuning of a trained network.
        "qgen-imagenet": Recipe(
            epochs=120, learning_rate=0.01, schedule="multi-step", milestones=(30, 60, 90)
        ),
        # The shape of "qgen-nin", shortened for 1,437 images of 8x8: some seconds a run.
        "digits-nin": Recipe(epochs=60, schedule="multi-step", milestones=(20, 40)),
    }
)
"""Recipes by name: the papers', and one for the embedded digits."""

POOL_RATES = {
    "sgd": (0.03, 0.1, 0.3),
    "adam": (0.0003, 0.001, 0.003),
    "rmsprop": (0.0001, 0.0003, 0.001),
}
POOL_DECAYS = (0.0, 1e-4, 5e-4)


def qgen_pool(base: Recipe = recipes["qgen-nin"]) -> list[Recipe]:
    """The 27 recipes of a pool of models: three optimizers, three rates each, three weight decays.

    Appendix B.3 of arXiv 2404.11769 has this grid, at three widths, three depths and four
    precisions: 972 models. The rates and decays are ours: about the recipe's for SGD and usual ones
    for the other two, each time by a factor of about three apart.

    Parameters
    ----------
    base : Recipe
        All else: epochs, batch size, schedule and so on.

    Examples
    --------
    >>> from dataclasses import replace
    >>> short = replace(recipes["digits-nin"], epochs=30, milestones=(10, 20))
    >>> len(qgen_pool(short))
    27
    """
    return [
        replace(base, optimizer=optimizer, learning_rate=rate, weight_decay=decay)
        for optimizer, rates in POOL_RATES.items()
        for rate in rates
        for decay in POOL_DECAYS
    ]
