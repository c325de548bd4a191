"""Random changes of training images, by name, a whole batch at a time and on its device.

An augmentation is a function `(images, generator) -> images`: a batch of shape (N, H, W, C), bytes
or floats, in; a new batch of the same shape and dtype out. The generator may live on another
device than the images: equal seeds then still give equal changes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = _integers(2, images, generator).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side either way; what comes in is zero (black).

    At 32 pixels this is the usual random crop after padding with four pixels.
    """
    _, height, width, _ = images.shape
    up, left = height // 8, width // 8
    padded = torch.nn.functional.pad(images, (0, 0, left, left, up, up))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (N, 2 up + 1, 2 left + 1, C, H, W)
    top = _integers(2 * up + 1, images, generator)
    start = _integers(2 * left + 1, images, generator)
    each = torch.arange(len(images), device=images.device)
    return windows[each, top, start].permute(0, 2, 3, 1)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """First `crop`, then `flip`."""
    return flip(crop(images, generator), generator)


def none(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Leave the images as they are."""
    return images


augmentations: dict[str, Augmentation] = {
    "none": none,
    "flip": flip,
    "crop": crop,
    "crop-flip": crop_and_flip,
}


def _integers(upper: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """One integer from 0 to `upper - 1` for each image."""
    drawn = torch.randint(upper, (len(images),), generator=generator, device=generator.device)
    return drawn.to(images.device)
