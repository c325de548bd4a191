"""LSQ against closed formulas, against PyTorch's operator, and under unkind use."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import images, network, normal
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from qgen_lab.qat import (
    LSQ,
    kernels,
    parameter_groups,
    quantize_weights,
    step_sizes,
)

ALL_BITS = (1, 2, 3, 4, 8, 16)


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


@settings(max_examples=50)
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
