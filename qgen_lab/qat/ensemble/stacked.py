"""K models of one architecture as one: a matrix of parameters, one row a model.

Activations have the samples last: `(K, channels, height, width, N)`, or `(K, features, N)`. So a
convolution is a batch of matrix products over long rows, and each channel's statistics are sums
over one of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qgen_lab.qat.quantizers import LSQ

Pieces = dict[str, Tensor]
Layer = Callable[[Tensor, Pieces, bool], Tensor]


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
    kind = _kind(layer)
    if kind not in _TWINS:
        return f"is a {kind.__name__}"
    if kind is nn.Conv2d:
        plain = (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
        if not plain or isinstance(layer.padding, str):
            return "has groups, dilation, or a padding given by name"
    if kind in _NORMS and (not layer.track_running_stats or layer.momentum is None):
        return "has no running statistics, or averages them without a momentum"
    if kind in _NORMS and not layer.affine:
        return "has no weight and bias"
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


def _kind(layer: nn.Module) -> type[nn.Module]:
    """The layer's class, without what torch derives from it for a parametrization."""
    return type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)


def _quantizer(layer: nn.Module) -> LSQ | None:
    return layer.parametrizations.weight[0] if parametrize.is_parametrized(layer) else None


def _float_weight(layer: nn.Module) -> Tensor:
    if parametrize.is_parametrized(layer):
        return layer.parametrizations.weight.original
    return layer.weight


class Stack:
    """K models with one state.

    The columns of `parameters` are the float weights that may be quantized, then all other
    parameters, then LSQ's steps: room for one an output channel, of which a model uses as many of
    each layer's first as it has, one in full precision none.

    Parameters
    ----------
    models : list of nn.Module
        As `refuses` allows, of one architecture. They are only read until `write_back`.

    Raises
    ------
    ValueError
        If the models differ in their layers or the shapes of these.
    """

    def __init__(self, models: list[nn.Module]):
        self.models = models
        self.names = [name for name, _ in layers_of(models[0])]
        columns = [list(layers) for layers in zip(*map(_only_layers, models), strict=True)]
        self._require_one_architecture(columns)
        self.weighted = [i for i, layers in enumerate(columns) if _kind(layers[0]) in _WEIGHTED]
        self.columns = columns
        weights = [self._stacked(i, _float_weight) for i in self.weighted]
        others, self._others = [], []
        for i, layers in enumerate(columns):
            for name, _ in layers[0].named_parameters(recurse=False):
                if not (i in self.weighted and name == "weight"):
                    self._others.append((i, name))
                    others.append(self._stacked(i, attrgetter(name)))
        self.lsq = _StackedLSQ([columns[i] for i in self.weighted])
        self.weight_sizes = [part.shape[1] for part in weights]
        self.other_sizes = [part.shape[1] for part in others]
        parts = [*weights, *others, self.lsq.steps]
        self.parameters = torch.cat(parts, 1).detach().requires_grad_()
        self.sections = [sum(self.weight_sizes), sum(self.other_sizes), self.lsq.steps.shape[1]]
        self.decayed = torch.ones_like(self.parameters[0])  # which columns take weight decay
        self.decayed[sum(self.sections[:2]) :] = 0
        self.layers = [_TWINS[_kind(layers[0])](str(i), layers) for i, layers in enumerate(columns)]
        self.norms = [layer for layer in self.layers if isinstance(layer, _BatchNorm)]

    def __len__(self) -> int:
        return len(self.models)

    def _require_one_architecture(self, columns: list[list[nn.Module]]) -> None:
        for name, layers in zip(self.names, columns, strict=True):
            if len({_signature(layer) for layer in layers}) > 1:
                raise ValueError(f"the models are not of one architecture: layer {name!r} differs")

    def _stacked(self, index: int, read: Callable[[nn.Module], Tensor]) -> Tensor:
        return torch.stack([read(layer).detach().flatten() for layer in self.columns[index]])

    def __call__(self, inputs: Tensor, training: bool) -> Tensor:
        """Outputs of shape (K, N, ...) for inputs (K, C, H, W, N) or (K, D, N); K may be 1."""
        weights, others, steps = self.parameters.split(self.sections, 1)
        quantized = self.lsq(weights, steps)
        keys = [*map(str, self.weighted), *(f"{i}.{name}" for i, name in self._others)]
        parts = [*quantized.split(self.weight_sizes, 1), *others.split(self.other_sizes, 1)]
        pieces = dict(zip(keys, parts, strict=True))
        x = inputs
        for layer in self.layers:
            x = layer(x, pieces, training)
        return x.movedim(-1, 1)

    @torch.no_grad()
    def raise_steps(self) -> None:
        """Put steps that the optimizer has brought below their floor back on it."""
        self.parameters[:, sum(self.sections[:2]) :].clamp_(min=self.lsq.floor)

    def state(self) -> list[Tensor]:
        """All that training changes, one row a model; not copies."""
        return [self.parameters.detach(), *(part for norm in self.norms for part in norm.state)]

    @torch.no_grad()
    def write_back(self, state: list[Tensor]) -> None:
        """Put a state into the models."""
        parameters, *statistics = state
        weights, others, steps = parameters.split(self.sections, 1)
        for i, piece in zip(self.weighted, weights.split(self.weight_sizes, 1), strict=True):
            self._write(i, piece, _float_weight)
        for (i, name), piece in zip(self._others, others.split(self.other_sizes, 1), strict=True):
            self._write(i, piece, attrgetter(name))
        self.lsq.write_back(steps)
        for n, norm in enumerate(self.norms):
            norm.write_back(statistics[3 * n : 3 * n + 3])

    def _write(self, index: int, rows: Tensor, target: Callable[[nn.Module], Tensor]) -> None:
        for layer, row in zip(self.columns[index], rows, strict=True):
            parameter = target(layer)
            parameter.copy_(row.view(parameter.shape))


