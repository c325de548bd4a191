"""The one place that imports torchvision, also where its compiled operators do not fit torch.

The ordinary wheel of torchvision is built for a CUDA torch. Beside a CPU torch its operators
cannot be loaded, and its import fails because two of them are missing. Its Python half (models,
transforms, data sets) is all that we need, and imports once those two are declared.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

_SCHEMAS = {
    name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms")
}


def _load_operators() -> None:
    """Load torchvision's compiled operators where they fit this torch, as its own import does."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        raise ModuleNotFoundError(
            "torchvision is not installed: pip install torchvision", name="torchvision"
        )
    extension = PathFinder.find_spec("_C", [str(Path(package.origin).parent)])
    if extension is not None:
        try:
            torch.ops.load_library(extension.origin)
        except (ImportError, OSError):
            return


def _declare_missing_operators() -> torch.library.Library:
    """Declare, without an implementation, the operators that torchvision's import looks up."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library


if "torchvision" not in sys.modules:
    _load_operators()
    _library = _declare_missing_operators()  # kept: the declarations go when it is collected

import torchvision  # noqa: E402

__all__ = ["torchvision"]
