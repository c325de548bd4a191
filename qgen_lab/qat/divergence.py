"""Where a training run ceased to be finite."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qgen_lab.qat.batches import Batches
from qgen_lab.qat.recipes import Recipe

if TYPE_CHECKING:
    from qgen_lab.qat.training import History

__all__ = ["Diverged"]


class Diverged(RuntimeError):
    """Training met a loss that is not finite.

    The model is left as it was at that step.

    Attributes
    ----------
    epoch, step : int
        Where, both counted from 1. Step 0 is the clean pass after the epoch.
    layer : str
        Name of the layer where the first value that is not finite was found; ``"inputs"`` if it
        was in the data, ``"loss"`` if only in the loss.
    history : History or None
        The epochs before this one, if any.
    """

    def __init__(
        self, epoch: int, step: int, layer: str, message: str, history: "History | None"
    ) -> None:
        super().__init__(epoch, step, layer, message, history)
        self.epoch, self.step, self.layer, self.history = epoch, step, layer, history

    def __str__(self) -> str:
        return self.args[3]


class NotFinite(Exception):
    """A loss that is not finite, and the batches among which it arose."""

    def __init__(self, step: int, value: float, batches: Batches) -> None:
        self.step, self.value, self.batches = step, value, batches


def diverged_at(
    model: nn.Module, recipe: Recipe, epoch: int, problem: NotFinite, history: "History | None"
) -> Diverged:
    where = f"step {problem.step}" if problem.step else "the clean pass after the epoch"
    layer, what = _first_not_finite(model, problem.batches)
    message = (
        f"The loss is {problem.value} in epoch {epoch}, {where}; first not finite: {what}. "
        f"Try a smaller learning rate (now {recipe.learning_rate:g}), look for inputs or "
        "operations without a finite value or gradient (log, sqrt or division at 0), and for "
        "layers without normalisation."
    )
    return Diverged(epoch, problem.step, layer, message, history)


def _first_not_finite(model: nn.Module, batches: Batches) -> tuple[str, str]:
    """Name of the layer where values stop being finite, and a description.

    A gradient that is not finite spoils the weights of its own and of all earlier layers: of the
    spoilt layers the last is the one to name.
    """
    spoilt = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        layer = _layer_of(spoilt[-1].rpartition(".")[0])
        return layer, f"the weights of layer {layer!r}, before the forward pass"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
            if not all(part.isfinite().all() for part in parts if isinstance(part, Tensor)):
                found.append(name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch(_layer_of(name))).remove)
        for inputs, _ in batches:
            if not inputs.isfinite().all():
                return "inputs", "the inputs"
            model(inputs)
            if found:
                return found[0], f"the output of layer {found[0]!r}"
    return "loss", "the loss itself, from finite outputs"


def _layer_of(module_name: str) -> str:
    """The layer that a quantizer inside it belongs to; the model itself has no other name."""
    return module_name.partition(".parametrizations")[0] or "model"
