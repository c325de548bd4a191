"""Quantizers to the nearest of a few levels, even or uneven, fixed or learned."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qgen_lab.codebooks import Codebook, check_bits, lloyd_max, power_of_two, uniform
from qgen_lab.qat import kernels
from qgen_lab.qat.quantizers.base import (
    Quantizer,
    Sharing,
    hold_above,
    magnitude_and_spread,
    with_gradient_of,
)


class _Slopes(NamedTuple):
    """Derivatives of quantized weights, all of shape `(steps, weights that share it)`."""

    code: Tensor  # the level that a weight goes to
    other: Tensor  # the level on the weight's other side
    passes: Tensor  # by the weight: whether it passes its gradient on
    by_level: Tensor  # by the level at `code`
    by_other: Tensor  # by the level at `other`


class LevelQuantizer(Quantizer):
    """Nearest level, with straight-through gradients: what all codebooks share.

    A weight at a threshold goes to the level of even index, as in `qgen_lab.codebooks.Codebook`.
    Weights strictly between the outer levels pass their gradient `G` on, the others get zero; with
    two levels all pass it on.

    Levels get the gradient of LSQ, carried over to uneven ones. Let a weight `w` strictly between
    the outer levels go to the level `a`, let `b` be the level on its other side, and
    `t = (w - a) / (b - a)`: then `a` gets `t G` and `b` gets `-t G`. A weight at or beyond an outer
    level gives that level `G`, and with two levels each weight gives `G` to its level. For levels
    that are multiples of a step, the step thus gets what `LSQ` says.
    """

    def __init__(self, sharing: Sharing):
        super().__init__()
        self.sharing = sharing
        self._pool = kernels.Pool()

    @abstractmethod
    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the levels in ascending order, float64, shape `(steps, levels)`, differentiable.

        One row for each part of the weights that has levels of its own.
        """

    def code(self, weight: Tensor) -> Tensor:
        """Return the index of each weight's level, int32."""
        rows = self.sharing.rows(weight.detach())
        codes = _nearest(rows, self.levels_for(weight).detach())
        return self.sharing.unrows(codes.to(torch.int32), weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Return each weight's level; gradients as the class describes."""
        levels = self.levels_for(weight)
        if self.sharing.suits_kernels(weight):
            return _KernelLevels.apply(weight, levels.contiguous(), self)
        rows = self.sharing.rows(weight)
        slopes = _slopes(rows.detach(), levels.detach())
        values = levels.to(weight.dtype)
        surrogate = (
            torch.where(slopes.passes, rows, 0)
            + slopes.by_level * values.gather(1, slopes.code)
            + slopes.by_other * values.gather(1, slopes.other)
        )
        value = torch.where(rows.isnan(), rows, values.gather(1, slopes.code))
        return self.sharing.unrows(with_gradient_of(surrogate, value), weight)


class _KernelLevels(torch.autograd.Function):
    """Nearest level by compiled loops; saves nothing but weights and levels."""

    @staticmethod
    def forward(ctx, weight, levels, quantizer):
        """Quantize."""
        ctx.save_for_backward(weight, levels)
        ctx.quantizer = quantizer
        return kernels.nearest(weight, levels, quantizer._pool)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on to the weights and to the levels."""
        weight, levels = ctx.saved_tensors
        learned, sharing = ctx.needs_input_grad[1], ctx.quantizer.sharing
        differentiated = torch.is_grad_enabled() or kernels.being_transformed()
        if kernels.plain(grad) and not differentiated:
            pool = ctx.quantizer._pool
            return *kernels.level_gradients(weight, levels, grad, learned, pool), None
        # Higher derivatives and batches of gradients: the same by ordinary operations.
        slopes, rows = _slopes(sharing.rows(weight.detach()), levels.detach()), sharing.rows(grad)
        grad_weight = sharing.unrows(torch.where(slopes.passes, rows, 0), weight)
        rows = rows.double()
        grad_levels = (
            torch.zeros_like(levels)
            .scatter_add(1, slopes.code, rows * slopes.by_level)
            .scatter_add(1, slopes.other, rows * slopes.by_other)
        )
        return grad_weight, grad_levels if learned else None, None


def _nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """Index of the level of each weight, compared in float64, ties to the even index."""
    rows = rows.double().contiguous()
    thresholds = levels[:, :-1] / 2 + levels[:, 1:] / 2
    upper = torch.searchsorted(thresholds, rows, right=True)
    tied = (upper > 0) & (rows == thresholds.gather(1, (upper - 1).clamp(min=0)))
    return upper - (tied & (upper % 2 == 1)).to(upper.dtype)


def _slopes(rows: Tensor, levels: Tensor) -> _Slopes:
    code = _nearest(rows, levels)
    values, last = levels.to(rows.dtype), levels.shape[1] - 1
    nearest = values.gather(1, code)
    other = (code + torch.where(rows > nearest, 1, -1)).clamp(0, last)
    gap = values.gather(1, other) - nearest
    share = torch.where(gap == 0, 0, (rows - nearest) / torch.where(gap == 0, 1, gap))
    passes = (rows > values[:, :1]) & (rows < values[:, -1:])
    one = torch.ones_like(rows)
    if last == 1:
        return _Slopes(code, other, torch.ones_like(passes), one, torch.zeros_like(rows))
    return _Slopes(
        code, other, passes, torch.where(passes, share, one), torch.where(passes, -share, 0)
    )


class FixedCodebook(LevelQuantizer):
    """Nearest level of a codebook that does not change, with straight-through gradients.

    Codes count the levels from 0; the step size is the mean spacing.

    Parameters
    ----------
    codebook : Codebook
        The levels, in the weights' units, or with `relative` in units of the standard deviation of
        the weights. They travel in `state_dict`.
    relative : bool
        Whether the levels scale with the standard deviation (about the mean) of the weights, which
        every forward pass computes anew and does not differentiate.
    sharing : Sharing, optional
        Which weights share a standard deviation; all by default.
    """

    def __init__(self, codebook: Codebook, relative: bool = False, sharing: Sharing | None = None):
        super().__init__(sharing or Sharing())
        self.codebook = codebook
        self.relative = relative
        self.register_buffer("scale", torch.ones(self.sharing.shape, dtype=torch.float64), False)

    @classmethod
    def attach(
        cls,
        codebook: Codebook,
        weight: Tensor,
        bits: int | None,
        channel_dim: int | None,
        relative: bool = False,
    ) -> "FixedCodebook":
        """Build the quantizer of one layer, after a check that the arguments suit the codebook."""
        if bits is not None and bits != int(np.ceil(codebook.bits)):
            raise ValueError(
                f"bits={bits} does not match a codebook of {len(codebook)} levels: "
                f"give bits=None or {int(np.ceil(codebook.bits))}"
            )
        if channel_dim is not None and not relative:
            raise ValueError("per_channel=True needs a quantizer with a step; a codebook has none")
        member = cls(codebook, relative, Sharing(weight, channel_dim))
        member.follow(weight)
        return member

    @property
    def bits(self) -> float:
        """Binary logarithm of the number of levels."""
        return self.codebook.bits

    @property
    def step_size(self) -> Tensor:
        """Mean spacing of the levels, shape `()`, or `(channels,)` per channel."""
        return self.codebook.spacing.mean() * self.scale

    def follow(self, weight: Tensor) -> None:
        """Measure the standard deviation of the weights, if the levels are relative to it."""
        if self.relative:
            self.scale = self._spread(weight).view(self.sharing.shape)

    def _spread(self, weight: Tensor) -> Tensor:
        if self.sharing.suits_kernels(weight):
            spread = kernels.spread(weight, self.sharing.steps)
        else:
            spread = self.sharing.rows(weight.detach()).std(1, correction=0).double()
        return spread.clamp(min=torch.finfo(weight.dtype).tiny)

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the levels, scaled to the weights if they are relative."""
        levels = torch.tensor(self.codebook.levels, device=weight.device)[None]
        return self._spread(weight)[:, None] * levels if self.relative else levels

    def get_extra_state(self) -> Tensor:
        """Return the levels, for `state_dict`."""
        return torch.tensor(self.codebook.levels)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the levels from `state_dict`."""
        self.codebook = Codebook(state.cpu().numpy())

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"{self.codebook}" + (", relative" if self.relative else "")


@dataclass(frozen=True)
class FixedWidth:
    """Builder of uniform quantizers of a fixed width: the codebook `uniform(bits, width)`.

    Parameters
    ----------
    width : float
        Half range: the outermost levels lie at `-width` and `width`.
    relative : bool
        Whether `width` counts in standard deviations of the layer's weights (of each channel's with
        `per_channel`), computed anew in each forward pass and not differentiated. Under batch norm
        an absolute width is a free gauge, since the weights may grow or shrink against it.

    Examples
    --------
    >>> model = quantize_weights(model, 3, FixedWidth(2.0, relative=True))  # doctest: +SKIP
    """

    width: float
    relative: bool = False

    def __call__(self, weight: Tensor, bits: int, channel_dim: int | None) -> FixedCodebook:
        """Build the quantizer of one layer."""
        codebook = uniform(bits, self.width)
        return FixedCodebook.attach(codebook, weight, bits, channel_dim, self.relative)


class ScaledLevels(LevelQuantizer):
    """Levels of a given shape times a learned scale.

    The scale starts where the squared error of the weights is least. Its gradient is that of LSQ,
    `sum G (Q(v) - v)` over the weights inside and `sum G Q(v)` over the others, with `v = w / s`
    and `Q(v)` the nearest level at scale one, times `1 / sqrt(n)` where `n` weights share it. The
    largest level never falls below 1% of the root mean square of the initial weights. One bit is
    `s sign(w)` up to a factor, a weight of exactly zero going to the lower level.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    bits : int
        As the shape allows.
    channel_dim : int or None
        Dimension along which each index has a scale of its own; None for one scale.
    """

    step_is_free = True

    def __init__(self, weight: Tensor, bits: int, channel_dim: int | None = None):
        super().__init__(Sharing(weight, channel_dim))
        self.bits = check_bits(bits)
        self.unit = self.shape(bits)
        floor = 0.01 * magnitude_and_spread(weight, self.sharing)[1] / self.unit.levels[-1]
        self.register_buffer("floor", floor.to(weight.dtype))
        rows = self.sharing.rows(weight.detach()).float().cpu().contiguous()
        scale = self.best_scale(rows).view(self.sharing.shape)
        self.scale = nn.Parameter(scale.to(weight.device, weight.dtype))
        self.gradient_scale = (weight.numel() / self.sharing.steps) ** -0.5

    @staticmethod
    @abstractmethod
    def shape(bits: int) -> Codebook:
        """Return the levels at scale one."""

    @abstractmethod
    def best_scale(self, rows: Tensor) -> Tensor:
        """Return where the scale starts, shape (steps, 1), for weights of shape (steps, any)."""

    @property
    def step_size(self) -> Tensor:
        """The scale, detached, of shape `()` or `(channels,)`."""
        return torch.maximum(self.scale.detach(), self.floor)

    @torch.no_grad()
    def put_step_size(self, step: Tensor) -> None:
        """Set the scale."""
        self.scale.copy_(step)

    @property
    def bin_width(self) -> Tensor:
        """Mean spacing of the levels."""
        return float(self.unit.spacing.mean()) * self.step_size

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the levels at the learned scale."""
        hold_above(self.floor, self.scale)
        scale = with_gradient_of(self.gradient_scale * self.scale, self.step_size)
        unit = torch.tensor(self.unit.levels, device=weight.device)
        return scale.double().view(-1, 1) * unit

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"bits={self.bits}, steps={self.sharing.steps}"


