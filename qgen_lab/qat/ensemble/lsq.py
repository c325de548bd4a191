"""LSQ of all layers of all models at once: bits, and whether at all, differ between models."""

import torch
from torch import Tensor

from qgen_lab.qat.quantizers import LSQ


class StackedLSQ:
    """The quantizers of K models, which learn one matrix of steps.

    A row of weights is one output channel of one layer. There is a column of steps for each row;
    a layer with fewer steps than channels uses the first of its columns, one in full precision
    none.

    Parameters
    ----------
    weights : list of Tensor
        One weight of each layer, for shapes, type and device.
    members : list of list of LSQ or None
        For each layer the quantizer of each model, None for full precision.

    Attributes
    ----------
    steps, floor : Tensor of shape (K, rows)
        The steps at the start, and what they never fall below.
    """

    def __init__(self, weights: list[Tensor], members: list[list[LSQ | None]]):
        self.members = members
        self.shapes = [(len(weight), weight[0].numel()) for weight in weights]
        heights, widths = zip(*self.shapes, strict=True)
        self.first_rows = [sum(heights[:i]) for i in range(len(heights))]
        shape = len(members[0]), sum(heights)
        self.steps, self.floor = weights[0].new_ones(shape), weights[0].new_zeros(shape)
        self.column = torch.arange(shape[1]).repeat(shape[0], 1)  # of a row's step
        low, high, self.scale = (weights[0].new_zeros(shape) for _ in range(3))
        one_bit, full = (torch.ones(shape, dtype=torch.bool) for _ in range(2))
        for first, height, layer in zip(self.first_rows, heights, members, strict=True):
            for k, member in enumerate(layer):
                if member is None:
                    continue
                rows = slice(first, first + height)
                steps = member.step.numel()
                columns = first + torch.arange(height) // (height // steps)
                self.column[k, rows] = columns
                self.steps[k, first : first + steps] = member.step.detach()
                self.floor[k, first : first + steps] = member.floor
                low[k, rows], high[k, rows] = member.low, member.high
                self.scale[k, rows] = member.gradient_scale
                one_bit[k, rows], full[k, rows] = member.bits == 1, False
        self.is_needed = not bool(full.all())
        device = weights[0].device
        self.column = self.column.to(device)
        row_of_layer = torch.tensor(widths).repeat_interleave(torch.tensor(heights))
        self.row = torch.arange(shape[1]).repeat_interleave(row_of_layer).to(device)
        self.low, self.high = self.per_weight(low), self.per_weight(high)
        self.full = self.per_weight(full.to(device))
        self.one_bit = self.per_weight(one_bit.to(device)) & ~self.full

    def __call__(self, weights: Tensor, steps: Tensor) -> Tensor:
        """Quantized weights, of shape (K, weights) as the float ones, with their gradients."""
        return _Quantize.apply(weights, steps, self) if self.is_needed else weights

    def per_weight(self, rows: Tensor) -> Tensor:
        """Repeat what belongs to a row for each of its weights."""
        return rows.index_select(1, self.row)

    def step_per_weight(self, steps: Tensor) -> Tensor:
        """The step that each weight is quantized with."""
        return self.per_weight(steps.gather(1, self.column))

    def codes(self, v: Tensor) -> Tensor:
        """Codes of `v`, weights over steps; meaningless for weights in full precision."""
        sign = torch.where(v >= 0, v.new_tensor(1), v.new_tensor(-1))
        return torch.where(self.one_bit, sign, v.clamp(self.low, self.high).round())

    def step_gradient(self, values: Tensor) -> Tensor:
        """Gradient to the steps from each weight's share of it."""
        sizes = [height * width for height, width in self.shapes]
        parts = zip(values.split(sizes, 1), self.shapes, strict=True)
        rows = torch.cat([part.unflatten(1, shape).sum(2) for part, shape in parts], 1)
        return torch.zeros_like(rows).scatter_add_(1, self.column, rows * self.scale)

    def write_back(self, steps: Tensor) -> None:
        """Put steps into the models' quantizers."""
        for first, layer in zip(self.first_rows, self.members, strict=True):
            for k, member in enumerate(layer):
                if member is not None:
                    values = steps[k, first : first + member.step.numel()]
                    member.step.copy_(values.view(member.step.shape))


class _Quantize(torch.autograd.Function):
    """As `LSQ`, whose docstring has the formulas; weights in full precision pass through."""

    @staticmethod
    def forward(ctx, weights, steps, lsq):
        """Quantize with steps that are on their floor or above."""
        step = lsq.step_per_weight(steps)
        v = weights / step
        codes = lsq.codes(v)
        passes = ((v > lsq.low) & (v < lsq.high)) | lsq.one_bit | lsq.full
        ctx.save_for_backward(passes, torch.where(passes & ~lsq.one_bit, codes - v, codes))
        ctx.lsq = lsq
        return torch.where(lsq.full, weights, codes * step)

    @staticmethod
    def backward(ctx, grad):
        """Pass the gradient on to the weights and to the steps."""
        passes, slope = ctx.saved_tensors
        return torch.where(passes, grad, 0), ctx.lsq.step_gradient(grad * slope), None
