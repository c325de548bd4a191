"""VVTQ's parts: steps by head, bin regularization, distillation, each against a slow twin."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qgen_lab._torchvision import torchvision
from qgen_lab.data import load_dataset
from qgen_lab.qat import (
    LSQ,
    Recipe,
    bake,
    build_model,
    codes,
    evaluate,
    fit,
    quantize_weights,
    quantizers,
    step_sizes,
)
from qgen_lab.qat.transformers import (
    AttentionLayer,
    BinRegularization,
    attention_layers,
    bin_regularizer,
    by_head,
    cross_entropy_of_targets,
    distillation,
)

HEADS, DIM = 2, 8


def vit(seed=0):
    """Two blocks, two heads of four channels each, for one image channel of 8x8."""
    return build_model(
        "vit",
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=HEADS,
        hidden_dim=DIM,
        mlp_dim=12,
        num_classes=10,
        in_channels=1,
        seed=seed,
    )


class FusedAttention(nn.Module):
    """Attention with one linear layer for queries, keys and values, as timm builds it."""

    def __init__(self, dim=DIM, heads=HEADS):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(
            nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)
        )


def fused_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, DIM), FusedAttention(), nn.Flatten(), nn.Linear(3 * DIM, 4)
        )


def images(size=6, seed=0):
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slot(model, layer):
    return quantizers.quantized_slots(model)[layer]


def float_weight(model, layer):
    return slot(model, layer).layer.parametrizations[slot(model, layer).parameter].original


# Where attention layers keep their weights


def test_attention_layers_of_torch_and_of_fused_linear_layers():
    found = attention_layers(vit())
    assert [layer.heads for layer in found] == [HEADS, HEADS]
    assert all(layer.projections == f"{layer.name}.in_proj" for layer in found)
    assert all(layer.output == f"{layer.name}.out_proj" for layer in found)
    assert attention_layers(fused_model()) == [AttentionLayer("1", HEADS, "1.qkv", "1.proj")]
    assert attention_layers(FusedAttention()) == [AttentionLayer("", HEADS, "qkv", "proj")]


def test_attention_layers_leave_out_what_has_no_fused_projections():
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert attention_layers(nn.Sequential(nn.Linear(3, 3), separate)) == []


def test_attention_layers_of_libraries():
    swin = torchvision.models.swin_t()
    assert [layer.heads for layer in attention_layers(swin)] == [3] * 2 + [6] * 2 + [12] * 6 + [
        24
    ] * 2
    timm = pytest.importorskip("timm")
    deit = timm.create_model("deit_tiny_patch16_224")
    assert len(attention_layers(deit)) == 12
    assert attention_layers(deit)[0] == AttentionLayer(
        "blocks.0.attn", 3, "blocks.0.attn.qkv", "blocks.0.attn.proj"
    )


# Steps by head


def lsq_of_blocks(weight, steps, bits, grad, dim):
    """Blocks of `weight` along `dim`, quantized one after another by a step each, and gradients."""
    values, for_weight, for_steps = [], [], []
    blocks = zip(weight.chunk(len(steps), dim), grad.chunk(len(steps), dim), steps, strict=True)
    for block, block_grad, step in blocks:
        quantizer = LSQ(block, bits)
        quantizer.step.data = step.clone()
        block = block.detach().contiguous().requires_grad_()
        value = quantizer(block)
        value.backward(block_grad.contiguous())
        values.append(value.detach())
        for_weight.append(block.grad)
        for_steps.append(quantizer.step.grad)
    return torch.cat(values, dim), torch.cat(for_weight, dim), torch.stack(for_steps)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("build", [vit, fused_model])
def test_each_head_has_steps_of_its_own(bits, build):
    model = build()
    layers = attention_layers(model)
    quantize_weights(model, bits, by_head(model))
    for layer in layers:
        for name, dim, count in ((layer.projections, 0, 3 * HEADS), (layer.output, 1, HEADS)):
            weight = float_weight(model, name).detach()
            steps = step_sizes(model)[name]
            assert steps.shape == (count,)
            first = torch.stack([LSQ(part, bits).step_size for part in weight.chunk(count, dim)])
            torch.testing.assert_close(steps, first)
            member = slot(model, name).quantizer
            member.step.data *= torch.linspace(0.5, 1.5, count)
            grad = normal(*weight.shape)
            original = float_weight(model, name)
            value = member(original)
            value.backward(grad)
            expected = lsq_of_blocks(weight, member.step.detach(), bits, grad, dim)
            torch.testing.assert_close(value.detach(), expected[0])
            torch.testing.assert_close(original.grad, expected[1])
            torch.testing.assert_close(member.step.grad, expected[2])
            torch.testing.assert_close(
                codes(model)[name] * steps_of(member.step, weight, dim), value.detach()
            )


def steps_of(steps, weight, dim):
    repeated = steps.detach().repeat_interleave(weight.shape[dim] // len(steps))
    return repeated[:, None] if dim == 0 else repeated


def test_a_step_of_one_head_moves_that_head_alone():
    model = fused_model()
    quantize_weights(model, 3, by_head(model))
    attention = model[1]
    before = attention.qkv.weight.detach().clone(), attention.proj.weight.detach().clone()
    attention.qkv.parametrizations.weight[0].step.data[3] *= 1.7  # keys of the second head
    attention.proj.parametrizations.weight[0].step.data[1] *= 1.7  # results of the second head
    rows = (attention.qkv.weight != before[0]).any(1).nonzero().flatten().tolist()
    columns = (attention.proj.weight != before[1]).any(0).nonzero().flatten().tolist()
    assert rows == [12, 13, 14, 15]
    assert columns == [4, 5, 6, 7]


@pytest.mark.parametrize("projection", [0, 1])  # queries, keys
def test_blocks_of_rows_are_the_heads_of_torch(projection):
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    quantize_weights(attention, 3, by_head(attention))
    inputs = normal(2, 5, DIM)

    def weights():
        return attention(inputs, inputs, inputs, average_attn_weights=False)[1].detach()

    before = weights()
    slot(attention, "in_proj").quantizer.step.data[projection * HEADS + 1] *= 1.7
    assert torch.equal(weights()[:, 0], before[:, 0])
    assert not torch.allclose(weights()[:, 1], before[:, 1])


def test_blocks_of_rows_are_the_heads_of_timm():
    timm = pytest.importorskip("timm")
    attention = timm.layers.Attention(DIM, HEADS)
    quantize_weights(attention, 3, by_head(attention))
    keys = []
    attention.k_norm.register_forward_hook(lambda module, inputs, output: keys.append(output))
    attention(normal(2, 5, DIM))
    slot(attention, "qkv").quantizer.step.data[HEADS + 1] *= 1.7
    attention(normal(2, 5, DIM))
    assert torch.equal(keys[0][:, 0], keys[1][:, 0])
    assert not torch.allclose(keys[0][:, 1], keys[1][:, 1])


def test_other_layers_have_lsq_as_usual():
    model, twin = fused_model(), fused_model()
    quantize_weights(model, 4, by_head(model), per_channel=True)
    quantize_weights(twin, 4, per_channel=True)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert step_sizes(model)["0"].shape == (DIM,)
    assert step_sizes(model)["1.qkv"].shape == (3 * HEADS,)


def test_by_head_needs_an_attention_layer():
    with pytest.raises(ValueError, match="no attention layer"):
        by_head(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("build", [vit, fused_model])
def test_state_copy_and_bake_of_steps_by_head(build):
    inputs = images() if build is vit else normal(6, 3, 5)
    model = build()
    quantize_weights(model, 3, by_head(model))
    other = build(seed=1)
    quantize_weights(other, 3, by_head(other))
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    model.eval(), other.eval(), copied.eval()
    with torch.no_grad():
        outputs = model(inputs)
        assert torch.equal(other(inputs), outputs)
        assert torch.equal(copied(inputs), outputs)
        assert torch.equal(bake(copied)(inputs), outputs)


# Bin regularization


def regularizer_by_hand(model):
    """One weight and one bin after another, in float64, on Python lists."""
    total = 0.0
    for layer, steps in step_sizes(model).items():
        weight = float_weight(model, layer).detach().double()
        bits, code = 3, codes(model)[layer]
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        steps = steps.double().reshape(-1)
        dim = 1 if len(steps) == HEADS else 0
        parts = zip(weight.chunk(len(steps), dim), code.chunk(len(steps), dim), steps, strict=True)
        squares, variances = [], 0.0
        for part, part_code, step in parts:
            bins = {}
            for w, c in zip(part.flatten().tolist(), part_code.flatten().tolist(), strict=True):
                clipped = min(max(w, low * step.item()), high * step.item())
                squares.append((clipped - c * step.item()) ** 2)
                bins.setdefault(c, []).append(clipped)
            for members in bins.values():
                if len(members) > 1:
                    mean = sum(members) / len(members)
                    variances += sum((m - mean) ** 2 for m in members) / (len(members) - 1)
        total += sum(squares) / len(squares) + variances / len(steps)
    return total


@pytest.mark.parametrize("quantizer", ["lsq", by_head])
@pytest.mark.parametrize("build", [vit, fused_model])
def test_bin_regularizer_equals_its_slow_twin(quantizer, build):
    model = build()
    quantize_weights(model, 3, quantizer if quantizer == "lsq" else quantizer(model))
    assert bin_regularizer(model).item() == pytest.approx(regularizer_by_hand(model), rel=1e-5)


def test_bin_regularizer_counts_the_bins_that_floating_point_loses():
    step = next(s for s in torch.linspace(0.1, 0.2, 500) if (3 * s) / s != 3)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    quantize_weights(model, 3)
    model[0].parametrizations.weight[0].step.data.fill_(step)
    weights = 3 * step + 0.2 * step * torch.linspace(-1, 1, 16)
    weights = weights.clamp(max=3 * step)
    model[0].parametrizations.weight.original.data = weights.view(4, 4)
    expected = (weights - 3 * step).square().mean() + weights.var()
    torch.testing.assert_close(bin_regularizer(model), expected)


def test_gradient_of_the_bin_regularizer_by_finite_differences():
    model = fused_model().double()
    quantize_weights(model, 2, by_head(model))
    bin_regularizer(model).backward()
    steps = {id(p) for m in model.modules() if isinstance(m, LSQ) for p in m.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) in steps)
    eps, checked = 1e-6, 0
    for layer in step_sizes(model):
        weight = float_weight(model, layer)
        code = codes(model)[layer]
        for index in range(0, weight.numel(), 5):
            gradient, values = weight.grad.flatten()[index].item(), []
            for shift in (eps, -eps):
                weight.data.view(-1)[index] += shift
                values.append(bin_regularizer(model).item())
                assert torch.equal(codes(model)[layer], code)
                weight.data.view(-1)[index] -= shift
            assert gradient == pytest.approx((values[0] - values[1]) / (2 * eps), abs=1e-7)
            checked += 1
    assert checked > 50


def test_clipped_weights_are_not_drawn():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    quantize_weights(model, 2)
    model[0].parametrizations.weight[0].step.data.fill_(1.0)
    weight = model[0].parametrizations.weight.original
    weight.data = torch.tensor([[1.2, 5.0], [-2.5, -1.9]])
    bin_regularizer(model).backward()
    # (1.2, 5.0) are both clipped to level 1; (-2.5, -1.9) to (-2, -1.9): a mean of squares over
    # four weights, and a variance of two, (-1.9 + 2)**2 / 2.
    expected = torch.tensor([[0.0, 0.0], [0.0, 2 * 0.1 / 4 + 0.1]])
    torch.testing.assert_close(weight.grad, expected)
    assert bin_regularizer(model).item() == pytest.approx(0.1**2 / 4 + 0.1**2 / 2)


def test_regularizer_pulls_weights_onto_their_levels():
    model = fused_model()
    quantize_weights(model, 3, by_head(model))
    before = codes(model)
    start = bin_regularizer(model).item()
    weights = [float_weight(model, layer) for layer in step_sizes(model)]
    for _ in range(200):
        bin_regularizer(model).backward()
        for weight in weights:
            weight.data -= 0.5 * weight.grad
            weight.grad = None
    assert bin_regularizer(model).item() < 0.02 * start
    assert all(torch.equal(code, before[name]) for name, code in codes(model).items())


def test_bin_regularizer_needs_lsq():
    with pytest.raises(ValueError, match="no layer with LSQ"):
        bin_regularizer(fused_model())


def test_strength_rises_along_half_a_cosine():
    model = quantize_weights(nn.Sequential(nn.Linear(3, 2)), 3)
    inputs, targets = normal(5, 3), torch.tensor([0, 1, 0, 1, 0])
    steps, strength, start = 41, 7.0, 0.25
    objective = BinRegularization(steps, strength=strength, start=start)
    outputs, found = model(inputs), []
    task = cross_entropy(outputs, targets).item()
    for _ in range(steps + 3):
        value = objective(model, inputs, outputs, targets).item()
        found.append((value - task) / bin_regularizer(model).item())
    rise = [max(0.0, (t / 40 - 0.25) / 0.75) for t in range(steps)] + [1.0] * 3
    expected = [7.0 * 0.5 * (1 - math.cos(math.pi * r)) for r in rise]
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[:11] == [0.0] * 11
    assert objective.step == steps + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 5, "strength": -1.0}, "strength must be zero or positive, got -1.0"),
        ({"steps": 5, "strength": math.inf}, "strength must be zero or positive, got inf"),
        ({"steps": 5, "start": 1.0}, r"start must be in \[0, 1\), got 1.0"),
    ],
)
def test_bin_regularization_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        BinRegularization(**arguments)


# Distillation


class Halves(nn.Module):
    """Gives other logits in training mode, as dropout and batch norm do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x) * (0.5 if self.training else 1.0)


