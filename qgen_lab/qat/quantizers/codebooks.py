"""Quantizers to the nearest level of a codebook."""

import numpy as np
import torch
from torch import Tensor

from qgen_lab.codebooks import Codebook
from qgen_lab.qat.quantizers.base import Quantizer, with_gradient_of


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
        return with_gradient_of(torch.where(passes, weight, 0), value=value)

    def get_extra_state(self) -> Tensor:
        """Return the levels, for `state_dict`."""
        return torch.tensor(self.codebook.levels)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the levels from `state_dict`."""
        self.codebook = Codebook(state.cpu().numpy())

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"{self.codebook}"
