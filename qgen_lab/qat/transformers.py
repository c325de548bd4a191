"""Transformers in few bits: the parts of variation-aware quantization (VVTQ), each usable alone.

- `by_head` gives each attention head steps of its own, where a layer would have one; it goes to
  `quantize_weights`.
- `BinRegularization` draws weights to the middle of their bins, so that fewer of them jump to and
  fro between two levels; it is an objective for `fit`.
- `distillation` lets the network learn the answers of a full-precision teacher; it is one too.

References
----------
Huang, Shen, Dong and Cheng, "Quantization variation: a new perspective on training transformers
with low-bit precision", TMLR 2024, arXiv 2307.00331.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qgen_lab.qat.quantizers import LSQ, quantized_slots
from qgen_lab.qat.steps import Objective

__all__ = [
    "AttentionLayer",
    "BinRegularization",
    "attention_layers",
    "bin_regularizer",
    "by_head",
    "cross_entropy_of_targets",
    "distillation",
]


@dataclass(frozen=True)
class AttentionLayer:
    """Where one attention layer keeps its weights; layers by the names that `step_sizes` uses.

    Attributes
    ----------
    name : str
        The attention layer itself.
    heads : int
        Number of heads.
    projections : str
        The fused weight to queries, keys and values: three blocks of rows, one after another, in
        each of them as many rows for every head.
    output : str
        The weight that takes what the heads give: as many columns for every head.
    """

    name: str
    heads: int
    projections: str
    output: str


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Attention layers whose queries, keys and values come from one fused weight.

    These are `torch.nn.MultiheadAttention`, as in torchvision's vision transformer, and modules
    with `num_heads` and linear layers `qkv` and `proj`, as timm's attention and the window
    attention of both libraries.

    Returns
    -------
    list of AttentionLayer
        In the model's order; empty if there is none.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            fused = module._qkv_same_embed_dim  # otherwise three weights
            projections, output = "in_proj", "out_proj"
        else:
            fused, projections, output = _has_fused_projections(module), "qkv", "proj"
        if fused:
            prefix = f"{name}." if name else ""
            layer = AttentionLayer(name, module.num_heads, prefix + projections, prefix + output)
            found.append(layer)
    return found


def _has_fused_projections(module: nn.Module) -> bool:
    linear = all(isinstance(getattr(module, part, None), nn.Linear) for part in ("qkv", "proj"))
    return (
        linear
        and isinstance(getattr(module, "num_heads", None), int)
        and module.qkv.out_features == 3 * module.proj.in_features
    )


def by_head(model: nn.Module) -> Callable[[Tensor, int, int | None], LSQ]:
    """Return a builder for `quantize_weights`: LSQ with a step for each attention head.

    In attention layers each head has four steps: for the rows that make its queries, its keys and
    its values, and for the columns of the output projection that take its result. All other layers
    have LSQ as usual.

    Parameters
    ----------
    model : torch.nn.Module
        The model that is about to be quantized: the builder knows its attention layers by their
        weights. See `attention_layers` for those that it finds.

    Returns
    -------
    callable
        Builds a `Quantizer` from ``(weight, bits, channel_dim)``.

    Raises
    ------
    ValueError
        If the model has no attention layer.

    Notes
    -----
    The idea is VVTQ's module-dependent quantization. Its released code differs: there the heads of
    a projection share one learned step, and the blocks lie along the other dimension of the weight.
    The factor on a step's gradient is LSQ's, ``1 / sqrt(n high)`` with the ``n`` weights that share
    the step, where VVTQ puts the sum of their magnitudes for ``n``.

    Examples
    --------
    >>> from qgen_lab.qat import build_model, quantize_weights, step_sizes
    >>> from qgen_lab.qat.transformers import attention_layers, by_head
    >>> model = build_model("vit", image_size=8, patch_size=2, num_layers=1, num_heads=4,
    ...     hidden_dim=16, mlp_dim=32, in_channels=1)
    >>> model = quantize_weights(model, 4, by_head(model))
    >>> [layer] = attention_layers(model)
    >>> step_sizes(model)[layer.projections].shape
    torch.Size([12])
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            "model has no attention layer with fused projections: quantizer='lsq' gives each "
            "layer one step"
        )
    known = []  # weight, dimension of the heads, number of blocks
    for layer in layers:
        attention = model.get_submodule(layer.name)
        is_torch = isinstance(attention, nn.MultiheadAttention)
        projections = attention.in_proj_weight if is_torch else attention.qkv.weight
        output = model.get_submodule(layer.output).weight
        known += [(projections, 0, 3 * layer.heads), (output, 1, layer.heads)]

    def build(weight: Tensor, bits: int, channel_dim: int | None) -> LSQ:
        for member, dim, blocks in known:
            if weight is member:
                return LSQ(weight, bits, dim, groups=blocks)
        return LSQ(weight, bits, channel_dim)

    return build


