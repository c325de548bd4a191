"""Average of the codes over the end of training: what a last iterate swings about.

At a learning rate that does not go to zero, a weight at the border of two levels keeps jumping
between them, so the last iterate is a stochastic rounding of the time average. Rounding that
average to the nearest level makes half the error.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qgen_lab.qat import kernels
from qgen_lab.qat.quantizers import LSQ, Slot, quantized_slots
from qgen_lab.qat.quantizers.base import Sharing

__all__ = ["CodeAverage"]


class CodeAverage:
    """Running mean of every quantized weight, in units of its step, over the updates so far.

    For a uniform grid this is the mean of the codes. Weights that are not quantized, biases and
    batch norm stay as training leaves them.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantized layers, whatever their quantizers and bits, on the device where it is
        trained. A model without any is left alone: its full-precision twin goes through the same
        procedure.

    Attributes
    ----------
    updates : int
        Number of weights in the mean: one for each call of `update`.

    Examples
    --------
    >>> average = CodeAverage(model)  # doctest: +SKIP
    >>> for inputs, targets in last_part_of_training:  # doctest: +SKIP
    ...     step(model, inputs, targets)
    ...     average.update()
    >>> average.round()  # doctest: +SKIP
    >>> reestimate_batch_norm(model, data.train)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self.updates = 0
        self._layers = {name: _Layer(slot) for name, slot in _slots(model)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the quantized weights as they are now into the mean; call it after each step."""
        for layer in self._layers.values():
            layer.update(first=self.updates == 0)
        self.updates += 1

    @torch.no_grad()
    def round(self) -> None:
        """Put the rounded average into the model: the level next to each weight's mean.

        The float weights become the means, in units of the step as it is now, and the quantizers
        do the rounding. Batch-norm statistics are those of other weights then: call
        `reestimate_batch_norm`.

        Raises
        ------
        RuntimeError
            If there was no update.

        Notes
        -----
        A quantizer whose grid follows the spread of the float weights lays it anew about the means.
        """
        if self.updates == 0:
            raise RuntimeError("nothing is averaged yet: call update() after a training step")
        for layer in self._layers.values():
            layer.put(self.updates)

    @property
    def share_moving(self) -> float:
        """Share of the quantized weights whose code differed between two updates in a row.

        A weight counts once, however often it moved; one that left its code and came back counts
        too. Before the second update, and for a model without quantized layers, it is zero.
        """
        weights = sum(layer.moved.numel() for layer in self._layers.values())
        moved = sum(int(layer.moved.sum()) for layer in self._layers.values())
        return moved / max(weights, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on averaging: numbers and tensors, by layer."""
        layers = {name: layer.state() for name, layer in self._layers.items()}
        return {"updates": self.updates, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises
        ------
        ValueError
            If the state belongs to another model; this average is then unchanged.
        """
        shapes = {name: tuple(layer["sums"].shape) for name, layer in state["layers"].items()}
        own = {name: tuple(layer.sums.shape) for name, layer in self._layers.items()}
        if shapes != own:
            raise ValueError(f"state has the quantized layers {shapes}, the model has {own}")
        self.updates = int(state["updates"])
        for name, layer in self._layers.items():
            layer.load(state["layers"][name])

    def __repr__(self) -> str:
        return f"CodeAverage(updates={self.updates}, share_moving={self.share_moving:.4f})"


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Each quantized weight by the name of its layer; of layers that share one, the first."""
    seen = set()
    for name, slot in quantized_slots(model).items():
        if id(slot.quantizer) not in seen:
            seen.add(id(slot.quantizer))
            yield name, slot


class _Layer:
    """Sums, last codes and movement of one layer's weights, laid out in memory as the weights."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        # Sums of integers stay exact in float64.
        self.sums = torch.zeros_like(slot.original, dtype=torch.float64)
        self.codes = torch.zeros_like(slot.original, dtype=torch.int32)
        self.moved = torch.zeros_like(slot.original, dtype=torch.bool)

    def update(self, first: bool) -> None:
        """Add the quantized weights in units of the step; mark the codes that changed."""
        weight, quantizer = self.slot.original, self.slot.quantizer
        if weight.stride() != self.sums.stride():  # training may have changed the memory format
            self.load(self.state())
        if first:
            self.codes.copy_(quantizer.code(weight))
        if type(quantizer) is LSQ and _loops_apply(weight, quantizer):
            loop = _add_signs if quantizer.bits == 1 else _add_codes
            arrays = (weight, quantizer.step_size, self.sums, self.codes, self.moved)
            loop(quantizer.low, quantizer.high, *(kernels.flat(array) for array in arrays))
            return
        training = quantizer.training
        quantizer.eval()  # what is deployed: no noise
        self.sums += quantizer(weight) / self.steps()
        code = quantizer.code(weight)
        quantizer.train(training)
        self.moved |= code != self.codes
        self.codes.copy_(code)

    def put(self, updates: int) -> None:
        """Make the mean the float weight."""
        self.slot.original.copy_(self.sums / updates * self.steps())

    def steps(self) -> Tensor:
        """The step, shaped so that it broadcasts over the weights."""
        weight, quantizer = self.slot.original, self.slot.quantizer
        step = quantizer.step_size.to(weight.device)
        if step.dim() == 0:
            return step
        sharing = getattr(quantizer, "sharing", None)
        sharing = sharing or Sharing(weight, self.slot.channel_dim, step.numel())
        return sharing.spread(step, weight)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone(), "codes": self.codes.clone(), "moved": self.moved.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            like = torch.empty_like(self.slot.original, dtype=value.dtype)
            setattr(self, name, like.copy_(value))


def _loops_apply(weight: Tensor, quantizer: LSQ) -> bool:
    """Whether the loops below can be used: each step belongs to one run of the memory."""
    return kernels.plain(weight) and kernels.dense(weight) and quantizer.sharing.in_runs(weight)


@kernels.compiled
def _add_codes(low, high, weight, step, sums, codes, moved):
    low, high = np.float32(low), np.float32(high)
    run = weight.size // step.size
    for c in range(step.size):
        here = slice(c * run, (c + 1) * run)
        w, s, total, last, changed = weight[here], step[c], sums[here], codes[here], moved[here]
        for i in range(w.size):
            v = w[i] / s
            code = np.rint(low if v < low else (high if v > high else v))
            total[i] += code
            changed[i] |= np.int32(code) != last[i]
            last[i] = np.int32(code)


@kernels.compiled
def _add_signs(low, high, weight, step, sums, codes, moved):
    for i in range(weight.size):
        sign = np.int32(1) if weight[i] >= 0 else np.int32(-1)
        sums[i] += sign
        moved[i] |= sign != codes[i]
        codes[i] = sign
