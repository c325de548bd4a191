"""What each common layer becomes for K models at once.

Activations have the samples last: `(K, channels, height, width, N)`, or `(K, features, N)`. So a
convolution is a batch of matrix products with long rows, and a channel's statistics are those of
one row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qgen_lab.qat.quantizers import LSQ

Parameters = dict[str, Tensor]
Layer = Callable[[Tensor, Parameters, bool], Tensor]


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of what an `nn.Sequential` does in turn, those inside each other unfolded."""
    if isinstance(model, nn.Sequential):
        for name, child in model.named_children():
            yield from layers_of(child, f"{prefix}{name}.")
    else:
        yield prefix.rstrip("."), model


def refuses(model: nn.Module) -> str | None:
    """Why a model cannot be stacked, or None if it can."""
    if not isinstance(model, nn.Sequential):
        return f"the model is a {type(model).__name__}, not an nn.Sequential"
    for name, layer in layers_of(model):
        reason = _refuses_layer(layer)
        if reason is not None:
            return f"layer {name!r} {reason}"
    return None


def _refuses_layer(layer: nn.Module) -> str | None:
    kind = kind_of(layer)
    if kind not in TWINS:
        return f"is a {kind.__name__}"
    if kind is nn.Conv2d:
        is_plain = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
        if not is_plain or isinstance(layer.padding, str):
            return "has groups, dilation, or a padding that is not a number of zeros"
    if kind in NORMS and not (layer.track_running_stats and layer.affine and layer.momentum):
        return "has no running statistics, no momentum, or no weight"
    if kind is nn.AdaptiveAvgPool2d and layer.output_size not in (1, (1, 1)):
        return "averages to more than one pixel"
    if kind is nn.Flatten and (layer.start_dim, layer.end_dim) != (1, -1):
        return "does not flatten all dimensions"
    if kind is nn.GELU and layer.approximate != "none":
        return "is an approximate GELU"
    if parametrize.is_parametrized(layer) and not _has_lsq_only(layer):
        return "has a parametrization that is not LSQ of its weight"
    return None


def _has_lsq_only(layer: nn.Module) -> bool:
    names = set(layer.parametrizations)
    return names == {"weight"} and [type(q) for q in layer.parametrizations.weight] == [LSQ]


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, without what torch derives from it for a parametrization."""
    return type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)


def quantizer_of(layer: nn.Module) -> LSQ | None:
    """The quantizer of the layer's weight, None in full precision."""
    return layer.parametrizations.weight[0] if parametrize.is_parametrized(layer) else None


def float_weight(layer: nn.Module) -> Tensor:
    """The weight that the optimizer moves."""
    is_quantized = parametrize.is_parametrized(layer)
    return layer.parametrizations.weight.original if is_quantized else layer.weight


