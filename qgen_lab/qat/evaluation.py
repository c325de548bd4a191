"""Mean loss and metrics of a model over a data set; whether model, data and loss fit together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batches import Batches, Source
from qgen_lab.qat.models import seeded

__all__ = ["Evaluation", "Loss", "Metrics", "accuracy", "evaluate"]

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
    with modes_restored(model), seeded(0, source.device):
        metrics = checked_metrics(model, source, loss, metrics)
        return evaluate_batches(model, source.batches(batch_size), loss, metrics)


def evaluate_batches(
    model: nn.Module, batches: Batches, loss: Loss, metrics: Metrics
) -> Evaluation:
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


_CLASS_LOSSES = (cross_entropy, nll_loss)
_ELEMENTWISE_LOSSES = (mse_loss, l1_loss, smooth_l1_loss, huber_loss)
_IGNORE_INDEX = -100


@torch.no_grad()
def checked_metrics(
    model: nn.Module, source: Source, loss: Loss, metrics: Metrics | None
) -> Metrics:
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
def modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
