"""Network in network and fully connected networks, small enough to train many of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral

import torch
from torch import nn

__all__ = ["mlp", "nin", "require_positive", "seeded"]


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from `seed` inside the block and leave PyTorch's global random state as it was.

    Layers draw their initial weights, and dropout its masks, from that global state: there is no
    generator to hand them. With ``seed=None`` the block draws from the global state as usual.
    """
    if seed is None:
        yield
        return
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def nin(
    depth: int,
    width_multiplier: int,
    num_classes: int = 10,
    in_channels: int = 3,
    base_width: int = 25,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """Network in network, as the literature on flatness and generalization builds it.

    `depth` blocks of three convolutions (3x3 with stride 2 and padding 1, 1x1, 1x1), then a 1x1
    convolution to the classes and a global average. Each convolution, the last one too, is followed
    by batch normalisation and ReLU. ``NiN (4x10)`` is depth 4, multiplier 10: 250 channels.

    The convolutions have no bias: batch normalisation subtracts the mean, so a bias in front of it
    changes nothing and its gradient is exactly zero. Initial weights are PyTorch's own.

    Parameters
    ----------
    depth : int
        Number of blocks. Each halves the height and the width of the image, rounding up.
    width_multiplier, base_width : int
        All hidden layers have ``base_width * width_multiplier`` channels.
    num_classes, in_channels : int
        Classes, and channels of the images.
    seed : int, optional
        Seed of the initial weights; by default they come from PyTorch's global random state.

    Returns
    -------
    torch.nn.Sequential
        Maps images of shape (N, in_channels, H, W), any H and W, to logits of shape
        (N, num_classes).

    Raises
    ------
    ValueError
        If a size is not a positive integer.

    References
    ----------
    Lin, Chen and Yan, "Network in network" (2014); Dziugaite et al., "In search of robust measures
    of generalization" (2020), for this layout.
    """
    require_positive(
        depth=depth,
        width_multiplier=width_multiplier,
        num_classes=num_classes,
        in_channels=in_channels,
        base_width=base_width,
    )
    width = base_width * width_multiplier
    layers: list[nn.Module] = []
    with seeded(seed):
        for block in range(depth):
            layers += _unit(width if block else in_channels, width, 3, stride=2, padding=1)
            layers += _unit(width, width, 1)
            layers += _unit(width, width, 1)
        layers += _unit(width, num_classes, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _unit(in_channels: int, out_channels: int, kernel: int, **kwargs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **kwargs)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


_ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


def mlp(
    features: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str = "tanh",
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """Fully connected network, with biases and without normalisation.

    Parameters
    ----------
    features : int
        Inputs to the first layer. An input of any shape is flattened first, so images of shape
        (1, 8, 8) have 64.
    hidden : sequence of int
        Widths of the hidden layers; empty for a linear model.
    outputs : int
        Outputs of the last layer, which has no activation.
    activation : {"tanh", "gelu", "relu"}
        Follows every hidden layer.
    seed : int, optional
        Seed of the initial weights; by default they come from PyTorch's global random state.

    Returns
    -------
    torch.nn.Sequential
        Maps inputs of shape (N, ...) to outputs of shape (N, outputs).

    Raises
    ------
    ValueError
        If a size is not a positive integer, or the activation is unknown.
    """
    require_positive(features=features, outputs=outputs)
    require_positive(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
    layers: list[nn.Module] = [nn.Flatten()]
    with seeded(seed):
        for inputs, width in pairwise([features, *hidden]):
            layers += [nn.Linear(inputs, width), _ACTIVATIONS[activation]()]
        layers.append(nn.Linear([features, *hidden][-1], outputs))
    return nn.Sequential(*layers)


def require_positive(**sizes: int) -> None:
    """Raise ValueError unless each size is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
