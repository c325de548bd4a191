"""Models with few-bit weights: whether, when and why they generalize better, and which to pick.

The rooms, from the ground floor up: `codebooks`, `theory` and `data`, `qat`, `flatness`,
`experiments`; `plotting` stands beside them. Each is imported on first use.
"""

import importlib

__version__ = "0.1.0"

_ROOMS = ("codebooks", "data", "experiments", "flatness", "plotting", "qat", "theory")


def __getattr__(name: str):
    """Import a room when it is first asked for, so that `import qgen_lab` stays instant."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
