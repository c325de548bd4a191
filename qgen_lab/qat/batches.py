"""Batches of any kind of data, on a model's device and in the memory format it is fastest in."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgen_lab.data import Dataset
from qgen_lab.qat.recipes import Recipe

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TensorPair:
    """A pair of tensors, in batches."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"data has {len(self.inputs)} inputs for {len(self.targets)} targets")

    def to(self, device: torch.device) -> "TensorPair":
        """The same data on another device."""
        return TensorPair(self.inputs.to(device), self.targets.to(device))

    def batches(
        self, batch_size: int, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Dataset.batches`."""
        size = len(self.targets)
        order = torch.randperm(size, generator=generator) if shuffle else torch.arange(size)
        for indices in order.split(batch_size):
            yield self.inputs[indices], self.targets[indices]


class Source:
    """Batches of any kind of data, on the model's device and in its memory format."""

    def __init__(self, data: Any, model: nn.Module) -> None:
        self.device = device_of(model)
        self.image_format = image_format_of(model)
        self.has_batch_norm = any(isinstance(module, BATCH_NORM) for module in model.modules())
        if isinstance(data, tuple) and _is_pair(data):
            data = TensorPair(*data)
        if isinstance(data, Dataset | TensorPair):
            data = data.to(self.device)
        elif not isinstance(data, Iterable) or isinstance(data, Iterator | Tensor):
            raise TypeError(
                "data must be Splits, a Dataset, a pair of tensors (inputs, targets), or an "
                "iterable of such pairs that can be gone through again, such as a DataLoader; "
                f"got {type(data).__name__}"
            )
        self.data = data

    @property
    def targets(self) -> Tensor | None:
        """All targets, where they lie in one tensor."""
        return self.data.targets if isinstance(self.data, Dataset | TensorPair) else None

    def steps(self, recipe: Recipe) -> int | None:
        """Batches of a training epoch, where known."""
        if self.targets is None:
            return len(self.data) if hasattr(self.data, "__len__") else None
        size, batch_size = len(self.targets), recipe.batch_size
        skipped = size % batch_size == 1 < min(size, batch_size) and self.has_batch_norm
        return math.ceil(size / batch_size) - skipped

    def batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The clean pass."""
        return self._placed(self.data if self.targets is None else self.data.batches(batch_size))

    def shuffled(
        self, recipe: Recipe, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one training epoch."""
        batches = self.data
        if self.targets is not None:
            options = {"shuffle": True, "generator": generator}
            if isinstance(self.data, Dataset):
                options["augmentation"] = recipe.augmentation
            batches = self.data.batches(recipe.batch_size, **options)
        full = 0
        for inputs, targets in self._placed(batches):
            full = full or len(targets)
            if len(targets) == 1 < full and self.has_batch_norm:
                continue
            yield inputs, targets

    def _placed(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            if not _is_pair(batch):
                raise TypeError(f"a batch must be a pair of tensors, got {type(batch).__name__}")
            inputs, targets = batch
            image_format = self.image_format if inputs.dim() == 4 else torch.preserve_format
            yield (
                inputs.to(self.device, non_blocking=True, memory_format=image_format),
                targets.to(self.device, non_blocking=True),
            )


def _is_pair(batch: Any) -> bool:
    is_sequence = isinstance(batch, tuple | list) and len(batch) == 2
    return is_sequence and all(isinstance(part, Tensor) for part in batch)


BATCH_NORM = nn.modules.batchnorm._BatchNorm


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model has no parameters")
    return parameter.device


def image_format_of(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutions on a CPU, where it can halve the time of a step."""
    has_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if has_images and device_of(model).type == "cpu":
        return torch.channels_last
    return torch.preserve_format


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Hold kernels in the model's image format inside the block, and as they were after it."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.is_contiguous()]
    image_format = image_format_of(model)
    for kernel in kernels:
        kernel.data = kernel.data.to(memory_format=image_format)
    try:
        yield
    finally:
        for kernel in kernels:
            kernel.data = kernel.data.contiguous()