class PowerOfTwo(ScaledLevels):
    """Levels `+-s 2**-k`, `k = 0 ... 2**(bits - 1) - 1`, with a learned scale `s`; zero is none.

    All else is as in `ScaledLevels`, but that the scale starts in a local optimum near two spreads
    of the weights; 1 to 8 bits, since beyond the smallest levels vanish in float32.
    """

    @staticmethod
    def shape(bits: int) -> Codebook:
        """Return the powers of two up to 1, and their negatives."""
        if bits > 8:
            raise ValueError(f"bits = {bits}: powers of two take 1 to 8 bits, as 2**-255 vanishes")
        return power_of_two(bits, 1.0)

    def best_scale(self, rows: Tensor) -> Tensor:
        """Alternate between the nearest levels and the scale that suits them best."""
        unit = torch.tensor(self.unit.levels)
        spread = _root_mean_square(rows)
        scale = 2 * spread
        for _ in range(20):
            value = kernels.nearest(rows, scale * unit, self._pool).double() / scale
            scale = ((rows * value).sum(1) / value.square().sum(1))[:, None].clamp(0.1 * spread)
        return scale


class Uniform(ScaledLevels):
    """Even levels `s (k - (2**bits - 1) / 2)`, `k = 0 ... 2**bits - 1`, with a learned step `s`.

    The theory's `uniform(bits, width)`: as many levels above zero as below, zero none of them,
    where `LSQ` has zero and one level more below than above. All else is as in `ScaledLevels`;
    1 to 16 bits.
    """

    @staticmethod
    def shape(bits: int) -> Codebook:
        """Return the levels half a step, three halves, ... from zero, at step one."""
        return uniform(bits, (2**bits - 1) / 2)

    def best_scale(self, rows: Tensor) -> Tensor:
        """Search for the step of least squared error."""
        return least_squares_scale(rows, torch.tensor(self.unit.levels))


