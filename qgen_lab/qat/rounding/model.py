"""Rounding a finished network, layer after layer."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qgen_lab.codebooks import Codebook
from qgen_lab.data import Dataset
from qgen_lab.qat.batch_norm import fold_batch_norm, reestimate_batch_norm
from qgen_lab.qat.batches import BATCH_NORM, Batches, Source
from qgen_lab.qat.quantizers import Quantizer
from qgen_lab.qat.quantizers.attach import Slot, planned
from qgen_lab.qat.quantizers.choice import LayerChoice
from qgen_lab.qat.rounding.layer import RoundedLayer, methods, round_layer
from qgen_lab.qat.rounding.moments import call_order, second_moments
from qgen_lab.qat.rounding.steps import criteria, row_levels

__all__ = ["LayerRounding", "RoundingReport", "round_model"]

_BATCH_NORM_CHOICES = ("re-estimated", "folded", "kept")


@dataclass(frozen=True)
class LayerRounding:
    """What became of one layer.

    Attributes
    ----------
    shape : tuple of int
        Of its weights.
    bits : float
        Binary logarithm of the number of levels.
    step_size : float
        The grid's step; the mean over channels where each has its own.
    method : str
        How its weights were found.
    output_error, nearest_error : float
        Squared error of its outputs, relative to the squared outputs of the float weights, on the
        inputs that it was rounded for; and what rounding to the nearest level of the same grid
        would have made.
    seconds : float
        Wall time of its rounding, the choice of the step and the pass over the data not included.
    """

    shape: tuple[int, ...]
    bits: float
    step_size: float
    method: str
    output_error: float
    nearest_error: float
    seconds: float


@dataclass(frozen=True, repr=False)
class RoundingReport:
    """What `round_model` did.

    Attributes
    ----------
    layers : dict of str to LayerRounding
        By name, in the order in which they were rounded.
    """

    layers: dict[str, LayerRounding]

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer."""
        rows = [{"layer": name} | vars(layer) for name, layer in self.layers.items()]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        errors = [layer.output_error for layer in self.layers.values()]
        seconds = sum(layer.seconds for layer in self.layers.values())
        median, worst = pd.Series(errors).median(), max(errors)
        return (
            f"RoundingReport({len(errors)} layers, median output_error={median:.3g}, "
            f"largest={worst:.3g}, seconds={seconds:.2g})"
        )


