"""What quantize_weights attaches, what every quantizer does, and bad input."""

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from samples import BITS, images, network, normal
from torch import nn
from torch.nn.utils import parametrize

from qgen_lab.codebooks import power_of_two
from qgen_lab.qat import (
    LSQ,
    Quantizer,
    bake,
    bin_widths,
    bits_per_layer,
    codes,
    parameter_groups,
    quantization_noise,
    quantize_weights,
    quantizers,
    step_sizes,
)
from qgen_lab.qat.quantizers import FixedWidth, NoiseInjection, quantized_slots

# What quantize_weights attaches


def test_every_step_is_trained_saved_and_loaded():
    model = quantize_weights(network(), 4)
    steps = {n: p for n, p in model.named_parameters() if n.endswith(".step")}
    assert len(steps) == 3
    model(images()).square().mean().backward()
    assert all(p.grad is not None and p.grad != 0 for p in steps.values())
    assert steps.keys() <= model.state_dict().keys()
    decayed, free = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0.0
    assert {id(p) for p in free["params"]} == {id(p) for p in steps.values()}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    torch.optim.SGD([decayed, free], lr=0.1, momentum=0.9).step()

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantize_weights(network(seed=5), 4)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert step_sizes(other) == step_sizes(model)


def test_plain_models_have_one_parameter_group():
    assert len(parameter_groups(network(), 0.1)) == 1


def test_a_copy_trains_by_itself():
    model = quantize_weights(network(), 3)
    model(images()).sum().backward()
    twin = copy.deepcopy(model)
    before = step_sizes(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(images()).sum().backward()
    optimizer.step()
    assert step_sizes(model) == before
    assert step_sizes(twin) != before


def test_the_reports_fit_together():
    model = network()
    floats = {name: layer.weight.detach().clone() for name, layer in model.named_modules()
              if isinstance(layer, nn.Conv2d | nn.Linear)}  # fmt: skip
    quantize_weights(model, {"*": 4, "6": 1}, per_channel=True)
    assert bits_per_layer(model) == {"0": 4, "3": 4, "6": 1}
    steps, code, noise = step_sizes(model), codes(model), quantization_noise(model)
    for name, weight in floats.items():
        layer = model.get_submodule(name)
        original = layer.parametrizations.weight.original
        assert torch.equal(original, weight)
        assert steps[name].shape == (weight.shape[0],)
        assert code[name].dtype == torch.int32
        per_weight = steps[name].view(-1, *[1] * (weight.dim() - 1))
        assert torch.equal(layer.weight, per_weight * code[name])
        assert torch.equal(noise[name], weight - layer.weight)
        assert not (noise[name].requires_grad)
        assert not (steps[name].requires_grad)
    assert set(code["6"].unique().tolist()) == {-1, 1}
    assert code["0"].min() >= -8
    assert code["0"].max() <= 7


def test_bake_leaves_plain_weights_on_the_grid():
    model = quantize_weights(network(), 3).eval()
    originals = [layer.parametrizations.weight.original for layer in (model[0], model[3], model[6])]
    expected, weights = model(images()), [layer.weight for layer in (model[0], model[3], model[6])]
    assert bake(model) is model
    assert torch.equal(model(images()), expected)
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert model.state_dict().keys() == network().state_dict().keys()
    for layer, original, weight in zip(
        (model[0], model[3], model[6]), originals, weights, strict=True
    ):
        assert layer.weight is original
        assert torch.equal(layer.weight, weight)
        assert layer.weight.requires_grad
    assert bake(model) is model  # nothing left to do
    assert not step_sizes(model)


def test_a_copy_is_baked_by_itself():
    model = quantize_weights(network(), 3).eval()
    expected = model(images())
    baked = bake(copy.deepcopy(model))
    assert len(step_sizes(model)) == 3
    assert torch.equal(model(images()), expected)
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(baked(images()), expected)
    assert torch.equal(copy.deepcopy(baked)(images()), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


def test_tied_weights_share_one_quantizer():
    model = quantize_weights(Tied(), 3)
    assert len([n for n, _ in model.named_parameters() if n.endswith("step")]) == 1
    assert step_sizes(model)["encoder"] == step_sizes(model)["decoder"]
    model(normal(2, 4)).sum().backward()
    twin = copy.deepcopy(model)
    original = twin.encoder.parametrizations.weight.original
    assert original is twin.decoder.parametrizations.weight.original
    weight = model.encoder.weight.detach().clone()
    bake(model)
    assert model.encoder.weight is model.decoder.weight
    assert torch.equal(model.encoder.weight, weight)


def test_bits_may_follow_names_and_patterns():
    model = quantize_weights(network(), {"*": 8, "3": 2})
    assert bits_per_layer(model) == {"0": 8, "3": 2, "6": 8}
    model = quantize_weights(network(), {"[03]": 4})
    assert bits_per_layer(model) == {"0": 4, "3": 4}
    assert bits_per_layer(quantize_weights(network(), np.int64(4)))["0"] == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"0", "3", "6"}),
        ({"layers": "0"}, {"0"}),
        ({"layers": ["0", nn.Linear]}, {"0", "6"}),
        ({"layers": nn.Conv2d}, {"0", "3"}),
        ({"exclude": nn.Linear}, {"0", "3"}),
        ({"layers": "[0-3]", "exclude": ("3",)}, {"0"}),
    ],
)
def test_layers_are_chosen_by_name_pattern_or_type(arguments, expected):
    assert set(step_sizes(quantize_weights(network(), 4, **arguments))) == expected


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (nn.Conv1d(4, 6, 3), 6),
        (nn.Conv3d(4, 6, 3), 6),
        (nn.ConvTranspose2d(4, 6, 3), 6),
        (nn.Conv2d(4, 6, 3, groups=2), 6),
        (nn.Linear(4, 6), 6),
    ],
)
def test_channels_are_output_channels(layer, channels):
    quantize_weights(layer, 4, per_channel=True)
    assert step_sizes(layer)[""].shape == (channels,)