def _only_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in layers_of(model)]


def _signature(layer: nn.Module) -> tuple:
    """What must be equal for two layers to be stacked."""
    weight = _float_weight(layer).shape if _kind(layer) in _WEIGHTED else None
    settings = ("stride", "padding", "num_features", "momentum", "eps")
    has_bias = getattr(layer, "bias", None) is not None
    return _kind(layer), weight, has_bias, *(getattr(layer, name, None) for name in settings)


class _StackedLSQ:
    """LSQ of all layers of all models at once: bits, and whether at all, differ between models.

    A row of weights is one output channel of one layer; `slot[k, row]` is the column of its step.
    """

    def __init__(self, columns: list[list[nn.Module]]):
        first = [_float_weight(layers[0]) for layers in columns]
        heights = [len(weight) for weight in first]
        self.shapes = [(len(weight), weight[0].numel()) for weight in first]
        widths = torch.tensor([width for _, width in self.shapes], device=first[0].device)
        self.row_of_weight = torch.arange(sum(heights), device=first[0].device).repeat_interleave(
            widths.repeat_interleave(torch.tensor(heights, device=first[0].device))
        )
        self.members = [[_quantizer(layer) for layer in layers] for layers in columns]
        like = {"dtype": first[0].dtype, "device": first[0].device}
        shape = len(columns[0]), sum(heights)
        self.steps, self.floor = torch.ones(shape, **like), torch.zeros(shape, **like)
        self.low, self.high = torch.full(shape, -1.0, **like), torch.ones(shape, **like)
        self.scale = torch.zeros(shape, **like)
        self.one_bit, self.full = (
            torch.zeros(shape, dtype=bool, device=like["device"]) for _ in "12"
        )
        self.slot = torch.arange(sum(heights), device=like["device"]).repeat(shape[0], 1)
        self.offsets = [sum(heights[:i]) for i in range(len(heights))]
        for start, height, members in zip(self.offsets, heights, self.members, strict=True):
            for k, member in enumerate(members):
                self._place(k, slice(start, start + height), member)
        self.is_needed = not bool(self.full.all())

    def _place(self, k: int, rows: slice, member: LSQ | None) -> None:
        if member is None:
            self.full[k, rows] = True
            return
        height, steps = rows.stop - rows.start, member.step.numel()
        self.slot[k, rows] = rows.start + torch.arange(height, device=self.slot.device) // (
            height // steps
        )
        self.steps[k, self.slot[k, rows]] = member.step.detach()
        self.floor[k, self.slot[k, rows]] = member.floor
        self.low[k, rows], self.high[k, rows] = member.low, member.high
        self.scale[k, rows] = member.gradient_scale
        self.one_bit[k, rows] = member.bits == 1

    def __call__(self, weights: Tensor, steps: Tensor) -> Tensor:
        return _QuantizeRows.apply(weights, steps, self) if self.is_needed else weights

    def per_weight(self, rows: Tensor) -> Tensor:
        """Repeat what belongs to a row for each of its weights."""
        return rows.index_select(1, self.row_of_weight)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sum over the weights of each row."""
        parts = values.split([rows * width for rows, width in self.shapes], 1)
        sums = [p.unflatten(1, shape).sum(2) for p, shape in zip(parts, self.shapes, strict=True)]
        return torch.cat(sums, 1)

    def write_back(self, steps: Tensor) -> None:
        """Put the steps into the models' quantizers."""
        for start, members in zip(self.offsets, self.members, strict=True):
            for k, member in enumerate(members):
                if member is not None:
                    values = steps[k, start : start + member.step.numel()]
                    member.step.copy_(values.view(member.step.shape))


