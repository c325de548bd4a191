"""Optimizers of `torch.optim` for a matrix of parameters whose rows have rates of their own."""

from collections.abc import Callable

import torch
from torch import Tensor

from qgen_lab.qat.recipes import Recipe


class RowOptimizer:
    """One optimizer a row, as the rows' recipes say.

    Parameters
    ----------
    recipes : list of Recipe
        One a row of `parameters`.
    parameters : Tensor of shape (K, P)
        Changed in place.
    decayed : Tensor of shape (P,)
        Which columns take weight decay.
    """

    def __init__(self, recipes: list[Recipe], parameters: Tensor, decayed: Tensor):
        self.parameters = parameters.detach()
        column = self.parameters.new_tensor([recipe.weight_decay for recipe in recipes])[:, None]
        decay = column * decayed
        self.parts = []
        for name in sorted({recipe.optimizer for recipe in recipes}):
            rows = torch.tensor(
                [k for k, recipe in enumerate(recipes) if recipe.optimizer == name],
                device=parameters.device,
            )
            momentum = parameters.new_tensor([recipes[k].momentum for k in rows])[:, None]
            self.parts.append((rows, OPTIMIZERS[name](decay[rows], momentum.detach())))

    def step(self, gradient: Tensor, rates: Tensor) -> None:
        """Move each row by its gradient, shape (K, P), at its rate, shape (K,)."""
        if len(self.parts) == 1:
            self.parts[0][1].step(self.parameters, gradient, rates[:, None])
            return
        for rows, part in self.parts:
            moved = self.parameters[rows]
            part.step(moved, gradient[rows], rates[rows, None])
            self.parameters[rows] = moved


class _SGD:
    def __init__(self, decay: Tensor, momentum: Tensor):
        self.decay, self.momentum, self.mean = decay, momentum, torch.zeros_like(decay)

    def step(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        gradient = torch.addcmul(gradient, self.decay, parameters)
        self.mean.mul_(self.momentum).add_(gradient)
        parameters.addcmul_(self.mean, rates, value=-1)


class _Adam:
    beta, epsilon = 0.999, 1e-8

    def __init__(self, decay: Tensor, momentum: Tensor):
        self.decay, self.momentum, self.steps = decay, momentum, 0
        self.mean, self.square = torch.zeros_like(decay), torch.zeros_like(decay)

    def step(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        self._move(parameters, torch.addcmul(gradient, self.decay, parameters), rates)

    def _move(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        self.steps += 1
        self.mean.mul_(self.momentum).addcmul_(gradient, 1 - self.momentum)
        self.square.mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
        correction = (1 - self.beta**self.steps) ** 0.5
        spread = self.square.sqrt().div_(correction).add_(self.epsilon)
        step = rates / (1 - self.momentum**self.steps)
        parameters.sub_(step * self.mean / spread)


class _AdamW(_Adam):
    def step(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        parameters.mul_(1 - rates * self.decay)
        self._move(parameters, gradient, rates)


class _RMSprop:
    smoothing, epsilon = 0.99, 1e-8

    def __init__(self, decay: Tensor, momentum: Tensor):
        self.decay, self.momentum = decay, momentum
        self.square, self.mean = torch.zeros_like(decay), torch.zeros_like(decay)

    def step(self, parameters: Tensor, gradient: Tensor, rates: Tensor) -> None:
        gradient = torch.addcmul(gradient, self.decay, parameters)
        self.square.mul_(self.smoothing).addcmul_(gradient, gradient, value=1 - self.smoothing)
        spread = self.square.sqrt().add_(self.epsilon)
        self.mean.mul_(self.momentum).add_(gradient / spread)
        parameters.addcmul_(self.mean, rates, value=-1)


OPTIMIZERS: dict[str, Callable[[Tensor, Tensor], _SGD | _Adam | _RMSprop]] = {
    "sgd": _SGD,
    "adam": _Adam,
    "adamw": _AdamW,
    "rmsprop": _RMSprop,
}