def test_distillation_by_hand():
    teacher, model, inputs = Halves().train(), nn.Linear(3, 4), normal(5, 3)
    outputs = model(inputs)
    value = distillation(teacher)(model, inputs, outputs, torch.zeros(5, dtype=torch.long))
    expected = 0.0
    for answer, output in zip(teacher.layer(inputs).tolist(), outputs.tolist(), strict=True):
        total = sum(math.exp(a) for a in answer)
        normaliser = math.log(sum(math.exp(o) for o in output))
        expected -= sum(
            math.exp(a) / total * (o - normaliser) for a, o in zip(answer, output, strict=True)
        )
    assert value.item() == pytest.approx(expected / 5, rel=1e-5)
    value.backward()
    assert teacher.layer.weight.grad is None
    with torch.no_grad():
        residual = outputs.softmax(1) - teacher(inputs).softmax(1)
    torch.testing.assert_close(model.weight.grad, residual.T @ inputs / 5)


def test_a_teacher_of_other_classes_is_refused():
    inputs = normal(5, 3)
    objective = distillation(nn.Linear(3, 7))
    with pytest.raises(ValueError, match=r"\(5, 7\) where the network gives \(5, 4\)"):
        objective(None, inputs, normal(5, 4), None)


# A small vision transformer on digits


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", size=160)


