"""Which layers an argument means, and how many bits each gets."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from qgen_lab.codebooks import check_bits

LayerChoice = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def choose(
    available: dict[str, nn.Module], layers: LayerChoice | None, exclude: LayerChoice | None
) -> dict[str, nn.Module]:
    """Return the layers that are meant, by name, in the order of `available`."""
    chosen = set(available) if layers is None else _matching(available, layers, "layers")
    if exclude is not None:
        chosen -= _matching(available, exclude, "exclude")
    return {name: layer for name, layer in available.items() if name in chosen}


def bits_of(
    chosen: dict[str, nn.Module], bits: int | Mapping[str, int] | None
) -> dict[str, int | None]:
    """Return the bits of each layer that is to be quantized."""
    if not isinstance(bits, Mapping):
        return dict.fromkeys(chosen, None if bits is None else check_bits(bits))
    widths = {}
    for pattern, value in bits.items():
        for name in _matching(chosen, pattern, "bits"):
            widths[name] = check_bits(value)
    return widths


def _matching(available: dict[str, nn.Module], choice: LayerChoice, argument: str) -> set[str]:
    """Return the names that `choice` selects, each of its items at least one."""
    items = [choice] if isinstance(choice, str | type) else list(choice)
    selected = set()
    for item in items:
        if isinstance(item, type):
            found = {name for name, layer in available.items() if isinstance(layer, item)}
        elif isinstance(item, str):
            found = {name for name in available if fnmatchcase(name, item)}
        else:
            raise TypeError(f"{argument} holds {item!r}: give names, patterns or layer types")
        if not found:
            raise ValueError(
                f"{argument}={item!r} matches no layer; the layers are: {', '.join(available)}"
            )
        selected |= found
    return selected