def round_model(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor] | Batches,
    bits: int | Mapping[str, int] | None,
    method: str = "cooled",
    per_channel: bool = False,
    sequential: bool = True,
    *,
    quantizer: str | Codebook | Callable[[Tensor, int, int | None], Quantizer] = "uniform",
    step: str = "outputs",
    batch_norm: str = "re-estimated",
    layers: LayerChoice | None = None,
    exclude: LayerChoice | None = None,
    polish: bool = False,
    batch_size: int = 256,
    progress: bool | None = None,
    **options,
) -> RoundingReport:
    """Round a trained network's weights to few bits without training it, in place.

    Each layer's weights are rounded by `round_layer`, for the inputs that the data give it. The
    model then stands as after `quantize_weights`, its float weights on the levels: `codes`,
    `step_sizes`, `bake` and further training all work.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model without quantizers. If anything fails, it is as it was (batch norms that
        were folded stay so).
    data : Dataset, (inputs, targets) tensors, or iterable of such batches
        Some hundred samples or more of what the model was trained on; targets are not used.
    bits, quantizer, layers, exclude
        As in `quantize_weights`. The default quantizer has even levels without zero.
    method : str
        A name in `methods`.
    per_channel : bool
        One step per output channel in place of one per layer.
    sequential : bool
        Whether each layer is rounded for the inputs that come from the layers rounded before it,
        one pass over the data for each layer; else all for the float model's, in one pass.
    step : str
        How the step of each grid is chosen: "outputs", of least output error; "weights", of least
        weight error; "recommended", by `qgen_lab.theory.recommend_width`. A quantizer without a
        step that is free keeps its levels.
    batch_norm : str
        "re-estimated" on the data, after each layer if `sequential`; "folded" into the layers
        before they are rounded; "kept" as they are.
    polish : bool
        Whether coordinate descent follows in each layer.
    batch_size : int
        Samples per forward pass, for data held in memory.
    progress : bool, optional
        Show a progress bar over the layers. By default only on a terminal.
    **options
        Of the method.

    Returns
    -------
    RoundingReport

    Raises
    ------
    ValueError, TypeError
        As `quantize_weights`, `second_moments` and `round_layer`; if `step` or `batch_norm` is not
        known; if a quantizer does not round, or its levels move with the weights; if batch norms
        cannot be folded.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import nin
    >>> model = nin(2, 8, in_channels=1, base_width=1, seed=0)
    >>> report = round_model(model, load_dataset("digits").train, 4)
    >>> report.to_frame().shape[0]
    7
    """
    for name, value, known in (
        ("method", method, methods),
        ("step", step, criteria),
        ("batch_norm", batch_norm, _BATCH_NORM_CHOICES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; the names are: {', '.join(known)}")
    plan = planned(model, bits, quantizer, layers, per_channel, exclude)
    if batch_norm == "folded":
        fold_batch_norm(model)
        plan = planned(model, bits, quantizer, layers, per_channel, exclude)
    for name, (_, member) in plan.items():
        if not member.rounds:
            raise ValueError(f"quantizer of layer {name!r} leaves weights as they are: {member}")
    has_norms = any(isinstance(module, BATCH_NORM) for module in model.modules())
    reestimate = has_norms and batch_norm == "re-estimated"
    rounding = partial(round_layer, method=method, polish=polish, **options)
    source, before = Source(data, model), copy.deepcopy(model.state_dict())
    found = {}
    try:
        for names, gram in _grams(model, source, plan, sequential, batch_size, progress):
            slot, member = plan[names[0]]
            if member.step_is_free:
                criteria[step](member, slot.weight.detach(), gram, method)
            found |= dict.fromkeys(names, _round(slot, member, gram, rounding))
            if reestimate and sequential:
                reestimate_batch_norm(model, source.data, batch_size)
        if reestimate and not sequential:
            reestimate_batch_norm(model, source.data, batch_size)
    except BaseException:
        model.load_state_dict(before)
        raise
    for slot, member in plan.values():
        slot.attach(member)
    return RoundingReport(found)


def _grams(
    model: nn.Module,
    source: Source,
    plan: dict[str, tuple[Slot, Quantizer]],
    sequential: bool,
    batch_size: int,
    progress: bool | None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Layers that share a weight, and the Gram matrix of all that goes into them, in call order."""
    slots = {name: slot for name, (slot, _) in plan.items()}
    shared: dict[int, list[str]] = {}
    for name in call_order(model, source, slots):
        shared.setdefault(id(slots[name].weight), []).append(name)
    gather = partial(second_moments, model, source.data, batch_size=batch_size)
    known = {} if sequential else gather(list(slots))
    bar = tqdm(shared.values(), disable=None if progress is None else not progress, unit="layer")
    for names in bar:
        here = known or gather(names)
        yield names, sum(here[name] for name in names)


@torch.no_grad()
def _round(
    slot: Slot, quantizer: Quantizer, gram: Tensor, rounding: Callable[..., RoundedLayer]
) -> LayerRounding:
    """Round one weight in its place."""
    weight = slot.weight
    rounded = rounding(weight, gram, row_levels(quantizer, weight))
    weight.copy_(rounded.weight)
    if not torch.equal(quantizer.eval()(weight), rounded.weight):
        raise ValueError(f"the levels of {quantizer} move with the weights: give levels that stay")
    quantizer.train(slot.layer.training)
    return LayerRounding(
        tuple(weight.shape),
        quantizer.bits,
        quantizer.step_size.double().mean().item(),
        rounded.method,
        rounded.output_error,
        rounded.nearest_error,
        rounded.seconds,
    )
