"""Folded batch norms against the networks that they were folded in, and what cannot be folded."""

import copy

import pytest
import torch
from samples import normal
from torch import nn

from qgen_lab.qat import (
    bake,
    build_model,
    nin,
    quantize_weights,
    resnet18,
    step_sizes,
    torchvision_model,
)
from qgen_lab.qat.batch_norm import CannotFold, batch_norm_pairs, fold_batch_norm

NORMS = nn.modules.batchnorm._BatchNorm
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def trained(model, seed=0):
    """Batch norms as training could leave them: nothing is zero or one, signs differ."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            for value in (module.running_mean, module.weight, module.bias):
                if value is not None:
                    value.data.normal_(generator=draw)
            if module.running_var is not None:
                module.running_var.uniform_(0.2, 3, generator=draw)
            if module.weight is not None:  # gains near one keep the outputs of deep networks finite
                module.weight.data.uniform_(0.5, 1.5, generator=draw).mul_(
                    torch.rand(len(module.weight), generator=draw).sub(0.3).sign()
                )
    return model.eval()


def batch_norm_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def sequence(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers))


CASES = {
    "nin": (lambda: nin(2, 2, base_width=3, seed=0), (3, 16, 16)),
    "resnet18": (lambda: resnet18(base_width=8, seed=0), (3, 16, 16)),
    "mobilenet": (lambda: torchvision_model("mobilenet_v2", num_classes=4, seed=0), (3, 32, 32)),
    "grouped": (
        lambda: sequence(
            lambda: nn.Conv2d(6, 12, 3, groups=3, padding=1, padding_mode="reflect"),
            lambda: nn.BatchNorm2d(12, eps=0.1),
            lambda: nn.Conv2d(12, 12, 3, groups=12, stride=2, bias=False),
            lambda: nn.BatchNorm2d(12, affine=False),
        ),
        (6, 9, 9),
    ),
    "transposed": (
        lambda: sequence(
            lambda: nn.ConvTranspose2d(3, 5, 3, stride=2),
            lambda: nn.BatchNorm2d(5),
            nn.ReLU,
            lambda: nn.ConvTranspose2d(5, 2, 3, bias=False),
            lambda: nn.BatchNorm2d(2),
        ),
        (3, 5, 5),
    ),
    "linear": (
        lambda: sequence(
            lambda: nn.Linear(6, 5),
            lambda: nn.BatchNorm1d(5),
            nn.Tanh,
            lambda: nn.Linear(5, 4, bias=False),
            lambda: nn.BatchNorm1d(4, affine=False),
        ),
        (6,),
    ),
    "one and three dimensions": (
        lambda: sequence(
            lambda: nn.Conv1d(2, 4, 3),
            lambda: nn.BatchNorm1d(4),
            lambda: nn.Unflatten(2, (2, 2, 2)),
            lambda: nn.Conv3d(4, 3, 2),
            lambda: nn.BatchNorm3d(3),
        ),
        (2, 10),
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_the_same(case, dtype):
    build, shape = CASES[case]
    model = trained(build()).to(dtype)
    inputs = normal(3, *shape, dtype=dtype)
    before, norms = model(inputs), [m for m in model.modules() if isinstance(m, NORMS)]
    pairs = batch_norm_pairs(model)
    assert len(pairs) == len(norms) > 0
    assert fold_batch_norm(model) is model
    assert not any(isinstance(module, NORMS) for module in model.modules())
    after = model(inputs)
    assert (after - before).abs().max() < TOLERANCE[dtype] * before.abs().max()
    for norm, layer in pairs.items():
        assert type(model.get_submodule(norm)) is nn.Identity
        assert model.get_submodule(layer).bias.dtype == dtype


def test_every_network_of_the_library_can_be_traced():
    for name in ("nin", "resnet18", "resnet50"):
        model = build_model(name, **({"depth": 1, "width_multiplier": 1} if name == "nin" else {}))
        norms = [n for n, m in model.named_modules() if isinstance(m, NORMS)]
        assert set(batch_norm_pairs(model)) == set(norms)


def test_parameters_modes_and_gradients_stay_as_they_were():
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)))
    weight = model[0].weight.requires_grad_(False)
    model.train()
    fold_batch_norm(model)
    assert model[0].weight is weight
    assert not model[0].bias.requires_grad
    assert all(module.training for module in model[:1])
    other = trained(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    bias = other[0].bias
    assert fold_batch_norm(other)[0].bias is bias
    assert bias.requires_grad


def test_without_batch_norm_nothing_happens():
    class Untraceable(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = nn.Sequential(Untraceable(3, 3), nn.LayerNorm(3))
    before = copy.deepcopy(model.state_dict())
    assert batch_norm_pairs(model) == {}
    assert fold_batch_norm(model) is model
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bake_folds_on_request():
    model = trained(quantize_weights(nin(1, 2, base_width=3, seed=0), 3))
    inputs, steps = normal(3, 3, 8, 8), step_sizes(model)
    expected = model(inputs)
    twin, norm = copy.deepcopy(model), model.get_submodule(next(iter(batch_norm_names(model))))
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert bake(model, fold_batch_norm=True) is model
    assert not batch_norm_names(model)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)
    name = next(iter(steps))
    codes = model.get_submodule(name).weight / (gain * steps[name]).view(-1, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert batch_norm_names(bake(twin))


def test_a_model_that_is_baked_and_cannot_be_folded_is_baked():
    model = quantize_weights(Branching(), 3)
    with pytest.raises(CannotFold, match=r"torch\.fx"):
        bake(model, fold_batch_norm=True)
    assert not step_sizes(model)


# What stays a norm


class Branches(nn.Module):
    """Five norms, of which only the last can go into the layer before it."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.alone = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.twice.weight
        self.before = nn.BatchNorm1d(4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(6))

    def forward(self, x):
        x = self.before(x)
        y = self.first(x)
        x = self.norms[0](y) + y
        x = self.norms[1](self.twice(x)) + self.norms[1](self.alone(x))
        x = self.norms[2](self.twice(x))
        x = self.norms[3](self.read(x)) + self.read.weight.mean()
        x = self.norms[4](self.tied(x))
        return self.norms[5](self.last(x))


