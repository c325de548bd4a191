"""Batch-norm statistics against pooled statistics by hand, layer by layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qgen_lab.data import load_dataset
from qgen_lab.qat import Recipe, evaluate, fit, nin, quantize_weights
from qgen_lab.qat.batch_norm import reestimate_batch_norm


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(size, *shape):
    return 3 + 2 * normal(size, *shape), torch.zeros(size, dtype=torch.int64)


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def one_batch_by_hand(layers, inputs):
    """Mean and unbiased variance in front of each batch norm when all samples are one batch."""
    found, values = [], inputs.double().numpy()
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            flat = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
            found.append((flat.mean(0), flat.var(0, ddof=1)))
            scale, shift = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            normalised = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + layer.eps)
            rows = np.moveaxis(values, 1, -1).shape
            values = np.moveaxis((normalised * scale + shift).reshape(rows), -1, 1)
        else:
            values = layer.double()(torch.tensor(values)).detach().numpy()
    return found


CASES = {
    "images": (lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)], (2, 5, 5)),
    "two in a row": (lambda: [nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)], (2, 3, 3)),
    "features": (lambda: [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5)], (6,)),
    "volumes": (lambda: [nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3, affine=True)], (1, 3, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_batch_gives_its_own_statistics(case):
    build, shape = CASES[case]
    model = nn.Sequential(*build())
    expected = one_batch_by_hand(copy.deepcopy(model), pair(50, *shape)[0])
    assert reestimate_batch_norm(model, pair(50, *shape), batch_size=50) is model
    norms = [m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer, (mean, variance) in zip(norms, expected, strict=True):
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.running_var, variance, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 7, 16, 100])
def test_first_layer_has_the_exact_statistics_of_all_samples_whatever_the_batches(batch_size):
    inputs, targets = pair(48, 3, 4, 4)
    inputs += torch.arange(48).view(-1, 1, 1, 1)  # batches differ in their means
    model = nn.Sequential(nn.BatchNorm2d(3))
    reestimate_batch_norm(model, (inputs, targets), batch_size)
    flat = inputs.double().transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(model[0].running_mean.double(), flat.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), flat.var(1), rtol=1e-5, atol=0)


def test_iterables_are_taken_in_their_own_batches():
    inputs, targets = pair(30, 3)
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    model = reestimate_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), batches)
    values = model[0](inputs)
    torch.testing.assert_close(model[1].running_mean, values.mean(0))
    torch.testing.assert_close(model[1].running_var, values.var(0))


def test_order_of_the_samples_hardly_matters_even_if_sorted_by_class():
    targets = torch.arange(400) // 100
    inputs = normal(400, 3) + 5 * targets[:, None]
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)
    whole = reestimate_batch_norm(nn.Sequential(*layers), (inputs, targets), 400)
    expected = statistics(whole)
    batched = statistics(reestimate_batch_norm(whole, (inputs, targets), 100))
    for name, value in expected.items():
        torch.testing.assert_close(batched[name], value, rtol=0.1, atol=0.1)


def test_modes_gradients_and_all_else_stay():
    model = quantize_weights(nin(1, 4, in_channels=1, base_width=1, seed=0), 2)
    model.insert(3, nn.Dropout(0.5))
    model.train()
    model[1].eval()  # a frozen layer is estimated too, and stays frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.random.get_rng_state()
    reestimate_batch_norm(model, pair(20, 1, 8, 8), batch_size=8)
    assert [module.training for module in model.modules()] == modes
    assert all(m.track_running_stats for m in model if isinstance(m, nn.BatchNorm2d))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" not in name), name


def test_twice_is_the_same_as_once():
    model = nin(1, 4, in_channels=1, base_width=1, seed=0)
    first = statistics(reestimate_batch_norm(model, pair(30, 1, 8, 8), 8))
    second = statistics(reestimate_batch_norm(model, pair(30, 1, 8, 8), 8))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_without_running_statistics_or_without_inputs_stay_as_they_are():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.BatchNorm1d(3)
            self.stateless = nn.BatchNorm1d(3, track_running_stats=False)
            self.unused = nn.BatchNorm1d(3)
            self.rest = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.rest(self.stateless(self.used(inputs)))

    model = reestimate_batch_norm(Partial(), pair(20, 3))
    assert (model.used.running_mean != 0).all()
    assert model.stateless.running_mean is None
    assert not model.stateless.track_running_stats
    assert (model.unused.running_mean == 0).all()
    assert (model.unused.running_var == 1).all()


def test_a_layer_used_twice_pools_both_uses():
    norm = nn.BatchNorm1d(3)
    inputs, targets = pair(20, 3)
    reestimate_batch_norm(nn.Sequential(norm, nn.Softplus(), norm), (inputs, targets))
    normalised = (inputs - inputs.mean(0)) / (inputs.var(0, correction=0) + norm.eps).sqrt()
    both = torch.cat([inputs, nn.functional.softplus(normalised)])
    torch.testing.assert_close(norm.running_mean, both.mean(0))
    torch.testing.assert_close(norm.running_var, both.var(0))


def test_a_model_without_batch_norm_stays_as_it_is():
    model = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    reestimate_batch_norm(model, pair(20, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_after_training_the_estimate_is_close_to_the_running_one_and_the_loss_is_good():
    splits = load_dataset("digits", size=300, seed=0)
    model = quantize_weights(nin(2, 8, in_channels=1, base_width=1, seed=0), 4)
    fit(model, splits, Recipe(epochs=3, learning_rate=0.05, keep="last"), seed=0)
    before = evaluate(model, splits.train).loss
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    spoilt = evaluate(model, splits.train).loss
    reestimate_batch_norm(model, splits.train)
    assert evaluate(model, splits.train).loss < min(1.1 * before, spoilt)


def test_a_failed_pass_leaves_everything_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    batches = [pair(8, 3), pair(8, 4)]
    before = statistics(model)
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, batches)
    assert model.training
    assert model[0].track_running_stats
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "empty"),
        (pair(0, 3), ValueError, "empty"),
        (normal(8, 3), TypeError, "data must be"),
        (load_dataset("diabetes"), TypeError, "data must be"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = statistics(model)
    with pytest.raises(error, match=message):
        reestimate_batch_norm(model, data)
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())
