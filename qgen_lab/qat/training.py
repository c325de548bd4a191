"""One training loop for any model, loss and metric.

*Training loss* means one thing in this project: a full pass over the training set, without
augmentation, in evaluation mode, after an epoch. `fit` keeps the weights for which it is lowest.

On a CPU, run one thread a process (``OMP_NUM_THREADS=1``) wherever several processes train at
once: two threads that wait for a busy core can be ten times slower than one. `fit` leaves the
thread count, and every other global setting, as it finds it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.batches import Batches, Source, channels_last, device_of
from qgen_lab.qat.models import seeded
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.steps import Objective, Steps

__all__ = ["Diverged", "Evaluation", "History", "accuracy", "evaluate", "fit"]

Loss = Callable[[Tensor, Tensor], Tensor]
Metrics = Mapping[str, Loss]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and metrics of a model over a set of `size` samples."""

    loss: float
    metrics: dict[str, float]
    size: int

    def __repr__(self) -> str:
        values = {"loss": self.loss, **self.metrics}
        named = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        return f"Evaluation({named}, size={self.size})"


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


class Diverged(RuntimeError):
    """Training met a loss that is not finite.

    The model is left as it was at that step.

    Attributes
    ----------
    epoch, step : int
        Where, both counted from 1. Step 0 is the clean pass after the epoch.
    layer : str
        Name of the layer where the first value that is not finite was found; ``"inputs"`` if it
        was in the data, ``"loss"`` if only in the loss.
    history : History or None
        The epochs before this one, if any.
    """

    def __init__(
        self, epoch: int, step: int, layer: str, message: str, history: History | None
    ) -> None:
        super().__init__(epoch, step, layer, message, history)
        self.epoch, self.step, self.layer, self.history = epoch, step, layer, history

    def __str__(self) -> str:
        return self.args[3]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of targets that have the largest logit.

    Parameters
    ----------
    outputs : Tensor of shape (N, classes, ...)
        Logits.
    targets : Tensor of int, shape (N, ...)
        Class indices.
    """
    return (outputs.argmax(1) == targets).float().mean()


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

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If the data are empty, or model, data and loss do not fit together.
    TypeError
        If an argument is of a wrong kind.
    Diverged
        If a loss is not finite.

    Notes
    -----
    The pass over a set weighs each batch by its size, so the mean is exact for losses that are
    means over samples, whatever the sizes. Where a single sample is left over as the last training
    batch of an epoch, it is skipped if the model has batch norm, which cannot normalise it.

    The learning rate is set at every step, by `learning_rates`; for an iterable of unknown length,
    once per epoch.

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
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device_of(model)))
        metrics = _check(model, training, loss, metrics)
        bar = stack.enter_context(_bar(recipe, training, progress))
        per_epoch = training.steps(recipe) or 1
        steps = Steps(model, recipe, objective or _plain(loss), per_epoch)
        generator = torch.Generator().manual_seed(seed)
        epochs: list[_Epoch] = []
        kept_epoch, kept_state = 0, {}
        for number in range(1, recipe.epochs + 1):
            start = time.perf_counter()
            try:
                batches = training.shuffled(recipe, generator)
                with channels_last(model):
                    running_loss = _train_epoch(steps, number, batches, bar)
                    train = _evaluate(model, training.batches(), loss, metrics)
                    valid = validation and _evaluate(model, validation.batches(), loss, metrics)
                if not math.isfinite(train.loss):
                    raise _NotFinite(0, train.loss, training.batches())
            except _NotFinite as problem:
                history = _history(epochs, kept_epoch) if epochs else None
                raise _diverged(model, recipe, number, problem, history) from None
            if recipe.keep == "last":
                kept_epoch = number
            elif not epochs or train.loss < epochs[kept_epoch - 1].train.loss:
                kept_epoch, kept_state = number, _snapshot(model)
            seconds = time.perf_counter() - start
            rate = steps.rates[(number - 1) * per_epoch]
            epochs.append(_Epoch(number, rate, running_loss, train, valid, seconds))
            bar.set_description(f"epoch {number}/{recipe.epochs}, loss {train.loss:.3g}")
            if on_epoch is not None:
                on_epoch(number, model)
            if recipe.stop_at_loss is not None and train.loss <= recipe.stop_at_loss:
                break
        if kept_epoch < len(epochs):
            model.load_state_dict(kept_state)
        history = _history(epochs, kept_epoch)
        if recipe.average_codes_from is not None:
            steps.average.round()
        if recipe.reestimate_batch_norm:
            reestimate_batch_norm(model, training.data)
        if recipe.average_codes_from is not None or recipe.reestimate_batch_norm:
            with channels_last(model):
                train = _evaluate(model, training.batches(), loss, metrics)
                valid = validation and _evaluate(model, validation.batches(), loss, metrics)
            history = replace(history, train=train, validation=valid)
    model.eval()
    return history


def evaluate(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor] | Batches,
    loss: Loss = cross_entropy,
    metrics: Metrics | None = None,
    batch_size: int = 256,
) -> Evaluation:
    """Mean loss and metrics of `model` over `data`, in evaluation mode, without augmentation.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated where it is; its mode is restored.
    data : Dataset, (inputs, targets) tensors, or iterable of such batches
        What to evaluate on.
    loss, metrics : callable, dict of str to callable
        As for `fit`. Means over batches are weighed by the size of the batch.
    batch_size : int
        Samples per forward pass. On a CPU a few hundred are faster than thousands.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        If the data are empty, or model, data and loss do not fit together.
    TypeError
        If `data` is of a wrong kind.
    """
    if isinstance(data, Splits):
        raise TypeError("data holds several splits; give one of them, such as data.test")
    source = Source(data, model)
    with _modes_restored(model), seeded(0, source.device):
        metrics = _check(model, source, loss, metrics)
        return _evaluate(model, source.batches(batch_size), loss, metrics)


@dataclass(frozen=True)
class _Epoch:
    """One row of a `History`."""

    number: int
    learning_rate: float
    running_loss: float
    train: Evaluation
    validation: Evaluation | None
    seconds: float


def _history(epochs: list[_Epoch], kept_epoch: int) -> History:
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


class _NotFinite(Exception):
    """A loss that is not finite, and the batches among which it arose."""

    def __init__(self, step: int, value: float, batches: Batches) -> None:
        self.step, self.value, self.batches = step, value, batches


def _plain(loss: Loss) -> Objective:
    return lambda model, inputs, outputs, targets: loss(outputs, targets)


def _train_epoch(steps: Steps, number: int, batches: Batches, bar: tqdm) -> float:
    """One pass of optimizer steps; the mean of their objectives."""
    steps.model.train()
    total, samples = 0.0, 0
    for step, (inputs, targets) in enumerate(batches, start=1):
        value = steps.take(number, step, inputs, targets)
        if not math.isfinite(value):
            raise _NotFinite(step, value, [(inputs, targets)])
        total += value * len(targets)
        samples += len(targets)
        bar.update()
    return total / samples


def _evaluate(model: nn.Module, batches: Batches, loss: Loss, metrics: Metrics) -> Evaluation:
    """One pass in evaluation mode; means weighed by batch size, summed in float64."""
    model.eval()
    values, sizes = [], []
    with torch.no_grad():
        for inputs, targets in batches:
            outputs = model(inputs)
            means = [measure(outputs, targets) for measure in (loss, *metrics.values())]
            values.append(torch.stack([torch.as_tensor(mean).double().mean() for mean in means]))
            sizes.append(len(targets))
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    loss_mean, *metric_means = (weights @ torch.stack(values).cpu()).tolist()
    return Evaluation(loss_mean, dict(zip(metrics, metric_means, strict=True)), sum(sizes))


def _diverged(
    model: nn.Module, recipe: Recipe, epoch: int, problem: _NotFinite, history: History | None
) -> Diverged:
    where = f"step {problem.step}" if problem.step else "the clean pass after the epoch"
    layer, what = _first_not_finite(model, problem.batches)
    message = (
        f"The loss is {problem.value} in epoch {epoch}, {where}; first not finite: {what}. "
        f"Try a smaller learning rate (now {recipe.learning_rate:g}), look for inputs or "
        "operations without a finite value or gradient (log, sqrt or division at 0), and for "
        "layers without normalisation."
    )
    return Diverged(epoch, problem.step, layer, message, history)


def _first_not_finite(model: nn.Module, batches: Batches) -> tuple[str, str]:
    """Name of the layer where values stop being finite, and a description.

    A gradient that is not finite spoils the weights of its own and of all earlier layers: of the
    spoilt layers the last is the one to name.
    """
    spoilt = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        layer = _layer_of(spoilt[-1].rpartition(".")[0])
        return layer, f"the weights of layer {layer!r}, before the forward pass"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
            if not all(part.isfinite().all() for part in parts if isinstance(part, Tensor)):
                found.append(name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch(_layer_of(name))).remove)
        for inputs, _ in batches:
            if not inputs.isfinite().all():
                return "inputs", "the inputs"
            model(inputs)
            if found:
                return found[0], f"the output of layer {found[0]!r}"
    return "loss", "the loss itself, from finite outputs"


def _layer_of(module_name: str) -> str:
    """The layer that a quantizer inside it belongs to; the model itself has no other name."""
    return module_name.partition(".parametrizations")[0] or "model"


_CLASS_LOSSES = (cross_entropy, nll_loss)
_ELEMENTWISE_LOSSES = (mse_loss, l1_loss, smooth_l1_loss, huber_loss)
_IGNORE_INDEX = -100


@torch.no_grad()
def _check(model: nn.Module, source: Source, loss: Loss, metrics: Metrics | None) -> Metrics:
    """Try a forward pass of two samples; the metrics to use."""
    inputs, targets = next(source.batches(), (None, None))
    if targets is None or len(targets) == 0:
        raise ValueError("data is empty: there is no batch to go through")
    if len(inputs) != len(targets):
        raise ValueError(f"data has {len(inputs)} inputs for {len(targets)} targets")
    model.eval()
    try:
        outputs = model(inputs[:2])
    except RuntimeError as error:
        shape = tuple(inputs.shape)
        raise ValueError(f"the model does not take inputs of shape {shape}: {error}") from error
    shapes = f"outputs {tuple(outputs.shape)}, targets {tuple(targets[:2].shape)} {targets.dtype}"
    alike = outputs.shape == targets[:2].shape and outputs.dtype == targets.dtype
    if loss in _ELEMENTWISE_LOSSES and not alike:
        raise ValueError(
            f"{loss.__name__} needs outputs and targets of one shape and type: {shapes}"
        )
    is_classes = not (targets.is_floating_point() or targets.is_complex())
    if loss in _CLASS_LOSSES and is_classes:
        _check_labels(targets if source.targets is None else source.targets, outputs.shape[1])
    try:
        value = loss(outputs, targets[:2])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the loss does not take {shapes}: {error}") from error
    if value.numel() != 1:
        raise ValueError(f"loss must return one number per batch, got shape {tuple(value.shape)}")
    if metrics is None:
        return {"accuracy": accuracy} if is_classes and outputs.dim() > 1 else {}
    return dict(metrics)


def _check_labels(labels: Tensor, classes: int) -> None:
    labels = labels[labels != _IGNORE_INDEX]
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"the model has {classes} outputs, so labels must lie in 0..{classes - 1}; "
            f"got {labels.min().item()}..{labels.max().item()}"
        )


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """A copy of the state; `copy.deepcopy` of tensors would take eight times as long."""
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def _bar(recipe: Recipe, training: Source, progress: bool | None) -> tqdm:
    """A bar over all steps; tqdm hides it by itself where there is no terminal."""
    steps = training.steps(recipe)
    return tqdm(
        total=steps and steps * recipe.epochs,
        disable=None if progress is None else not progress,
        unit="step",
    )
