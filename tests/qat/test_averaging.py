"""The average of the codes against all quantized weights kept in one stack."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from qgen_lab.codebooks import Codebook, power_of_two, uniform
from qgen_lab.qat import (
    LSQ,
    FixedWidth,
    averaging,
    codes,
    kernels,
    quantize_weights,
    quantizers,
    step_sizes,
)
from qgen_lab.qat.averaging import CodeAverage


def network(seed=0):
    """A convolution, a 1x1 convolution, a transposed one and a linear layer, on (2, 6, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1, bias=False),
            nn.ConvTranspose2d(4, 6, 2),
            nn.Flatten(),
            nn.Linear(150, 5),
        )


def quantized(model):
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        and hasattr(layer, "parametrizations")
    }


def wander(model, generator, size=0.4):
    """A step of training's stead: weights, steps and all else move at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            scale = parameter.std(correction=0) if parameter.numel() > 1 else 0
            parameter.add_(size * scale * noise)
            if parameter.dim() < 2:
                parameter.mul_(1 + 0.02 * noise)


def deployed(model):
    """Quantized weights in evaluation mode, and the step of each weight, in float64."""
    values = {}
    for name, layer in quantized(model).items():
        member = layer.parametrizations.weight[0]
        training = member.training
        member.eval()
        weight = layer.weight.detach().double()
        member.train(training)
        step = member.step_size.double()
        if step.dim():
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            step = step.view([-1 if d == dim else 1 for d in range(weight.dim())])
        values[name] = weight, step.expand(weight.shape)
    return values


def average_by_hand(model, steps=7, seed=0):
    """Run `CodeAverage` along a random path; the mean of a stack, and which codes changed."""
    generator, average = torch.Generator().manual_seed(seed), CodeAverage(model)
    stack, path = [], []
    for _ in range(steps):
        wander(model, generator)
        average.update()
        stack.append({name: weight / step for name, (weight, step) in deployed(model).items()})
        path.append(codes(model))
    means = {name: torch.stack([s[name] for s in stack]).mean(0) for name in stack[0]}
    moved = {
        name: (torch.stack([p[name] for p in path]).diff(dim=0) != 0).any(0) for name in path[0]
    }
    return average, means, moved


ARRANGEMENTS = {
    **{f"lsq-{bits}": {"bits": bits} for bits in (1, 2, 3, 4, 8)},
    "lsq-2-per-channel": {"bits": 2, "per_channel": True},
    "lsq-1-per-channel": {"bits": 1, "per_channel": True},
    "mixed": {"bits": {"0": 2, "3": 1, "6": 4}},
    "uniform": {"bits": None, "quantizer": uniform(2, 0.2)},
    "power of two": {"bits": None, "quantizer": power_of_two(3, 0.2)},
    "uneven": {"bits": None, "quantizer": Codebook([-0.3, -0.05, 0.1, 0.2, 0.4])},
    "fixed width": {"bits": 2, "quantizer": FixedWidth(0.2)},
    "relative width": {"bits": 2, "quantizer": FixedWidth(2.0, relative=True)},
    **{name: {"bits": 3, "quantizer": name} for name in quantizers.registry if name != "lsq"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_mean_and_movement_are_those_of_the_stack(name, training):
    model = quantize_weights(network(), **ARRANGEMENTS[name]).train(training)
    average, means, moved = average_by_hand(model)
    changed = sum(int(m.sum()) for m in moved.values())
    assert changed > 0
    assert average.share_moving == changed / sum(m.numel() for m in moved.values())
    steps = {name: step for name, (_, step) in deployed(model).items()}
    average.round()
    for layer, module in quantized(model).items():
        expected = (means[layer] * steps[layer]).float()
        original = module.parametrizations.weight.original.detach()
        torch.testing.assert_close(original, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ARRANGEMENTS if n.startswith(("lsq", "mixed"))])
def test_rounded_average_is_the_nearest_code(name):
    model = quantize_weights(network(), **ARRANGEMENTS[name])
    average, means, _ = average_by_hand(model, steps=9)  # odd: no mean lies halfway
    steps = step_sizes(model)
    average.round()
    for layer, code in codes(model).items():
        bits = quantized(model)[layer].parametrizations.weight[0].bits
        nearest = means[layer].sign() if bits == 1 else means[layer].round()
        assert torch.equal(code.double(), nearest)
        assert torch.equal(step_sizes(model)[layer], steps[layer])


@pytest.mark.parametrize("levels", [uniform(2, 0.2), power_of_two(3, 0.2), uniform(1, 0.1)])
def test_rounded_average_is_the_nearest_level_of_a_codebook(levels):
    model = quantize_weights(network(), None, quantizer=levels)
    average, means, _ = average_by_hand(model, steps=9)
    average.round()
    for layer, module in quantized(model).items():
        mean = means[layer].numpy() * levels.spacing.mean()
        nearest = np.abs(mean[..., None] - levels.levels).min(-1)
        reached = np.abs(mean - module.weight.detach().numpy())
        np.testing.assert_allclose(reached, nearest, atol=1e-6)


def test_one_update_gives_back_the_quantized_model():
    model = quantize_weights(network(), 3)
    before = {name: layer.weight.detach().clone() for name, layer in quantized(model).items()}
    average = CodeAverage(model)
    average.update()
    average.round()
    assert average.share_moving == 0
    for name, layer in quantized(model).items():
        torch.testing.assert_close(layer.weight.detach(), before[name], rtol=1e-6, atol=0)


def test_weights_that_rest_do_not_move_and_one_that_comes_back_has_moved():
    model = quantize_weights(nn.Sequential(nn.Linear(4, 2, bias=False)), 2)
    weight = model[0].parametrizations.weight.original
    step = model[0].parametrizations.weight[0].step_size
    average = CodeAverage(model)
    for value in (0.0, 1.0, 0.0, 0.0):
        with torch.no_grad():
            weight.zero_()
            weight[0, 0] = value * step
        average.update()
    assert average.share_moving == 1 / 8
    average.round()
    assert weight[0, 0] == 0.25 * step
    assert (model[0].weight == 0).all()


def test_all_that_is_not_quantized_stays():
    model = quantize_weights(network(), {"3": 2})
    average = CodeAverage(model)
    wander(model, torch.Generator().manual_seed(0))
    average.update()
    wander(model, torch.Generator().manual_seed(1))
    average.update()
    before = copy.deepcopy(model.state_dict())
    average.round()
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert changed == ["3.parametrizations.weight.original"]


def test_a_full_precision_model_is_left_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    average = CodeAverage(model)
    average.update()
    average.round()
    assert average.share_moving == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    quantize_weights(model, 2)
    average, _, moved = average_by_hand(model)
    assert average.share_moving == moved["0"].sum() / 16
    average.round()
    assert torch.equal(model[0].weight, model[2].weight)


def test_memory_format_may_change_along_the_way():
    results = []
    for changes in (False, True):
        model = quantize_weights(network(), 3, per_channel=True)
        average, generator = CodeAverage(model), torch.Generator().manual_seed(0)
        for number in range(6):
            wander(model, generator)
            if changes:
                memory = torch.channels_last if number % 3 else torch.contiguous_format
                for parameter in model.parameters():
                    if parameter.dim() == 4:
                        parameter.data = parameter.data.to(memory_format=memory)
            average.update()
        average.round()
        results.append((average.share_moving, codes(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(code, results[1][1][name]) for name, code in results[0][1].items())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_compiled_loops_do_what_the_plain_operations_do(bits, per_channel, monkeypatch):
    states = []
    for compiled in (True, False):
        monkeypatch.setattr(averaging, "_loops_apply", lambda *_, use=compiled: use)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
        torch.nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(2))
        quantize_weights(model, bits, per_channel=per_channel)
        with torch.no_grad():
            model[0].parametrizations.weight.original[0, 0, 0, 0] = 0.0
        average = average_by_hand(model)[0]
        states.append(average.state_dict()["layers"])
    for name, layer in states[0].items():
        for part, value in layer.items():
            torch.testing.assert_close(value, states[1][name][part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["_add_codes", "_add_signs"])
def test_loops_agree_with_plain_numpy(name):
    rng = np.random.default_rng(0)
    weight, step = rng.normal(size=24).astype(np.float32), np.float32([0.3, 0.7, 1.1])
    weight[:3] = 0.0, 0.45, -10.0
    sums, moved = rng.integers(-9, 9, 24).astype(float), rng.random(24) < 0.2
    last = rng.integers(-2, 2, 24).astype(np.int32)
    ratio = weight / np.repeat(step, 8)
    code = np.rint(np.clip(ratio, -2, 1)) if name == "_add_codes" else np.where(ratio < 0, -1, 1)
    expected = sums + code, code.astype(np.int32), moved | (code != last)
    getattr(averaging, name)(-2, 1, weight, step, sums, last, moved)
    for found, value in zip((sums, last, moved), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_blocks_of_channels_that_share_a_step_are_averaged_in_its_unit():
    model = nn.Sequential(nn.Linear(4, 6))
    quantize_weights(model, 2, quantizer=lambda weight, bits, _: LSQ(weight, bits, groups=3))
    average, generator, stack = CodeAverage(model), torch.Generator().manual_seed(0), []
    for _ in range(5):
        wander(model, generator)
        average.update()
        stack.append(codes(model)["0"].double())
    average.round()
    assert torch.equal(codes(model)["0"].double(), torch.stack(stack).mean(0).round())


def test_attention_is_averaged_too():
    model = quantize_weights(nn.TransformerEncoderLayer(8, 2, 16), 2)
    average, generator, stack = CodeAverage(model), torch.Generator().manual_seed(0), []
    for _ in range(5):
        wander(model, generator)
        average.update()
        stack.append(codes(model))
    average.round()
    assert "self_attn.in_proj" in codes(model)
    for name, code in codes(model).items():
        mean = torch.stack([past[name].double() for past in stack]).mean(0)
        assert torch.equal(code.double(), mean.round()), name


def test_double_precision_uses_plain_operations():
    model = quantize_weights(network().double(), 2, per_channel=True)
    assert not kernels.plain(model[0].parametrizations.weight.original)
    average, means, _ = average_by_hand(model, steps=5)
    average.round()
    for layer, code in codes(model).items():
        assert torch.equal(code.double(), means[layer].round())


class EveryOther(LSQ):
    """A user's own quantizer: the even codes of LSQ only."""

    def code(self, weight):
        return super().code(weight) // 2 * 2

    def forward(self, weight):
        return self.code(weight) * self.step_size + (weight - weight.detach())


