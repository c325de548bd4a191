"""What a member is, what an engine must do, and what comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm

from qgen_lab.qat.divergence import Diverged
from qgen_lab.qat.evaluation import Loss, Metrics
from qgen_lab.qat.quantizers import quantize_weights
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.training import History

FULL_PRECISION = 32


@dataclass(frozen=True)
class Member:
    """One model of an ensemble: how it starts, is quantized and is trained.

    Parameters
    ----------
    recipe : Recipe
        Epochs, batch size and `stop_at_loss` aside, members may differ in all of it.
    bits : int, mapping or None
        As for `quantize_weights`; None or 32 for full precision.
    seed : int
        Of the initial weights, of the order of the samples, and of the augmentation.
    quantizer : str, Codebook or callable
        As for `quantize_weights`.
    per_channel : bool
        One step per output channel in place of one per layer.
    """

    recipe: Recipe
    bits: int | Mapping[str, int] | None = None
    seed: int = 0
    quantizer: Any = "lsq"
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {self.recipe!r}")

    @property
    def is_quantized(self) -> bool:
        """Whether the model has quantizers."""
        return self.bits not in (None, FULL_PRECISION) or not isinstance(self.quantizer, str)

    def build(self, build: Callable[[int], nn.Module]) -> nn.Module:
        """The model at the start of its training."""
        model = build(self.seed)
        if not isinstance(model, nn.Module):
            raise TypeError(f"build({self.seed}) must return an nn.Module, got {model!r}")
        if self.is_quantized:
            quantize_weights(model, self.bits, self.quantizer, per_channel=self.per_channel)
        return model


@dataclass(frozen=True)
class Cohort:
    """What an engine is given: models at their start, beside how each is to be trained."""

    build: Callable[[int], nn.Module]
    models: list[nn.Module]
    members: list[Member]
    data: Any
    loss: Loss
    metrics: Metrics | None
    workers: int

    def __len__(self) -> int:
        return len(self.members)

    def take(self, indices: list[int]) -> "Cohort":
        """The cohort of some of the members."""
        models = [self.models[i] for i in indices]
        return replace(self, models=models, members=[self.members[i] for i in indices])


@dataclass(frozen=True)
class Outcome:
    """How one member's training went; its model holds the kept weights."""

    history: History | None
    diverged: Diverged | None = None


class Engine(Protocol):
    """A way to train a cohort. It has no state: one instance serves all calls."""

    name: str

    def refuses(self, cohort: Cohort) -> str | None:
        """Why it cannot train this cohort, or None if it can."""

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Train the cohort's models in place, as `fit` would each; one step of `bar` an epoch."""


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Trained models and what happened to each.

    Parameters
    ----------
    members : list of Member
        As given.
    models : list of torch.nn.Module
        One a member, holding the weights of its kept epoch, in evaluation mode.
    histories : list of History or None
        One a member. That of a member that diverged ends before the epoch in which it did; None if
        that was the first.
    diverged : list of Diverged or None
        Where and why a member's loss ceased to be finite; None for a member whose loss did not. The
        model of such a member is as it was then.
    engine : str
        The engine that trained.
    measured : dict of str to float
        Seconds per step and model of the engines that "auto" tried; empty otherwise.
    seconds : float
        Wall time of the training, the trial of engines not included.
    """

    members: list[Member]
    models: list[nn.Module]
    histories: list[History | None]
    diverged: list[Diverged | None]
    engine: str
    measured: dict[str, float]
    seconds: float

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        lost = sum(problem is not None for problem in self.diverged)
        return (
            f"Ensemble({len(self)} models, {lost} diverged, engine={self.engine!r}, "
            f"seconds={self.seconds:.3g})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per member: bits, seed, recipe, and the kept model's losses and metrics."""
        return pd.DataFrame([self._row(i) for i in range(len(self))]).rename_axis("member")

    def _row(self, i: int) -> dict[str, Any]:
        member, history = self.members[i], self.histories[i]
        row = {
            "bits": member.bits if member.is_quantized else FULL_PRECISION,
            "per_channel": member.per_channel,
            "seed": member.seed,
            "optimizer": member.recipe.optimizer,
            "learning_rate": member.recipe.learning_rate,
            "momentum": member.recipe.momentum,
            "weight_decay": member.recipe.weight_decay,
            "diverged": self.diverged[i] is not None,
            "kept_epoch": history.kept_epoch if history else 0,
            "train_loss": history.train.loss if history else np.nan,
        }
        for split in ("train", "validation"):
            kept = getattr(history, split, None)
            if kept is not None:
                row[f"{split}_loss"] = kept.loss
                row |= {f"{split}_{name}": value for name, value in kept.metrics.items()}
        return row
