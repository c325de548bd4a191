"""Noise in place of rounding: where it comes from, how wide it is, and that it can be repeated."""

import copy
from functools import partial

import pytest
import torch
from samples import images, network, normal
from torch import nn

from qgen_lab.qat import (
    FixedWidth,
    NoiseInjection,
    bake,
    bin_widths,
    bits_per_layer,
    parameter_groups,
    quantization_noise,
    quantize_weights,
)
from qgen_lab.qat.quantizers import LSQ

RELATIVE = FixedWidth(2.0, relative=True)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("channel_dim", [None, 0])
def test_noise_is_uniform_over_a_bin(bits, channel_dim):
    """Mean and variance of 40,000 draws within five standard errors: false alarm one in 10**6."""
    weight = normal(4, 10_000)
    weight *= torch.arange(1, 5)[:, None]
    quantizer = NoiseInjection(weight, bits, channel_dim)
    assert quantizer.bits == bits
    width = LSQ(weight, bits, channel_dim).bin_width
    assert torch.equal(quantizer.bin_width, width)
    noise = ((quantizer(weight) - weight) / width.view(-1, 1)).double()
    assert noise.abs().max() <= 0.5 + 1e-6
    assert noise.mean().abs() < 5 * (12 * noise.numel()) ** -0.5
    assert abs(noise.square().mean() - 1 / 12) < 5 * (180 * noise.numel()) ** -0.5


def test_every_pass_draws_anew_and_every_layer_its_own():
    model = quantize_weights(network(), 3, "noise")
    first, second = (quantization_noise(model) for _ in range(2))
    assert not torch.equal(first["0"], second["0"])
    widths = bin_widths(model)
    a, b = (first[name].flatten()[:64] / widths[name] for name in ("0", "3"))
    assert not torch.allclose(a, b)


def test_the_same_model_gets_the_same_noise_whatever_the_random_state():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = quantize_weights(network(), 3, "noise")
        model(images())
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model[0].weight.detach())
    assert torch.equal(*found)


def test_a_loaded_state_goes_on_with_the_noise():
    model = quantize_weights(network(), 3, "noise")
    model(images())
    other = quantize_weights(network(seed=4), 3, "noise")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(copy.deepcopy(model)[3].weight, model[3].weight)


def test_evaluation_leaves_the_weights_or_rounds_them():
    model = network()
    plain = quantize_weights(copy.deepcopy(model), 3, "noise").eval()
    assert torch.equal(plain(images()), model.eval()(images()))
    rounding = partial(NoiseInjection, grid=RELATIVE, quantized=True)
    rounded = quantize_weights(copy.deepcopy(model), 3, rounding).eval()
    expected = quantize_weights(copy.deepcopy(model), 3, RELATIVE).eval()
    assert torch.equal(rounded(images()), expected(images()))
    assert torch.equal(bake(rounded)(images()), expected(images()))


def test_gradients_pass_and_only_the_weights_learn():
    layer = quantize_weights(nn.Linear(30, 20, bias=False), 3, "noise")
    grad = normal(20, 30)
    layer.weight.backward(grad)
    assert torch.equal(layer.parametrizations.weight.original.grad, grad)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "parametrizations.weight.original"
    ]
    torch.optim.SGD(parameter_groups(layer, 0.1), lr=0.1).step()


def test_a_relative_grid_follows_the_weights():
    layer = quantize_weights(nn.Linear(300, 20), 3, partial(NoiseInjection, grid=RELATIVE))
    before = bin_widths(layer)[""]
    spread = layer.parametrizations.weight.original.detach().std(correction=0)
    torch.testing.assert_close(before.float(), 4 / 7 * spread)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(10)
    assert quantization_noise(layer)[""].abs().max() > 2 * before
    torch.testing.assert_close(bin_widths(layer)[""], 10 * before)
    assert bits_per_layer(layer)[""] == 3
