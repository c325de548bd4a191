"""One training loop for any model, loss and metric.

*Training loss* means one thing in this project: a full pass over the training set, without
augmentation, in evaluation mode, after an epoch. `fit` keeps the weights for which it is lowest.

On a CPU, run one thread a process (``OMP_NUM_THREADS=1``) wherever several processes train at
once: two threads that wait for a busy core can be ten times slower than one. `fit` leaves the
thread count, and every other global setting, as it finds it.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.batches import Batches, Source, channels_last, device_of
from qgen_lab.qat.checkpoints import Checkpoint, describe
from qgen_lab.qat.divergence import Diverged, NotFinite, diverged_at
from qgen_lab.qat.evaluation import (
    Evaluation,
    Loss,
    Metrics,
    accuracy,
    checked_metrics,
    evaluate,
    evaluate_batches,
)
from qgen_lab.qat.models import seeded
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.steps import Objective, Steps

__all__ = ["Diverged", "Evaluation", "History", "accuracy", "evaluate", "fit"]


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """What happened in each epoch of one training run.

    All arrays have one entry per epoch. Training loss and metrics come from a clean pass after the
    epoch (see the module's first lines), `running_loss` is the mean over the epoch's own steps,
    while the weights moved, which most training programs print.

    Parameters
    ----------
    epoch : ndarray of int
        1, 2, ...
    learning_rate : ndarray
        Rate of the epoch's first step.
    running_loss : ndarray
        Mean objective of the training batches, augmented, in training mode.
    train_loss, validation_loss : ndarray
        Clean losses; `validation_loss` is None without a validation split.
    train_metrics, validation_metrics : dict of str to ndarray
        Clean metrics by name.
    seconds : ndarray
        Wall time of the epoch, its clean passes included.
    kept_epoch : int
        The epoch whose weights the model holds on return.
    train, validation : Evaluation
        Of the model on return: the kept epoch's, its codes averaged and its batch norm re-estimated
        where the recipe says so. `validation` is None without a validation split.
    """

    epoch: np.ndarray
    learning_rate: np.ndarray
    running_loss: np.ndarray
    train_loss: np.ndarray
    train_metrics: dict[str, np.ndarray]
    validation_loss: np.ndarray | None
    validation_metrics: dict[str, np.ndarray]
    seconds: np.ndarray
    kept_epoch: int
    train: Evaluation
    validation: Evaluation | None

    def __repr__(self) -> str:
        validation = f", validation={self.validation}" if self.validation else ""
        return (
            f"History(epochs={len(self.epoch)}, kept_epoch={self.kept_epoch}, "
            f"train={self.train}{validation})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per epoch, one column per array; metrics as ``train_<name>``."""
        columns = {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "running_loss": self.running_loss,
            "train_loss": self.train_loss,
            **{f"train_{name}": values for name, values in self.train_metrics.items()},
        }
        if self.validation_loss is not None:
            columns["validation_loss"] = self.validation_loss
        columns |= {f"validation_{name}": v for name, v in self.validation_metrics.items()}
        return pd.DataFrame(columns | {"seconds": self.seconds})


def fit(
    model: nn.Module,
    data: Splits | Dataset | tuple[Tensor, Tensor] | Batches,
    recipe: Recipe,
    loss: Loss = cross_entropy,
    metrics: Metrics | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
    objective: Objective | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1,
) -> History:
    """Train `model` in place.

    On return the model holds the weights of the kept epoch (the one of lowest training loss unless
    `recipe` says otherwise), with its buffers and quantizer steps, in evaluation mode. Give
    quantizers to the model before the call, so that the optimizer knows their steps. Without
    quantizers, the same call is the full-precision twin, with the same budget.

    Two calls with equal models, data, recipe and seed give equal results, bit for bit, on one
    machine with one thread count. PyTorch's global random state is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Its initial weights are the start of training; `seed` does not touch them.
    data : Splits, Dataset, (inputs, targets) tensors, or iterable of such batches
        Training data, and with `Splits` validation data. An iterable is gone through once per epoch
        and once per clean pass, in the batches and the order that it gives; `recipe.batch_size`
        is then not used.
    recipe : Recipe
        See `recipes` for some by name.
    loss : callable
        ``loss(outputs, targets)`` gives the mean over a batch, a scalar. All clean passes use it.
    metrics : dict of str to callable, optional
        ``metric(outputs, targets)`` gives a mean over a batch, or one value per sample. By default
        `accuracy` where targets are integers, else none.
    seed : int
        Seed of the order of the samples, the augmentation, and dropout.
    device : torch.device or str, optional
        Where to train; by default where the model is. The model stays there.
    progress : bool, optional
        Show a progress bar. By default only on a terminal.
    on_epoch : callable, optional
        ``on_epoch(epoch, model)`` is called after each epoch, the model in evaluation mode.
    objective : callable, optional
        ``objective(model, inputs, outputs, targets)``, a scalar, is what training makes smaller,
        such as the loss and a penalty. By default ``loss(outputs, targets)``.
    checkpoint : str or Path, optional
        File to which the state of training is written; if it is there, training goes on from it.
        See the notes.
    checkpoint_every : int
        Epochs between checkpoints; after the last epoch there always is one.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If the data are empty, or model, data and loss do not fit together; or if the device cannot
        compute in the recipe's precision.
    TypeError
        If an argument is of a wrong kind.
    Diverged
        If a loss is not finite.
    CheckpointRefused
        If the checkpoint and the one before it are damaged, or if it holds what could execute code,
        or belongs to another recipe, seed, initial model or data.

    Notes
    -----
    The pass over a set weighs each batch by its size, so the mean is exact for losses that are
    means over samples, whatever the sizes. Where a single sample is left over as the last training
    batch of an epoch, it is skipped if the model has batch norm, which cannot normalise it.

    The learning rate is set at every step, by `learning_rates`; for an iterable of unknown length,
    once per epoch.

    To go on from a checkpoint, make the same call with the same data and the model as it was at the
    start. On a CPU the end is then equal to that of a run that was never interrupted, bit for bit,
    but for the seconds of epochs, if all randomness comes from PyTorch's global state, as that of
    dropout and of a shuffling DataLoader does. The checkpoint before is kept beside it as
    ``*.previous`` and is used if the last one is damaged. An objective with a state of its own
    needs `state_dict` and `load_state_dict`; `on_epoch` is called before the epoch's checkpoint is
    written, so again if training was killed in between.

    On a CPU, models with convolutions are trained with channels last, which can halve the time of
    a step; outside the passes over the data the kernels have the layout they came with.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import Recipe, fit, nin, quantize_weights
    >>> model = quantize_weights(nin(2, 8, in_channels=1, base_width=1, seed=0), bits=4)
    >>> history = fit(model, load_dataset("digits"), Recipe(epochs=2))
    >>> len(history.epoch)
    2
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as recipes['qgen-nin'], got {recipe!r}")
    if device is not None:
        model.to(device)
    splits = (data.train, data.validation) if isinstance(data, Splits) else (data, None)
    training, validation = (Source(part, model) if part is not None else None for part in splits)
    if recipe.augmentation != "none" and not isinstance(training.data, Dataset):
        raise ValueError(
            f"recipe.augmentation {recipe.augmentation!r} needs data in a Dataset; "
            "set it to 'none' and augment in the iterable instead"
        )
    if not (isinstance(checkpoint_every, int) and checkpoint_every >= 1):
        raise ValueError(f"checkpoint_every must be a positive integer, got {checkpoint_every!r}")
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device_of(model)))
        metrics = checked_metrics(model, training, loss, metrics)
        run = _Run(model, recipe, training, validation, loss, metrics, objective, seed)
        file = None if checkpoint is None else Checkpoint(checkpoint, run.description())
        if file is not None:
            run.resume(file)
        bar = stack.enter_context(_bar(run, progress))
        while not run.finished:
            run.train_epoch(bar)
            number = len(run.epochs)
            if on_epoch is not None:
                on_epoch(number, model)
            if file is not None and (run.finished or number % checkpoint_every == 0):
                file.save(run.state_dict())
        history = run.end()
    model.eval()
    return history


@dataclass(frozen=True)
class Epoch:
    """One row of a `History`."""

    number: int
    learning_rate: float
    running_loss: float
    train: Evaluation
    validation: Evaluation | None
    seconds: float

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Epoch":
        """The inverse of `dataclasses.asdict`."""
        evaluations = {
            part: row[part] and Evaluation(**row[part]) for part in ("train", "validation")
        }
        return cls(**row | evaluations)


def history_of(epochs: list[Epoch], kept_epoch: int) -> History:
    def column(part: str, name: str) -> np.ndarray:
        return np.array([getattr(epoch, part).metrics[name] for epoch in epochs])

    kept, has_validation = epochs[kept_epoch - 1], epochs[0].validation is not None
    return History(
        epoch=np.array([epoch.number for epoch in epochs]),
        learning_rate=np.array([epoch.learning_rate for epoch in epochs]),
        running_loss=np.array([epoch.running_loss for epoch in epochs]),
        train_loss=np.array([epoch.train.loss for epoch in epochs]),
        train_metrics={name: column("train", name) for name in kept.train.metrics},
        validation_loss=(
            np.array([epoch.validation.loss for epoch in epochs]) if has_validation else None
        ),
        validation_metrics=(
            {name: column("validation", name) for name in kept.train.metrics}
            if has_validation
            else {}
        ),
        seconds=np.array([epoch.seconds for epoch in epochs]),
        kept_epoch=kept_epoch,
        train=kept.train,
        validation=kept.validation,
    )


class _Run:
    """One training run: what it is made of, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        training: Source,
        validation: Source | None,
        loss: Loss,
        metrics: Metrics,
        objective: Objective | None,
        seed: int,
    ) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.training, self.validation = training, validation
        self.loss, self.metrics, self.objective = loss, metrics, objective
        self.steps = Steps(model, recipe, objective or _plain(loss), training.steps(recipe) or 1)
        self.order = torch.Generator().manual_seed(seed)
        self.epochs: list[Epoch] = []
        self.kept_epoch, self.kept_state = 0, {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the loss is low enough to stop."""
        stop = self.recipe.stop_at_loss
        low = stop is not None and bool(self.epochs) and self.epochs[-1].train.loss <= stop
        return low or len(self.epochs) == self.recipe.epochs

    def train_epoch(self, bar: tqdm) -> None:
        """Train for one epoch, evaluate, and keep what is to be kept."""
        start, number = time.perf_counter(), len(self.epochs) + 1
        try:
            with channels_last(self.model):
                running_loss = self._take_steps(number, bar)
                train, validation = self._evaluate()
            if not math.isfinite(train.loss):
                raise NotFinite(0, train.loss, self.training.batches())
        except NotFinite as problem:
            history = history_of(self.epochs, self.kept_epoch) if self.epochs else None
            raise diverged_at(self.model, self.recipe, number, problem, history) from None
        if self.recipe.keep == "last":
            self.kept_epoch = number
        elif not self.epochs or train.loss < self.epochs[self.kept_epoch - 1].train.loss:
            self.kept_epoch, self.kept_state = number, _snapshot(self.model)
        rate, seconds = self.steps.first_rate(number), time.perf_counter() - start
        self.epochs.append(Epoch(number, rate, running_loss, train, validation, seconds))
        bar.set_description(f"epoch {number}/{self.recipe.epochs}, loss {train.loss:.3g}")

    def _take_steps(self, number: int, bar: tqdm) -> float:
        """One pass of optimizer steps; the mean of their objectives."""
        self.model.train()
        total, samples = 0.0, 0
        batches = self.training.shuffled(self.recipe, self.order)
        for step, (inputs, targets) in enumerate(batches, start=1):
            value = self.steps.take(number, step, inputs, targets)
            if not math.isfinite(value):
                raise NotFinite(step, value, [(inputs, targets)])
            total += value * len(targets)
            samples += len(targets)
            bar.update()
        return total / samples

    def _evaluate(self) -> tuple[Evaluation, Evaluation | None]:
        """The clean passes over training and validation data."""
        train, validation = (
            source and evaluate_batches(self.model, source.batches(), self.loss, self.metrics)
            for source in (self.training, self.validation)
        )
        return train, validation

    def end(self) -> History:
        """Leave in the model what the recipe asks for."""
        if self.kept_epoch < len(self.epochs):
            self.model.load_state_dict(self.kept_state)
        history = history_of(self.epochs, self.kept_epoch)
        if self.steps.average is not None:
            self.steps.average.round()
        if self.recipe.reestimate_batch_norm:
            reestimate_batch_norm(self.model, self.training.data)
        if self.steps.average is not None or self.recipe.reestimate_batch_norm:
            with channels_last(self.model):
                train, validation = self._evaluate()
            history = replace(history, train=train, validation=validation)
        return history

    def description(self) -> dict[str, Any]:
        """What tells this run from others, before its first step."""
        sources = {"training data": self.training, "validation data": self.validation}
        return describe(self.model, self.recipe, self.seed, sources) | {
            "loss": _name(self.loss),
            "objective": self.objective and _name(self.objective),
            "metrics": list(self.metrics),
            "device": self.training.device.type,
        }

    def resume(self, file: Checkpoint) -> None:
        """Go on from the file; if there is none, write the start, so that what hinders is seen."""
        state = file.load()
        if state is None:
            file.save(self.state_dict())
        else:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, of plain values, tensors and containers."""
        state = {
            "model": dict(self.model.state_dict()),
            "steps": self.steps.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "kept_epoch": self.kept_epoch,
            "kept_state": self.kept_state,
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.training.device.type == "cuda":
            state["random on GPU"] = torch.cuda.get_rng_state(self.training.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.steps.load_state_dict(state["steps"])
        self.epochs = [Epoch.from_dict(row) for row in state["epochs"]]
        self.kept_epoch, self.kept_state = state["kept_epoch"], state["kept_state"]
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self.training.device.type == "cuda":
            torch.cuda.set_rng_state(state["random on GPU"], self.training.device)


def _plain(loss: Loss) -> Objective:
    return lambda model, inputs, outputs, targets: loss(outputs, targets)


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """A copy of the state; `copy.deepcopy` of tensors would take eight times as long."""
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def _bar(run: _Run, progress: bool | None) -> tqdm:
    """A bar over all steps; tqdm hides it by itself where there is no terminal."""
    steps = run.training.steps(run.recipe) or 0
    return tqdm(
        total=steps * run.recipe.epochs or None,
        initial=steps * len(run.epochs),
        disable=None if progress is None else not progress,
        unit="step",
    )
