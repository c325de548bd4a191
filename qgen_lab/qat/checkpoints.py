"""Checkpoints of a training run: written whole or not at all, read without executing anything."""

import hashlib
import os
import pickle
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen_lab.data import Dataset
from qgen_lab.qat.batches import Source
from qgen_lab.qat.quantizers import bits_per_layer
from qgen_lab.qat.recipes import Recipe

__all__ = ["Checkpoint", "CheckpointRefused"]

_FORMAT = 1


class CheckpointRefused(ValueError):
    """A checkpoint that is damaged, unsafe, or of another training run."""


class Checkpoint:
    """A file with the state of one training run, and beside it the state before, `*.previous`.

    The files hold tensors, numbers, strings and plain containers of them; `torch.load` reads them
    with ``weights_only=True``, which executes nothing.

    Parameters
    ----------
    path : str or Path
        The file; folders above it are made.
    run : dict
        What tells this training run from others, as `describe` gives it.

    Raises
    ------
    ValueError
        If `path` is a directory.
    """

    def __init__(self, path: str | os.PathLike, run: dict[str, Any]) -> None:
        self.path, self.run = Path(path), run
        self.previous = self.path.with_name(f"{self.path.name}.previous")
        if self.path.is_dir():
            raise ValueError(f"checkpoint must be a file, and {self.path} is a directory")

    def save(self, state: dict[str, Any]) -> None:
        """Write the state; a kill at any moment leaves this one or the one before it whole.

        Raises
        ------
        TypeError
            If the state holds more than tensors, numbers, strings and plain containers.
        """
        content = {"format": _FORMAT, "run": self.run, "state": state}
        _require_plain(content, "checkpoint")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(unfinished, self.path)

    def load(self) -> dict[str, Any] | None:
        """Return the last state that is whole, or None if there is no file.

        Raises
        ------
        CheckpointRefused
            If no file is whole, or if the whole one would execute code or is of another run.
        """
        files = [path for path in (self.path, self.previous) if path.exists()]
        for path in files:
            content = _content(path)
            if content is not None:
                state = self._state(path, content)
                if path != files[0]:
                    self._fall_back()
                return state
        if files:
            raise CheckpointRefused(
                f"{' and '.join(map(str, files))}: damaged (cut short or altered), nothing was "
                "loaded; remove it to start anew"
            )
        return None

    def _state(self, path: Path, content: Any) -> dict[str, Any]:
        """The state in a file, after a check that it is of this run."""
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise CheckpointRefused(f"{path} is not a checkpoint of fit (format {_FORMAT})")
        differences = _differences(self.run, content["run"])
        if differences:
            raise CheckpointRefused(
                f"{path} is of another training run: {'; '.join(differences)}. "
                "Resume with what that run had, or give another path"
            )
        return content["state"]

    def _fall_back(self) -> None:
        """Put the file before in the place of the damaged one, and say so."""
        warnings.warn(
            f"{self.path} is damaged (cut short or altered); training goes on from the "
            f"checkpoint before it, {self.previous.name}",
            RuntimeWarning,
            stacklevel=2,
        )
        os.replace(self.previous, self.path)


def describe(
    model: nn.Module, recipe: Recipe, seed: int, sources: dict[str, Source | None]
) -> dict[str, Any]:
    """Return what tells a training run from others, before its first step.

    The content of data is compared where it lies in memory; of an iterable, only its length.
    """
    tensors = model.state_dict()
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "model": {
            "tensors": {name: _kind(value) for name, value in tensors.items()},
            "bits": {name: float(bits) for name, bits in bits_per_layer(model).items()},
            "initial weights": _digest(*tensors.values()),
        },
        **{name: source and _describe_data(source) for name, source in sources.items()},
    }


def _describe_data(source: Source) -> dict[str, Any]:
    data = source.data
    if source.targets is None:
        return {"batches": len(data) if hasattr(data, "__len__") else None}
    normalization = (data.mean, data.std) if isinstance(data, Dataset) else ()
    return {
        "inputs": _kind(data.inputs),
        "targets": _kind(data.targets),
        "content": _digest(data.inputs, data.targets, *normalization),
    }


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _digest(*tensors: Any) -> str:
    """A short check sum of the tensors' bytes."""
    total = hashlib.sha256()
    for value in tensors:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(memoryview(flat.view(torch.uint8).numpy()))
    return total.hexdigest()[:16]


def _differences(here: Any, there: Any, name: str = "") -> list[str]:
    """Return what differs between two nested dictionaries, in words."""
    if isinstance(here, dict) and isinstance(there, dict):
        prefix = f"{name}." if name else ""
        keys = [*here, *(key for key in there if key not in here)]
        return [
            difference
            for key in keys
            for difference in _differences(here.get(key), there.get(key), f"{prefix}{key}")
        ]
    return [] if here == there else [f"{name} is {here!r} here and {there!r} there"]


def _content(path: Path) -> Any:
    """What a file holds, or None if it is damaged."""
    with open(path, "rb") as file:
        try:
            if zipfile.ZipFile(file).testzip() is not None:
                return None
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # of a file that is whole
            raise CheckpointRefused(
                f"{path} holds more than tensors, numbers and plain containers, and loading it "
                "could execute code; it was not loaded"
            ) from error
        except Exception:  # a damaged archive can trip its readers anywhere
            return None


_PLAIN = (Tensor, int, float, str, bytes, bool, type(None))


def _require_plain(value: Any, name: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            _require_plain(key, f"a key of {name}")
            _require_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}[{index}]")
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{name} is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings and "
            "plain containers only, since reading anything else could execute code"
        )