def least_squares_scale(rows: Tensor, unit: Tensor) -> Tensor:
    """Scale at which rounding to the nearest level makes the least squared error.

    Parameters
    ----------
    rows : Tensor, shape (steps, weights)
        Float weights, float32 on the CPU.
    unit : Tensor, shape (levels,)
        Ascending levels at scale one, float64.

    Returns
    -------
    Tensor, shape (steps, 1)
        To some thousandths: the best of a range, then of a finer one about it, and so on.
    """
    pool, reach = kernels.Pool(), unit.abs().max()
    spread = _root_mean_square(rows)
    lowest = 0.2 * spread
    ratio = 1.5 * torch.maximum(rows.abs().amax(1, keepdim=True), spread) / lowest
    best, extent = torch.full_like(spread, 0.5), 1.0
    for count in (32, 8, 8, 8):
        powers = best + extent * torch.linspace(-0.5, 0.5, count, dtype=torch.float64)
        scales = lowest * ratio**powers / reach
        errors = [
            (kernels.nearest(rows, scale[:, None] * unit, pool) - rows).double().square().sum(1)
            for scale in scales.unbind(1)
        ]
        best = powers.gather(1, torch.stack(errors, 1).argmin(1, keepdim=True))
        extent *= 2.5 / count
    return lowest * ratio**best / reach