def test_norms_that_do_not_belong_to_one_layer_stay():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(Branches())
    inputs = normal(5, 4)
    expected = model(inputs)
    assert batch_norm_pairs(model) == {"norms.5": "last"}
    fold_batch_norm(model)
    assert [type(norm) is nn.Identity for norm in model.norms] == [False] * 5 + [True]
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_transposed_convolution_of_several_groups_keeps_its_norm():
    model = trained(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)))
    assert batch_norm_pairs(model) == {}


def test_a_norm_with_two_names_is_replaced_under_both():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.parts = nn.ModuleList([self.layer, self.norm])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    model, inputs = trained(Aliased()), normal(4, 3)
    expected = model(inputs)
    fold_batch_norm(model)
    assert type(model.norm) is type(model.parts[1]) is nn.Identity
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)


# What cannot be folded


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.norm(self.layer(x))
        return x if x.sum() > 0 else -x


def without_statistics():
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), norm)


REFUSED = {
    "untraceable": (Branching, r"torch.fx cannot trace the model.*fold the parts"),
    "quantized": (
        lambda: quantize_weights(
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)),
            3,
            layers="2",
        ),
        r"layer '2' before batch norm '3' is quantized.*bake\(model\) first",
    ),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)
        ),
        "layer '0' before batch norm '1' .* remove the parametrization",
    ),
    "without statistics": (without_statistics, "batch norm '3' keeps no running statistics"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_said_and_left_alone(case):
    build, message = REFUSED[case]
    model = build()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(CannotFold, match=message):
        fold_batch_norm(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