def test_one_may_quantize_in_stages_and_assign_weights():
    model = quantize_weights(quantize_weights(network(), 8, layers="0"), 2, exclude="0")
    assert bits_per_layer(model) == {"0": 8, "3": 2, "6": 2}
    new = normal(8, 8, 1, 1, seed=9)
    model[3].weight = new
    assert torch.equal(model[3].parametrizations.weight.original, new)


def test_steps_learn_where_the_float_weights_are_frozen():
    model = network()
    model[0].requires_grad_(False)
    quantize_weights(model, 4)
    model(images()).square().mean().backward()
    assert model[0].parametrizations.weight[0].step.grad != 0
    assert model[0].parametrizations.weight.original.grad is None


# The protocol: what every member does


class Ternary(Quantizer):
    """A user's own quantizer: threshold at half the mean magnitude, one level each side."""

    bits = float(np.log2(3))

    def __init__(self, weight, bits, channel_dim):
        super().__init__()
        self.register_buffer("threshold", weight.detach().abs().mean() / 2)

    @property
    def step_size(self):
        return 2 * self.threshold

    def code(self, weight):
        return (weight.sign() * (weight.abs() > self.threshold)).to(torch.int32)

    def forward(self, weight):
        return weight + (self.step_size * self.code(weight) - weight).detach()


RELATIVE = FixedWidth(2.0, relative=True)
MEMBERS = {
    **{f"{name}, {b} bits": (name, b) for name in quantizers.registry for b in BITS},
    "lsq, 16 bits": ("lsq", 16),
    "lsq in blocks": (partial(LSQ, groups=1), 4),
    "codebook": (power_of_two(3, 0.4), None),
    "fixed width": (FixedWidth(0.2), 3),
    "fixed relative width": (RELATIVE, 3),
    "noise, rounded in the end": (partial(NoiseInjection, grid=RELATIVE, quantized=True), 3),
    "own": (Ternary, 2),
    "own, as noise": (partial(NoiseInjection, grid=Ternary), 2),
}
PER_CHANNEL = {
    **{f"{name} per channel": (name, 3) for name in quantizers.registry},
    "fixed relative width per channel": (RELATIVE, 3),
}
EVERY = [
    *(pytest.param(*m, False, id=name) for name, m in MEMBERS.items()),
    *(pytest.param(*m, True, id=name) for name, m in PER_CHANNEL.items()),
]


def assert_on_a_grid(slot, bits):
    """Few levels, an ascending code for each; and they stay where they are, if held."""
    weight, code = slot.weight.detach(), slot.quantizer.code(slot.original)
    assert code.dtype == torch.int32
    rows = slot.quantizer.sharing.rows
    for values, codes_of_values in zip(rows(weight), rows(code), strict=True):
        assert len(values.unique()) <= round(2**bits)
        order = codes_of_values.argsort()
        steps, rises = codes_of_values[order].diff(), values[order].diff()
        assert (rises >= 0).all()
        assert (steps[rises == 0] == 0).all()
    if not any(getattr(module, "relative", False) for module in slot.quantizer.modules()):
        assert torch.equal(slot.quantizer(weight), weight)


