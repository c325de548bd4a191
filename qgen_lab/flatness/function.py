"""A model as a function of some of its weights, on fixed data: what flatness is measured on.

Losses are summed over the outputs of a sample and averaged over samples; `"squared"` is
``|f - y|^2`` without a factor one half, `"cross_entropy"` is in nats.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qgen_lab import qat


@dataclass(frozen=True)
class Loss:
    """A loss of one sample as a function of its outputs f, and what its expansion needs.

    Attributes
    ----------
    value : callable
        ``value(f, y)``, one number a sample.
    slope : callable
        ``slope(f, y)``, the gradient in f.
    hessian_root : callable
        ``hessian_root(f, u)`` is ``S u``, where ``S S'`` is the Hessian in f.
    change : callable
        ``change(f, g)``, how far outputs moved, one number a sample; to second order in ``g - f``
        it is ``|S' (g - f)|^2 / 2``.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    hessian_root: Callable[[Tensor, Tensor], Tensor]
    change: Callable[[Tensor, Tensor], Tensor]


def _squared_distance(f: Tensor, g: Tensor) -> Tensor:
    return (f - g).square().flatten(1).sum(1)


def _divergence(f: Tensor, g: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) of the distributions with logits f and g."""
    log_p, log_q = functional.log_softmax(f, -1), functional.log_softmax(g, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _softmax_root(f: Tensor, u: Tensor) -> Tensor:
    """Apply S = diag(sqrt p) (1 - sqrt p sqrt p'), for which S S' = diag p - p p'."""
    root = (functional.log_softmax(f, -1) / 2).exp()  # has a derivative where p underflows
    return root * (u - root * (root * u).sum(-1, keepdim=True))


LOSSES = {
    "squared": Loss(
        value=_squared_distance,
        slope=lambda f, y: 2 * (f - y),
        hessian_root=lambda f, u: math.sqrt(2) * u,
        change=_squared_distance,
    ),
    "cross_entropy": Loss(
        value=lambda f, y: -(y * functional.log_softmax(f, -1)).sum(-1),
        slope=lambda f, y: functional.softmax(f, -1) - y,
        hessian_root=_softmax_root,
        change=_divergence,
    ),
}
"""Losses by name."""


@dataclass(frozen=True, eq=False)
class WeightFunction:
    """A model as a function of the weights of its linear and convolution layers, on fixed batches.

    Attributes
    ----------
    weights : dict of Tensor
        By layer name; quantized models have their quantized weights.
    batches : list of pairs of Tensor
        Inputs and targets, the targets in the shape of the outputs.
    outputs : list of Tensor
        Of the model as it is, one for each batch.
    loss : Loss
    value : float
        The loss of the model as it is.
    coupled : bool
        Whether batch norm couples the samples of a batch.
    """

    network: nn.Module
    weights: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]
    outputs: list[Tensor]
    loss: Loss
    value: float
    coupled: bool

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Outputs for the inputs x; layers that are not named keep their weights."""
        named = {f"{name}.weight".lstrip("."): weight for name, weight in weights.items()}
        return functional_call(self.network, named, (x,))

    def channel_dim(self, name: str) -> int:
        """Dimension of a layer's weight that counts its output channels."""
        return channel_dim(self.network.get_submodule(name))

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights.values())


