"""Quantized activations against closed formulas, and on models."""

import copy
import io

import numpy as np
import pytest
import torch
from samples import images, network, normal
from torch import nn

from qgen_lab.qat import bake, parameter_groups, quantize_weights, step_sizes
from qgen_lab.qat.quantizers import UnsignedLSQ, activation_steps, quantize_activations

ALL_BITS = (1, 2, 3, 4, 8)


def rectified(bits, seed=0, layers=None):
    return quantize_activations(network(seed), bits, layers)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activations_equal_the_closed_formulas(bits, dtype, memory_format):
    x = normal(6, 4, 3, 5, dtype=dtype).relu().contiguous(memory_format=memory_format)
    grad = normal(6, 4, 3, 5, seed=1, dtype=dtype)
    quantizer = UnsignedLSQ(bits).to(dtype)
    x.requires_grad_()
    y = quantizer(x)
    y.backward(grad)

    high = 2**bits - 1
    a, g = x.detach().double().numpy(), grad.double().numpy()
    step = 2 * a.mean() / np.sqrt(high)
    np.testing.assert_allclose(quantizer.step.item(), step, rtol=1e-6)
    v = a / quantizer.step.double().item()
    inside, bounded = (v > 0) & (v < high), np.round(np.clip(v, 0, high))
    np.testing.assert_allclose(y.detach().numpy(), bounded * quantizer.step.item(), rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-6)
    slope = np.where(inside, bounded - v, bounded)
    expected = np.sum(g * slope) / np.sqrt(4 * 3 * 5 * high)
    np.testing.assert_allclose(quantizer.step.grad.item(), expected, rtol=1e-4)
    assert set(quantizer.code(x).unique().tolist()) <= set(range(high + 1))


def test_the_first_batch_sets_the_step_and_later_ones_do_not():
    model = rectified(4)
    assert activation_steps(model)["2"].isnan()
    first = model[:2](images()).relu().mean()
    model(images())
    step = activation_steps(model)["2"]
    torch.testing.assert_close(step, 2 * first.detach() / np.sqrt(15))
    model(10 * images(1))
    assert activation_steps(model)["2"] == step
    assert model[:3](images()).unique().numel() <= 16


def test_a_batch_of_zeros_sets_no_step():
    quantizer = UnsignedLSQ(2)
    assert not quantizer(torch.zeros(3, 4)).any()
    assert not quantizer.started
    quantizer(torch.ones(3, 4))
    assert quantizer.step_size == pytest.approx(2 / np.sqrt(3))


def test_steps_train_without_decay_and_travel():
    model = rectified(3)
    quantize_weights(model, 3)
    decayed, free = parameter_groups(model, 0.1)
    assert len(free["params"]) == 4
    optimizer = torch.optim.SGD([decayed, free], lr=0.1, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed)).square().mean().backward()
        optimizer.step()
    assert model[2].output_quantizer.step.grad != 0
    model.eval()
    expected = model(images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantize_weights(rectified(3, seed=5), 3).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images()), expected)
    assert activation_steps(other) == activation_steps(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        twin[2].output_quantizer.step.mul_(2)
    assert torch.equal(model(images()), expected)
    assert not torch.equal(twin(images()), expected)
    assert torch.equal(bake(model)(images()), expected)  # weights only: activations stay
    assert not step_sizes(model)
    assert len(activation_steps(model)) == 1


def test_a_rectifier_used_twice_has_one_step():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Linear(5, 5), nn.Linear(5, 5), nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x))))

    model = quantize_activations(Twice(), {"relu": 2})
    outputs = model(normal(7, 5))
    outputs.square().sum().backward()
    assert outputs.unique().numel() <= 4
    assert all(p.grad is not None for p in model.parameters())
    assert set(activation_steps(model)) == {"relu"}


def test_activations_keep_their_dtype():
    assert UnsignedLSQ(4)(normal(3, 4).relu().bfloat16()).dtype == torch.bfloat16
    model = quantize_activations(network().double(), 4)
    assert model(images(dtype=torch.float64)).dtype == torch.float64
    assert activation_steps(model)["2"].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rectified(4)(images()).sum().backward()


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (network, {"bits": 0}, ValueError, "bits = 0: use a whole number from 1 to 16"),
        (network, {"bits": {"9": 4}}, ValueError, "bits='9' matches no layer; the layers are: 2"),
        (network, {"bits": 4, "layers": nn.Tanh}, ValueError, "matches no layer"),
        (network, {"bits": 4, "exclude": "x"}, ValueError, "exclude='x'"),
        (lambda: nn.Linear(3, 3), {"bits": 4}, ValueError, "no ReLU"),
        (lambda: rectified(4), {"bits": 4}, ValueError, "'2' is quantized already"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(build, arguments, error, message):
    model = build()
    before = set(model.state_dict())
    with pytest.raises(error, match=message):
        quantize_activations(model, **arguments)
    assert set(model.state_dict()) == before
