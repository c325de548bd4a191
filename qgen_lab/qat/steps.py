"""One optimizer step: its learning rate, its precision, what it makes smaller, and where (SAM)."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qgen_lab.qat.averaging import CodeAverage
from qgen_lab.qat.batches import BATCH_NORM, device_of
from qgen_lab.qat.quantizers import parameter_groups
from qgen_lab.qat.recipes import OPTIMIZERS, Recipe
from qgen_lab.qat.schedules import learning_rates

Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Steps:
    """The optimizer steps of one training run, with all that they remember.

    Parameters
    ----------
    model : torch.nn.Module
        On the device where it is trained.
    recipe : Recipe
        How to step.
    objective : callable
        ``objective(model, inputs, outputs, targets)`` is what a step makes smaller. What it
        remembers travels in `state_dict` if it has `state_dict` and `load_state_dict` itself.
    per_epoch : int
        Steps in an epoch. With 1, rates and averaging change from epoch to epoch.

    Raises
    ------
    ValueError
        If the device cannot compute in the recipe's precision.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, objective: Objective, per_epoch: int
    ) -> None:
        groups = parameter_groups(model, recipe.weight_decay)
        self.model, self.objective, self.per_epoch = model, objective, per_epoch
        self.optimizer = OPTIMIZERS[recipe.optimizer](groups, recipe)
        self.rates = learning_rates(recipe, per_epoch).tolist()
        self.forward_precision = _forward_precision(recipe.precision, device_of(model))
        self.scaler = torch.amp.GradScaler(enabled=recipe.precision == "float16")
        self.radius = recipe.sharpness_radius
        self.own_parameters = groups[0]["params"]  # without what quantizers learn
        self.batch_norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
        self.average, self.average_from = None, math.inf
        if recipe.average_codes_from is not None:
            self.average = CodeAverage(model)
            last = len(self.rates) - 1
            self.average_from = min(recipe.average_codes_from * len(self.rates), last)

    def first_rate(self, epoch: int) -> float:
        """Learning rate of an epoch's first step."""
        return self.rates[(epoch - 1) * self.per_epoch]

    def take(self, epoch: int, step: int, inputs: Tensor, targets: Tensor) -> float:
        """Take one step (both counted from 1) and return the objective before it.

        Where that is not finite, the weights stay as they are.
        """
        position = (epoch - 1) * self.per_epoch + min(step, self.per_epoch) - 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[position]
        value = self._differentiate(inputs, targets)
        if self.radius > 0 and math.isfinite(value):
            with self._uphill(), self._statistics_unchanged():
                uphill = self._differentiate(inputs, targets)
            value = value if math.isfinite(uphill) else uphill
        if math.isfinite(value):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if position >= self.average_from:
                self.average.update()
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on, of plain values, tensors and containers."""
        return {name: part.state_dict() for name, part in self._with_memory().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, part in self._with_memory().items():
            part.load_state_dict(state[name])

    def _with_memory(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "average": self.average,
            "objective": self.objective,
        }
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _differentiate(self, inputs: Tensor, targets: Tensor) -> float:
        """Leave the gradients at the parameters; return the objective."""
        self.optimizer.zero_grad()
        with self.forward_precision():
            outputs = self.model(inputs)
        if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()
        value = self.objective(self.model, inputs, outputs, targets)
        if value.numel() != 1:
            raise ValueError(
                f"objective must return one number per batch, got shape {tuple(value.shape)}"
            )
        self.scaler.scale(value).backward()
        return value.item()

    @contextmanager
    def _uphill(self) -> Iterator[None]:
        """Inside, the parameters are moved along their gradient by a distance of `radius`."""
        moved = [p for p in self.own_parameters if p.grad is not None]
        norm = get_total_norm([p.grad for p in moved]).item()
        if not math.isfinite(norm):
            moved = []  # the next step finds out whose gradient it was
        before = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for parameter in moved:
                parameter.add_(parameter.grad, alpha=self.radius / max(norm, 1e-12))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(moved, before, strict=True):
                    parameter.copy_(value)

    @contextmanager
    def _statistics_unchanged(self) -> Iterator[None]:
        """Inside, batch norm uses its batch's statistics but does not take them in."""
        tracking = [layer for layer in self.batch_norms if layer.track_running_stats]
        for layer in tracking:
            layer.track_running_stats = False
        try:
            yield
        finally:
            for layer in tracking:
                layer.track_running_stats = True


def _forward_precision(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a forward pass."""
    if precision == "float32":
        return nullcontext
    if precision == "float16" and device.type != "cuda":
        raise ValueError(
            f"precision 'float16' needs a GPU, and the model is on {device.type!r}: "
            "use 'bfloat16' or 'float32'"
        )
    return lambda: torch.autocast(device.type, getattr(torch, precision))
