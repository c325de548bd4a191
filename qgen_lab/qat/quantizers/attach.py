"""Quantizers onto the weights of a model, what they say about it, and off again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qgen_lab.codebooks import Codebook
from qgen_lab.qat import batch_norm
from qgen_lab.qat.quantizers.base import Quantizer
from qgen_lab.qat.quantizers.choice import LayerChoice, bits_of, choose
from qgen_lab.qat.quantizers.codebooks import FixedCodebook, LloydMax, PowerOfTwo, Uniform
from qgen_lab.qat.quantizers.lsq import LSQ
from qgen_lab.qat.quantizers.noise import NoiseInjection

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# How to build each quantizer that has a name; see `Quantizer` for the protocol.
registry: dict[str, Callable[[Tensor, int, int | None], Quantizer]] = {
    "lsq": LSQ,
    "uniform": Uniform,
    "power-of-two": PowerOfTwo,
    "lloyd-max": LloydMax,
    "noise": NoiseInjection,
}


def quantize_weights(
    model: nn.Module,
    bits: int | Mapping[str, int] | None,
    quantizer: str | Codebook | Callable[[Tensor, int, int | None], Quantizer] = "lsq",
    layers: LayerChoice | None = None,
    per_channel: bool = False,
    *,
    exclude: LayerChoice | None = None,
) -> nn.Module:
    """Quantize the weights of a model's convolutions, linear and attention layers, in place.

    Biases, normalisation and activations stay as they are. Call it before the optimizer is built:
    learned steps are parameters of the model. The joint input projection of a
    `torch.nn.MultiheadAttention` called `attn` counts as a layer called `attn.in_proj`.

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
    for slot, member in planned(model, bits, quantizer, layers, per_channel, exclude).values():
        slot.attach(member)
    return model


def planned(
    model: nn.Module,
    bits: int | Mapping[str, int] | None,
    quantizer: str | Codebook | Callable[[Tensor, int, int | None], Quantizer],
    layers: LayerChoice | None,
    per_channel: bool,
    exclude: LayerChoice | None,
) -> dict[str, tuple["Slot", Quantizer]]:
    """Build the quantizers of `quantize_weights`, by layer, and attach none."""
    slots = all_slots(model)
    if not slots:
        raise ValueError("model has no convolution, linear or attention layer to quantize")
    widths = bits_of(choose({n: s.layer for n, s in slots.items()}, layers, exclude), bits)
    build = _builder(quantizer)
    members: dict[int, Quantizer] = {}  # by weight, so that tied layers share one
    for name in widths:
        slot = slots[name]
        _check_slot(name, slot)
        if id(slot.weight) not in members:
            channel_dim = slot.channel_dim if per_channel else None
            member = build(slot.weight, widths[name], channel_dim)
            _check_member(name, slot.weight, member)
            members[id(slot.weight)] = member
    return {name: (slots[name], members[id(slots[name].weight)]) for name in widths}


def step_sizes(model: nn.Module) -> dict[str, Tensor]:
    """Step of each quantized layer in its weights' units, detached: shape `()` or `(channels,)`."""
    return {name: slot.quantizer.step_size.clone() for name, slot in quantized_slots(model).items()}


def bin_widths(model: nn.Module) -> dict[str, Tensor]:
    """Distance of neighbouring levels in each quantized layer: `d` of Eq. 5, shaped as the step."""
    return {name: slot.quantizer.bin_width.clone() for name, slot in quantized_slots(model).items()}


def bits_per_layer(model: nn.Module) -> dict[str, float]:
    """Bits of each quantized layer: the binary logarithm of its number of levels."""
    return {name: slot.quantizer.bits for name, slot in quantized_slots(model).items()}


