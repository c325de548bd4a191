"""Attention layers, and steps that blocks of channels share."""

import copy

import pytest
import torch
from samples import normal
from torch import nn

from qgen_lab.qat import LSQ, bake, codes, quantize_weights, step_sizes
from qgen_lab.qat.quantizers import quantized_slots


def encoder_layer(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)


LAYERS = {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}


def test_the_input_projection_is_a_layer_of_its_own():
    model = quantize_weights(encoder_layer(), 3)
    assert set(step_sizes(model)) == LAYERS
    assert quantized_slots(model)["self_attn.in_proj"].original.shape == (36, 12)
    code, step = codes(model)["self_attn.in_proj"], step_sizes(model)["self_attn.in_proj"]
    assert torch.equal(model.self_attn.in_proj_weight, code * step)
    assert set(step_sizes(quantize_weights(encoder_layer(), 3, exclude="*.in_proj"))) == (
        LAYERS - {"self_attn.in_proj"}
    )
    by_type = quantize_weights(encoder_layer(), 3, layers=nn.MultiheadAttention, per_channel=True)
    assert {name: s.shape for name, s in step_sizes(by_type).items()} == {
        "self_attn.in_proj": (36,)
    }


def test_projections_of_unequal_sizes_are_three_layers():
    attention = quantize_weights(nn.MultiheadAttention(8, 2, kdim=6, vdim=4), 4)
    assert set(step_sizes(attention)) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    outputs = attention(normal(5, 1, 8), normal(5, 1, 6), normal(5, 1, 4))[0]
    outputs.sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    baked = bake(copy.deepcopy(attention))
    assert torch.equal(baked(normal(5, 1, 8), normal(5, 1, 6), normal(5, 1, 4))[0], outputs)
    assert not step_sizes(baked)
    assert len(step_sizes(attention)) == 4


@pytest.mark.parametrize("fast", ["_transformer_encoder_layer_fwd", "_native_multi_head_attention"])
def test_the_fast_path_of_evaluation_uses_quantized_weights(fast, monkeypatch):
    calls = []
    kernel = getattr(torch, fast)
    monkeypatch.setattr(torch, fast, lambda *given, **kw: calls.append(0) or kernel(*given, **kw))
    model = encoder_layer().eval()
    plain = copy.deepcopy(model)
    quantize_weights(model, 2)
    x = normal(2, 5, 12)

    def run(module):
        if fast == "_transformer_encoder_layer_fwd":
            return module(x)
        return module.self_attn(x, x, x, need_weights=False)[0]

    slow = run(model).detach()
    assert not calls
    with torch.inference_mode():
        quick, unquantized = run(model), run(plain)
        assert len(calls) == 2
        assert torch.equal(run(bake(model)), quick)
    torch.testing.assert_close(quick, slow)
    assert (quick - unquantized).abs().max() > 0.01


def test_attention_trains_saves_and_loads():
    model = quantize_weights(encoder_layer(), 2)
    model(normal(2, 5, 12)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    other = quantize_weights(encoder_layer(seed=1), 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(normal(2, 5, 12)), model(normal(2, 5, 12)))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("channel_dim", [None, 0, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_block_of_channels_is_a_quantizer_of_its_own(bits, channel_dim, memory_format):
    weight, grad = normal(6, 12, 2, 3), normal(6, 12, 2, 3, seed=1)
    weight *= torch.arange(1, 13).view(1, 12, 1, 1) * torch.arange(1, 7).view(6, 1, 1, 1)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    quantizer = LSQ(weight, bits, channel_dim, groups=3)
    assert quantizer.step_size.shape == (3,)
    value = quantizer(weight)
    value.backward(grad)
    dim = channel_dim or 0
    blocks = [t.chunk(3, dim) for t in (weight.detach(), grad, value.detach(), weight.grad)]
    for group, (part, part_grad, part_value, part_weight_grad) in enumerate(
        zip(*blocks, strict=True)
    ):
        one = part.contiguous().requires_grad_()
        single = LSQ(one, bits)
        single(one).backward(part_grad.contiguous())
        torch.testing.assert_close(single.step, quantizer.step[group])
        torch.testing.assert_close(single(one), part_value)
        assert torch.equal(one.grad, part_weight_grad)
        torch.testing.assert_close(single.step.grad, quantizer.step.grad[group])
        assert torch.equal(single.code(one), quantizer.code(weight).chunk(3, dim)[group])


def test_groups_equal_pytorch_s_operator_on_each_block():
    """Away from the half bin beyond the range, which PyTorch counts as inside."""
    weight, grad = normal(12, 40), normal(12, 40, seed=1)
    quantizer = LSQ(weight, 4, groups=4)
    weight *= 3
    step = quantizer.step_size.repeat_interleave(3)[:, None]
    v = weight / step
    weight = torch.where((v > 7) & (v < 7.6), 7.7 * step, weight)
    weight = torch.where((v < -8) & (v > -8.6), -8.7 * step, weight).requires_grad_()
    quantizer(weight).backward(grad)
    for group in range(4):
        block = slice(3 * group, 3 * group + 3)
        one = weight.detach()[block].clone().requires_grad_()
        single = quantizer.step_size[group : group + 1].clone().requires_grad_()
        value = torch._fake_quantize_learnable_per_tensor_affine(
            one, single, torch.zeros(1), -8, 7, (120 * 7) ** -0.5
        )
        value.backward(grad[block])
        torch.testing.assert_close(quantizer(weight)[block], value)
        torch.testing.assert_close(weight.grad[block], one.grad)
        torch.testing.assert_close(quantizer.step.grad[group], single.grad[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [0, -1, 5])
def test_groups_that_do_not_divide_the_channels_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups = {groups}: give a divisor of the 12 channels"):
        LSQ(normal(12, 4), 4, groups=groups)
