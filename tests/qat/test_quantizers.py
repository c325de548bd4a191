"""Quantizers against closed formulas, against PyTorch's operator, and under unkind use."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from qgen_lab.codebooks import Codebook, lloyd_max, lsq_grid, power_of_two, uniform
from qgen_lab.qat import (
    LSQ,
    FixedCodebook,
    Quantizer,
    bake,
    bin_widths,
    bits_per_layer,
    codes,
    kernels,
    parameter_groups,
    quantization_noise,
    quantize_weights,
    quantizers,
    step_sizes,
)

ALL_BITS = (1, 2, 3, 4, 8, 16)


def network(seed=0):
    """Two convolutions, one of them 1x1, and a linear layer, on images of shape (3, 6, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(128, 5),
        )


def images(seed=0, size=4, dtype=torch.float32):
    return torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lsq_by_hand(weight, step, bits, grad):
    """Eq. 1 to 3 and their gradients in float64 NumPy, one step."""
    w, g = weight.double().numpy().ravel(), grad.double().numpy().ravel()
    high = 1 if bits == 1 else 2 ** (bits - 1) - 1
    scale = 1 / np.sqrt(w.size * high)
    if bits == 1:
        sign = np.where(w >= 0, 1.0, -1.0)
        return step * sign, g, scale * np.sum(g * sign)
    low, v = -(2 ** (bits - 1)), w / step
    inside = (low < v) & (v < high)
    bounded = np.round(np.clip(v, low, high))
    slope = np.where(inside, bounded - v, bounded)
    return step * bounded, g * inside, scale * np.sum(g * slope)


class SlowLSQ(torch.autograd.Function):
    """LSQ as one writes it down, fresh memory for everything."""

    @staticmethod
    def forward(ctx, weight, step, bits):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        v = weight / step
        inside = (v > low) & (v < high)
        bounded = v.clamp(low, high).round()
        ctx.save_for_backward(inside, torch.where(inside, bounded - v, bounded))
        ctx.scale = (weight.numel() * high) ** -0.5
        return bounded * step

    @staticmethod
    def backward(ctx, grad):
        inside, slope = ctx.saved_tensors
        return grad * inside, ctx.scale * (grad * slope).sum(), None


class SlowParametrization(nn.Module):
    def __init__(self, weight, bits):
        super().__init__()
        high = 2 ** (bits - 1) - 1
        self.step = nn.Parameter(2 * weight.detach().abs().mean() / high**0.5)
        self.bits = bits

    def forward(self, weight):
        return SlowLSQ.apply(weight, self.step, self.bits)


