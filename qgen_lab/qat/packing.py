"""Quantized models in one small file: few-bit codes for the weights, all else as it is.

The file is in the safetensors format, so that reading it executes nothing. The book's page on
packed weights describes it, and reads it with NumPy alone.
"""

import copy
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qgen_lab.qat.quantizers import Quantizer, Slot, bake, quantized_slots

__all__ = ["pack", "packed_bytes", "unpack"]

_FORMAT, _VERSION = "qgen-lab packed weights", "1"
_MOST_BITS = 16  # of a code
_LONGEST_INDEX = 2**28  # bytes, against a small file that inflates without end


def pack(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a quantized model as one file: integer codes of its weights, and all other tensors.

    Parameters
    ----------
    model : torch.nn.Module
        A model with quantizers, as `quantize_weights` and `round_model` leave it. It is not
        changed.
    path : str or Path
        The file; folders above it are made. It is written whole or not at all.

    Raises
    ------
    ValueError
        If no weights are quantized; if a quantizer does not round in evaluation mode, does not say
        its levels (`Quantizer.levels_for`), or gives weights that lie on none; or if the model's
        state holds more than tensors.

    Notes
    -----
    Weights of `b` bits take `b` bits each, the bits without gaps. Beside them stands a step for all
    weights that share one, or a table of levels where they are not even; and an index, compressed,
    of about a thousand bytes for a ResNet-18.

    Examples
    --------
    >>> model = quantize_weights(nin(2, 2, seed=0), 3)  # doctest: +SKIP
    >>> pack(model, "nin.safetensors")  # doctest: +SKIP
    >>> nin(2, 2).load_state_dict(unpack("nin.safetensors"))  # doctest: +SKIP
    """
    blocks, path = _blocks(model), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(_serialized(blocks))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def packed_bytes(model: nn.Module) -> int:
    """Return the size of the file that `pack` would write, in bytes.

    Parameters
    ----------
    model : torch.nn.Module
        As for `pack`, which raises the same errors.
    """
    return len(_serialized(_blocks(model)))


def unpack(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a file of `pack`: the `state_dict` of the baked model, bit for bit.

    Parameters
    ----------
    path : str or Path
        The file. Nothing in it is executed.

    Returns
    -------
    dict of str to Tensor
        What `bake(model).state_dict()` gave, on the CPU; a model without quantizers loads it.

    Raises
    ------
    ValueError
        If the file is of another kind or version, or damaged.
    """
    blocks = _read(Path(path))
    try:
        return _state(blocks)
    except (
        *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is damaged: {error}. Pack the model again") from error


@dataclass(frozen=True)
class _Packed:
    """What the index says of a packed tensor; see the page on packed weights.

    The value of code `k` in channel `c` of dimension `channel_dim` is `scale[g] levels[g, k]`,
    `g` counting the `steps` blocks of channels. Scale and levels are arrays beside the codes; no
    scale means one, and no levels mean `first + spacing k`.
    """

    shape: list[int]
    dtype: str
    bits: int
    count: int
    channel_dim: int
    steps: int
    first: float | None = None
    spacing: float | None = None

    def values(self, codes: np.ndarray, arrays: dict[str, np.ndarray]) -> Tensor:
        """Return the tensor, from codes of its shape and the arrays `scale` and `levels`."""
        if self.first is None:
            levels = arrays["levels"].astype(np.float64)
        else:
            levels = self.first + self.spacing * np.arange(self.count)[None]
        scale = arrays.get("scale", np.ones(1)).astype(np.float64)
        channels = self.shape[self.channel_dim]
        step = np.arange(channels) * self.steps // channels
        step = step.reshape([-1 if d == self.channel_dim else 1 for d in range(codes.ndim)])
        values = scale[step % len(scale)] * levels[step % len(levels), codes]
        numpy_dtype = "float32" if self.dtype == "bfloat16" else self.dtype
        with np.errstate(over="ignore"):
            values = values.astype(numpy_dtype) + 0.0  # no negative zeros: `bake` leaves none
        return torch.from_numpy(values).to(getattr(torch, self.dtype))


# Writing


def _blocks(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the file: the index, and one flat block for each dtype."""
    slots = quantized_slots(model)
    if not slots:
        raise ValueError("model has no quantized weights: quantize_weights or round_model first")
    for layer, slot in slots.items():
        if not slot.quantizer.rounds:
            raise ValueError(
                f"the quantizer of layer {layer!r} leaves weights unrounded in evaluation mode, so "
                "they have no codes: quantize with one that rounds"
            )
    names = {module: name for name, module in model.named_modules()}
    layers = {f"{names[s.layer]}.{s.parameter}".lstrip("."): layer for layer, s in slots.items()}
    arrays, packed, same, first_names = {}, {}, {}, {}
    for name, value in bake(copy.deepcopy(model)).state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in the model's state is a {type(value).__name__}, no tensor")
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        first = first_names.setdefault(place, name) if value.numel() else name
        if first != name:
            same[name] = first
        elif name in layers:
            layer = layers[name]
            entry, beside = _pack(layer, slots[layer], value.cpu())
            packed[name] = {k: v for k, v in asdict(entry).items() if v is not None}
            arrays |= {f"{name}.{part}": torch.from_numpy(array) for part, array in beside.items()}
        else:
            arrays[name] = value.cpu()
    return _joined(arrays, {"packed": packed, "same": same})


def _joined(arrays: dict[str, Tensor], index: dict[str, dict]) -> dict[str, Tensor]:
    """Join arrays of the same dtype, and add to the index what lies where."""
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, array in arrays.items():
        shapes.setdefault(_name(array.dtype), {})[name] = list(array.shape)
    text = json.dumps({**index, "arrays": shapes}, separators=(",", ":"))
    blocks = {d: torch.cat([arrays[name].reshape(-1) for name in shapes[d]]) for d in shapes}
    if "bfloat16" in blocks:  # which NumPy does not know
        blocks["bfloat16"] = blocks["bfloat16"].view(torch.uint16)
    blocks["index"] = torch.frombuffer(
        bytearray(zlib.compress(text.encode(), 9)), dtype=torch.uint8
    )
    return blocks


def _serialized(blocks: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(blocks, {_FORMAT: _VERSION})


def _pack(layer: str, slot: Slot, weight: Tensor) -> tuple[_Packed, dict[str, np.ndarray]]:
    """Return entry and arrays of a quantized weight, the shortest that give it back exactly."""
    quantizer, sharing = slot.quantizer, slot.quantizer.sharing
    try:
        levels = quantizer.levels_for(slot.original).detach().cpu()
    except NotImplementedError as error:
        raise ValueError(f"layer {layer!r} cannot be packed: {error}") from error
    levels = levels.expand(sharing.steps, -1)
    count, table = levels.shape[1], levels.to(weight.dtype)
    if count > 2**_MOST_BITS:
        raise ValueError(f"layer {layer!r} has {count} levels: at most {2**_MOST_BITS} are packed")
    index = torch.searchsorted(table.double(), sharing.rows(weight).double().contiguous())
    codes = sharing.unrows(index.clamp(max=count - 1), weight).numpy()
    bits, dim = max(1, (count - 1).bit_length()), sharing.dim
    plain = _Packed(list(weight.shape), _name(weight.dtype), bits, count, dim, sharing.steps)
    for grid, arrays in _grids(quantizer, levels.numpy(), table):
        packed = replace(plain, **grid)
        if torch.equal(packed.values(codes, arrays), weight):
            return packed, {"codes": _to_bits(codes, bits), **arrays}
    raise ValueError(
        f"weights of layer {layer!r} are not finite, or on none of the levels that "
        f"{type(quantizer).__name__}.levels_for says"
    )


def _grids(
    quantizer: Quantizer, levels: np.ndarray, table: Tensor
) -> Iterator[tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Yield ways to write down levels of shape (steps, K), the shortest first, the surest last."""
    scale = quantizer.step_size.cpu().reshape(-1)
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32)).numpy()
    if len(scale) == len(levels) and scale.all():
        unit = levels[0] / scale[0]
        spacing = (unit[-1] - unit[0]) / max(len(unit) - 1, 1)
        yield {"first": _half_integer(unit[0]), "spacing": _half_integer(spacing)}, {"scale": scale}
        if len(levels) > 1:
            yield {}, {"scale": scale, "levels": unit[None]}
    yield {}, {"levels": (table.float() if table.dtype == torch.bfloat16 else table).numpy()}


def _half_integer(value: float) -> float:
    return float(np.round(2 * value) / 2)


def _to_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write codes one after another, `bits` bits each, the lowest bit first."""
    octets = codes.astype("<u2").reshape(-1, 1).view(np.uint8)
    flags = np.unpackbits(octets, axis=1, count=bits, bitorder="little")
    return np.packbits(flags, bitorder="little")


def _from_bits(octets: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `_to_bits`."""
    flags = np.unpackbits(octets, count=bits * count, bitorder="little").reshape(count, bits)
    codes = np.zeros((count, 2), np.uint8)
    codes[:, : (bits + 7) // 8] = np.packbits(flags, axis=1, bitorder="little")
    return codes.view("<u2")[:, 0]


# Reading


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of this format and version."""
    with open(path, "rb"):  # says plainly if there is none
        pass
    try:
        with safe_open(path, "pt") as file:
            version = (file.metadata() or {}).get(_FORMAT)
            blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): cut short, or of another kind"
        ) from error
    if version is None:
        raise ValueError(f"{path} holds no packed weights: write them with pack(model, path)")
    if version != _VERSION:
        raise ValueError(
            f"{path} is of version {version} of the format, and this library reads {_VERSION}: "
            "update qgen-lab"
        )
    return blocks


def _state(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state that the blocks hold, or raise any error if they do not fit together."""
    inflate = zlib.decompressobj()
    text = inflate.decompress(blocks.pop("index").numpy().tobytes(), _LONGEST_INDEX)
    _require(inflate.eof, "the index ends too soon")
    index = json.loads(text)
    arrays = {}
    for dtype, shapes in index["arrays"].items():
        block = blocks.pop(dtype)
        block = block.view(torch.bfloat16) if dtype == "bfloat16" else block
        _require(_name(block.dtype) == dtype, f"a block of {block.dtype} is called {dtype}")
        parts = block.split([math.prod(shape) for shape in shapes.values()])
        arrays |= {
            name: p.reshape(shapes[name]).clone() for name, p in zip(shapes, parts, strict=True)
        }
    _require(not blocks, f"the index says nothing of {', '.join(blocks)}")
    packed = {
        name: _unpack(name, _Packed(**entry), arrays) for name, entry in index["packed"].items()
    }
    state = arrays | packed
    return state | {name: state[first] for name, first in index["same"].items()}


def _unpack(name: str, packed: _Packed, arrays: dict[str, Tensor]) -> Tensor:
    """Decode one tensor, and take its arrays out of `arrays`."""
    parts = (part for part in ("codes", "scale", "levels") if f"{name}.{part}" in arrays)
    beside = {part: arrays.pop(f"{name}.{part}").numpy() for part in parts}
    octets, count = beside.pop("codes"), math.prod(packed.shape)
    _require(
        1 <= packed.bits <= _MOST_BITS and 1 <= packed.count <= 2**packed.bits,
        f"{name} has {packed.bits} bits and {packed.count} levels",
    )
    _require(
        octets.dtype == np.uint8 and octets.size == -(-count * packed.bits // 8),
        f"{name} has {octets.nbytes} bytes of codes for {count} weights of {packed.bits} bits",
    )
    codes = _from_bits(octets, packed.bits, count).reshape(packed.shape)
    _require(codes.max(initial=0) < packed.count, f"{name} has codes beyond its levels")
    _require(
        all(len(array) in (1, packed.steps) for array in beside.values()),
        f"{name} has not one scale or row of levels for each of {packed.steps} steps",
    )
    return packed.values(codes, beside)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