def weight_function(
    model: nn.Module,
    data,
    layers: Iterable[str] | None = None,
    *,
    loss: str = "squared",
    batch_norm: str = "frozen",
    batch_size: int = 256,
) -> WeightFunction:
    """Copy a model, with plain weights and nothing random, and put the data beside it.

    Parameters
    ----------
    model : Module
        From one tensor to one tensor of shape (samples, ...). It is not changed.
    data : Dataset or pair of Tensor
        ``(inputs, targets)``. Whole-number targets of outputs (samples, classes) are classes and
        become one-hot rows.
    layers : iterable of str, optional
        Names of linear and convolution layers; default all of them.
    loss : {"squared", "cross_entropy"}
    batch_norm : {"frozen", "batch"}
        Whether batch norm uses its running statistics, or those of each batch.
    batch_size : int

    Returns
    -------
    WeightFunction

    Raises
    ------
    TypeError
        If the data are of another kind.
    ValueError
        For an unknown layer, loss or mode, data that are empty or do not match the outputs, or a
        loss that is not finite.
    """
    check_choice("loss", loss, LOSSES)
    check_choice("batch_norm", batch_norm, ("frozen", "batch"))
    check_at_least("batch_size", batch_size, 1)
    network = _still_copy(model, batch_norm)
    weights = _layer_weights(network)
    layers = list(weights) if layers is None else list(layers)
    unknown = [name for name in layers if name not in weights]
    if unknown or not layers:
        raise ValueError(
            f"no layers named {unknown}: linear and convolution layers are {list(weights)}"
        )
    weights = _each_once({name: weights[name] for name in layers})

    batches = _batches(data, batch_size, like=next(iter(weights.values())))
    with torch.no_grad():
        outputs = [network(x) for x, _ in batches]
    fitted = [(x, fitted_targets(f, y, loss)) for f, (x, y) in zip(outputs, batches, strict=True)]
    losses = [LOSSES[loss].value(f, y) for f, (_, y) in zip(outputs, fitted, strict=True)]
    value = torch.cat(losses).double().mean().item()
    if not math.isfinite(value):
        raise ValueError(f"the loss of the model is {value}: its weights or data are not finite")
    return WeightFunction(
        network, weights, fitted, outputs, LOSSES[loss], value, coupled=batch_norm == "batch"
    )


def _still_copy(model: nn.Module, batch_norm: str) -> nn.Module:
    """A copy with plain weights, nothing random, and no running statistics to update."""
    network = qat.bake(copy.deepcopy(model))
    network.eval().requires_grad_(False)
    if batch_norm == "batch":
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean = module.running_var = None
                module.track_running_stats = False
    return network


def _layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of linear and convolution layers by layer name."""
    return {name: layer.weight.detach() for name, layer in weight_layers(network).items()}


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
    }


def channel_dim(layer: nn.Module) -> int:
    """Dimension of a layer's weight that counts its output channels."""
    return int(isinstance(layer, _ConvTransposeNd))


def _each_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the later names of a weight that layers share."""
    first = {weight.data_ptr(): name for name, weight in reversed(weights.items())}
    return {name: weight for name, weight in weights.items() if first[weight.data_ptr()] == name}


def _batches(data, batch_size: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Consecutive batches on the device of `like`, real-valued inputs in its dtype."""
    try:
        x, y = data.batch() if hasattr(data, "batch") else data
        x, y = torch.as_tensor(x, device=like.device), torch.as_tensor(y, device=like.device)
    except (TypeError, ValueError) as error:
        kind = type(data).__name__
        raise TypeError(f"data is a {kind}: give a Dataset or (inputs, targets)") from error
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"data has {len(x)} inputs and {len(y)} targets: give as many of both, at least one"
        )
    if x.is_floating_point():
        x = x.to(like.dtype)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def fitted_targets(f: Tensor, y: Tensor, loss: str) -> Tensor:
    """Targets as real numbers in the shape of the outputs, classes as one-hot rows."""
    if loss == "cross_entropy" and f.ndim != 2:
        raise ValueError(f"cross_entropy needs outputs (samples, classes), got {tuple(f.shape)}")
    if f.ndim == 2 and y.ndim == 1 and not y.is_floating_point():
        classes = f.shape[1]
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"targets reach from {y.min()} to {y.max()}: outputs are {classes}")
        y = functional.one_hot(y.long(), classes)
    if y.shape != f.shape:
        raise ValueError(f"targets {tuple(y.shape)} do not match outputs {tuple(f.shape)}")
    return y.to(f)


def check_choice(argument: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{argument} = {value!r}: must be one of {list(allowed)}")


def check_at_least(argument: str, value: int, least: int) -> None:
    """Raise a ValueError unless the value is a whole number of at least `least`."""
    if value != int(value) or value < least:
        raise ValueError(f"{argument} = {value!r}: must be a whole number of at least {least}")
