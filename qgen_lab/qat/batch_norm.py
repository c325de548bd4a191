"""Batch-norm statistics, estimated anew for the weights as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qgen_lab.data import Dataset
from qgen_lab.qat.batches import BATCH_NORM, Batches, Source, channels_last
from qgen_lab.qat.evaluation import modes_restored
from qgen_lab.qat.recipes import Recipe

__all__ = ["reestimate_batch_norm"]


def reestimate_batch_norm(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor] | Batches,
    batch_size: int = 256,
) -> nn.Module:
    """Replace the running statistics of all batch norms by those of one pass over `data`, in place.

    Training leaves a moving average over past weights. Weights that were changed since, by rounding
    or averaging, need statistics of their own; so does a fair comparison of such weights.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. One without batch norm stays as it is, and so does a batch norm that keeps no
        running statistics or that the forward pass never reaches.
    data : Dataset, (inputs, targets) tensors, or iterable of such batches
        Training data, without augmentation. Samples held in memory are shuffled, with a fixed seed:
        batches of one class each would not be normalised as in training.
    batch_size : int
        Samples per batch, for data held in memory. As in `fit`, a single sample that is left over
        is skipped, since it cannot be normalised.

    Returns
    -------
    torch.nn.Module
        `model` itself; every module has the mode (training or evaluation) that it came with.

    Raises
    ------
    ValueError
        If the data are empty.
    TypeError
        If `data` is of a wrong kind.

    Notes
    -----
    In the pass each batch norm normalises by its batch, as in training; all else, such as dropout,
    is in evaluation mode. The mean and the variance that are kept are those of all samples pooled,
    the spread between batches included (`momentum=None` in PyTorch leaves that spread out;
    see Wu and Johnson 2021, arXiv 2105.07576, section 3).

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import nin
    >>> model = nin(2, 8, in_channels=1, base_width=1, seed=0)
    >>> _ = reestimate_batch_norm(model, load_dataset("digits").train)
    """
    source = Source(data, model)
    order = torch.Generator().manual_seed(0)
    batches = source.shuffled(Recipe(epochs=1, batch_size=batch_size), order)
    empty = True
    with torch.no_grad(), channels_last(model), _moments_collected(model) as moments:
        for inputs, _ in batches:
            if len(inputs):
                model(inputs)
                empty = False
    if empty:
        raise ValueError("data is empty: batch-norm statistics need at least one batch")
    for layer, collected in moments.items():
        if collected.count:
            layer.running_mean.copy_(collected.mean)
            layer.running_var.copy_(collected.variance)
    return model


class _Moments:
    """Mean and variance per channel of all batches pooled (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.deviations = 0, 0.0, 0.0

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in a batch of shape (N, C, ...)."""
        (batch,) = inputs
        dims = [dim for dim in range(batch.dim()) if dim != 1]
        variance, mean = torch.var_mean(batch, dims, correction=0)
        count = batch.numel() // batch.shape[1]
        difference, total = mean.double() - self.mean, self.count + count
        self.mean = self.mean + difference * count / total
        between = difference.square() * (self.count * count / total)
        self.deviations = self.deviations + variance.double() * count + between
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased, as batch norm keeps it."""
        return self.deviations / (self.count - 1)


@contextmanager
def _moments_collected(model: nn.Module) -> Iterator[dict[nn.Module, _Moments]]:
    """Let each batch norm normalise by its batch, and collect what goes into it."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BATCH_NORM) and module.track_running_stats
    ]
    moments = {layer: _Moments() for layer in layers}
    hooks = [layer.register_forward_pre_hook(moments[layer].add) for layer in layers]
    try:
        with modes_restored(model):
            model.eval()
            for layer in layers:
                layer.training, layer.track_running_stats = True, False  # buffers stay untouched
            yield moments
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.track_running_stats = True