def _root_mean_square(rows: Tensor) -> Tensor:
    """Root mean square of each row, as a column; where it is zero, that of a fresh layer."""
    return magnitude_and_spread(rows[..., None], Sharing(rows, 0))[1][:, None]


class LloydMax(LevelQuantizer):
    """Uneven levels, each of them learned.

    They start at the levels of least squared error for the weights (Lloyd-Max); where there are
    fewer distinct weights than levels, at those for Gaussian weights of the same mean square. Their
    gradients, as in `LevelQuantizer`, are scaled by `sqrt(levels / n)`, where `n` weights share the
    levels. Training may move levels past one another: their order in the parameter means nothing.

    Parameters
    ----------
    weight : Tensor
        Float weights.
    bits : int
        From 1 to 8.
    channel_dim : int or None
        Dimension along which each index has levels of its own; None for one set.
    """

    def __init__(self, weight: Tensor, bits: int, channel_dim: int | None = None):
        super().__init__(Sharing(weight, channel_dim))
        if check_bits(bits) > 8:
            raise ValueError(f"bits = {bits}: learned levels take 1 to 8 bits")
        self.bits = bits
        rows = self.sharing.rows(weight.detach()).double().cpu().numpy()
        spread = magnitude_and_spread(weight, self.sharing)[1].reshape(-1)
        start = [_lloyd_max_levels(bits, *pair) for pair in zip(rows, spread.tolist(), strict=True)]
        levels = torch.tensor(np.array(start), dtype=weight.dtype, device=weight.device)
        self.levels = nn.Parameter(levels.view(*self.sharing.shape, 2**bits))
        self.gradient_scale = (2**bits / rows.shape[1]) ** 0.5

    @property
    def step_size(self) -> Tensor:
        """Mean spacing of the levels, detached, of shape `()` or `(channels,)`."""
        levels = self.levels.detach()
        return (levels.amax(-1) - levels.amin(-1)) / (2**self.bits - 1)

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the levels in order."""
        levels = self.levels.view(self.sharing.steps, -1).sort(1).values
        return with_gradient_of(self.gradient_scale * levels, levels).double()

    def extra_repr(self) -> str:
        """Show the arguments in the model's printout."""
        return f"bits={self.bits}, steps={self.sharing.steps}"


def _lloyd_max_levels(bits: int, weights: np.ndarray, spread: float) -> np.ndarray:
    if np.unique(weights).size < 2**bits:
        return spread * lloyd_max(bits).levels
    return lloyd_max(bits, weights).levels
