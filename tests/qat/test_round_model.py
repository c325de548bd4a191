"""Rounding a whole network: what it does to each layer, and that it leaves nothing half done."""

import copy

import pytest
import torch
from torch import nn

from qgen_lab.codebooks import lloyd_max, uniform
from qgen_lab.qat import (
    FixedWidth,
    NoiseInjection,
    Recipe,
    bake,
    bits_per_layer,
    codes,
    fit,
    nin,
    quantize_weights,
    reestimate_batch_norm,
    resnet18,
    step_sizes,
    vit,
)
from qgen_lab.qat.batches import BATCH_NORM
from qgen_lab.qat.quantizers import quantized_slots, registry
from qgen_lab.qat.rounding import criteria, methods, round_layer, round_model, second_moments

# Few and short steps: what is tested does not depend on how good the answer is.
BRIEF = {"cooled": {"steps": 20, "constant_steps": 20}}


def images(count=40, seed=0, channels=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, channels, size, size, generator=generator)
    return inputs.cumsum(-1) / 3, torch.randint(0, 10, (count,), generator=generator)


def network(seed=0):
    """A network in evaluation mode with batch norms that have seen data."""
    model = nin(2, 6, in_channels=1, base_width=1, seed=seed)
    return reestimate_batch_norm(model, images(seed=7)).eval()


def weights_of(model):
    return {name: slot.weight.detach().clone() for name, slot in quantized_slots(model).items()}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, expected):
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", methods)
class TestEveryMethod:
    def test_all_layers_for_the_float_model(self, method):
        """Not sequential: `round_layer` with the float model's inputs, layer by layer."""
        model, data = network(), images()
        float_model = copy.deepcopy(model)
        round_model(
            model, data, 3, method, sequential=False, step="weights", **BRIEF.get(method, {})
        )
        grams = second_moments(float_model, data)
        for name, slot in quantized_slots(model).items():
            weight = float_model.get_submodule(name).weight.detach()
            levels = slot.quantizer.levels_for(weight).detach()
            expected = round_layer(weight, grams[name], levels, method, **BRIEF.get(method, {}))
            assert torch.equal(slot.weight, expected.weight)
            assert torch.equal(slot.original, expected.weight)

    def test_one_layer_after_the_other(self, method):
        """Sequential: each layer for the inputs that the rounded ones before it give."""
        model, data = network(), images()
        by_hand = copy.deepcopy(model)
        options = BRIEF.get(method, {})
        report = round_model(model, data, 3, method, step="weights", batch_norm="kept", **options)
        slots = quantized_slots(model)
        assert list(report.layers) == list(slots)
        for name, slot in slots.items():
            layer = by_hand.get_submodule(name)
            gram = second_moments(by_hand, data, name)[name]
            levels = slot.quantizer.levels_for(slot.original).detach()
            expected = round_layer(layer.weight, gram, levels, method, **options)
            layer.weight.data = expected.weight
            assert torch.equal(slot.weight, expected.weight)
            assert report.layers[name].output_error == expected.output_error
            assert report.layers[name].nearest_error == expected.nearest_error

    def test_the_same_twice(self, method):
        runs = []
        for _ in range(2):
            model = network()
            round_model(model, images(), 2, method, per_channel=True, **BRIEF.get(method, {}))
            runs.append(state(model))
        assert runs[0].keys() == runs[1].keys()
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_the_rounded_model_is_a_quantized_one():
    model, data = network(), images()
    round_model(model, data, {"*": 4, "0": 8}, "compensated")
    assert bits_per_layer(model)["0"] == 8
    assert set(bits_per_layer(model).values()) == {4, 8}
    assert codes(model).keys() == step_sizes(model).keys() == bits_per_layer(model).keys()
    twin = copy.deepcopy(model)
    expected = model(data[0])
    assert torch.equal(bake(model)(data[0]), expected)
    before = weights_of(twin)
    fit(twin, data, Recipe(epochs=1, batch_size=20, learning_rate=0.1))
    assert any(not torch.equal(w, before[name]) for name, w in weights_of(twin).items())