def test_a_users_own_quantizer_is_averaged_by_its_own_levels():
    model = quantize_weights(nn.Sequential(nn.Linear(6, 5)), 3, quantizer=EveryOther)
    average, means, moved = average_by_hand(model)
    assert average.share_moving == moved["0"].sum() / 30
    step = step_sizes(model)["0"]
    average.round()
    original = model[0].parametrizations.weight.original.detach()
    torch.testing.assert_close(original, (means["0"] * step).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", list(quantizers.registry))
def test_interrupted_averaging_goes_on_where_it_was(quantizer):
    whole = quantize_weights(network(), 3, quantizer=quantizer)
    parts = copy.deepcopy(whole)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = CodeAverage(whole), CodeAverage(parts)
    for number in range(6):
        wander(whole, generators[0])
        one.update()
        wander(parts, generators[1])
        other.update()
        if number == 2:
            file = io.BytesIO()
            torch.save(other.state_dict(), file)
            file.seek(0)
            other = CodeAverage(parts)
            other.load_state_dict(torch.load(file, weights_only=True))
    assert (one.updates, one.share_moving) == (other.updates, other.share_moving)
    one.round()
    other.round()
    assert all(torch.equal(parts.state_dict()[n], v) for n, v in whole.state_dict().items())


def test_a_state_is_a_copy():
    model = quantize_weights(network(), 3)
    average = CodeAverage(model)
    average.update()
    state = average.state_dict()
    before = copy.deepcopy(state)
    wander(model, torch.Generator().manual_seed(0))
    average.update()
    for name, layer in state["layers"].items():
        assert all(torch.equal(value, before["layers"][name][p]) for p, value in layer.items())


def test_a_state_of_another_model_is_refused():
    average = CodeAverage(quantize_weights(network(), 3))
    with pytest.raises(ValueError, match="the model has"):
        average.load_state_dict(CodeAverage(quantize_weights(network(), {"0": 3})).state_dict())
    assert average.updates == 0


def test_rounding_nothing_is_refused():
    with pytest.raises(RuntimeError, match="call update"):
        CodeAverage(quantize_weights(network(), 3)).round()


def test_updates_leave_model_and_randomness_alone():
    model = quantize_weights(network(), 3).train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.random.get_rng_state()
    CodeAverage(model).update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random_state)
