"""Quantizers: few-bit weights during training, gradients to the float weights behind them.

`quantize_weights` attaches one quantizer to each chosen layer as a parametrization of its weight
(`torch.nn.utils.parametrize`): `layer.weight` is then quantized, and the float weight that the
optimizer moves stays at `layer.parametrizations.weight.original`. `bake` makes it plain again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qgen_lab.codebooks import Codebook, check_bits
from qgen_lab.qat import kernels

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

LayerChoice = str | type[nn.Module] | Iterable[str | type[nn.Module]]


class Quantizer(nn.Module, ABC):
    """Quantizer of one layer's weights; the protocol that every member of `registry` follows.

    A member is built by `member(weight, bits, channel_dim)`: `weight` is the float weight it starts
    from, `channel_dim` the dimension of the output channels if each is to have a grid of its own,
    else None. What it learns are its own `nn.Parameter` objects; they take no weight decay.

    Attributes
    ----------
    bits : int or float
        Binary logarithm of the number of levels.
    """

    bits: float

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weights, shape and dtype of `weight`, with their gradients."""

    @abstractmethod
    def code(self, weight: Tensor) -> Tensor:
        """Return the integer (int32) that stands for each weight's level."""

    @property
    @abstractmethod
    def step_size(self) -> Tensor:
        """The grid's step in the weights' units, of shape `()`, or `(channels,)` per channel."""

    @property
    def bin_width(self) -> Tensor:
        """Distance of neighbouring levels, shaped as `step_size`, which it is by default."""
        return self.step_size

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what becomes the float weight when someone assigns `layer.weight = weight`."""
        return weight


class LSQ(Quantizer):
    """Uniform quantizer with a learned step (Esser et al. 2020, arXiv 1902.08153).

    With `v = w / s`, weights `w`, step `s`, codes from `low = -2**(bits - 1)` to
    `high = 2**(bits - 1) - 1`: the quantized weight is `s round(clip(v, low, high))`, ties to even.
    Weights strictly between the bounds pass their gradient on, the others get zero. The step gets
    `sum G (round(v) - v)` over the former, `sum G bound` over the latter, times `1 / sqrt(n high)`,
    where `G` is the gradient to the quantized weights and `n` weights share the step.
    One bit is `s sign(w)` with `sign(0) = 1`; all weights pass their gradient on, the step gets
    `sum G sign(w)`, times `1 / sqrt(n)`.

    With many bits the loss hardly holds the step: at 8 bits, plain SGD at a large rate can let it
    drift until weights are clipped, and then throw it up (the book's chapter on training shows it).

    The step never reaches zero: below `floor`, the step at which the grid reaches out to 1% of the
    root mean square of the initial weights, it counts as `floor`, and the next forward pass puts
    the parameter back there.

    Parameters
    ----------
    weight : Tensor
        Float weights; the step starts at `2 mean|w| / sqrt(high)`, for one bit at `mean|w|`.
    bits : int
        From 1 to 16.
    channel_dim : int or None
        Dimension along which each index has a step of its own; None for one step.
    """

    def __init__(self, weight: Tensor, bits: int, channel_dim: int | None = None):
        super().__init__()
        self.bits = check_bits(bits)
        self.channel_dim = channel_dim
        self.low, self.high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self._pool = kernels.Pool()

        magnitude, spread = _scales(weight.detach(), channel_dim)
        step = magnitude if bits == 1 else 2 * magnitude / self.high**0.5
        self.step = nn.Parameter(step.to(weight.dtype))
        floor = 0.01 * spread / self.high
        smallest = torch.finfo(weight.dtype).tiny
        self.register_buffer("floor", floor.to(weight.dtype).clamp(min=smallest))
        self.gradient_scale = (weight.numel() / step.numel() * self.high) ** -0.5

    @property
    def step_size(self) -> Tensor:
        """The step that the forward pass uses, detached, of shape `()` or `(channels,)`."""
        return torch.maximum(self.step.detach(), self.floor)

    @property
    def bin_width(self) -> Tensor:
        """The step; for one bit, whose levels are `-s` and `s`, twice the step."""
        return self.step_size * (2 if self.bits == 1 else 1)

    def code(self, weight: Tensor) -> Tensor:
        """Return `round(clip(w / s))`, int32; -1 and 1 for one bit."""
        step = self._per_weight(self.step_size, weight)
        return self._round(weight.detach() / step)[0].to(torch.int32)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weights; gradients as the class describes."""
        step = self.step
        if isinstance(step, nn.Parameter) and not kernels.being_transformed():
            step.data.clamp_(min=self.floor)  # wherever the optimizer has put it
            if kernels.plain(weight) and kernels.dense(weight) and self.channel_dim in (None, 0):
                return _KernelLSQ.apply(weight, step, self)
        step = self._per_weight(self.step_size, weight)
        codes, passes, slope = self._round(weight.detach() / step)
        learned = self.gradient_scale * self._per_weight(self.step, weight)
        surrogate = torch.where(passes, weight, 0) + slope * learned
        return _with_gradient_of(surrogate, value=codes * step)

    def _round(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for `v = w / s`, the codes, who passes its gradient on, the step's slope."""
        if self.bits == 1:
            sign = torch.where(v >= 0, 1, torch.where(v < 0, -1, v))  # not-a-number stays
            return sign, torch.ones_like(v, dtype=torch.bool), sign
        codes = v.clamp(self.low, self.high).round()
        inside = (v > self.low) & (v < self.high)
        return codes, inside, torch.where(inside, codes - v, codes)

    def _per_weight(self, step: Tensor, weight: Tensor) -> Tensor:
        """Shape the step so that it broadcasts over the weights."""
        if self.channel_dim is None:
            return step
        shape = [1] * weight.dim()
        shape[self.channel_dim] = -1
        return step.view(shape)

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"bits={self.bits}, channel_dim={self.channel_dim}"


class _KernelLSQ(torch.autograd.Function):
    """LSQ by compiled loops; saves nothing but the weights, from which the codes are recomputed."""

    @staticmethod
    def forward(ctx, weight, step, quantizer):
        """Quantize with a step that is on its floor or above."""
        ctx.save_for_backward(weight, step)
        ctx.quantizer = quantizer
        return kernels.quantize(weight, step, quantizer.bits, quantizer._pool)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on to the weights and to the step."""
        weight, step = ctx.saved_tensors
        bits, scale, pool = ctx.quantizer.bits, ctx.quantizer.gradient_scale, ctx.quantizer._pool
        differentiated = torch.is_grad_enabled() or kernels.being_transformed()
        if kernels.plain(grad) and not differentiated:
            return *kernels.gradients(weight, step, bits, grad, scale, pool), None
        # Higher derivatives and batches of gradients: the same by ordinary operations.
        steps = ctx.quantizer._per_weight(step.detach(), weight)
        _, passes, slope = ctx.quantizer._round(weight.detach() / steps)
        grad_step = scale * (grad * slope).sum_to_size(steps.shape)
        return torch.where(passes, grad, 0), grad_step.view(step.shape), None


class FixedCodebook(Quantizer):
    """Nearest level of a codebook that does not change, with straight-through gradients.

    Weights strictly between the outer levels pass their gradient on, the others get zero; with two
    levels all pass it on. Ties as in `Codebook`. Codes count the levels from 0; the step size is
    the mean spacing.

    Parameters
    ----------
    codebook : Codebook
        The levels, in the weights' units. They travel in `state_dict`.
    """

    def __init__(self, codebook: Codebook):
        super().__init__()
        self.codebook = codebook

    @classmethod
    def attach(
        cls, codebook: Codebook, weight: Tensor, bits: int | None, channel_dim: int | None
    ) -> "FixedCodebook":
        """Build the quantizer of one layer, after a check that the arguments suit the codebook."""
        if bits is not None and bits != int(np.ceil(codebook.bits)):
            raise ValueError(
                f"bits={bits} does not match a codebook of {len(codebook)} levels: "
                f"give bits=None or {int(np.ceil(codebook.bits))}"
            )
        if channel_dim is not None:
            raise ValueError("per_channel=True needs a quantizer with a step; a codebook has none")
        return cls(codebook)

    @property
    def bits(self) -> float:
        """Binary logarithm of the number of levels."""
        return self.codebook.bits

    @property
    def step_size(self) -> Tensor:
        """Mean spacing of the levels, shape `()`."""
        return torch.tensor(self.codebook.spacing.mean())

    def code(self, weight: Tensor) -> Tensor:
        """Return the index of each weight's level, int32."""
        weight = weight.detach().double().contiguous()
        thresholds = torch.tensor(self.codebook.thresholds, device=weight.device)
        upper = torch.bucketize(weight, thresholds, right=True, out_int32=True)
        tied = (upper > 0) & (weight == thresholds[(upper - 1).clamp(min=0)])
        return upper - (tied & (upper % 2 == 1)).to(torch.int32)

    def forward(self, weight: Tensor) -> Tensor:
        """Return each weight's level; gradients as the class describes."""
        levels = torch.tensor(self.codebook.levels, dtype=weight.dtype, device=weight.device)
        passes = (weight > levels[0]) & (weight < levels[-1])
        if len(levels) == 2:
            passes = torch.ones_like(passes)
        value = torch.where(weight.isnan(), weight, levels[self.code(weight)])
        return _with_gradient_of(torch.where(passes, weight, 0), value=value)

    def get_extra_state(self) -> Tensor:
        """Return the levels, for `state_dict`."""
        return torch.tensor(self.codebook.levels)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the levels from `state_dict`."""
        self.codebook = Codebook(state.cpu().numpy())

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"{self.codebook}"


# How to build each quantizer that has a name; see `Quantizer` for the protocol.
registry: dict[str, Callable[[Tensor, int, int | None], Quantizer]] = {"lsq": LSQ}


def quantize_weights(
    model: nn.Module,
    bits: int | Mapping[str, int] | None,
    quantizer: str | Codebook | Callable[[Tensor, int, int | None], Quantizer] = "lsq",
    layers: LayerChoice | None = None,
    per_channel: bool = False,
    *,
    exclude: LayerChoice | None = None,
) -> nn.Module:
    """Quantize the weights of a model's convolutions and linear layers, in place.

    Biases, normalisation and activations stay as they are. Call it before the optimizer is built:
    learned steps are parameters of the model.

    Parameters
    ----------
    model : nn.Module
        Any model. Layers that share one weight share one quantizer.
    bits : int or mapping or None
        From 1 to 16; or a mapping of layer names or patterns (`fnmatch`) to bits, where the last
        entry that matches a layer counts and layers without an entry stay in full precision; or
        None where the quantizer knows by itself, as a `Codebook` does.
    quantizer : str, Codebook or callable
        A name in `registry`; fixed levels; or what builds a `Quantizer` from `(weight, bits,
        channel_dim)`.
    layers, exclude : str, layer type, or several of them, optional
        The only layers to quantize, and layers not to: names, patterns or types. All by default.
    per_channel : bool
        One step per output channel in place of one per layer.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; if a name, pattern or type matches no layer; if a layer is
        parametrized already, or its weights are empty or not finite. The model is then unchanged.
    """
    chosen = _choose(_quantizable(model), layers, exclude)
    widths = _bits_of(chosen, bits)
    build = _builder(quantizer)
    members: dict[int, Quantizer] = {}  # by weight, so that tied layers share one
    for name in widths:
        layer = chosen[name]
        _check_layer(name, layer)
        if id(layer.weight) not in members:
            channel_dim = (1 if isinstance(layer, TRANSPOSED) else 0) if per_channel else None
            member = build(layer.weight, widths[name], channel_dim)
            _check_member(name, layer.weight, member)
            members[id(layer.weight)] = member
    plan = [(chosen[name], members[id(chosen[name].weight)]) for name in widths]
    for layer, member in plan:
        parametrize.register_parametrization(layer, "weight", member)
    return model


def step_sizes(model: nn.Module) -> dict[str, Tensor]:
    """Step of each quantized layer in its weights' units, detached: shape `()` or `(channels,)`."""
    return {name: member.step_size.clone() for name, _, member in _quantized(model)}


def bin_widths(model: nn.Module) -> dict[str, Tensor]:
    """Distance of neighbouring levels in each quantized layer: `d` of Eq. 5, shaped as the step."""
    return {name: member.bin_width.clone() for name, _, member in _quantized(model)}


def bits_per_layer(model: nn.Module) -> dict[str, float]:
    """Bits of each quantized layer: the binary logarithm of its number of levels."""
    return {name: member.bits for name, _, member in _quantized(model)}


@torch.no_grad()
def quantization_noise(model: nn.Module) -> dict[str, Tensor]:
    """Quantization noise of each quantized layer, float weight less quantized weight (Eq. 3)."""
    return {name: _original(layer) - layer.weight for name, layer, _ in _quantized(model)}


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Integer code (int32) of each weight of each quantized layer; for LSQ, weight over step."""
    return {name: member.code(_original(layer)) for name, layer, member in _quantized(model)}


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Put the quantized weights in place of the float ones and drop the quantizers, in place.

    Returns
    -------
    nn.Module
        `model` itself, with plain parameters on the grid; the parameter objects are the same.
    """
    quantized = [(layer, layer.weight) for _, layer, _ in _quantized(model)]
    for layer, weight in quantized:
        # A deep copy shares the class that torch made for the layer, and torch would strip that.
        made = type(layer)
        layer.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight.copy_(weight)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: `weight_decay` for all but what the quantizers learn.

    Examples
    --------
    >>> optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1)  # doctest: +SKIP
    """
    learned = {id(p) for _, _, member in _quantized(model) for p in member.parameters()}
    decayed = [p for p in model.parameters() if id(p) not in learned]
    steps = [p for p in model.parameters() if id(p) in learned]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": steps, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def _scales(weight: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Return the mean magnitude and root mean square of all weights, or of each channel's.

    Where they are zero, PyTorch's default initialisation of such a layer, whose standard
    deviation is `1 / sqrt(3 fan_in)`, stands in.
    """
    weight = weight.double()
    dims = [dim for dim in range(weight.dim()) if dim != channel_dim]
    magnitude = weight.abs().mean(dims)
    spread = weight.square().mean(dims).sqrt()
    default = (3 * weight[0].numel()) ** -0.5
    return magnitude.where(magnitude > 0, default), spread.where(spread > 0, default)


def _original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original.detach()


def _quantized(model: nn.Module) -> list[tuple[str, nn.Module, Quantizer]]:
    """Name, layer and quantizer of each quantized layer, in the model's order."""
    return [
        (name, layer, layer.parametrizations.weight[0])
        for name, layer in _quantizable(model).items()
        if _is_quantized(layer)
    ]


def _is_quantized(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and isinstance(
        layer.parametrizations.weight[0], Quantizer
    )


def _quantizable(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LINEAR + TRANSPOSED)
    }


def _choose(
    available: dict[str, nn.Module], layers: LayerChoice | None, exclude: LayerChoice | None
) -> dict[str, nn.Module]:
    """Return the layers to quantize."""
    if not available:
        raise ValueError("model has no convolution and no linear layer to quantize")
    chosen = set(available) if layers is None else _matching(available, layers, "layers")
    if exclude is not None:
        chosen -= _matching(available, exclude, "exclude")
    return {name: layer for name, layer in available.items() if name in chosen}


def _matching(available: dict[str, nn.Module], choice: LayerChoice, argument: str) -> set[str]:
    """Return the names that `choice` selects, each of its items at least one."""
    items = [choice] if isinstance(choice, str | type) else list(choice)
    selected = set()
    for item in items:
        if isinstance(item, type):
            found = {name for name, layer in available.items() if isinstance(layer, item)}
        elif isinstance(item, str):
            found = {name for name in available if fnmatchcase(name, item)}
        else:
            raise TypeError(f"{argument} holds {item!r}: give names, patterns or layer types")
        if not found:
            raise ValueError(
                f"{argument}={item!r} matches no layer; the layers are: {', '.join(available)}"
            )
        selected |= found
    return selected


def _bits_of(
    chosen: dict[str, nn.Module], bits: int | Mapping[str, int] | None
) -> dict[str, int | None]:
    """Return the bits of each layer that is to be quantized."""
    if not isinstance(bits, Mapping):
        return dict.fromkeys(chosen, None if bits is None else check_bits(bits))
    widths = {}
    for pattern, value in bits.items():
        for name in _matching(chosen, pattern, "bits"):
            widths[name] = check_bits(value)
    return widths


def _builder(quantizer) -> Callable[[Tensor, int | None, int | None], Quantizer]:
    """Return what builds one layer's quantizer."""
    if isinstance(quantizer, str):
        if quantizer not in registry:
            raise ValueError(
                f"quantizer={quantizer!r} is not known; the names are: {', '.join(registry)}"
            )
        return registry[quantizer]
    if isinstance(quantizer, Codebook):
        return partial(FixedCodebook.attach, quantizer)
    if callable(quantizer):
        return quantizer
    raise TypeError(f"quantizer={quantizer!r}: give a name, a Codebook or a callable")


def _check_layer(name: str, layer: nn.Module) -> None:
    """Raise if a layer cannot be quantized."""
    if _is_quantized(layer):
        raise ValueError(f"layer {name!r} is quantized already: bake(model) first, or exclude it")
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"layer {name!r} has another parametrization: remove or exclude it")
    weight = layer.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layer {name!r} is lazy: run the model once before quantizing it")
    if weight.numel() == 0:
        raise ValueError(f"layer {name!r} has no weights: exclude it")
    if not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"layer {name!r} has weights that are not finite real numbers")


@torch.no_grad()
def _check_member(name: str, weight: Tensor, member: Quantizer) -> None:
    """Raise if what a caller's builder made cannot quantize the layer."""
    if not isinstance(member, Quantizer):
        raise TypeError(f"quantizer built {member!r} for layer {name!r}: build a Quantizer")
    value = member(weight)
    if (value.shape, value.dtype) != (weight.shape, weight.dtype):
        raise ValueError(
            f"quantizer turns layer {name!r} of shape {tuple(weight.shape)}, {weight.dtype} into "
            f"{tuple(value.shape)}, {value.dtype}: keep shape and dtype"
        )