def own_parameters(layer: nn.Module) -> dict[str, Callable[[nn.Module], Tensor]]:
    """How to read each parameter of a layer of this kind but a weight that may be quantized."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    if kind_of(layer) in WEIGHTED:
        names = [name for name in names if name != "weight"]
    return {name: attrgetter(name) for name in names}


def signature(layer: nn.Module) -> tuple:
    """What must be equal for layers to be stacked."""
    weight = float_weight(layer).shape if kind_of(layer) in WEIGHTED else None
    settings = ("stride", "padding", "num_features", "momentum", "eps")
    has_bias = getattr(layer, "bias", None) is not None
    return kind_of(layer), weight, has_bias, *(getattr(layer, name, None) for name in settings)


@dataclass(frozen=True)
class Product:
    """A convolution or a linear layer, as a batch of matrix products."""

    key: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @classmethod
    def convolution(cls, key: str, layers: list[nn.Module]) -> "Product":
        """Of layers of one shape."""
        layer = layers[0]
        return cls(key, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)

    @classmethod
    def linear(cls, key: str, layers: list[nn.Module]) -> "Product":
        """Of layers of one shape."""
        return cls(key, layers[0].out_features)

    def __call__(self, x: Tensor, parameters: Parameters, training: bool) -> Tensor:
        """Multiply the patches under the kernel, or all features."""
        if (self.kernel, self.stride, self.padding) != ((1, 1), (1, 1), (0, 0)):
            x = _Patches.apply(x, self.kernel, self.stride, self.padding)
        weight = parameters[f"{self.key}.weight"].unflatten(1, (self.outputs, -1))
        columns = x.flatten(2).expand(len(weight), -1, -1)
        bias = parameters.get(f"{self.key}.bias")
        if bias is None:
            product = torch.bmm(weight, columns)
        else:
            product = torch.baddbmm(bias.unsqueeze(2), weight, columns)
        return product.unflatten(2, x.shape[2:])


class _Patches(torch.autograd.Function):
    """All patches under a kernel: (K, C, H, W, N) to (K, C kh kw, H', W', N)."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding):
        """Copy what each place in the kernel sees."""
        ctx.sizes = x.shape, kernel, stride, padding
        padded = functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
        seen = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        return seen.permute(0, 1, 5, 6, 2, 3, 4).flatten(1, 3)

    @staticmethod
    def backward(ctx, grad):
        """Add each slice where it came from."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (k, channels, height, width, size), kernel, stride, (top, left) = ctx.sizes
        padded = grad.new_zeros(k, channels, height + 2 * top, width + 2 * left, size)
        parts = grad.unflatten(1, (channels, -1)).unbind(2)
        for target, part in zip(_slices(padded, kernel, stride), parts, strict=True):
            target += part
        return padded[:, :, top : top + height, left : left + width], None, None, None


def _slices(padded: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> list[Tensor]:
    """What each place in the kernel sees, row by row."""

    def seen(dim: int, start: int) -> slice:
        steps = (padded.shape[dim + 2] - kernel[dim]) // stride[dim]
        return slice(start, start + steps * stride[dim] + 1, stride[dim])

    return [
        padded[:, :, seen(0, i), seen(1, j)] for i in range(kernel[0]) for j in range(kernel[1])
    ]


class BatchNorm:
    """Batch norm with running statistics: the channels of K models are those of one."""

    buffers = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, key: str, layers: list[nn.Module]):
        self.key, self.layers = key, layers
        self.momentum, self.eps = layers[0].momentum, layers[0].eps
        self.state = [
            torch.stack([getattr(layer, name) for layer in layers]) for name in self.buffers
        ]

    def __call__(self, x: Tensor, parameters: Parameters, training: bool) -> Tensor:
        """Normalise; in training, by the batch's statistics, which the running ones follow."""
        mean, variance, count = self.state
        count += training
        weight, bias = (parameters[f"{self.key}.{name}"].flatten() for name in ("weight", "bias"))
        rows = x.reshape(weight.numel(), -1)
        statistics = mean.view(-1), variance.view(-1)
        if training and x.device.type == "cpu":
            normal = _Normalise.apply(rows, weight, bias, *statistics, self.momentum, self.eps)
        else:
            normal = functional.batch_norm(
                rows[None], *statistics, weight, bias, training, self.momentum, self.eps
            )
        return normal.view(x.shape)

    def write_back(self, state: list[Tensor]) -> None:
        """Put statistics into the models."""
        for name, rows in zip(self.buffers, state, strict=True):
            for layer, row in zip(self.layers, rows, strict=True):
                getattr(layer, name).copy_(row)


class _Normalise(torch.autograd.Function):
    """Batch norm of the rows of a matrix, forward three times as fast as torch's on a CPU."""

    @staticmethod
    def forward(ctx, rows, weight, bias, running_mean, running_variance, momentum, eps):
        """Normalise each row by its mean and variance; the running ones follow in place."""
        mean, length = rows.mean(1), rows.shape[1]
        normal = rows - mean[:, None]
        variance = torch.linalg.vector_norm(normal, dim=1).square_().div_(length)
        inverse = (variance + eps).rsqrt_()
        running_mean.lerp_(mean, momentum)
        running_variance.lerp_(variance.mul_(length / (length - 1)), momentum)
        ctx.save_for_backward(rows, weight, mean, inverse)
        ctx.eps = eps
        return normal.mul_((inverse * weight)[:, None]).add_(bias[:, None])

    @staticmethod
    def backward(ctx, grad):
        """As torch's."""
        rows, weight, mean, inverse = ctx.saved_tensors
        for_rows, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            *(grad[None], rows[None], weight, None, None, mean, inverse),
            *(True, ctx.eps, [True, True, True]),
        )
        return for_rows[0], for_weight, for_bias, None, None, None, None


def _relu(key: str, layers: list[nn.Module]) -> Layer:
    function = torch.relu_ if layers[0].inplace else torch.relu
    return lambda x, parameters, training: function(x)


def _without_parameters(
    function: Callable[[Tensor], Tensor],
) -> Callable[[str, list[nn.Module]], Layer]:
    return lambda key, layers: lambda x, parameters, training: function(x)


def _average(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1, -2)


WEIGHTED = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# What makes a layer's twin from its key and its K instances.
TWINS: dict[type[nn.Module], Callable[[str, list[nn.Module]], Layer]] = {
    nn.Conv2d: Product.convolution,
    nn.Linear: Product.linear,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.ReLU: _relu,
    nn.Tanh: _without_parameters(torch.tanh),
    nn.GELU: _without_parameters(functional.gelu),
    nn.Identity: _without_parameters(lambda x: x),
    nn.AdaptiveAvgPool2d: _without_parameters(_average),
    nn.Flatten: _without_parameters(_flatten),
}