class _QuantizeRows(torch.autograd.Function):
    """As `LSQ`, whose docstring has the formulas; weights in full precision pass through."""

    @staticmethod
    def forward(ctx, weights, steps, lsq):
        """Quantize with steps that are on their floor or above."""
        per_row = steps.gather(1, lsq.slot)
        step, low, high, one_bit, full = map(
            lsq.per_weight, (per_row, lsq.low, lsq.high, lsq.one_bit, lsq.full)
        )
        v = weights / step
        codes = torch.where(
            one_bit, torch.where(v >= 0, 1.0, -1.0).to(v), v.clamp(low, high).round()
        )
        inside = ((v > low) & (v < high)) | one_bit | full
        slope = torch.where(inside & ~one_bit, codes - v, codes)
        ctx.save_for_backward(inside, slope)
        ctx.lsq = lsq
        return torch.where(full, weights, codes * step)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on to the weights and to the steps."""
        inside, slope = ctx.saved_tensors
        lsq = ctx.lsq
        per_row = lsq.scale * lsq.row_sums(grad * slope)
        per_row = per_row.masked_fill(lsq.full, 0)
        grad_steps = torch.zeros_like(per_row).scatter_add_(1, lsq.slot, per_row)
        return torch.where(inside, grad, 0), grad_steps, None


@dataclass(frozen=True)
class _Product:
    """A convolution or a linear layer, as a batch of matrix products."""

    key: str
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    outputs: int = 0

    @classmethod
    def convolution(cls, key: str, layers: list[nn.Module]) -> "_Product":
        layer = layers[0]
        return cls(key, layer.kernel_size, layer.stride, layer.padding, layer.out_channels)

    @classmethod
    def linear(cls, key: str, layers: list[nn.Module]) -> "_Product":
        return cls(key, outputs=layers[0].out_features)

    def __call__(self, x: Tensor, pieces: Pieces, training: bool) -> Tensor:
        if (self.kernel, self.stride, self.padding) != ((1, 1), (1, 1), (0, 0)):
            x = _Patches.apply(x, self.kernel, self.stride, self.padding)
        columns = x.flatten(2)
        weight = pieces[self.key].unflatten(1, (self.outputs, -1))
        columns = columns.expand(len(weight), -1, -1)
        bias = pieces.get(f"{self.key}.bias")
        if bias is None:
            product = torch.bmm(weight, columns)
        else:
            product = torch.baddbmm(bias.unsqueeze(2), weight, columns)
        return product.unflatten(2, x.shape[2:])


class _Patches(torch.autograd.Function):
    """All patches under a kernel: (K, C, H, W, N) to (K, C kh kw, H', W', N)."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding):
        """Copy one slice per place in the kernel."""
        ctx.sizes = x.shape, kernel, stride, padding
        padded = functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
        slices = _slices(padded, kernel, stride)
        return torch.stack(slices, 2).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        """Add each slice where it came from."""
        (k, channels, height, width, size), kernel, stride, (top, left) = ctx.sizes
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        padded = grad.new_zeros(k, channels, height + 2 * top, width + 2 * left, size)
        parts = grad.unflatten(1, (channels, -1)).unbind(2)
        for target, part in zip(_slices(padded, kernel, stride), parts, strict=True):
            target += part
        return padded[:, :, top : top + height, left : left + width], None, None, None


def _slices(padded: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> list[Tensor]:
    """What each place in the kernel sees, row by row."""
    rows, columns = (
        (size - k) // s + 1 for size, k, s in zip(padded.shape[2:4], kernel, stride, strict=True)
    )
    return [
        padded[
            :,
            :,
            i : i + (rows - 1) * stride[0] + 1 : stride[0],
            j : j + (columns - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


class _BatchNorm:
    """Batch norm with running statistics: K models' channels are the channels of one."""

    def __init__(self, key: str, layers: list[nn.Module]):
        self.key, self.layers = key, layers
        self.momentum, self.eps = layers[0].momentum, layers[0].eps
        self.state = [
            torch.stack([getattr(layer, name) for layer in layers]).clone()
            for name in self._BUFFERS
        ]

    _BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

    def __call__(self, x: Tensor, pieces: Pieces, training: bool) -> Tensor:
        mean, variance, count = self.state
        if training:
            count += 1
        weight, bias = (pieces[f"{self.key}.{name}"].flatten() for name in ("weight", "bias"))
        normal = functional.batch_norm(
            x.reshape(1, weight.numel(), -1),
            mean.view(-1),
            variance.view(-1),
            weight,
            bias,
            training,
            self.momentum,
            self.eps,
        )
        return normal.view(x.shape)

    def write_back(self, state: list[Tensor]) -> None:
        """Put the statistics into the models."""
        for name, rows in zip(self._BUFFERS, state, strict=True):
            for layer, row in zip(self.layers, rows, strict=True):
                getattr(layer, name).copy_(row)


def _elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[str, list[nn.Module]], Layer]:
    return lambda key, layers: lambda x, pieces, training: function(x)


def _average(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1, -2)


# What each layer becomes, from its name and its K instances.
_TWINS: dict[type[nn.Module], Callable[[str, list[nn.Module]], Layer]] = {
    nn.Conv2d: _Product.convolution,
    nn.Linear: _Product.linear,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.ReLU: _elementwise(torch.relu),
    nn.Tanh: _elementwise(torch.tanh),
    nn.GELU: _elementwise(functional.gelu),
    nn.Identity: _elementwise(lambda x: x),
    nn.AdaptiveAvgPool2d: _elementwise(_average),
    nn.Flatten: _elementwise(_flatten),
}
_WEIGHTED = (nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
