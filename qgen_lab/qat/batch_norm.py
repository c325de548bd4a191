"""Batch norm after training: statistics for the weights as they are, or folded away."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qgen_lab.data import Dataset
from qgen_lab.qat.batches import BATCH_NORM, Batches, Source, channels_last
from qgen_lab.qat.evaluation import modes_restored
from qgen_lab.qat.recipes import Recipe

__all__ = ["CannotFold", "batch_norm_pairs", "fold_batch_norm", "reestimate_batch_norm"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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


class CannotFold(ValueError):
    """A model whose batch norms cannot be folded; it is unchanged."""


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold each batch norm that follows a convolution or linear layer into that layer, in place.

    In evaluation mode a batch norm is a factor and a shift for each channel. They go into the
    layer's weights and bias, which is made where there was none, and `torch.nn.Identity` takes the
    norm's place. The outputs in evaluation mode stay the same up to rounding error; in training
    mode nothing is normalised any more. `batch_norm_pairs` says beforehand what will be folded.

    Parameters
    ----------
    model : torch.nn.Module
        A model that `torch.fx` can trace, as it can the networks of this library. One without batch
        norm stays as it is.

    Returns
    -------
    torch.nn.Module
        `model` itself. A norm that follows no such layer stays a norm.

    Raises
    ------
    CannotFold
        If the model cannot be traced, the layer before a norm is quantized, or the norm keeps no
        running statistics. The model is then unchanged.

    Notes
    -----
    Each channel gets a factor of its own, so weights that lay on one grid for the whole layer lie
    on one a channel afterwards. Computed in float64 by `torch.nn.utils.fusion`.

    Examples
    --------
    >>> from qgen_lab.qat import nin
    >>> model = fold_batch_norm(nin(2, 8, in_channels=1, base_width=1, seed=0))
    >>> any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    False
    """
    names = batch_norm_pairs(model)
    pairs = [(model.get_submodule(norm), model.get_submodule(names[norm])) for norm in names]
    fused = [_fused(norm, layer) for norm, layer in pairs]
    for (norm, layer), (weight, bias) in zip(pairs, fused, strict=True):
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias.to(layer.weight), layer.weight.requires_grad)
        else:
            layer.bias.copy_(bias)
        _replace(model, norm, nn.Identity())
    return model


def batch_norm_pairs(model: nn.Module) -> dict[str, str]:
    """Say which batch norms `fold_batch_norm` folds, and into which layers.

    Those whose input is the output of a convolution or linear layer that goes nowhere else, norm
    and layer being called once in a forward pass; layers that share their weights with others do
    not count, and transposed convolutions only if they have one group.

    Parameters
    ----------
    model : torch.nn.Module
        As for `fold_batch_norm`.

    Returns
    -------
    dict of str to str
        For the name of each such norm the name of the layer, in the order of the forward pass.

    Raises
    ------
    CannotFold
        As `fold_batch_norm` does.

    Notes
    -----
    `torch.fx` sees PyTorch's own layers, and not those of classes derived from them. A norm after a
    linear layer is taken to see inputs of shape `(samples, features)`.

    Examples
    --------
    >>> batch_norm_pairs(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    {'1': '0'}
    """
    if not any(type(module) in _NORMS for module in model.modules()):
        return {}
    nodes = _trace(model).nodes
    called = {node: model.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    times = Counter(called.values())
    read = {node.target for node in nodes if node.op == "get_attr"}  # besides by the layer itself
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    pairs = {}
    for node, norm in called.items():
        source = next(iter(node.all_input_nodes), None)
        layer = called.get(source)
        if not (_fit(layer, norm) and len(source.users) == times[layer] == times[norm] == 1):
            continue
        _check(source.target, layer, node.target, norm)
        parameters = dict(layer.named_parameters(recurse=False))
        shared = any(owners[id(parameter)] > 1 for parameter in parameters.values())
        if not shared and read.isdisjoint(f"{source.target}.{name}" for name in parameters):
            pairs[node.target] = source.target
    return pairs


def _trace(model: nn.Module) -> fx.Graph:
    """Record what calls what in evaluation mode."""
    with modes_restored(model):
        model.eval()
        try:
            return fx.Tracer().trace(model)
        except Exception as error:  # the model's own code runs on stand-ins, and may do anything
            raise CannotFold(
                f"torch.fx cannot trace the model, so what goes into its batch norms is not known "
                f"({type(error).__name__}: {error}); fold the parts that can be traced one by one, "
                "as in fold_batch_norm(model.features), or keep the norms"
            ) from error


def _fit(layer: nn.Module | None, norm: nn.Module) -> bool:
    if isinstance(layer, _TRANSPOSED):
        return type(norm) in _NORMS and layer.groups == 1
    return type(norm) in _NORMS and isinstance(layer, _LAYERS)


def _check(layer_name: str, layer: nn.Module, norm_name: str, norm: nn.Module) -> None:
    """Raise if norm and layer fit and still cannot be folded."""
    if "weight" not in layer._parameters:
        raise CannotFold(
            f"layer {layer_name!r} before batch norm {norm_name!r} is quantized, or its weight is "
            "parametrized otherwise: bake(model) first, or remove the parametrization"
        )
    if norm.running_mean is None:
        raise CannotFold(
            f"batch norm {norm_name!r} keeps no running statistics, so it normalises by the batch "
            "even in evaluation: train it with track_running_stats=True"
        )


def _fused(norm: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, that do what layer and norm do."""
    tensors = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    return fuse_conv_bn_weights(  # a linear layer is a convolution of size one
        *(None if x is None else x.double() for x in tensors),
        norm.eps,
        *(None if x is None else x.double() for x in (norm.weight, norm.bias)),
        transpose=isinstance(layer, _TRANSPOSED),
    )


def _replace(model: nn.Module, module: nn.Module, substitute: nn.Module) -> None:
    """Put a module in the place of another, under every name that has it."""
    for name, candidate in list(model.named_modules(remove_duplicate=False)):
        if candidate is module:
            model.set_submodule(name, substitute)