RECIPE = Recipe(epochs=2, batch_size=40, optimizer="adamw", learning_rate=3e-3, schedule="cosine")


@pytest.fixture(scope="module")
def teacher(digits):
    model = vit()
    fit(model, digits, RECIPE)
    return model


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_every_combination_trains_a_small_vision_transformer(
    digits, teacher, heads, bins, distilled
):
    model = copy.deepcopy(teacher)
    quantize_weights(model, 3, by_head(model) if heads else "lsq")
    first = {name: step.clone() for name, step in step_sizes(model).items()}
    before = evaluate(model, digits.train).loss
    objective = distillation(teacher) if distilled else cross_entropy_of_targets
    if bins:
        objective = BinRegularization(8, objective, strength=0.1)
    history = fit(model, digits, RECIPE, objective=objective)
    assert history.train.loss < before
    assert not bins or objective.step == 8
    for name, step in step_sizes(model).items():
        assert torch.all(step != first[name]), name  # each step is learned, one by one
    model.eval()
    with torch.no_grad():
        outputs = model(images())
        assert torch.equal(bake(model)(images()), outputs)


def test_an_interrupted_training_goes_on_with_the_same_strength(digits, teacher, tmp_path):
    recipe = replace(RECIPE, epochs=4)

    def train(**arguments):
        model = copy.deepcopy(teacher)
        quantize_weights(model, 3, by_head(model))
        objective = BinRegularization(16, distillation(teacher), strength=10.0)
        try:
            fit(model, digits, recipe, objective=objective, **arguments)
        except KeyboardInterrupt:
            return None
        return model.state_dict()

    def stop_in_third_epoch(epoch, model):
        if epoch == 3:
            raise KeyboardInterrupt

    whole = train()
    train(checkpoint=tmp_path / "run", on_epoch=stop_in_third_epoch)
    resumed = train(checkpoint=tmp_path / "run")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
