"""Uniform noise of a quantizer's bin width in place of its rounding, Eq. 5."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from qgen_lab.qat.quantizers.base import Quantizer
from qgen_lab.qat.quantizers.lsq import LSQ


class NoiseInjection(Quantizer):
    """Weights plus noise from `U[-d/2, d/2]` in training mode, plain weights in evaluation mode.

    The bin width `d` is that of a grid which is not learned: LSQ's at its start by default, so that
    `d` is constant; a grid relative to the weights makes `d` follow them. Every forward pass draws
    anew. The draws depend on the initial weights and on how many there were, which travels in
    `state_dict`; they leave PyTorch's random state alone.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    bits : int
        From 1 to 16.
    channel_dim : int or None
        Dimension along which each index has a bin width of its own; None for one.
    grid : callable
        What builds the quantizer whose bin width and codes count, from `(weight, bits,
        channel_dim)`.
    quantized : bool
        Whether evaluation mode rounds to the grid in place of leaving the weights plain.

    Examples
    --------
    Noise of the bin width of `uniform(3, 2 std(w))`, rounded to that grid when evaluated:

    >>> noise = partial(
    ...     NoiseInjection, grid=FixedWidth(2.0, relative=True), quantized=True
    ... )  # doctest: +SKIP
    >>> model = quantize_weights(model, 3, noise)  # doctest: +SKIP
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        channel_dim: int | None = None,
        grid: Callable[[Tensor, int, int | None], Quantizer] = LSQ,
        quantized: bool = False,
    ):
        super().__init__()
        self.grid = grid(weight, bits, channel_dim).requires_grad_(False)
        self.rounds, self.sharing = quantized, self.grid.sharing
        seed = zlib.crc32(weight.detach().cpu().double().contiguous().numpy().tobytes())
        self.register_buffer("draw", torch.tensor(seed))

    @property
    def bits(self) -> float:
        """Binary logarithm of the number of levels of the grid."""
        return self.grid.bits

    @property
    def step_size(self) -> Tensor:
        """Step of the grid."""
        return self.grid.step_size

    @property
    def bin_width(self) -> Tensor:
        """Width of the interval that the noise comes from."""
        return self.grid.bin_width

    def follow(self, weight: Tensor) -> None:
        """Let the grid follow the weights."""
        self.grid.follow(weight)

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the levels of the grid."""
        return self.grid.levels_for(weight)

    def code(self, weight: Tensor) -> Tensor:
        """Return the code of each weight on the grid."""
        return self.grid.code(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Return weights plus noise; in evaluation mode plain or rounded weights."""
        if not self.training:
            return self.grid(weight) if self.rounds else weight
        self.follow(weight)
        generator = torch.Generator(weight.device).manual_seed(self.draw.item())
        self.draw += 1
        noise = torch.empty_like(weight).uniform_(-0.5, 0.5, generator=generator)
        return weight + self.sharing.spread(self.bin_width, weight) * noise
