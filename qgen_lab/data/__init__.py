"""Data sets in one small shape.

`load_dataset(name)` gives `Splits(train, validation, test)` of `Dataset`; `augmentations` are the
random changes of training images, by name.
"""

from qgen_lab.data.augmentation import augmentations
from qgen_lab.data.datasets import Dataset, Splits, load_dataset, readers
from qgen_lab.data.formats import Arrays, DatasetDamaged, DatasetMissing

__all__ = [
    "Arrays",
    "Dataset",
    "DatasetDamaged",
    "DatasetMissing",
    "Splits",
    "augmentations",
    "load_dataset",
    "readers",
]
