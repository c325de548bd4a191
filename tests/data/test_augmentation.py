import itertools

import numpy as np
import pytest
import torch

from qgen_lab.data import augmentations

NAMES = sorted(augmentations)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=200, height=16, width=24, channels=3, dtype=torch.uint8):
    x = torch.randint(1, 256, (n, height, width, channels), generator=generator(5))
    return x.to(dtype)


def shifted(image, top, left):
    """One crop, pixel by pixel."""
    height, width, _ = image.shape
    up, side = height // 8, width // 8
    out = np.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        y, x = i + top - up, j + left - side
        if 0 <= y < height and 0 <= x < width:
            out[i, j] = image[y, x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_member_keeps_shape_dtype_and_input(name, dtype):
    x = images(dtype=dtype)
    before = x.clone()
    y = augmentations[name](x, generator())
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(x, before)
    assert torch.equal(y, augmentations[name](x, generator()))
    if name != "none":
        assert not torch.equal(y, augmentations[name](x, generator(1)))


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name):
    state = torch.get_rng_state()
    augmentations[name](images(), generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors_about_half():
    x = images(2000, 4, 4, 1)
    y = augmentations["flip"](x, generator())
    mirrored = (y == x.flip(2)).flatten(1).all(1)
    kept = (y == x).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 900 < mirrored.sum() < 1100


def test_crop_is_a_shift_of_each_image_and_all_shifts_occur():
    x = images(400, height=8, width=16)
    y = augmentations["crop"](x, generator())
    drawn = set()
    for image, cropped in zip(x.numpy(), y.numpy(), strict=True):
        shifts = [
            shift
            for shift in itertools.product(range(3), range(5))
            if np.array_equal(shifted(image, *shift), cropped)
        ]
        assert len(shifts) == 1
        drawn.add(shifts[0])
    assert len(drawn) == 15


def test_crop_and_flip_does_both():
    x = images()
    source = generator()
    expected = augmentations["flip"](augmentations["crop"](x, source), source)
    assert torch.equal(augmentations["crop-flip"](x, generator()), expected)
