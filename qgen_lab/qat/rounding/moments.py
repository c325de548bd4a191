"""Gram matrices of what goes into the layers of a network, over a set of data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from torch.nn.utils import skip_init

from qgen_lab.data import Dataset
from qgen_lab.qat.batches import Batches, Source, channels_last
from qgen_lab.qat.evaluation import modes_restored
from qgen_lab.qat.quantizers.attach import Slot, all_slots
from qgen_lab.qat.quantizers.choice import LayerChoice, choose

__all__ = ["second_moments"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


@torch.no_grad()
def second_moments(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor] | Batches,
    layers: LayerChoice | None = None,
    *,
    batch_size: int = 256,
    memory: float = 4e9,
) -> dict[str, Tensor]:
    """Gram matrix of each layer's inputs: the sum of `x x'` over all samples.

    In a convolution every position of every image is a sample, and `x` the patch that it sees.

    Parameters
    ----------
    model : torch.nn.Module
        Gone through in evaluation mode; it stays as it is.
    data : Dataset, (inputs, targets) tensors, or iterable of such batches
        What goes into the model.
    layers : str, layer type, or several of them, optional
        As in `quantize_weights`; all by default.
    batch_size : int
        Samples per forward pass, for data held in memory. A batch's patches are held at once.
    memory : float
        Bytes that the matrices may take, 8 for each entry.

    Returns
    -------
    dict of str to Tensor
        By layer, in the order in which the model calls them: shape (inputs, inputs), where `inputs`
        are the weights of one output, or (groups, inputs, inputs) for a convolution in groups;
        float64, on the model's device.

    Raises
    ------
    ValueError
        If a pattern matches no layer; if the data are empty, never reach a layer, or give it values
        that are not finite; if the matrices need more than `memory`.
    TypeError
        If a layer is not linear, attention, or a convolution in one or two dimensions; if `data`
        is of a wrong kind.
    """
    slots = all_slots(model)
    chosen = choose({name: slot.layer for name, slot in slots.items()}, layers, None)
    slots = {name: slots[name] for name in chosen}
    shapes = {name: _shape(name, slot) for name, slot in slots.items()}
    needed = sum(8 * shape.numel() for shape in shapes.values())
    if needed > memory:
        raise ValueError(
            f"the matrices of {len(slots)} layers need {needed / 1e9:.2f} GB, more than "
            f"memory={memory:g} bytes: name fewer layers, or allow more"
        )
    source = Source(data, model)
    moments: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, inputs: Tensor) -> None:
        columns = _columns(layer, inputs)
        product = columns @ columns.mT
        if not product.isfinite().all():
            raise ValueError(f"layer {name!r} gets inputs that are not finite")
        moments[name] = moments[name].add_(product) if name in moments else product

    with modes_restored(model), channels_last(model), _hooked(model, slots, add):
        model.eval()
        for inputs, _ in source.batches(batch_size):
            if len(inputs):
                model(inputs)
    _check_reached(slots, moments)
    return {name: moment.reshape(shapes[name]) for name, moment in moments.items()}


@torch.no_grad()
def call_order(model: nn.Module, source: Source, slots: dict[str, Slot]) -> list[str]:
    """Names of the layers in the order in which the first batch reaches them."""
    order: list[str] = []
    with modes_restored(model), _hooked(model, slots, lambda name, *_: order.append(name)):
        model.eval()
        for inputs, _ in islice(source.batches(2), 1):
            if len(inputs):
                model(inputs)
    _check_reached(slots, order)
    return list(dict.fromkeys(order))


def _check_reached(slots: dict[str, Slot], reached: Iterable[str]) -> None:
    missed = sorted(slots.keys() - set(reached), key=list(slots).index)
    if missed:
        raise ValueError(
            f"no data reach the layers {', '.join(missed)}: give data, or name other layers"
        )


def _shape(name: str, slot: Slot) -> torch.Size:
    layer = slot.layer
    if not isinstance(layer, _KINDS):
        raise TypeError(
            f"layer {name!r} is a {type(layer).__name__}: leave it out; the kinds are "
            f"{', '.join(kind.__name__ for kind in _KINDS)}"
        )
    inputs, groups = slot.weight[0].numel(), getattr(layer, "groups", 1)
    return torch.Size((groups, inputs, inputs) if groups > 1 else (inputs, inputs))


@contextmanager
def _hooked(
    model: nn.Module, slots: dict[str, Slot], act: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call `act` with the name, the layer and its input whenever one of the layers is used."""
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    for attention in attentions:
        attention.forward = partial(_attend, attention)
    handles = [
        slot.layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: act(name, layer, inputs[0])
        )
        for name, slot in slots.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del attention.forward


def _attend(attention: nn.MultiheadAttention, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """Forward pass that uses the output projection as a layer; torch uses its weight alone."""
    projection = attention.out_proj
    weight = projection.weight
    identity = skip_init(nn.Linear, *weight.shape, device=weight.device, dtype=weight.dtype)
    identity.weight.copy_(torch.eye(len(weight)))
    identity.bias.zero_()
    attention.out_proj = identity
    try:
        heads, attended = type(attention).forward(attention, *args, **kwargs)
    finally:
        attention.out_proj = projection
    return projection(heads), attended


def _columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The samples of one batch, float64, shape (groups, inputs, samples)."""
    inputs = inputs.double()
    if isinstance(layer, nn.Linear | nn.MultiheadAttention):
        return inputs.reshape(1, -1, inputs.shape[-1]).mT
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    inputs = pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        inputs, kernel = inputs.unsqueeze(2), (1, *kernel)
        stride, dilation = (1, *stride), (1, *dilation)
    patches = unfold(inputs, kernel, dilation=dilation, stride=stride)  # (N, inputs, positions)
    return patches.transpose(0, 1).reshape(layer.groups, -1, patches.shape[0] * patches.shape[2])
