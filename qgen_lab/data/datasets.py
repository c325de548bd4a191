"""Data sets: one small shape for all, and loading by name with seeded choices."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qgen_lab.data.augmentation import augmentations
from qgen_lab.data.formats import (
    Arrays,
    Part,
    read_cifar10,
    read_cifar100,
    read_diabetes,
    read_digits,
    read_fashion_mnist,
    read_image_folder,
)

Normalization = str | tuple[Tensor | list[float], Tensor | list[float]]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Inputs and targets of one split, in memory, and how a batch of them is normalised.

    Parameters
    ----------
    inputs : Tensor
        Images as bytes (uint8), shape (N, H, W, C), or features as float32, shape (N, D).
    targets : Tensor
        Class numbers, int64, shape (N,), or for regression float32, shape (N, K).
    classes : tuple of str
        Names of the classes in order; empty for regression.
    mean, std : Tensor or float
        What a batch is normalised by: shape (C,) in units of inputs/255 for images, shape (D,)
        in units of the inputs for features.

    Raises
    ------
    ValueError
        If inputs and targets differ in number, or have another shape or dtype than above.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()
    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0

    def __post_init__(self):
        kind = (self.inputs.dtype, self.inputs.dim())
        if kind not in {(torch.uint8, 4), (torch.float32, 2)}:
            raise ValueError(
                f"inputs are {kind[0]} of shape {tuple(self.inputs.shape)}: use uint8 images of"
                " shape (N, H, W, C) or float32 features of shape (N, D)"
            )
        if (self.targets.dtype, self.targets.dim()) not in {(torch.int64, 1), (torch.float32, 2)}:
            raise ValueError(
                f"targets are {self.targets.dtype} of shape {tuple(self.targets.shape)}: use int64"
                " class numbers of shape (N,) or float32 values of shape (N, K)"
            )
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")
        for name in ("mean", "std"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32)
            value = value.to(self.inputs.device).expand(self.inputs.shape[-1])
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.inputs.shape[1:]))
        inputs = f"images {shape}" if self.is_images else f"rows of {shape} features"
        targets = f"{len(self.classes)} classes" if self.classes else "regression"
        return f"Dataset({len(self)} {inputs}, {targets}, on {self.inputs.device})"

    @property
    def is_images(self) -> bool:
        """Whether the inputs are images, not features."""
        return self.inputs.dtype == torch.uint8

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device; images stay bytes there."""
        moved = {
            name: getattr(self, name).to(device) for name in ("inputs", "targets", "mean", "std")
        }
        return replace(self, **moved)

    def take(self, indices: Tensor | NDArray | list[int] | slice) -> "Dataset":
        """A copy of the samples at `indices` (integers, a mask, or a slice), normalised alike."""
        rows = self._rows(indices)
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def batch(self, indices: Tensor | NDArray | list[int] | slice | None = None):
        """Samples ready for a model.

        Parameters
        ----------
        indices : integers, a mask, or a slice, optional
            Which samples; all of them by default.

        Returns
        -------
        inputs : Tensor
            Normalised float32, shape (N, C, H, W) for images, in channels-last memory order; shape
            (N, D) for features.
        targets : Tensor
            A copy of the targets.
        """
        rows = self._rows(slice(None) if indices is None else indices)
        return self._ready(self.inputs[rows]), self.targets[rows]

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augmentation: str = "none",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through all samples once, in batches as `batch` gives them; the last may be short.

        Parameters
        ----------
        batch_size : int
            Samples per batch.
        shuffle : bool
            Whether the order is random.
        generator : torch.Generator, optional
            Source of randomness; needed to shuffle or to augment. It may be on another device.
        augmentation : str
            A name of `qgen_lab.data.augmentations`.

        Raises
        ------
        ValueError
            If `batch_size` is not positive, `augmentation` is unknown or does not apply to
            features, or randomness is asked for without a generator.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: use a positive number")
        if augmentation not in augmentations:
            raise ValueError(f"augmentation = {augmentation!r}: use one of {sorted(augmentations)}")
        if augmentation != "none" and not self.is_images:
            raise ValueError(f"augmentation = {augmentation!r} is for images: use 'none'")
        if generator is None and (shuffle or augmentation != "none"):
            raise ValueError(
                "shuffling and augmentation need a generator:"
                " pass generator=torch.Generator().manual_seed(0)"
            )
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=generator, device=generator.device)
        return self._batches(order.to(self.inputs.device), batch_size, generator, augmentation)

    def _batches(self, order, batch_size, generator, augmentation):
        augment = augmentations[augmentation]
        for rows in order.split(batch_size):
            yield self._ready(augment(self.inputs[rows], generator)), self.targets[rows]

    def _rows(self, indices) -> Tensor:
        """Indices as a tensor, so that indexing copies and never shares memory."""
        if isinstance(indices, slice):
            return torch.arange(*indices.indices(len(self)), device=self.inputs.device)
        return torch.as_tensor(indices, device=self.inputs.device)

    def _ready(self, inputs: Tensor) -> Tensor:
        """Normalised float32, images as (N, C, H, W)."""
        if not self.is_images:
            return (inputs - self.mean) / self.std
        scaled = inputs.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        return scaled.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Splits:
    """A data set to train on, one to choose on, one to report on; what is absent is None."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None

    def to(self, device: torch.device | str) -> "Splits":
        """All of it on another device."""
        parts = (self.train, self.validation, self.test)
        return Splits(*(part and part.to(device) for part in parts))


Reader = Callable[[Path, bool], Arrays]

readers: dict[str, Reader] = {
    "digits": read_digits,
    "diabetes": read_diabetes,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "fashion_mnist": read_fashion_mnist,
    "image_folder": read_image_folder,
}


def load_dataset(
    name: str,
    root: str | Path | None = None,
    validation: float = 0.0,
    seed: int = 0,
    *,
    size: int | None = None,
    label_noise: float = 0.0,
    normalization: Normalization = "standard",
    resize: int | tuple[int, int] | None = None,
    download: bool = False,
) -> Splits:
    """Load a data set by name.

    `digits` and `diabetes` (a regression) come with scikit-learn and need no files. `cifar10` and
    `cifar100` are read from torchvision's layout or from WebP sheets, `fashion_mnist` from
    torchvision's layout, `image_folder` from `root/train/<class>/*` with `test` and `validation`
    (or `val`) beside it. Everything is held in memory, images as bytes.

    Parameters
    ----------
    name : str
        digits, diabetes, cifar10, cifar100, fashion_mnist, or image_folder.
    root : path, optional
        Where the files are; by default the environment variable `QGEN_DATA`, else the folder
        `qgen-lab` in the user's cache.
    validation : float
        Share of the training set that is set apart, stratified by class, from 0 to below 1.
    seed : int
        Decides which samples are set apart, kept, and mislabelled. The three choices use streams
        of their own: which sample comes first in one does not depend on the others.
    size : int, optional
        Number of training samples kept, after the validation samples are set apart, stratified by
        class. A smaller size keeps a subset of what a larger one keeps.
    label_noise : float
        Share of the kept training labels that is replaced by a different class, drawn uniformly.
        Validation and test labels stay true.
    normalization : {"standard", "none"} or pair (mean, std)
        How batches are normalised: by the mean and standard deviation of the kept training
        samples, not at all, or by the values given (per channel in units of inputs/255, or per
        feature).
    resize : int or (height, width), optional
        For `image_folder` only: the common size that images are scaled to cover and cut to.
    download : bool
        Whether torchvision may download what is not there.

    Returns
    -------
    Splits
        `validation` is None unless asked for or present as a folder.

    Raises
    ------
    ValueError
        If an argument is out of its range or the name is unknown.
    DatasetMissing
        If the files are not there; a FileNotFoundError.
    DatasetDamaged
        If a file is absent, cut short or altered; a ValueError.
    """
    if name not in readers:
        raise ValueError(f"name = {name!r}: use one of {', '.join(sorted(readers))}")
    if resize is not None and name != "image_folder":
        raise ValueError(f"resize = {resize!r} is for image_folder: leave it out for {name}")
    options = {} if resize is None else {"resize": resize}
    arrays = readers[name](_root(root), download, **options)
    if validation and arrays.validation is not None:
        raise ValueError(f"validation = {validation}: {name} has a validation folder: leave it out")

    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
    apart, kept = _choose_rows(arrays, validation, size, *streams[:2])
    targets = _mislabel(arrays, kept, label_noise, streams[2])

    train = _dataset((arrays.train[0], targets), arrays.classes, kept)
    if arrays.validation is not None:
        held_out = _dataset(arrays.validation, arrays.classes)
    else:
        held_out = _dataset(arrays.train, arrays.classes, apart) if apart.size else None
    test = _dataset(arrays.test, arrays.classes) if arrays.test is not None else None
    mean, std = _mean_and_std(normalization, train)
    return Splits(*(part and replace(part, mean=mean, std=std) for part in (train, held_out, test)))


def _root(root: str | Path | None) -> Path:
    """Where data sets lie."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root or os.environ.get("QGEN_DATA") or Path(cache) / "qgen-lab").expanduser()