def slow_twin(model, bits):
    """The same model with the slow quantizer, parameter names included."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            slow = SlowParametrization(layer.weight, bits)
            parametrize.register_parametrization(layer, "weight", slow)
    return twin


def pair(bits=3, seed=0):
    """A quantized model and its slow twin."""
    model = network(seed)
    return quantize_weights(copy.deepcopy(model), bits), slow_twin(model, bits)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(model, twin, rtol=1e-4):
    assert dict(model.named_parameters()).keys() == dict(twin.named_parameters()).keys()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1e-3)
        error = (found.grad - expected.grad).abs().max() / scale
        assert error < rtol, f"{name}: relative error {error:.2e}"


# LSQ: values and gradients


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lsq_equals_the_closed_formulas(bits, dtype):
    weight, grad = normal(8, 5, 3, 3, dtype=dtype), normal(8, 5, 3, 3, seed=1, dtype=dtype)
    quantizer = LSQ(weight, bits)
    weight.requires_grad_()
    quantizer(weight).backward(grad)
    value, grad_weight, grad_step = lsq_by_hand(
        weight.detach(), quantizer.step_size.double().item(), bits, grad
    )
    tolerance = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12}
    np.testing.assert_allclose(quantizer(weight).detach().numpy().ravel(), value, **tolerance)
    np.testing.assert_allclose(weight.grad.numpy().ravel(), grad_weight, **tolerance)
    np.testing.assert_allclose(quantizer.step.grad.item(), grad_step, rtol=1e-4, atol=1e-6)
    assert quantizer(weight).dtype == dtype


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_channel_is_a_quantizer_of_its_own(bits, channel_dim, memory_format):
    weight, grad = normal(6, 4, 3, 3), normal(6, 4, 3, 3, seed=1)
    weight *= torch.arange(1, 5).view(1, 4, 1, 1) * torch.arange(1, 7).view(6, 1, 1, 1)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    quantizer = LSQ(weight, bits, channel_dim)
    value = quantizer(weight)
    assert value.stride() == weight.stride()
    value.backward(grad)
    for channel in range(weight.shape[channel_dim]):
        one = weight.detach().select(channel_dim, channel).contiguous().requires_grad_()
        single = LSQ(one, bits)
        single(one).backward(grad.select(channel_dim, channel).contiguous())
        assert torch.equal(single(one), value.select(channel_dim, channel))
        assert torch.equal(one.grad, weight.grad.select(channel_dim, channel))
        torch.testing.assert_close(single.step.grad, quantizer.step.grad[channel])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_loops_equal_ordinary_operations(bits, memory_format):
    """A transpose in memory is what the loops decline, so the other path runs on equal numbers."""
    weight = normal(7, 5, 3, 3).contiguous(memory_format=memory_format)
    grad = normal(7, 5, 3, 3, seed=1)
    odd = weight.transpose(0, 3).contiguous().transpose(0, 3)
    assert kernels.dense(weight)
    assert not kernels.dense(odd)
    quantizer = LSQ(weight, bits)
    found = []
    for w in (weight.clone(memory_format=torch.preserve_format), odd):
        w.requires_grad_()
        value = quantizer(w)
        found.append((value, *torch.autograd.grad(value, (w, quantizer.step), grad)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["_round", "_round_gradients", "_sign", "_sign_gradient"])
def test_the_loops_are_the_same_uncompiled(name):
    weight, grad = normal(24).numpy(), normal(24, seed=1).numpy()
    step = np.array([0.3, 0.2], dtype=np.float32)
    arguments = {
        "_round": (weight, step, -4, 3),
        "_round_gradients": (weight, step, -4, 3, grad, 0.1, np.empty_like(weight)),
        "_sign": (weight, step, -1, 1),
        "_sign_gradient": (weight, grad, 0.1),
    }[name]
    loop = getattr(kernels, name)
    plain = getattr(loop, "py_func", loop)
    size = 2 if "gradient" in name else 24
    compiled, expected = np.zeros(size, np.float32), np.ones(size, np.float32)
    loop(*arguments, compiled)
    plain(*arguments, expected)
    np.testing.assert_allclose(compiled, expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_lsq_equals_pytorch_where_the_two_coincide(bits, per_channel):
    """That is away from the half bin beyond the range, which PyTorch counts as inside."""
    weight, grad = normal(16, 40), normal(16, 40, seed=1)
    quantizer = LSQ(weight, bits, 0 if per_channel else None)
    weight *= quantizer.high  # some weights beyond the range
    step = quantizer.step_size
    with torch.no_grad():
        v = weight / step.view(-1, 1)
        low, high = quantizer.low, quantizer.high
        in_half_bin = ((v > high) & (v < high + 0.6)) | ((v < low) & (v > low - 0.6))
        weight[in_half_bin] = 0.0
        assert (v > high + 1).any()
    weight.requires_grad_()
    twin, twin_step = weight.detach().clone().requires_grad_(), step.reshape(-1).clone()
    twin_step.requires_grad_()
    zero_point = torch.zeros_like(step.reshape(-1))
    if per_channel:
        expected = torch._fake_quantize_learnable_per_channel_affine(
            twin, twin_step, zero_point, 0, low, high, quantizer.gradient_scale
        )
    else:
        expected = torch._fake_quantize_learnable_per_tensor_affine(
            twin, twin_step, zero_point, low, high, quantizer.gradient_scale
        )
    value = quantizer(weight)
    value.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert torch.equal(weight.grad, twin.grad)
    torch.testing.assert_close(
        quantizer.step.grad.reshape(-1), twin_step.grad, rtol=1e-5, atol=1e-6
    )


def test_the_half_bin_beyond_the_range_is_outside():
    """Codes -8..7, step 1: 7.3 and -8.3 get no gradient, and give the step their bounds."""
    weight = torch.tensor([7.3, -8.3, 6.9, 7.0, -8.0, -7.6, 0.2], requires_grad=True)
    grad = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6])
    quantizer = LSQ(weight, 4)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    value = quantizer(weight)
    value.backward(grad)
    assert value.tolist() == [7, -8, 7, 7, -8, -8, 0]
    assert weight.grad.tolist() == [0, 0, 100, 0, 0, 1e5, 1e6]
    slopes = [7, -8, 7 - 6.9, 7, -8, -8 + 7.6, 0 - 0.2]
    expected = np.dot(grad.double().numpy(), slopes) / np.sqrt(7 * 7)
    assert quantizer.step.grad.item() == pytest.approx(expected, rel=1e-5)


def test_ties_go_to_the_even_code_and_the_sign_of_zero_is_one():
    weight = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    quantizer = LSQ(weight, 4)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    assert quantizer(weight).tolist() == [0, 2, 2, 0, -2, -2]
    one_bit = LSQ(torch.tensor([2.0, -4.0, 0.0]), 1)
    assert one_bit(torch.tensor([0.0, -0.0, -1e-30])).tolist() == [2.0, 2.0, -2.0]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_step_starts_where_the_paper_says(bits):
    weight = normal(6, 50, dtype=torch.float64)
    high = 2 ** (bits - 1) - 1
    expected = weight.abs().mean() * (1 if bits == 1 else 2 / high**0.5)
    torch.testing.assert_close(LSQ(weight, bits).step.detach(), expected)
    per_channel = weight.abs().mean(1) * (1 if bits == 1 else 2 / high**0.5)
    torch.testing.assert_close(LSQ(weight, bits, 0).step.detach(), per_channel)


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(1, 16),
    step=st.floats(2**-20, 2**20, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_on_the_grid_come_back_unchanged(bits, step, seed):
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    code = rng.choice([-1, 1], 64) if bits == 1 else rng.integers(-half, half, 64)
    for dtype in (torch.float32, torch.float64):
        weight = torch.tensor(code, dtype=dtype) * step
        quantizer = LSQ(torch.ones(1, dtype=dtype), bits)
        with torch.no_grad():
            quantizer.floor.fill_(0.0)
            quantizer.step.fill_(step)
        assert torch.equal(quantizer(weight), weight)
        assert quantizer.code(weight).tolist() == code.tolist()


@pytest.mark.parametrize(("bits", "per_channel"), [(1, False), (4, True), (16, False)])
@pytest.mark.parametrize(("optimizer", "huge"), [("SGD", 1e30), ("Adam", 1e15)])
def test_hostile_gradients_never_bring_a_step_to_zero(bits, per_channel, optimizer, huge):
    rng = np.random.default_rng(0)
    model = quantize_weights(nn.Linear(6, 4), bits, per_channel=per_channel)
    quantizer = model.parametrizations.weight[0]
    keywords = {"momentum": 0.9} if optimizer == "SGD" else {}
    stepper = getattr(torch.optim, optimizer)(parameter_groups(model, 1e-2), lr=0.1, **keywords)
    below = 0
    for _ in range(2000):
        assert model.weight.isfinite().all()
        assert (quantizer.step >= quantizer.floor).all()  # put back by the forward pass
        size = rng.choice([huge, 1e3, 1.0, -1.0], quantizer.step.shape, p=[0.2, 0.3, 0.3, 0.2])
        quantizer.step.grad = torch.tensor(size * rng.random(size.shape), dtype=torch.float32)
        stepper.step()
        below += (quantizer.step <= 0).any().item()
        assert (step_sizes(model)[""] >= quantizer.floor).all()
    assert (quantizer.floor > 0).all()
    assert below > 100, "the steps were hardly ever pushed through zero, so nothing was tested"


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_layer_of_zeros_gets_a_step_of_its_default_initialisation(per_channel):
    layer = nn.Linear(300, 4, bias=False)
    nn.init.zeros_(layer.weight)
    quantize_weights(layer, 4, per_channel=per_channel)
    quantizer = layer.parametrizations.weight[0]
    spread = 1 / np.sqrt(3 * 300)  # of U(-1/sqrt(300), 1/sqrt(300)), what nn.Linear starts from
    torch.testing.assert_close(
        quantizer.step_size, torch.full_like(quantizer.step, 2 * spread / np.sqrt(7))
    )
    assert (quantizer.floor < 0.01 * quantizer.step).all()
    assert not layer.weight.any()


def test_the_floor_scales_with_the_weights():
    weight = normal(50)
    for bits in ALL_BITS:
        quantizer, scaled = LSQ(weight, bits), LSQ(1000 * weight, bits)
        torch.testing.assert_close(scaled.floor, 1000 * quantizer.floor)
        reach = quantizer.floor * quantizer.high
        torch.testing.assert_close(reach, 0.01 * weight.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 4])
def test_not_a_number_stays_visible(dtype, bits):
    weight = normal(4, dtype=dtype)
    quantizer = LSQ(weight, bits)
    weight[1] = torch.nan
    assert quantizer(weight).isnan().tolist() == [False, True, False, False]


# Memory and graphs


def test_training_steps_equal_those_of_the_slow_twin():
    model, twin = pair()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, twin = (m.to(memory_format=memory_format) for m in (model, twin))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
        for seed in range(5):
            x = images(seed).contiguous(memory_format=memory_format)
            for m, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
            assert_same_gradients(model, twin)


def test_two_forwards_before_one_backward():
    model, twin = pair()
    for m in (model, twin):
        (m(images(0)).square().sum() + m(images(1)).exp().mean()).backward()
    assert_same_gradients(model, twin)


def test_gradients_accumulate_over_backwards():
    model, twin = pair()
    for m in (model, twin):
        losses = [m(images(seed)).square().mean() for seed in range(6)]
        for loss in losses:
            loss.backward()
    assert_same_gradients(model, twin)


def test_backward_twice_through_a_retained_graph():
    model, twin = pair()
    for m in (model, twin):
        loss = m(images()).square().mean()
        loss.backward(retain_graph=True)
        m(images(1))  # a forward in between
        loss.backward()
    assert_same_gradients(model, twin)


def test_a_graph_from_before_an_optimizer_step_raises():
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stale = model(images()).square().mean()
    model(images(1)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_weight_that_someone_holds_is_never_overwritten():
    layer = quantize_weights(nn.Linear(30, 20), 4)
    held = [layer.weight.detach() for _ in range(10)]
    copies = [w.clone() for w in held]
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1.0)
    for _ in range(10):
        layer.weight.sum().backward()
    assert all(torch.equal(w, c) for w, c in zip(held, copies, strict=True))
    row = layer.weight[3]  # a view holds the memory as well
    expected = row.detach().clone()
    for _ in range(10):
        layer.weight.sum().backward()
    assert torch.equal(row, expected)


def test_memory_is_used_again_from_step_to_step():
    layer = quantize_weights(nn.Linear(30, 20), 4)

    def addresses():
        layer.zero_grad()
        weight = layer.weight
        weight.square().sum().backward()
        return {weight.data_ptr(), layer.parametrizations.weight.original.grad.data_ptr()}

    addresses()
    assert all(addresses() == addresses() for _ in range(5))


def test_the_pool_keeps_little():
    pool = kernels.Pool()
    loans = [pool.empty_like(torch.ones(10))[0] for _ in range(50)]
    assert len({loan.data_ptr() for loan in loans}) == 50
    assert len(pool._slots) == pool.kept
    addresses = {loan.data_ptr() for loan in loans[:4]}
    del loans
    again, memory = pool.empty_like(torch.ones(10))
    assert again.data_ptr() in addresses
    memory[:] = 7.0
    assert (again == 7.0).all()
    assert pool.empty_like(torch.ones(3))[0].shape == (3,)
    assert len(pool._slots) == pool.kept


def test_incoming_gradients_are_left_as_they_are():
    """The gradient of a sum reaches both of its terms as one tensor."""
    layer = quantize_weights(nn.Linear(30, 20, bias=False), 2)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(10)  # beyond the range
    other = torch.zeros(20, 30, requires_grad=True)
    coefficients = normal(20, 30)
    seen = []
    weight = layer.weight
    weight.retain_grad()
    weight.register_hook(seen.append)
    ((weight + other) * coefficients).sum().backward()
    assert torch.equal(other.grad, coefficients)
    assert torch.equal(weight.grad, coefficients)
    assert torch.equal(seen[0], coefficients)
    assert not torch.equal(layer.parametrizations.weight.original.grad, coefficients)


@pytest.mark.parametrize("bits", [1, 4])
def test_expanded_and_transposed_gradients(bits):
    weight = normal(6, 5)
    quantizer = LSQ(weight, bits)
    for grad in (torch.ones(1, 1).expand(6, 5), normal(5, 6).T):
        found = []
        for g in (grad, grad.contiguous()):
            w = weight.clone().requires_grad_()
            found.append(torch.autograd.grad(quantizer(w), (w, quantizer.step), g))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, twin = pair()
    for m in (model, twin):
        m.eval()  # batch norm would see its batch twice
        x = images().requires_grad_()
        checkpoint(m, x, use_reentrant=use_reentrant).square().mean().backward()
    assert_same_gradients(model, twin)


def test_part_of_a_model_and_a_model_inside_another():
    model, twin = pair()
    for m in (model, twin):
        nn.Sequential(m[:4], nn.Flatten())(images()).square().mean().backward()
    assert model[6].parametrizations.weight.original.grad is None
    trained = nn.ModuleList([model[0], model[3]]), nn.ModuleList([twin[0], twin[3]])
    assert_same_gradients(*trained)


def test_threads_do_not_share_memory():
    model, _ = pair()
    model.eval()
    batches = [images(seed) for seed in range(4)]

    def run(x):
        found = []
        for _ in range(20):
            loss = model(x).square().mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        return found

    expected = [run(x)[0] for x in batches]
    with ThreadPoolExecutor(4) as executor:
        for found, gradient in zip(executor.map(run, batches), expected, strict=True):
            for each in found:
                torch.testing.assert_close(each, gradient)


def test_evaluation_and_inference_give_the_values_of_training():
    model, _ = pair()
    expected = model[0].weight.detach().clone()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model[0].weight, expected)
    with torch.inference_mode():
        assert torch.equal(model[0].weight, expected)
    with parametrize.cached():
        assert model[0].weight is model[0].weight


def test_half_precision_and_autocast():
    model = quantize_weights(network().bfloat16(), 4)
    model(images().bfloat16()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model, _ = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# Derivatives beyond the first, and transforms


def test_per_sample_gradients_by_transforms():
    model, _ = pair()
    model.eval()
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


def test_jacobians_by_batches_of_gradients():
    layer = quantize_weights(nn.Linear(6, 5, bias=False), 3)
    weight = layer.parametrizations.weight.original
    y = layer(normal(6))
    inputs = (weight, layer.parametrizations.weight[0].step)
    batched = torch.autograd.grad(y, inputs, torch.eye(5), is_grads_batched=True, retain_graph=True)
    for i in range(5):
        one = torch.autograd.grad(y[i], inputs, retain_graph=True)
        for found, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_and_parameters_from_outside():
    model, _ = pair()
    model.eval()
    x = images()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    directions = {name: normal(p.numel()).view(p.shape) for name, p in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    _, slope = torch.func.jvp(loss, (parameters,), (directions,))
    model(x).square().mean().backward()
    expected = sum((p.grad * directions[name]).sum() for name, p in model.named_parameters())
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)

    name = "0.parametrizations.weight.0.step"
    parameters[name].fill_(-1.0)  # a caller's tensor counts as the floor, and stays as it is
    assert loss(parameters).isfinite()
    assert parameters[name] == -1.0


@pytest.mark.parametrize("bits", [1, 3])
def test_second_derivatives_equal_those_of_ordinary_operations(bits):
    weight = normal(4, 6)
    direction = normal(4, 6, seed=2)
    quantizer = LSQ(weight, bits)
    found = []
    for w in (weight.clone(), weight.T.contiguous().T):
        w.requires_grad_()
        loss = quantizer(w).pow(3).sum()
        first = torch.autograd.grad(loss, (w, quantizer.step), create_graph=True)
        second = (first[0] * direction).sum() + first[1]
        found.append(torch.autograd.grad(second, (w, quantizer.step)))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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
    model, _ = pair()
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


MEMBERS = {
    **{name: (name, 4) for name in quantizers.registry},
    "lsq, one bit": ("lsq", 1),
    "codebook": (CODEBOOKS["power of two"], None),
    "own": (Ternary, 2),
}


@pytest.mark.parametrize(("member", "bits"), MEMBERS.values(), ids=MEMBERS.keys())
def test_every_quantizer_keeps_the_protocol(member, bits):
    model = quantize_weights(network(), bits, member).eval()
    for name, quantizer in ((n, model.get_submodule(n).parametrizations.weight[0]) for n in "036"):
        layer = model.get_submodule(name)
        original = layer.parametrizations.weight.original
        assert isinstance(quantizer, Quantizer)
        assert layer.weight.shape == original.shape
        assert layer.weight.dtype == original.dtype
        assert len(layer.weight.unique()) <= round(2 ** bits_per_layer(model)[name])
        code = codes(model)[name]
        assert code.dtype == torch.int32
        order = code.flatten().argsort()  # a code stands for one level, in ascending order
        assert (layer.weight.flatten()[order].diff() >= 0).all()
        assert (code.flatten()[order].diff()[layer.weight.flatten()[order].diff() == 0] == 0).all()
        assert torch.equal(quantizer(layer.weight), layer.weight)  # levels stay where they are
        assert step_sizes(model)[name] > 0
        assert str(quantizer)
    model(images()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    other = quantize_weights(network(seed=7), bits, member).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    expected = model(images())
    assert torch.equal(bake(model)(images()), expected)


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