def test_batch_norm_is_reestimated_or_kept_or_folded():
    data = images()
    model, kept, folded, together = (network() for _ in range(4))
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    statistics = [norm.running_var.clone() for norm in norms]
    round_model(model, data, 2, "nearest")
    assert not any(
        torch.equal(n.running_var, old) for n, old in zip(norms, statistics, strict=True)
    )
    again = state(reestimate_batch_norm(copy.deepcopy(model), data))
    assert_same_state(model, again)

    round_model(together, data, 2, "nearest", sequential=False)
    assert_same_state(together, state(reestimate_batch_norm(copy.deepcopy(together), data)))

    round_model(kept, data, 2, "nearest", batch_norm="kept")
    norms = [m for m in kept.modules() if isinstance(m, BATCH_NORM)]
    assert all(torch.equal(n.running_var, old) for n, old in zip(norms, statistics, strict=True))

    expected = network()(data[0])
    round_model(folded, data, 8, "nearest", per_channel=True, batch_norm="folded")
    assert not any(isinstance(m, BATCH_NORM) for m in folded.modules())
    torch.testing.assert_close(folded(data[0]), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("step", criteria)
@pytest.mark.parametrize("member", ["uniform", "lsq", "power-of-two"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_steps(step, member, per_channel):
    """Least weight error beats the quantizer's first step, least output error beats that."""
    model, data = network(), images()
    float_model = copy.deepcopy(model)
    round_model(
        model, data, 3, "nearest", per_channel, False, quantizer=member, step=step,
        batch_norm="kept",
    )  # fmt: skip
    grams = second_moments(float_model, data)
    for name, slot in quantized_slots(model).items():
        weight = float_model.get_submodule(name).weight.detach()
        gram = grams[name]

        def error(quantizer, step=step, weight=weight, gram=gram):
            change = (quantizer(weight) - weight).double().flatten(1)
            matrix = torch.eye(len(gram)).double() if step == "weights" else gram
            errors = ((change @ matrix) * change).sum(1)
            return errors if per_channel else errors.sum()

        other = registry[member](weight, 3, 0 if per_channel else None)
        if step == "outputs":
            criteria["weights"](other, weight, gram, "nearest")
        if step == "recommended":
            spread = weight.double().flatten(1).square().mean(1).sqrt()
            spread = spread if per_channel else spread.square().mean().sqrt()
            if member == "uniform":
                torch.testing.assert_close(
                    slot.quantizer.step_size.double(), 2.0499 * spread / 3.5, rtol=2e-3, atol=0
                )
        else:
            assert (error(slot.quantizer) <= 1.01 * error(other)).all()


def test_levels_that_are_given():
    model = network()
    round_model(model, images(), None, "compensated", quantizer=uniform(2, 0.4))
    assert all(torch.isin(w.double(), torch.tensor(uniform(2, 0.4).levels).float().double()).all()
               for w in weights_of(model).values())  # fmt: skip
    model = network()
    round_model(model, images(), 2, "compensated", quantizer="lloyd-max")
    assert all(len(w.unique()) <= 4 for w in weights_of(model).values())
    round_model(network(), images(), None, "coordinate", quantizer=lloyd_max(2).with_width(0.3))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (resnet18(base_width=2, seed=0), {"channels": 3, "size": 32, "count": 8}),
        (vit(8, 4, 1, 2, 8, 16, in_channels=1, seed=0), {}),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(216, 3)),
         {"channels": 4}),
    ],
    ids=["resnet", "vit", "groups"],
)  # fmt: skip
def test_other_architectures(model, size):
    inputs, _ = data = images(**size)
    report = round_model(model, data, 4, "compensated", per_channel=True)
    assert report.to_frame().layer.tolist() == list(report.layers)
    assert report.layers.keys() == quantized_slots(model).keys()
    assert all(r.output_error <= r.nearest_error for r in report.layers.values())
    assert str(report).startswith(f"RoundingReport({len(report.layers)} layers")
    assert model.eval()(inputs).isfinite().all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_layers_that_share_a_weight_are_rounded_together():
    torch.manual_seed(0)
    model, data = Tied(), (torch.randn(30, 8), torch.zeros(30))
    weight = model.first.weight.detach().clone()
    grams = second_moments(model, data)
    round_model(model, data, 2, "coordinate", step="weights")
    slot = quantized_slots(model)["first"]
    levels = slot.quantizer.levels_for(weight).detach()
    expected = round_layer(weight, grams["first"] + grams["second"], levels, "coordinate")
    assert torch.equal(model.first.weight, expected.weight)
    assert torch.equal(model.second.weight, expected.weight)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def with_nan():
    model = network()
    with torch.no_grad():
        model.get_submodule("0").weight[0] = torch.nan
    return model


NAN_DATA = (torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4))


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (network(), images(), {"method": "best"}, ValueError, "nearest, compensated, coordinate"),
        (network(), images(), {"step": "best"}, ValueError, "weights, outputs, recommended"),
        (network(), images(), {"batch_norm": "off"}, ValueError, "re-estimated, folded, kept"),
        (network(), images(), {"bits": 0}, ValueError, "bits"),
        (network(), images(), {"layers": "nothing"}, ValueError, "matches no layer"),
        (network(), images(), {"quantizer": "best"}, ValueError, "the names are: lsq, uniform"),
        (network(), images(), {"quantizer": "noise"}, ValueError, "leaves weights as they are"),
        (network(), images(), {"quantizer": FixedWidth(2.0, relative=True)}, ValueError, "move"),
        (network(), images(), {"speed": 3}, TypeError, "speed"),
        (quantize_weights(network(), 3), images(), {}, ValueError, "quantized already"),
        (with_nan(), images(), {}, ValueError, "not finite"),
        (network(), NAN_DATA, {}, ValueError, "inputs that are not finite"),
        (network(), 3, {}, TypeError, "data must be"),
        (network(), (torch.zeros(0, 1, 8, 8), torch.zeros(0)), {}, ValueError, "no data reach"),
        (Unused(), (torch.randn(9, 4), torch.zeros(9)), {}, ValueError, "no data reach.*idle"),
        (nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), images(), {}, TypeError, "ConvTranspose2d"),
        (nn.ReLU(), images(), {}, ValueError, "no convolution"),
    ],
)
def test_bad_input_changes_nothing(model, data, options, error, message):
    before = state(model)
    with pytest.raises(error, match=message):
        round_model(model, data, **{"bits": 3, "method": "nearest"} | options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_what_is_wrong_is_said_before_norms_are_folded():
    model = network()
    with pytest.raises(ValueError, match="bits"):
        round_model(model, images(), 0, batch_norm="folded")
    assert any(isinstance(module, BATCH_NORM) for module in model.modules())


def test_an_interrupted_model_is_as_it_was():
    model = network().train()
    before, calls = state(model), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt

    handle = model.get_submodule("9").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        round_model(model, images(), 2, "nearest")
    handle.remove()
    assert_same_state(model, before)
    assert model.training
    assert round_model(model, images(), 2, "nearest").layers


def test_noise_that_rounds_in_the_end_can_be_rounded_to():
    def noise(*arguments):
        return NoiseInjection(*arguments, quantized=True)

    model = network()
    round_model(model, images(), 3, "compensated", quantizer=noise)
    assert all(len(w.unique()) <= 8 for w in weights_of(model).values())
