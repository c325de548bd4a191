"""Learned step size: the uniform quantizer of the paper, Eq. 1 to 3."""

import torch
from torch import Tensor, nn

from qgen_lab.codebooks import check_bits
from qgen_lab.qat import kernels
from qgen_lab.qat.quantizers.base import (
    Quantizer,
    Sharing,
    hold_above,
    magnitude_and_spread,
    with_gradient_of,
)


class LSQ(Quantizer):
    """Uniform quantizer with a learned step (Esser et al. 2020, arXiv 1902.08153).

    With `v = w / s`, weights `w`, step `s`, codes from `low = -2**(bits - 1)` to
    `high = 2**(bits - 1) - 1`: the quantized weight is `s round(clip(v, low, high))`, ties to even.
    Weights strictly between the bounds pass their gradient on, the others get zero. The step gets
    `sum G (round(v) - v)` over the former, `sum G bound` over the latter, times `1 / sqrt(n high)`,
    where `G` is the gradient to the quantized weights and `n` weights share the step.
    One bit is `s sign(w)` with `sign(0) = 1`; all weights pass their gradient on, the step gets
    `sum G sign(w)`, times `1 / sqrt(n)`.

    With many bits the loss hardly holds the step: at 8 bits, plain SGD at a large rate can let it
    drift until weights are clipped, and then throw it up (the book's chapter on training shows it).

    The step never reaches zero: below `floor`, the step at which the grid reaches out to 1% of the
    root mean square of the initial weights, it counts as `floor`, and the next forward pass puts
    the parameter back there.

    Parameters
    ----------
    weight : Tensor
        Float weights; the step starts at `2 mean|w| / sqrt(high)`, for one bit at `mean|w|`.
    bits : int
        From 1 to 16.
    channel_dim : int or None
        Dimension along which each index has a step of its own; None for one step.
    groups : int or None
        Blocks of neighbouring channels (along `channel_dim`, or along dimension 0 if that is None)
        that have a step each, as the heads of an attention layer; `step` has shape `(groups,)`.

    Examples
    --------
    >>> layer = nn.Linear(64, 96)
    >>> LSQ(layer.weight, bits=4, groups=3).step.shape
    torch.Size([3])
    """

    step_is_free = True

    def __init__(
        self, weight: Tensor, bits: int, channel_dim: int | None = None, groups: int | None = None
    ):
        super().__init__()
        self.bits = check_bits(bits)
        self.sharing = Sharing(weight, channel_dim, groups)
        self.low, self.high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self._pool = kernels.Pool()

        magnitude, spread = magnitude_and_spread(weight, self.sharing)
        step = magnitude if bits == 1 else 2 * magnitude / self.high**0.5
        self.step = nn.Parameter(step.to(weight.dtype))
        floor = 0.01 * spread / self.high
        smallest = torch.finfo(weight.dtype).tiny
        self.register_buffer("floor", floor.to(weight.dtype).clamp(min=smallest))
        self.gradient_scale = (weight.numel() / step.numel() * self.high) ** -0.5

    @property
    def step_size(self) -> Tensor:
        """The step that the forward pass uses, detached: `()`, `(channels,)` or `(groups,)`."""
        return torch.maximum(self.step.detach(), self.floor)

    @torch.no_grad()
    def put_step_size(self, step: Tensor) -> None:
        """Set the step."""
        self.step.copy_(step)

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the step times the integers from `low` to `high`; for one bit `-s` and `s`."""
        codes = torch.arange(self.low, self.high + 1, 2 if self._signs else 1)
        return self.step_size.double().view(-1, 1) * codes.to(self.step.device)

    @property
    def bin_width(self) -> Tensor:
        """The step; for one bit, whose levels are `-s` and `s`, twice the step."""
        return self.step_size * (2 if self._signs else 1)

    @property
    def _signs(self) -> bool:
        return (self.low, self.high) == (-1, 1)

    def code(self, weight: Tensor) -> Tensor:
        """Return `round(clip(w / s))`, int32; -1 and 1 for one bit."""
        step = self.sharing.spread(self.step_size, weight)
        return self._round(weight.detach() / step)[0].to(torch.int32)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weights; gradients as the class describes."""
        step = self.step
        hold_above(self.floor, step)
        if isinstance(step, nn.Parameter) and self.sharing.suits_kernels(weight):
            return _KernelLSQ.apply(weight, step, self)
        step = self.sharing.spread(self.step_size, weight)
        codes, passes, slope = self._round(weight.detach() / step)
        learned = self.gradient_scale * self.sharing.spread(self.step, weight)
        surrogate = torch.where(passes, weight, 0) + slope * learned
        return with_gradient_of(surrogate, value=codes * step)

    def _round(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for `v = w / s`, the codes, who passes its gradient on, the step's slope."""
        if self._signs:
            sign = torch.where(v >= 0, 1, torch.where(v < 0, -1, v))  # not-a-number stays
            return sign, torch.ones_like(v, dtype=torch.bool), sign
        codes = v.clamp(self.low, self.high).round()
        inside = (v > self.low) & (v < self.high)
        return codes, inside, torch.where(inside, codes - v, codes)

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"bits={self.bits}, steps={self.sharing.steps}"


class _KernelLSQ(torch.autograd.Function):
    """LSQ by compiled loops; saves nothing but the weights, from which the codes are recomputed."""

    @staticmethod
    def forward(ctx, weight, step, quantizer):
        """Quantize with a step that is on its floor or above."""
        ctx.save_for_backward(weight, step)
        ctx.quantizer = quantizer
        return kernels.quantize(weight, step, quantizer.low, quantizer.high, quantizer._pool)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on to the weights and to the step."""
        weight, step = ctx.saved_tensors
        lsq = ctx.quantizer
        differentiated = torch.is_grad_enabled() or kernels.being_transformed()
        if kernels.plain(grad) and not differentiated:
            return *kernels.gradients(
                weight, step, lsq.low, lsq.high, grad, lsq.gradient_scale, lsq._pool
            ), None
        # Higher derivatives and batches of gradients: the same by ordinary operations.
        _, passes, slope = lsq._round(weight.detach() / lsq.sharing.spread(step.detach(), weight))
        grad_step = lsq.gradient_scale * lsq.sharing.rows(grad * slope).sum(1).view(step.shape)
        return torch.where(passes, grad, 0), grad_step, None