def bin_regularizer(model: nn.Module) -> Tensor:
    """Distance of the weights from their levels, and their spread within each bin.

    In one layer let ``q`` be a weight's level and ``c`` the float weight, clipped to the outermost
    levels. The layer's term is the mean of ``(c - q)**2``, plus the unbiased variance of ``c`` in a
    bin summed over the bins with two weights or more. Where parts of a layer have steps of their
    own, each part has bins of its own, and the sums over bins are averaged over the parts.

    Levels are held constant: the gradient goes to the float weights alone, to clipped ones none.

    Parameters
    ----------
    model : torch.nn.Module
        With LSQ quantizers; layers with others are passed over.

    Returns
    -------
    Tensor of shape ()
        Sum over the layers, in squared units of the weights.

    Raises
    ------
    ValueError
        If no layer has an LSQ quantizer.

    Notes
    -----
    The oscillation-aware bin regularization of VVTQ. Its released code finds bins by comparing
    ``q / s`` with the code in floating point, which skips whole bins for some steps ``s``; here
    they are found by integer codes.
    """
    terms = [
        _layer_term(slot.layer.parametrizations[slot.parameter].original, slot.quantizer)
        for slot in quantized_slots(model).values()
        if isinstance(slot.quantizer, LSQ)
    ]
    if not terms:
        raise ValueError("model has no layer with LSQ: quantize_weights(model, bits) first")
    return torch.stack(terms).sum()


def _layer_term(weight: Tensor, member: LSQ) -> Tensor:
    rows = member.sharing.rows  # the weights of each step in a row
    weight, code = rows(weight), rows(member.code(weight))
    step, codes = member.step_size.view(-1, 1), member.high - member.low + 1
    clipped = weight.clamp(member.low * step, member.high * step)
    part = torch.arange(len(weight), device=weight.device).view(-1, 1)
    bins = (codes * part + code - member.low).flatten()
    spread = _variances(clipped.flatten(), bins, codes * len(weight)).sum() / len(weight)
    return (clipped - code * step).square().mean() + spread


def _variances(values: Tensor, bins: Tensor, count: int) -> Tensor:
    """Unbiased variance of the values in each of `count` bins, zero where fewer than two are."""
    sizes = torch.bincount(bins, minlength=count)
    with torch.no_grad():  # deviations sum to zero, so the mean's own gradient does too
        means = values.new_zeros(count).index_add(0, bins, values) / sizes.clamp(min=1)
    squares = values.new_zeros(count).index_add(0, bins, (values - means[bins]).square())
    return squares / (sizes - 1).clamp(min=1)


def distillation(teacher: nn.Module) -> Objective:
    """Objective for `fit`: cross-entropy between a teacher's answers and the network's.

    The targets of the data are not used, as in VVTQ. The teacher answers live, so it sees each
    batch as the network does, augmented; VVTQ reads answers stored before the training.

    Parameters
    ----------
    teacher : torch.nn.Module
        Gives logits for the same classes. It is put in evaluation mode and otherwise not changed.

    Returns
    -------
    callable
        ``objective(model, inputs, outputs, targets)`` gives a scalar, and a ValueError if the
        teacher's classes are not the network's.
    """
    teacher.eval()

    def objective(model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            logits = teacher(inputs)
        if logits.shape != outputs.shape:
            raise ValueError(
                f"teacher gives logits of shape {tuple(logits.shape)} where the network gives "
                f"{tuple(outputs.shape)}: it needs the same classes"
            )
        return cross_entropy(outputs, logits.softmax(1))

    return objective


def cross_entropy_of_targets(
    model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Objective for `fit`: cross-entropy between the outputs and the targets of the data."""
    return cross_entropy(outputs, targets)


class BinRegularization:
    """Objective for `fit`: another objective, and `bin_regularizer` with a strength that rises.

    The strength is zero at first and then rises along half a cosine.

    Parameters
    ----------
    steps : int
        Calls in the whole training: one a step, two with a `sharpness_radius`.
    objective : callable
        What is minimised otherwise, such as `distillation(teacher)`.
    strength : float
        Strength at the last call.
    start : float
        Share of the calls during which it is zero, in [0, 1).

    Attributes
    ----------
    step : int
        Calls so far; travels in `state_dict`, and so in the checkpoints of `fit`.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Strength 0.01 and start 0.25 are VVTQ's. The regularizer has the unit of a squared weight, and
    its first term is a mean, so the effect of a strength depends on the scale of the weights and on
    how many there are.

    Examples
    --------
    >>> objective = BinRegularization(steps=460, objective=distillation(teacher))  # doctest: +SKIP
    """

    def __init__(
        self,
        steps: int,
        objective: Objective = cross_entropy_of_targets,
        strength: float = 0.01,
        start: float = 0.25,
    ):
        if steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps!r}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be zero or positive, got {strength!r}")
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), got {start!r}")
        self.steps, self.objective, self.strength, self.start = steps, objective, strength, start
        self.step = 0

    @property
    def current_strength(self) -> float:
        """Strength at the next call."""
        done = min(self.step / max(self.steps - 1, 1), 1.0)
        risen = max(done - self.start, 0.0) / (1 - self.start)
        return self.strength * (1 - math.cos(math.pi * risen)) / 2

    def __call__(
        self, model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Return what to minimise at this step, shape `()`."""
        value = self.objective(model, inputs, outputs, targets)
        if self.current_strength > 0:
            value = value + self.current_strength * bin_regularizer(model)
        self.step += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the calls so far, and what the other objective remembers."""
        state = {"step": self.step}
        if hasattr(self.objective, "state_dict"):
            state["objective"] = self.objective.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        if hasattr(self.objective, "load_state_dict"):
            self.objective.load_state_dict(state["objective"])
