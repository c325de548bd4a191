"""Codebooks, fixed and learned, against plain NumPy."""

import io

import numpy as np
import pytest
import torch
from samples import BITS, images, network, normal
from torch import nn

from qgen_lab.codebooks import Codebook, lloyd_max, lsq_grid, power_of_two, uniform
from qgen_lab.qat import (
    LSQ,
    FixedCodebook,
    FixedWidth,
    LloydMax,
    PowerOfTwo,
    Uniform,
    bits_per_layer,
    kernels,
    quantize_weights,
    quantizers,
    step_sizes,
)
from qgen_lab.qat.quantizers import quantized_slots

# Fixed codebooks

CODEBOOKS = {
    "uniform": uniform(3, 0.3),
    "with zero": uniform(2, 0.3, include_zero=True),
    "one bit": uniform(1, 0.2),
    "power of two": power_of_two(3, 0.4),
    "lloyd": Codebook(lloyd_max(4).levels * 0.1),
    "lsq": lsq_grid(4, 0.05),
}


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_codebook_quantizes_as_it_does_outside(codebook, dtype):
    weight = normal(40, 30, dtype=dtype) * 0.2
    weight[0] = torch.as_tensor(np.resize(codebook.thresholds, 30), dtype=dtype)  # ties
    weight[1] = torch.as_tensor(np.resize(codebook.levels, 30), dtype=dtype)
    quantizer = FixedCodebook(codebook)
    weight.requires_grad_()
    value = quantizer(weight)
    array = weight.detach().numpy()
    assert torch.equal(value, torch.tensor(codebook.quantize(array)))
    assert quantizer.code(weight).tolist() == codebook.code(array).tolist()
    grad = normal(40, 30, seed=1, dtype=dtype)
    value.backward(grad)
    inner = (array > codebook.levels.astype(array.dtype)[0]) & (
        array < codebook.levels.astype(array.dtype)[-1]
    )
    if len(codebook) == 2:
        inner[:] = True
    np.testing.assert_array_equal(weight.grad.numpy(), np.where(inner, grad.numpy(), 0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_and_its_grid_as_a_codebook_agree(bits):
    weight, grad = normal(300), normal(300, seed=1)
    lsq = LSQ(weight, bits)
    fixed = FixedCodebook(lsq_grid(bits, lsq.step_size.item()))
    found = []
    for quantizer in (lsq, fixed):
        w = weight.clone().requires_grad_()
        quantizer(w).backward(grad)
        found.append((quantizer(w).detach(), w.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_a_codebook_travels_in_the_state():
    model = quantize_weights(network(), None, CODEBOOKS["lloyd"])
    other = quantize_weights(network(seed=3), None, CODEBOOKS["uniform"])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert other[0].parametrizations.weight[0].codebook == CODEBOOKS["lloyd"]


def test_bits_must_match_a_codebook():
    for bits in (None, 3):
        assert bits_per_layer(quantize_weights(network(), bits, CODEBOOKS["uniform"]))["0"] == 3
    assert bits_per_layer(quantize_weights(network(), 2, CODEBOOKS["with zero"]))["0"] < 2
    with pytest.raises(ValueError, match="does not match a codebook of 8 levels"):
        quantize_weights(network(), 4, CODEBOOKS["uniform"])
    with pytest.raises(ValueError, match="per_channel"):
        quantize_weights(network(), None, CODEBOOKS["uniform"], per_channel=True)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_spread_of_each_run(steps):
    weight = normal(5, 4, 30) + 3 * torch.arange(5).view(5, 1, 1)
    expected = weight.double().view(steps, -1).std(1, correction=0)
    torch.testing.assert_close(kernels.spread(weight, steps), expected)
    result = np.empty(steps)
    getattr(kernels._spread, "py_func", kernels._spread)(weight.numpy().ravel(), result)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_relative_width_is_the_theory_s_codebook_in_standard_deviations(bits, per_channel):
    model = quantize_weights(
        network().double(), bits, FixedWidth(1.5, relative=True), per_channel=per_channel
    )
    for _ in range(2):
        for name, slot in quantized_slots(model).items():
            weight = slot.original.numpy()
            rows = weight.reshape(len(weight) if per_channel else 1, -1)
            expected = [uniform(bits, 1.5 * row.std()).quantize(row) for row in rows]
            np.testing.assert_allclose(
                slot.weight.detach().numpy(), np.reshape(expected, weight.shape), rtol=1e-12
            )
            spacing = np.squeeze([2 * 1.5 * row.std() / (2**bits - 1) for row in rows])
            np.testing.assert_allclose(step_sizes(model)[name].numpy(), spacing, rtol=1e-12)
            slot.layer.parametrizations.weight.original.data.mul_(3)  # the levels follow


def test_a_relative_width_has_a_straight_through_gradient_only():
    weight, grad = normal(50, 7), normal(50, 7, seed=1)
    quantizer = FixedWidth(1.0, relative=True)(weight, 2, None)
    weight.requires_grad_()
    quantizer(weight).backward(grad)
    spread = weight.detach().std(correction=0)
    assert torch.equal(weight.grad, torch.where(weight.detach().abs() < spread, grad, 0))


def test_a_fixed_width_is_the_theory_s_codebook():
    weight = normal(20, 30)
    quantizer = FixedWidth(0.7)(weight, 3, None)
    assert torch.equal(quantizer(weight), torch.tensor(uniform(3, 0.7).quantize(weight.numpy())))


def test_weights_without_spread_stay_finite():
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight)
    quantize_weights(layer, 3, FixedWidth(2.0, relative=True))
    assert layer.weight.isfinite().all()
    assert layer.weight.abs().max() < 1e-30


# Learned levels, against plain NumPy


def nearest_by_hand(weights, levels):
    """Index of the nearest level in float64, ties to the even one."""
    distance = np.abs(weights[:, None] - levels)
    first = distance.argmin(1)
    upper = np.minimum(first + 1, len(levels) - 1)
    tied = (upper > first) & (distance[np.arange(len(weights)), upper] == distance.min(1))
    return np.where(tied & (first % 2 == 1), upper, first)


def levels_by_hand(weights, levels, grad):
    """Quantized weights, gradient to the weights, gradient to the levels: one weight at a time."""
    index = nearest_by_hand(weights, levels)
    grad_weight, grad_levels = np.zeros(len(weights)), np.zeros(len(levels))
    for w, k, g, i in zip(weights, index, grad, range(len(weights)), strict=True):
        if len(levels) == 2:
            grad_weight[i] = g
            grad_levels[k] += g
        elif not levels[0] < w < levels[-1]:
            grad_levels[k] += g
        else:
            grad_weight[i] = g
            other = k + 1 if w > levels[k] else k - 1
            t = (w - levels[k]) / (levels[other] - levels[k])
            grad_levels[k] += t * g
            grad_levels[other] -= t * g
    return levels[index], grad_weight, grad_levels


def each_row(weight, channel_dim):
    """Weights as float64 rows that share levels."""
    array = weight.detach().double().numpy()
    return array.reshape(1, -1) if channel_dim is None else np.moveaxis(array, channel_dim, 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channel_dim", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_levels_equal_plain_numpy(bits, channel_dim, dtype):
    weight, grad = normal(5, 9, 8, 8, dtype=dtype), normal(5, 9, 8, 8, seed=1, dtype=dtype)
    quantizer = LloydMax(weight, bits, channel_dim)
    with torch.no_grad():  # uneven, out of order, with weights beyond them
        quantizer.levels.mul_(torch.linspace(0.3, 1.1, 2**bits, dtype=dtype)).copy_(
            quantizer.levels.flip(-1)
        )
    weight.requires_grad_()
    value = quantizer(weight)
    value.backward(grad)
    levels = np.sort(np.atleast_2d(quantizer.levels.detach().double().numpy()))
    rows = [each_row(t, channel_dim) for t in (weight, grad, value, weight.grad)]
    n = weight.numel() // len(levels)
    for i, (w, g, v, w_grad) in enumerate(zip(*rows, strict=True)):
        expected = levels_by_hand(w.ravel(), levels[i], g.ravel())
        np.testing.assert_allclose(v.ravel(), expected[0], rtol=1e-7)
        np.testing.assert_array_equal(w_grad.ravel(), expected[1])
        order = np.atleast_2d(quantizer.levels.detach().numpy())[i].argsort()
        found = np.atleast_2d(quantizer.levels.grad.numpy())[i][order]
        scale = np.sqrt(2**bits / n)
        np.testing.assert_allclose(found, scale * expected[2], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_equal_plain_numpy(bits, channel_dim, dtype):
    """The published form: scale times the nearest signed power of two of weight over scale."""
    weight, grad = normal(6, 40, dtype=dtype), normal(6, 40, seed=1, dtype=dtype)
    quantizer = PowerOfTwo(weight, bits, channel_dim)
    with torch.no_grad():
        quantizer.scale.mul_(0.6)  # some weights beyond the levels
    weight.requires_grad_()
    value = quantizer(weight)
    value.backward(grad)
    rows = [each_row(t, channel_dim) for t in (weight, grad, value, weight.grad)]
    exponents = np.arange(2 ** (bits - 1))
    for i, (w, g, v, w_grad) in enumerate(zip(*rows, strict=True)):
        scale = np.atleast_1d(quantizer.scale.detach().double().numpy())[i]
        x = w.ravel() / scale
        magnitude = 2.0**-exponents
        index = np.abs(np.abs(x)[:, None] - magnitude).argmin(1)
        rounded = np.sign(x) * magnitude[index]
        inside = (np.abs(x) < 1) | (bits == 1)
        slope = np.where((np.abs(x) < 1) & (bits > 1), rounded - x, rounded)
        np.testing.assert_allclose(v.ravel(), scale * rounded, rtol=1e-6)
        np.testing.assert_array_equal(w_grad.ravel(), g.ravel() * inside)
        found = np.atleast_1d(quantizer.scale.grad.numpy())[i]
        expected = np.sum(g.ravel() * slope) / np.sqrt(x.size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("member", ["power-of-two", "lloyd-max", FixedWidth(0.1, relative=False)])
def test_one_bit_is_two_levels_that_all_weights_pass(member):
    layer = quantize_weights(nn.Linear(30, 20, bias=False), 1, member)
    original = layer.parametrizations.weight.original
    grad = normal(20, 30)
    layer.weight.backward(grad)
    assert torch.equal(original.grad, grad)
    w, values = original.detach(), layer.weight.detach()
    if member == "power-of-two":
        torch.testing.assert_close(values, w.abs().mean() * w.sign())
    elif member == "lloyd-max":
        low, high = values.unique()
        assert torch.equal(values == high, w > (low + high) / 2)
        torch.testing.assert_close(low, w[values == low].mean())
        torch.testing.assert_close(high, w[values == high].mean())
    else:
        assert torch.equal(values, 0.1 * w.sign())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_even_levels_get_the_gradient_of_lsq(bits):
    weight, grad = normal(40, 30, dtype=torch.float64), normal(40, 30, seed=1, dtype=torch.float64)
    lsq = LSQ(weight, bits)
    free = LloydMax(weight, bits)
    code = torch.arange(lsq.low, lsq.high + 1)
    with torch.no_grad():
        free.levels.copy_(lsq.step * code)
    for quantizer in (lsq, free):
        quantizer(weight).backward(grad)
    found = (free.levels.grad * code).sum() / free.gradient_scale * lsq.gradient_scale
    torch.testing.assert_close(found, lsq.step.grad)


def test_learned_levels_start_at_lloyd_max():
    weight = normal(60, 50, dtype=torch.float64)
    levels = LloydMax(weight, 3).levels.detach().numpy()
    np.testing.assert_allclose(levels, lloyd_max(3, weight.numpy()).levels)
    few = torch.tensor([[1.0, -1.0, 2.0, 2.0]])
    expected = np.sqrt(2.5) * lloyd_max(2).levels
    np.testing.assert_allclose(LloydMax(few, 2).levels.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_even_levels_equal_plain_numpy(bits, channel_dim, dtype):
    """Halves of odd numbers times the step, clipped; LSQ's gradient to the step."""
    weight, grad = normal(6, 40, dtype=dtype), normal(6, 40, seed=1, dtype=dtype)
    quantizer = Uniform(weight, bits, channel_dim)
    quantizer.put_step_size(0.6 * quantizer.step_size)  # some weights beyond the levels
    weight.requires_grad_()
    value = quantizer(weight)
    value.backward(grad)
    rows = [each_row(t, channel_dim) for t in (weight, grad, value, weight.grad)]
    last = 2 ** (bits - 1) - 0.5
    for i, (w, g, v, w_grad) in enumerate(zip(*rows, strict=True)):
        step = np.atleast_1d(quantizer.step_size.double().numpy())[i]
        x = w.ravel() / step
        rounded = np.clip(np.floor(x) + 0.5, -last, last)
        inside = (np.abs(x) < last) | (bits == 1)
        slope = np.where((np.abs(x) < last) & (bits > 1), rounded - x, rounded)
        np.testing.assert_allclose(v.ravel(), step * rounded, rtol=1e-6)
        np.testing.assert_array_equal(w_grad.ravel(), g.ravel() * inside)
        found = np.atleast_1d(quantizer.scale.grad.numpy())[i]
        expected = np.sum(g.ravel() * slope) / np.sqrt(x.size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("member", [*quantizers.registry, FixedWidth(0.3)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 3])
def test_a_quantizer_that_rounds_says_its_levels(member, per_channel, bits):
    """Ascending, and its weights are among them; a step that is free can be set."""
    if per_channel and isinstance(member, FixedWidth):
        pytest.skip("has no step to give a channel")
    model = quantize_weights(network(), bits, member, per_channel=per_channel).eval()
    for slot in quantized_slots(model).values():
        quantizer, sharing = slot.quantizer, slot.quantizer.sharing
        for factor in (1.0, 0.7) if quantizer.step_is_free else (1.0,):
            if quantizer.step_is_free:
                step = factor * quantizer.step_size
                quantizer.put_step_size(step)
                assert torch.equal(quantizer.step_size, step)
            levels = quantizer.levels_for(slot.original)
            assert levels.shape == (sharing.steps, 2**bits)
            assert levels.dtype == torch.float64
            assert (levels.diff(dim=1) > 0).all()
            if quantizer.rounds:
                rows = sharing.rows(slot.weight.detach())
                for row, allowed in zip(rows, levels.float(), strict=True):
                    assert torch.isin(row, allowed).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("member", [PowerOfTwo, Uniform])
def test_the_scale_starts_where_the_squared_error_is_least(bits, shape, member):
    """Of a grid; within 4% for powers of two, whose alternation ends in a local optimum."""
    weight = normal(40, 50)
    if shape == "uniform":
        weight = torch.special.ndtr(weight) - 0.5
    w = weight.numpy().ravel().astype(float)
    levels = member.shape(bits)
    last = levels.levels[-1]

    def error(scale):
        return np.mean(levels.with_width(scale * last).noise(w) ** 2)

    widths = np.linspace(0.2, 3.0, 281) if member is PowerOfTwo else np.geomspace(0.2, 6.0, 281)
    least = min(error(width / last) for width in widths)
    tolerance = 1.04 if member is PowerOfTwo else 1.005
    assert error(member(weight, bits).step_size.item()) < tolerance * least


def test_a_scale_pushed_below_zero_is_put_back_on_its_floor():
    weight = normal(20, 30)
    quantizer = PowerOfTwo(weight, 3)
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    value = quantizer(weight)
    assert quantizer.scale == quantizer.floor
    assert value.abs().max() == quantizer.floor
    torch.testing.assert_close(quantizer.floor, 0.01 * weight.square().mean().sqrt())


def test_zero_between_levels_that_are_hardly_numbers():
    """At 8 bits the smallest levels are 1e-39 apart, where one over the distance overflows."""
    weight = normal(10, 10)
    weight[0] = 0
    quantizer = PowerOfTwo(weight, 8)
    quantizer(weight).sum().backward()
    assert quantizer.scale.grad.isfinite()


@pytest.mark.parametrize("member", ["power-of-two", "lloyd-max"])
def test_learned_levels_of_more_than_8_bits_are_refused(member):
    with pytest.raises(ValueError, match=r"bits = 9.*1 to 8 bits"):
        quantize_weights(network(), 9, member)


@pytest.mark.parametrize("member", ["power-of-two", "lloyd-max"])
@pytest.mark.parametrize("bits", [1, 3])
def test_second_derivatives_equal_those_of_ordinary_operations(member, bits):
    weight, direction = normal(4, 6), normal(4, 6, seed=2)
    quantizer = quantizers.registry[member](weight, bits, None)
    (learned,) = quantizer.parameters()
    found = []
    for w in (weight.clone(), weight.T.contiguous().T):
        w.requires_grad_()
        loss = quantizer(w).pow(3).sum()
        first = torch.autograd.grad(loss, (w, learned), create_graph=True)
        second = (first[0] * direction).sum() + first[1].square().sum()
        found.append(torch.autograd.grad(second, (w, learned)))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("member", ["power-of-two", "lloyd-max", FixedWidth(2.0, relative=True)])
def test_per_sample_gradients_by_transforms(member):
    model = quantize_weights(network(), 3, member).eval()
    x = images()
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("member", ["power-of-two", "lloyd-max"])
def test_not_a_number_stays_visible(member):
    weight = normal(4, 5)
    quantizer = quantizers.registry[member](weight, 3, None)
    weight[1] = torch.nan
    for w in (weight, weight.T.contiguous().T):
        assert quantizer(w).isnan().all(1).tolist() == [False, True, False, False]


# The loops


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_the_loops_are_the_same_uncompiled(bits):
    rng = np.random.default_rng(bits)
    levels = np.sort(rng.normal(size=(2, 2**bits)))
    weight = rng.normal(size=300).astype(np.float32)
    weight[:4], weight[4:8] = levels[0, :2].repeat(2), levels[0, -2:].mean()
    grad = rng.normal(size=300).astype(np.float32)
    cases = {
        "_nearest": ((weight, levels), (300, np.float32)),
        "_pass_inside": ((weight, levels, grad), (300, np.float32)),
        "_two_level_gradients" if bits == 1 else "_level_gradients": (
            (weight, levels, grad),
            ((2, 2**bits), np.float64),
        ),
    }
    for name, (arguments, (shape, dtype)) in cases.items():
        loop = getattr(kernels, name)
        compiled, expected = np.zeros(shape, dtype), np.ones(shape, dtype)
        loop(*arguments, compiled)
        getattr(loop, "py_func", loop)(*arguments, expected)
        np.testing.assert_allclose(compiled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_loops_equal_ordinary_operations(bits, channel_dim, memory_format):
    weight = normal(7, 5, 9, 9).contiguous(memory_format=memory_format)
    grad = normal(7, 5, 9, 9, seed=1)
    odd = weight.transpose(0, 3).contiguous().transpose(0, 3)
    assert kernels.dense(weight)
    assert not kernels.dense(odd)
    quantizer = LloydMax(weight, bits, channel_dim)
    with torch.no_grad():
        quantizer.levels.mul_(0.8)
    found = []
    for w in (weight.clone(memory_format=torch.preserve_format), odd):
        w.requires_grad_()
        value = quantizer(w)
        found.append((value, *torch.autograd.grad(value, (w, quantizer.levels), grad)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-6)