@torch.no_grad()
def quantization_noise(model: nn.Module) -> dict[str, Tensor]:
    """Quantization noise of each quantized layer, float weight less quantized weight (Eq. 3)."""
    return {name: slot.original - slot.weight for name, slot in quantized_slots(model).items()}


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Integer code (int32) of each weight of each quantized layer; for LSQ, weight over step."""
    slots = quantized_slots(model)
    return {name: slot.quantizer.code(slot.original) for name, slot in slots.items()}


@torch.no_grad()
def bake(model: nn.Module, fold_batch_norm: bool = False) -> nn.Module:
    """Put the quantized weights in place of the float ones and drop the quantizers, in place.

    Parameters
    ----------
    model : nn.Module
        A model with quantizers.
    fold_batch_norm : bool
        Whether to fold batch norms into the layers before them afterwards, as `fold_batch_norm`
        does; each channel's weights are then multiples of a step of its own.

    Returns
    -------
    nn.Module
        `model` itself, with plain parameters on the grid; the parameter objects are the same.

    Raises
    ------
    CannotFold
        If batch norms are to be folded and cannot be; the model is baked all the same.
    """
    slots = quantized_slots(model).values()
    quantized = [(slot, slot.quantizer.eval()(slot.original)) for slot in slots]
    for slot, weight in quantized:
        # A deep copy shares the class that torch made for the layer, and torch would strip that.
        layer, made = slot.layer, type(slot.layer)
        layer.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        parametrize.remove_parametrizations(layer, slot.parameter, leave_parametrized=False)
        slot.weight.copy_(weight + 0.0)  # which turns negative zeros into zeros, as integers are
    return batch_norm.fold_batch_norm(model) if fold_batch_norm else model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: `weight_decay` for all but what the quantizers learn.

    Examples
    --------
    >>> optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1)  # doctest: +SKIP
    """
    members = (module for module in model.modules() if isinstance(module, Quantizer))
    learned = {id(p) for member in members for p in member.parameters()}
    decayed = [p for p in model.parameters() if id(p) not in learned]
    steps = [p for p in model.parameters() if id(p) in learned]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": steps, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Slot:
    """Place of a weight in a model: a parameter of a layer, quantized or not.

    Attributes
    ----------
    layer : nn.Module
        The layer.
    parameter : str
        Name of its weight.
    """

    layer: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        """The weight as the layer uses it."""
        return getattr(self.layer, self.parameter)

    @property
    def channel_dim(self) -> int:
        """Dimension of the weight's output channels."""
        return 1 if isinstance(self.layer, TRANSPOSED) else 0

    @property
    def parametrized(self) -> bool:
        """Whether something computes the weight, a quantizer or other."""
        return parametrize.is_parametrized(self.layer, self.parameter)

    @property
    def quantizer(self) -> Quantizer | None:
        """The weight's quantizer, if it has one."""
        first = self.layer.parametrizations[self.parameter][0] if self.parametrized else None
        return first if isinstance(first, Quantizer) else None

    def attach(self, quantizer: Quantizer) -> None:
        """Let a quantizer compute the weight from here on."""
        parametrize.register_parametrization(self.layer, self.parameter, quantizer)

    @property
    def original(self) -> Tensor:
        """Float weight behind the quantized one, detached."""
        return self.layer.parametrizations[self.parameter].original.detach()


def quantized_slots(model: nn.Module) -> dict[str, Slot]:
    """Where each quantized weight stands, by layer, in the model's order; quantizers up to date."""
    slots = {name: slot for name, slot in all_slots(model).items() if slot.quantizer is not None}
    for slot in slots.values():
        slot.quantizer.follow(slot.original)
    return slots


def all_slots(model: nn.Module) -> dict[str, Slot]:
    """Every weight that can be quantized, by the name of its layer."""
    slots = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LINEAR + TRANSPOSED):
            slots[name] = Slot(layer, "weight")
        elif isinstance(layer, nn.MultiheadAttention):
            for part in ("in",) if layer._qkv_same_embed_dim else ("q", "k", "v"):
                slots[f"{name}.{part}_proj".lstrip(".")] = Slot(layer, f"{part}_proj_weight")
    return slots


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


def _check_slot(name: str, slot: Slot) -> None:
    """Raise if a layer cannot be quantized."""
    if slot.quantizer is not None:
        raise ValueError(f"layer {name!r} is quantized already: bake(model) first, or exclude it")
    if slot.parametrized:
        raise ValueError(f"layer {name!r} has another parametrization: remove or exclude it")
    weight = slot.weight
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
