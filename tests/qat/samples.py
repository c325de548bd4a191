"""What the tests of quantizers share: a small network, images, and random numbers."""

import numba
import torch
from torch import nn

# Few to many; uncompiled, the search for the best 256 levels alone takes half a minute.
BITS = (1, 2, 3) if numba.config.DISABLE_JIT else (1, 2, 3, 5, 8)


def network(seed=0):
    """Two convolutions, one of them 1x1, and a linear layer, on images of shape (3, 6, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(128, 5),
        )


def images(seed=0, size=4, dtype=torch.float32):
    return torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