@pytest.mark.parametrize(("member", "bits", "per_channel"), EVERY)
def test_every_quantizer_keeps_the_protocol(member, bits, per_channel):
    def attach(model):
        return quantize_weights(model, bits, member, per_channel=per_channel)

    model = attach(network())
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-3), lr=0.05, momentum=0.9)
    learned = [p for p in model.parameters() if p.requires_grad]
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
        optimizer.step()

    model.eval()
    for name, slot in quantized_slots(model).items():
        assert isinstance(slot.quantizer, Quantizer)
        assert slot.weight.shape == slot.original.shape
        assert slot.weight.dtype == slot.original.dtype
        assert (step_sizes(model)[name] > 0).all()
        assert bin_widths(model)[name].shape == step_sizes(model)[name].shape
        assert str(slot.quantizer)
        assert torch.equal(quantization_noise(model)[name], slot.original - slot.weight)
        if slot.quantizer.rounds:
            assert_on_a_grid(slot, bits_per_layer(model)[name])
        else:
            assert torch.equal(slot.weight, slot.original)
    expected = model(images())
    assert expected.isfinite().all()

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = attach(network(seed=7)).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images()), expected)
    for name, step in step_sizes(model).items():
        assert torch.equal(step_sizes(other)[name], step)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    assert torch.equal(bake(model)(images()), expected)
    assert torch.equal(twin(images()), expected)
    assert model.state_dict().keys() == network().state_dict().keys()
    network().load_state_dict(model.state_dict())


@pytest.mark.parametrize(("member", "bits", "per_channel"), EVERY)
def test_baking_a_model_in_training_mode_leaves_its_evaluation_weights(member, bits, per_channel):
    model = quantize_weights(network(), bits, member, per_channel=per_channel)
    expected = copy.deepcopy(model).eval()
    expected = {name: slot.weight.detach() for name, slot in quantized_slots(expected).items()}
    assert model.training
    bake(model)
    assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in expected.items())


# Bad input


def first_weight(value):
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    return model


class Reshaping(Ternary):
    def forward(self, weight):
        return weight.flatten()


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (network, {"bits": 0}, ValueError, "bits = 0: use a whole number from 1 to 16"),
        (network, {"bits": 1.5}, ValueError, "bits = 1.5: use a whole number from 1 to 16"),
        (network, {"bits": 40}, ValueError, "bits = 40: use a whole number from 1 to 16"),
        (network, {"bits": True}, ValueError, "bits = True: use a whole number from 1 to 16"),
        (network, {"bits": "4"}, ValueError, "bits = '4': use a whole number from 1 to 16"),
        (network, {"bits": None}, ValueError, "bits = None: use a whole number"),
        (network, {"bits": {"0": 4, "3": 40}}, ValueError, "bits = 40: use a whole number"),
        (network, {"bits": {"conv9": 4}}, ValueError, "bits='conv9' matches no layer.*0, 3, 6"),
        (network, {"bits": 4, "layers": "head"}, ValueError, "layers='head'.*0, 3, 6"),
        (network, {"bits": 4, "exclude": ["0", "x*"]}, ValueError, r"exclude='x\*'.*0, 3, 6"),
        (network, {"bits": 4, "layers": nn.Conv3d}, ValueError, "matches no layer.*0, 3, 6"),
        (network, {"bits": 4, "layers": [3]}, TypeError, "layers holds 3"),
        (network, {"bits": 4, "quantizer": "dorefa"}, ValueError, "'dorefa'.*lsq"),
        (network, {"bits": 4, "quantizer": 3}, TypeError, "quantizer=3"),
        (network, {"bits": 4, "quantizer": lambda *_: nn.Identity()}, TypeError, "a Quantizer"),
        (network, {"bits": 4, "quantizer": Reshaping}, ValueError, "'0'.*shape"),
        (lambda: nn.Sequential(nn.ReLU()), {"bits": 4}, ValueError, "no convolution"),
        (lambda: first_weight(np.nan), {"bits": 4}, ValueError, "'3'.*not finite"),
        (lambda: first_weight(np.inf), {"bits": 4}, ValueError, "'3'.*not finite"),
        (lambda: nn.LazyLinear(3), {"bits": 4}, ValueError, "lazy"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(
            nn.Linear(3, 3))), {"bits": 4}, ValueError, "'1' has another parametrization"),
        (lambda: quantize_weights(network(), 4, layers="6"), {"bits": 4}, ValueError,
         "'6' is quantized already"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_leaves_the_model_as_it_was(build, arguments, error, message):
    model = build()
    before = set(dict(model.named_parameters()))
    with pytest.raises(error, match=message):
        quantize_weights(model, **arguments)
    assert set(dict(model.named_parameters())) == before


def test_empty_weights_are_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(0, 3))
    with pytest.raises(ValueError, match="'1' has no weights"):
        quantize_weights(model, 4)
    assert not parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bin_width_is_the_distance_of_neighbouring_levels(bits):
    model = quantize_weights(nn.Linear(64, 64), bits)
    ((width,), (step,)) = bin_widths(model).values(), step_sizes(model).values()
    levels = model.weight.detach().unique()
    torch.testing.assert_close(levels.diff().min(), width)
    torch.testing.assert_close(width, step * (2 if bits == 1 else 1))