def _choose_rows(
    arrays: Arrays,
    validation: float,
    size: int | None,
    split: np.random.Generator,
    keep: np.random.Generator,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the training set that are set apart, and rows that are kept, both ascending."""
    n = len(arrays.train[1])
    # Without classes all samples are of one kind.
    labels = arrays.train[1] if arrays.classes else np.zeros(n, np.intp)
    n_apart = round(validation * n) if 0 <= validation < 1 else n
    if n_apart >= n or (validation > 0 and n_apart == 0):
        raise ValueError(
            f"validation = {validation!r}: use 0, or a share that leaves some of the {n} training"
            " samples on both sides"
        )
    rest = n - n_apart
    if size is not None and not (size == int(size) and 1 <= size <= rest):
        raise ValueError(f"size = {size!r}: use a whole number from 1 to {rest}")
    order = _stratified(labels, np.arange(n), split.random(n))
    apart, others = np.sort(order[:n_apart]), np.sort(order[n_apart:])
    kept = _stratified(labels, others, keep.random(n))[:size]
    return apart, np.sort(kept)


def _stratified(
    labels: NDArray, rows: NDArray[np.intp], priority: NDArray[np.float64]
) -> NDArray[np.intp]:
    """`rows` in an order of which every beginning has the classes in their proportions.

    Within a class, and between classes whose turn it is, the lower priority comes first.
    """
    rows = rows[np.lexsort((priority[rows], labels[rows]))]
    _, first, count = np.unique(labels[rows], return_index=True, return_counts=True)
    place = np.arange(rows.size) - np.repeat(first, count)
    turn = (place + 0.5) / np.repeat(count, count)
    return rows[np.lexsort((priority[rows], turn))]


def _mislabel(
    arrays: Arrays, kept: NDArray[np.intp], share: float, noise: np.random.Generator
) -> NDArray:
    """The training targets, a share of the kept ones replaced by a different class."""
    targets, n_classes = arrays.train[1], len(arrays.classes)
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise = {share!r}: use a share from 0 to 1")
    if share == 0:
        return targets
    if n_classes < 2:
        raise ValueError(f"label_noise = {share!r} needs classes: use 0 for a regression")
    priority = noise.random(len(targets))
    shift = noise.integers(1, n_classes, len(targets))
    chosen = kept[np.argsort(priority[kept])[: round(share * kept.size)]]
    targets = targets.astype(np.int64)
    targets[chosen] = (targets[chosen] + shift[chosen]) % n_classes
    return targets


def _dataset(part: Part, classes: tuple[str, ...], rows: NDArray[np.intp] | None = None) -> Dataset:
    """A copy of some rows of a part, or all, as tensors."""
    inputs, targets = part
    rows = np.arange(len(targets)) if rows is None else rows
    targets = targets[rows].astype(np.int64 if classes else np.float32)
    return Dataset(torch.from_numpy(inputs[rows]), torch.from_numpy(targets), classes)


def _mean_and_std(
    normalization: Normalization, train: Dataset
) -> tuple[Tensor | float, Tensor | float]:
    """What to normalise by; a channel or feature that never changes is divided by one."""
    if isinstance(normalization, str):
        if normalization not in ("standard", "none"):
            raise ValueError(
                f"normalization = {normalization!r}: use 'standard', 'none' or a pair (mean, std)"
            )
        return _moments(train) if normalization == "standard" else (0.0, 1.0)
    channels = train.inputs.shape[-1]
    mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in normalization)
    if not (mean.shape == std.shape == (channels,) and bool((std > 0).all())):
        raise ValueError(
            f"normalization = {normalization!r}: give (mean, std) with {channels} values each,"
            " std positive"
        )
    return mean, std


def _moments(train: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of inputs/255, or per feature."""
    if train.is_images:
        # Exact, and far faster than sums of a whole image set as floats.
        channels = train.inputs.unbind(-1)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in channels])
        share = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ values
        std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    else:
        std, mean = torch.std_mean(train.inputs.double(), 0, correction=0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()
