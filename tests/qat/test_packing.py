"""Packed files: what was packed comes back bit for bit, with and without this library."""

import copy
import json
import os
import pickle
import re
import zlib
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from samples import images, network, normal
from torch import nn

from qgen_lab.codebooks import Codebook, power_of_two
from qgen_lab.qat import (
    LSQ,
    Quantizer,
    bake,
    nin,
    quantize_activations,
    quantize_weights,
    resnet18,
    step_sizes,
)
from qgen_lab.qat.packing import pack, packed_bytes, unpack
from qgen_lab.qat.quantizers import FixedCodebook, FixedWidth, NoiseInjection, registry

PAGE = Path(__file__).parents[2] / "book" / "packed_weights.md"
(SNIPPET,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXAMPLES = 15 if numba.config.DISABLE_JIT else 60


def relative(weight, bits, channel_dim):
    """Uneven levels, in standard deviations of the layer or of each channel."""
    return FixedCodebook.attach(power_of_two(bits, 2.0), weight, bits, channel_dim, relative=True)


QUANTIZERS = {
    **{name: build for name, build in registry.items() if name != "noise"},
    "noise, rounded": partial(NoiseInjection, quantized=True),
    "fixed width, relative": FixedWidth(2.0, relative=True),
    "powers of two, relative": relative,
}
WHOLE_LAYER = {
    "fixed width": FixedWidth(1.5),
    "three levels": lambda weight, bits, channel_dim: FixedCodebook(Codebook([-1, 0.1, 1])),
    "two groups": partial(LSQ, groups=2),
}


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(state, expected):
    """Same names, types, shapes and bits, down to the sign of zero."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
        assert as_bytes(state[name]) == as_bytes(value), name


def round_trip(model, path):
    pack(model, path)
    state = unpack(path)
    assert_same(state, bake(copy.deepcopy(model)).state_dict())
    assert packed_bytes(model) == path.stat().st_size
    return state


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("packed") / "model.safetensors"


def read_without_us(path):
    """Run the page's own lines in the file's folder."""
    here, names = Path.cwd(), {}
    os.chdir(path.parent)
    try:
        exec(SNIPPET, names)
    finally:
        os.chdir(here)
    return names["tensors"]


# Round trips


LAYERS = st.one_of(
    st.builds(nn.Linear, st.integers(1, 9), st.integers(1, 9)),
    st.builds(nn.Conv1d, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    st.builds(nn.Conv2d, st.just(4), st.sampled_from([2, 6]), st.integers(1, 3), groups=st.just(2)),
    st.builds(nn.ConvTranspose2d, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    st.builds(nn.ConvTranspose3d, st.just(2), st.just(3), st.just(2)),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(LAYERS, st.data())
def test_round_trip_of_any_layer(path, layer, data):
    name = data.draw(st.sampled_from(sorted(QUANTIZERS)), label="quantizer")
    most = 4 if numba.config.DISABLE_JIT else 8
    bits = data.draw(st.integers(1, most), label="bits")
    per_channel = data.draw(st.booleans(), label="per_channel")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    layer.weight.data = normal(
        *layer.weight.shape, seed=data.draw(st.integers(0, 99), label="seed")
    )
    model = quantize_weights(
        nn.Sequential(layer.to(dtype)), bits, QUANTIZERS[name], None, per_channel
    )
    state = round_trip(model, path)
    if dtype != torch.bfloat16:
        for key, array in read_without_us(path).items():
            np.testing.assert_array_equal(array, state[key].numpy(), strict=True)


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_bit_width_fills_its_bits(path, bits):
    layer = nn.Linear(61, 3, dtype=torch.float64)
    layer.weight.data = normal(3, 61, seed=bits, dtype=torch.float64)
    state = round_trip(quantize_weights(nn.Sequential(layer), bits), path)
    assert safetensors.torch.load_file(path)["uint8"].numel() == -(-3 * 61 * bits // 8)
    for key, array in read_without_us(path).items():
        np.testing.assert_array_equal(array, state[key].numpy(), strict=True)


@pytest.mark.parametrize("name", WHOLE_LAYER)
def test_round_trip_of_quantizers_for_whole_layers(path, name):
    layer = nn.Linear(9, 4, bias=False)
    layer.weight.data = normal(4, 9)
    state = round_trip(quantize_weights(nn.Sequential(layer), 2, WHOLE_LAYER[name]), path)
    np.testing.assert_array_equal(read_without_us(path)["0.weight"], state["0.weight"].numpy())


def test_numpy_reads_bfloat16_as_the_page_says(path):
    model = quantize_weights(network().bfloat16(), 3)
    state, blocks = round_trip(model, path), safetensors.numpy.load_file(path)
    block = blocks["bfloat16"]
    numbers = (block.astype("uint32") << 16).view("float32")
    plain = [v for v in state.values() if v.dtype == torch.bfloat16 and v.dim() == 1]
    np.testing.assert_array_equal(numbers, torch.cat(plain).float().numpy())


def test_a_small_file_by_hand(path):
    """Six codes of three bits: 0 4 7 | 5 1 4 from the lowest level, the lowest bit first."""
    model = quantize_weights(nn.Sequential(nn.Linear(3, 2, bias=False)), 3)
    layer = model[0].parametrizations.weight
    layer[0].step.data.fill_(0.5)
    layer.original.data = torch.tensor([[-9.0, 0.1, 9.0], [0.4, -1.6, -0.1]])
    pack(model, path)
    octets = safetensors.torch.load_file(path)["uint8"].tolist()
    flags = "000 001 111 101 100 001".replace(" ", "").ljust(24, "0")
    assert octets == [int(flags[i : i + 8][::-1], 2) for i in (0, 8, 16)]
    values = [[-2.0, 0.0, 1.5], [0.5, -1.5, 0.0]]
    assert unpack(path)["0.weight"].tolist() == values
    assert read_without_us(path)["0.weight"].tolist() == values


def test_a_level_of_negative_zero_is_zero(path):
    model = quantize_weights(nn.Sequential(nn.Linear(9, 4, bias=False)), 2, "lloyd-max")
    member = model[0].parametrizations.weight[0]
    member.levels.data = torch.tensor([-1.0, -0.0, 0.5, 1.0])
    state = round_trip(model, path)
    assert (state["0.weight"] == 0).any()
    assert not state["0.weight"][state["0.weight"] == 0].signbit().any()


def test_a_plain_network_loads_what_was_packed(path):
    for quantizer in ("lsq", "uniform"):
        model = quantize_weights(network(), {"*": 3, "6": 1}, quantizer, per_channel=True).eval()
        original = copy.deepcopy(model.state_dict())
        pack(model, path)
        assert_same(model.state_dict(), original)
        plain = network(seed=5).eval()
        plain.load_state_dict(unpack(path))
        assert torch.equal(plain(images()), model(images()))


def test_attention_and_quantized_activations(path):
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attn": attention, "head": nn.Sequential(nn.Linear(8, 4), nn.ReLU())})
    quantize_activations(quantize_weights(model, 2, per_channel=True), 4)
    state = round_trip(model, path)
    assert state["attn.in_proj_weight"].shape == (24, 8)
    assert not state["head.1.output_quantizer.started"]
    split = nn.MultiheadAttention(8, 2, kdim=3, vdim=5)
    assert round_trip(quantize_weights(split, 2), path)["k_proj_weight"].shape == (8, 3)


def test_tied_weights_are_stored_once(path):
    class Tied(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(32, 32), nn.Linear(32, 32)
            if tied:
                self.decoder.weight, self.decoder.bias = self.encoder.weight, self.encoder.bias

    tied = quantize_weights(Tied(True), 8)
    state = round_trip(tied, path)
    np.testing.assert_array_equal(read_without_us(path)["decoder.weight"], state["decoder.weight"])
    assert packed_bytes(quantize_weights(Tied(False), 8)) - packed_bytes(tied) > 32 * 32


def test_the_same_model_gives_the_same_bytes(path):
    model = quantize_weights(network(), 3)
    pack(model, path)
    first = path.read_bytes()
    pack(model, path)
    assert path.read_bytes() == first


def test_memory_layouts_and_folders(tmp_path):
    model = quantize_weights(network().to(memory_format=torch.channels_last), 3)
    round_trip(model, tmp_path / "new" / "folder" / "model.safetensors")
    assert [f.name for f in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


# Size


SMALLER = {"base_width": 10} if numba.config.DISABLE_JIT else {}
REAL = {"resnet18": lambda: resnet18(base_width=16), "nin": lambda: nin(4, 10, **SMALLER)}


@pytest.mark.parametrize("name", REAL)
def test_size_is_bits_times_weights_and_the_other_tensors(name):
    for bits in range(1, 9):
        model = quantize_weights(REAL[name](), bits, per_channel=bits % 2 == 0)
        state = bake(copy.deepcopy(model)).state_dict()
        quantized = {f"{layer}.weight" for layer in step_sizes(model)}
        weights = sum(state[key].numel() for key in quantized)
        scales = sum(step.nbytes for step in step_sizes(model).values())
        others = sum(value.nbytes for key, value in state.items() if key not in quantized)
        least = bits * weights / 8 + scales + others
        assert least < packed_bytes(model) < 1.02 * least


def test_grids_of_one_shape_share_their_table():
    """256 powers of two for each of 40 channels, written out, would be 40 KiB."""
    model = nn.Sequential(nn.Linear(100, 40, bias=False))
    for quantizer in (registry["power-of-two"], relative):
        each = packed_bytes(quantize_weights(copy.deepcopy(model), 8, quantizer, per_channel=True))
        assert each < 4000 + 40 * 8 + 256 * 8 + 700


# Writing


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    pack(quantize_weights(network(), 3), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        pack(quantize_weights(network(), 4), path)
    assert path.read_bytes() == before


class Silent(LSQ):
    def levels_for(self, weight):
        return Quantizer.levels_for(self, weight)


class Liar(LSQ):
    def levels_for(self, weight):
        return super().levels_for(weight) * 2


class Stateful(nn.Module):
    def get_extra_state(self):
        return "a string"


def broken():
    model = quantize_weights(network(), 3)
    model[3].parametrizations.weight.original.data[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (network, "quantize_weights or round_model first"),
        (lambda: quantize_weights(network(), 3, "noise"), "layer '0' leaves weights unrounded"),
        (lambda: quantize_weights(network(), 3, Silent), "layer '0' .* define levels_for"),
        (lambda: quantize_weights(network(), 3, Liar), "layer '0' .* none of the levels that Liar"),
        (broken, "layer '3' are not finite"),
        (lambda: quantize_weights(network().append(Stateful()), 3), r"7\._extra_state .* is a str"),
    ],
)
def test_what_cannot_be_packed_is_said(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        pack(build(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        packed_bytes(build())
    assert not list(tmp_path.iterdir())


# Files that are refused


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "model.safetensors"
    pack(quantize_weights(nn.Sequential(nn.Linear(3, 2)), 3), path)
    return path


def test_every_truncation_is_refused(small):
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"no whole safetensors file.*cut short"):
            unpack(small)
    small.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        unpack(small)


def test_a_changed_byte_gives_numbers_or_a_value_error(small):
    whole = small.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        small.write_bytes(changed)
        try:
            state = unpack(small)
        except ValueError:
            continue
        assert all(isinstance(value, torch.Tensor) for value in state.values())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_not_run(tmp_path, write):
    path, proof = tmp_path / "model.safetensors", tmp_path / "it ran"
    with open(path, "wb") as file:
        write(Payload(str(proof)), file)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        unpack(path)
    assert not proof.exists()


def test_foreign_files_and_other_versions_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
        with pytest.raises(ValueError, match="holds no packed weights"):
            unpack(path)
    safetensors.torch.save_file({"a": torch.ones(3)}, path, {"qgen-lab packed weights": "2"})
    with pytest.raises(ValueError, match="version 2 of the format, and this library reads 1"):
        unpack(path)
    for junk in (b"", b"\0" * 100, b"not a model\n" * 9):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="no whole safetensors file"):
            unpack(path)
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "nowhere.safetensors")
    with pytest.raises(IsADirectoryError):
        unpack(tmp_path)


def entry(**change):
    return lambda index, blocks: index["packed"]["0.weight"].update(change)


def block(name, value):
    return lambda index, blocks: blocks.update({name: value})


INCONSISTENT = {
    "more bits than codes": (entry(bits=5), "3 bytes of codes for 6 weights of 5 bits"),
    "no bits": (entry(bits=0), "0 bits"),
    "seventeen bits": (entry(bits=17), "17 bits"),
    "levels beyond the bits": (entry(count=9), "9 levels"),
    "codes beyond the levels": (entry(count=3), "codes beyond its levels"),
    "another shape": (entry(shape=[2, 5]), "bytes of codes for 10 weights"),
    "a negative shape": (entry(shape=[-2, -3]), "damaged"),
    "a shape that is no list": (entry(shape="ab"), "damaged"),
    "two grids, one scale too many": (
        lambda index, blocks: index["arrays"]["float32"].update(
            {"0.weight.scale": [3], "0.bias": [0]}
        ),
        "not one scale or row of levels",
    ),
    "no such channels": (entry(channel_dim=5), "damaged"),
    "a dtype that is a function": (entry(dtype="load"), "damaged"),
    "an unknown key": (entry(colour="red"), "damaged"),
    "no codes": (lambda i, b: i["arrays"]["uint8"].update({"other": i["arrays"]["uint8"].pop(
        "0.weight.codes")}), "damaged"),
    "too short a block": (block("float32", torch.ones(2)), "damaged"),
    "a block of another type": (block("float32", torch.ones(3).double()), "is called float32"),
    "a block too many": (block("int8", torch.ones(3).char()), "says nothing of int8"),
    "tied to nothing": (lambda i, b: i["same"].update({"a": "b"}), "damaged"),
    "a list": (lambda i, b: i.update(packed=[1]), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCONSISTENT)
def test_parts_that_do_not_fit_together_are_refused(small, case):
    change, message = INCONSISTENT[case]
    blocks = safetensors.torch.load_file(small)
    index = json.loads(zlib.decompress(blocks["index"].numpy().tobytes()))
    with safe_open(small, "pt") as file:
        metadata = file.metadata()
    index["packed"]["0.weight"]["count"] = 8
    blocks["uint8"] = torch.tensor([0xFF] * 2 + [0x03], dtype=torch.uint8)  # all codes are seven
    change(index, blocks)
    blocks["index"] = torch.tensor(list(zlib.compress(json.dumps(index).encode()))).byte()
    safetensors.torch.save_file(blocks, small, metadata)
    with pytest.raises(ValueError, match=message) as raised:
        unpack(small)
    assert "is damaged" in str(raised.value)


@pytest.mark.parametrize(
    "index", [b"", b"no zlib", zlib.compress(b"{"), zlib.compress(b"[]"), zlib.compress(b"{}")[:-3]]
)
def test_a_broken_index_is_refused(small, index):
    blocks = safetensors.torch.load_file(small)
    blocks["index"] = torch.tensor(list(index)).byte()
    safetensors.torch.save_file(blocks, small, {"qgen-lab packed weights": "1"})
    with pytest.raises(ValueError, match="is damaged"):
        unpack(small)


def test_an_index_that_inflates_without_end_is_refused(small, monkeypatch):
    monkeypatch.setattr("qgen_lab.qat.packing._LONGEST_INDEX", 1000)
    blocks = safetensors.torch.load_file(small)
    blocks["index"] = torch.tensor(list(zlib.compress(b" " * 10_000 + b"{}"))).byte()
    safetensors.torch.save_file(blocks, small, {"qgen-lab packed weights": "1"})
    with pytest.raises(ValueError, match="is damaged"):
        unpack(small)
