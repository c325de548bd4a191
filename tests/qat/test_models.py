import pytest
import torch
from torch import nn

from qgen_lab._torchvision import torchvision
from qgen_lab.qat.models import MODELS, build_model, mlp, nin, resnet18, resnet50


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_nin_is_the_written_out_network():
    torch.manual_seed(0)
    written = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    images = torch.randn(5, 3, 8, 8)
    torch.manual_seed(0)
    model = nin(1, 2, num_classes=4, base_width=3)
    torch.testing.assert_close(model(images), written(images).mean((2, 3)))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_nin_layers(depth):
    model = nin(depth, 10)
    layers = convolutions(model)
    assert len(layers) == 3 * depth + 1
    assert {layer.out_channels for layer in layers[:-1]} == {250}
    assert [layer.stride for layer in layers].count((2, 2)) == depth
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_nin_takes_digits_at_every_depth():
    for depth in (1, 2, 3):
        model = nin(depth, 8, in_channels=1, base_width=1)
        assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_a_bias_before_batch_norm_has_no_gradient():
    # The reason why the convolutions have none.
    layer = nn.Conv2d(2, 3, 3, bias=True, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    norm(layer(torch.randn(4, 2, 8, 8, dtype=torch.float64))).pow(3).sum().backward()
    assert layer.bias.grad.abs().max() < 1e-12 < layer.weight.grad.abs().max()


def test_mlp_is_the_written_out_network():
    model = mlp(64, (5, 3), 2, activation="gelu")
    first, second, last = [module for module in model if isinstance(module, nn.Linear)]
    images = torch.randn(4, 1, 8, 8)
    hidden = nn.functional.gelu(second(nn.functional.gelu(first(images.flatten(1)))))
    torch.testing.assert_close(model(images), last(hidden))


def test_mlp_without_hidden_layers_is_linear():
    model = mlp(3, (), 1)
    assert [type(module) for module in model] == [nn.Flatten, nn.Linear]


@pytest.mark.parametrize("build", [lambda s: nin(2, 4, seed=s), lambda s: mlp(4, [3], 2, seed=s)])
def test_a_seed_fixes_the_weights_and_leaves_the_global_state(build):
    before = torch.get_rng_state()
    first, again, other = (nn.utils.parameters_to_vector(build(s).parameters()) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_weights_come_from_the_global_state():
    torch.manual_seed(3)
    first = nin(1, 2)
    torch.manual_seed(3)
    assert torch.equal(first[0].weight, nin(1, 2)[0].weight)
    assert torch.equal(first[0].weight, nin(1, 2, seed=3)[0].weight)


def test_build_model():
    model = build_model("nin", depth=1, width_multiplier=2, seed=0)
    assert torch.equal(model[0].weight, nin(1, 2, seed=0)[0].weight)
    for name in MODELS:
        with pytest.raises(ValueError, match=name):
            build_model("no such model")


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_sizes_must_be_positive_integers(size):
    with pytest.raises(ValueError, match="depth must be a positive integer"):
        nin(size, 8)
    with pytest.raises(ValueError, match=r"hidden\[0\] must be a positive integer"):
        mlp(4, [size], 2)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"gelu.*got 'swish'"):
        mlp(4, [2], 2, activation="swish")


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_resnet_is_torchvisions_behind_another_stem(build):
    # With torchvision's width, weights and stem it is torchvision's network.
    model, theirs = (
        build(base_width=64, seed=1),
        getattr(torchvision.models, build.__name__)(num_classes=10),
    )
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), theirs.eval()(images))


def test_thin_resnet_has_the_given_widths():
    model = resnet18(num_classes=7, in_channels=1, base_width=4)
    assert [model.get_submodule(f"layer{k}")[1].conv2.out_channels for k in (1, 2, 3, 4)] == [
        4,
        8,
        16,
        32,
    ]
    features = model[:-3](torch.zeros(1, 1, 32, 32))
    assert features.shape == (1, 32, 4, 4)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
