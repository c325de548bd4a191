import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

from qgen_lab.flatness.function import LOSSES, weight_function

CLASSES = torch.tensor([0, 2, 1, 2, 0])


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_derivatives_equal_autograd(name):
    loss, generator = LOSSES[name], torch.Generator().manual_seed(0)
    f = torch.randn(1, 4, generator=generator).double()
    y = torch.eye(4).double()[[2]]
    value = lambda f: loss.value(f, y).sum()  # noqa: E731
    curvature = hessian(value, f).view(4, 4)
    root = torch.stack([loss.hessian_root(f, u[None])[0] for u in torch.eye(4).double()]).T
    torch.testing.assert_close(jacobian(value, f), loss.slope(f, y))
    torch.testing.assert_close(root @ root.T, curvature)
    change = hessian(lambda g: loss.change(f, g).sum(), f).view(4, 4)
    torch.testing.assert_close(change, curvature)
    assert loss.change(f, f).item() == 0


def test_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double().train()
    model(inputs()).sum().backward()
    before, gradient = copy.deepcopy(model.state_dict()), model[0].weight.grad.clone()
    for mode in ("frozen", "batch"):
        weight_function(model, (inputs(), CLASSES), batch_norm=mode)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(model[0].weight.grad, gradient, rtol=0, atol=0)


def test_batch_norm_modes():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    frozen = weight_function(model, (inputs(), CLASSES))
    batch = weight_function(model, (inputs(), CLASSES), batch_norm="batch")
    with torch.no_grad():
        torch.testing.assert_close(frozen.outputs[0], copy.deepcopy(model).eval()(inputs()))
        torch.testing.assert_close(batch.outputs[0], copy.deepcopy(model).train()(inputs()))


def test_classes_become_one_hot_rows_and_batches_cover_the_data():
    function = weight_function(small_net(), (inputs(), CLASSES), batch_size=2)
    assert [len(x) for x, _ in function.batches] == [2, 2, 1]
    targets = torch.cat([y for _, y in function.batches])
    torch.testing.assert_close(targets, torch.eye(3).double()[CLASSES])
    assert function.samples == 5
    assert function.size == 4 * 3 + 3 * 3


def test_value_is_the_usual_loss():
    model = small_net()
    f = model(inputs()).detach()
    value = weight_function(model, (inputs(), CLASSES), loss="cross_entropy", batch_size=2).value
    assert value == pytest.approx(nn.functional.cross_entropy(f, CLASSES).item())
    targets = torch.randn(5, 3).double()
    value = weight_function(model, (inputs(), targets)).value
    assert value == pytest.approx((f - targets).square().sum(1).mean().item())


def test_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    function = weight_function(model, (inputs(), inputs(1)))
    assert list(function.weights) == ["0"]
    moved = {"0": function.weights["0"] + 0.1}
    with torch.no_grad():
        model[0].weight += 0.1
        torch.testing.assert_close(function(moved, inputs()), model(inputs()))


def test_model_may_be_a_single_layer():
    layer = nn.Linear(4, 3).double()
    function = weight_function(layer, (inputs(), CLASSES))
    assert list(function.weights) == [""]
    torch.testing.assert_close(function({"": layer.weight * 0}, inputs()), layer.bias.expand(5, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["0", "9"]}, r"no layers named \['9'\].*\['0', '2'\]"),
        ({"layers": []}, r"\['0', '2'\]"),
        ({"loss": "hinge"}, r"loss = 'hinge'.*squared.*cross_entropy"),
        ({"batch_norm": "train"}, r"batch_norm = 'train'.*frozen.*batch"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"data": (inputs()[:0], CLASSES[:0])}, "0 inputs and 0 targets"),
        ({"data": (inputs(), CLASSES[:3])}, "5 inputs and 3 targets"),
        ({"data": (inputs(), CLASSES + 1)}, "targets reach from 1 to 3: outputs are 3"),
        ({"data": (inputs(), torch.zeros(5))}, r"targets \(5,\) do not match outputs \(5, 3\)"),
        ({"data": (inputs() * torch.nan, CLASSES)}, "loss of the model is nan"),
    ],
)
def test_bad_arguments(arguments, message):
    data = arguments.pop("data", (inputs(), CLASSES))
    with pytest.raises(ValueError, match=message):
        weight_function(small_net(), data, **arguments)


@pytest.mark.parametrize("data", [None, 3, "digits", (inputs(), CLASSES, CLASSES)])
def test_data_of_another_kind(data):
    with pytest.raises((TypeError, ValueError), match=r"data is a \w+: give a Dataset"):
        weight_function(small_net(), data)


def test_cross_entropy_needs_classes():
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match=r"samples, classes"):
        weight_function(model, (inputs(), CLASSES), loss="cross_entropy")
