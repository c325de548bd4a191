"""What every quantizer is, and who shares a step."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qgen_lab.qat import kernels


class Sharing:
    """Which weights share a step: all, those of a channel, or those of a block of channels.

    Parameters
    ----------
    weight : Tensor or None
        The weights; None will do where all share a step.
    channel_dim : int or None
        Dimension of the channels; None for one step, or with `groups` for dimension 0.
    groups : int or None
        Number of blocks of neighbouring channels that share a step; None for one a channel.

    Raises
    ------
    ValueError
        If the channels do not fall into as many equal blocks.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        channel_dim: int | None = None,
        groups: int | None = None,
    ):
        self.dim, self.steps, self.shape = 0, 1, ()
        if channel_dim is None and groups is None:
            return
        self.dim = channel_dim or 0
        channels = weight.shape[self.dim]
        if groups is not None and not (groups >= 1 and channels % groups == 0):
            raise ValueError(f"groups = {groups}: give a divisor of the {channels} channels")
        self.steps = channels if groups is None else groups
        self.shape = (self.steps,)

    def rows(self, weight: Tensor) -> Tensor:
        """Arrange weights as one row for each step, shape `(steps, weights that share it)`."""
        return weight.movedim(self.dim, 0).reshape(self.steps, -1)

    def unrows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Undo `rows`, back into the shape of `weight`."""
        return rows.reshape(weight.movedim(self.dim, 0).shape).movedim(0, self.dim)

    def spread(self, steps: Tensor, weight: Tensor) -> Tensor:
        """Shape one number a step so that it broadcasts over the weights."""
        if not self.shape:
            return steps
        channels = weight.shape[self.dim]
        each = steps[:, None].expand(self.steps, channels // self.steps).reshape(channels)
        return each.view([channels if dim == self.dim else 1 for dim in range(weight.dim())])

    def in_runs(self, weight: Tensor) -> bool:
        """Whether weights that share a step are neighbours in dense memory, as kernels need."""
        return self.dim == 0 or not self.shape

    def suits_kernels(self, weight: Tensor) -> bool:
        """Whether compiled loops can be used, which take one run of memory for each step."""
        plain = kernels.plain(weight) and not kernels.being_transformed()
        return plain and kernels.dense(weight) and self.in_runs(weight)


class Quantizer(nn.Module, ABC):
    """Quantizer of one layer's weights; the protocol that every member of `registry` follows.

    A member is built by `member(weight, bits, channel_dim)`: `weight` is the float weight it starts
    from, `channel_dim` the dimension of the output channels if each is to have a grid of its own,
    else None. What it learns are its own `nn.Parameter` objects; they take no weight decay.

    Attributes
    ----------
    bits : int or float
        Binary logarithm of the number of levels.
    rounds : bool
        Whether the layer's weights lie on the levels in evaluation mode, as they nearly always do.
    step_is_free : bool
        Whether `put_step_size` can set the step.
    sharing : Sharing
        Which weights share a step; all by default.
    """

    bits: float
    rounds: bool = True
    step_is_free: bool = False
    sharing: Sharing = Sharing()

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weights, shape and dtype of `weight`, with their gradients."""

    @abstractmethod
    def code(self, weight: Tensor) -> Tensor:
        """Return the integer (int32) that stands for each weight's level."""

    @property
    @abstractmethod
    def step_size(self) -> Tensor:
        """The grid's step in the weights' units, of shape `()`, or `(channels,)` per channel."""

    @property
    def bin_width(self) -> Tensor:
        """Distance of neighbouring levels, shaped as `step_size`, which it is by default."""
        return self.step_size

    def levels_for(self, weight: Tensor) -> Tensor:
        """Return the ascending levels, float64, shape `(steps, levels)`; not all can say them.

        One row for each part of the weights that has levels of its own.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say its levels: define levels_for"
        )

    def put_step_size(self, step: Tensor) -> None:
        """Set the step, shaped as `step_size`; only where `step_is_free`."""
        raise NotImplementedError(f"{type(self).__name__} has no step that can be set")

    def follow(self, weight: Tensor) -> None:
        """Bring up to date what is read off the weights anew in each forward pass, if anything."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what becomes the float weight when someone assigns `layer.weight = weight`."""
        return weight


def hold_above(floor: Tensor, step: Tensor) -> None:
    """Put a learned step back on its floor, wherever the optimizer has put it."""
    if isinstance(step, nn.Parameter) and not kernels.being_transformed():
        step.data.clamp_(min=floor)


def with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def magnitude_and_spread(weight: Tensor, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Mean magnitude and root mean square of the weights that share a step, float64.

    Where they are zero, PyTorch's default initialisation of such a layer, whose standard
    deviation is `1 / sqrt(3 fan_in)`, stands in.
    """
    rows = sharing.rows(weight.detach().double())
    default = (3 * weight[0].numel()) ** -0.5
    magnitude, spread = rows.abs().mean(1), rows.square().mean(1).sqrt()
    return tuple(
        x.where(x > 0, torch.full_like(x, default)).view(sharing.shape) for x in (magnitude, spread)
    )
