"""`CodeAverage` for the models of a stack, each from the step that its recipe says."""

import math

import torch
from torch import Tensor

from qgen_lab.qat.ensemble.stack import Stack
from qgen_lab.qat.recipes import Recipe


class CodeAverages:
    """Sums of the codes of a stack's models.

    Parameters
    ----------
    stack : Stack
        The models.
    recipes : list of Recipe
        One a model.
    steps : int
        Steps of the whole training.
    """

    def __init__(self, stack: Stack, recipes: list[Recipe], steps: int):
        shares = [recipe.average_codes_from for recipe in recipes]
        self.starts = torch.tensor(
            [math.inf if share is None else min(share * steps, steps - 1) for share in shares]
        )
        self.stack = stack
        self.updates = torch.zeros(len(recipes))
        self.sums: Tensor | None = None

    def update(self, position: int) -> None:
        """Take in the codes after the step at `position`, counted from 0."""
        taken = position >= self.starts
        if bool(taken.any()):
            codes = self.stack.codes().double()
            if self.sums is None:
                self.sums = torch.zeros_like(codes)
            self.sums += codes * taken.to(codes)[:, None]
            self.updates += taken

    def put(self, parameters: Tensor) -> None:
        """Make the averages, in units of the step, the float weights in the stack's parameters."""
        for k in self.updates.nonzero().flatten().tolist():
            self.stack.put_codes(parameters, k, self.sums[k] / self.updates[k])
