import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn

from qgen_lab._torchvision import torchvision
from qgen_lab.qat import bake, parameter_groups, quantize_weights, step_sizes
from qgen_lab.qat.models import (
    MODELS,
    WeightsMissing,
    build_model,
    mlp,
    nin,
    resnet18,
    resnet50,
    timm_model,
    torchvision_model,
    vit,
)


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


# Builder arguments and an image, as small as each model allows.
SMALLEST = {
    "nin": ({"depth": 1, "width_multiplier": 2, "base_width": 1, "in_channels": 1}, (1, 8, 8)),
    "mlp": ({"features": 64, "hidden": [4], "outputs": 10}, (1, 8, 8)),
    "resnet18": ({"base_width": 2, "in_channels": 1}, (1, 8, 8)),
    "resnet50": ({"base_width": 2, "in_channels": 1}, (1, 8, 8)),
    "vit": (
        {
            "image_size": 8,
            "num_layers": 1,
            "num_heads": 2,
            "hidden_dim": 8,
            "mlp_dim": 8,
            "in_channels": 1,
        },
        (1, 8, 8),
    ),
}
OF_LIBRARIES = ({"for_32x32": True}, (3, 32, 32))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_the_contract(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    kwargs, shape = SMALLEST.get(name, OF_LIBRARIES)
    before = torch.get_rng_state()
    model, again = (build_model(name, **kwargs, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    del again
    quantize_weights(model, 4)
    outputs = model(torch.randn(2, *shape))
    assert outputs.shape == (2, 10)
    torch.nn.functional.cross_entropy(outputs, torch.tensor([3, 1])).backward()
    steps = [name for name, _ in model.named_parameters() if name.endswith(".step")]
    assert len(steps) == len(step_sizes(model)) > 1
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(*(model.eval()(torch.ones(2, *shape)) for _ in range(2)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_for_32x32_changes_strides_only(name):
    plain, adapted = (torchvision_model(name, for_32x32=on, seed=1) for on in (False, True))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, adapted.state_dict()[key])
    sizes = []
    for model in (plain, adapted):
        last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        last.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == {"resnet18": [1, 4], "mobilenet_v2": [1, 2]}[name]


def test_vgg_for_32x32_is_the_same_function():
    plain = torchvision_model("vgg19_bn", seed=1).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images)
    del plain  # 0.6 GB
    adapted = torchvision_model("vgg19_bn", for_32x32=True, seed=1).eval()
    torch.testing.assert_close(adapted(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [torchvision_model, timm_model])
def test_one_channel(build):
    name = "resnet18"
    if build is timm_model:
        pytest.importorskip("timm")
        name = "mobilenetv1_100"
    model = build(name, num_classes=3, in_channels=1, for_32x32=True, seed=0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_vit_of_one_channel_starts_like_torchvisions():
    grey, colour = (vit(num_layers=1, in_channels=channels, seed=0) for channels in (1, 3))
    assert grey.conv_proj.weight.shape == (192, 1, 4, 4)
    for model, channels in ((grey, 1), (colour, 3)):
        spread = model.conv_proj.weight.detach().std().item() * (16 * channels) ** 0.5
        assert spread == pytest.approx(1, abs=0.1)  # 3,072 or more weights
    torch.testing.assert_close(grey(torch.zeros(1, 1, 32, 32)), torch.zeros(1, 10))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 5}, "patch_size must divide image_size=32, got 5"),
        ({"num_heads": 5}, "num_heads must divide hidden_dim=192, got 5"),
        ({"num_layers": 0}, "num_layers must be a positive integer"),
    ],
)
def test_vit_sizes_must_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        vit(**sizes)


def test_trained_weights_are_loaded_and_another_head_is_drawn(monkeypatch):
    trained = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: trained
    )
    whole = torchvision_model("resnet18", num_classes=1000, pretrained=True).state_dict()
    assert all(torch.equal(whole[key], value) for key, value in trained.items())
    model = torchvision_model("resnet18", for_32x32=True, pretrained=True)
    assert torch.equal(model.conv1.weight, trained["conv1.weight"])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_timms_trained_weights_are_loaded_and_resized(monkeypatch):
    timm = pytest.importorskip("timm")
    trained = timm.create_model("deit_tiny_patch16_224").state_dict()
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(trained)
    )
    model = timm_model("deit_tiny_patch16_224", for_32x32=True, pretrained=True)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, trained["blocks.0.mlp.fc1.weight"])
    assert model.pos_embed.shape == (1, 65, 192)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_without_network_the_message_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(WeightsMissing, match=r"put https://.*resnet18.*pth into .*checkpoints"):
        torchvision_model("resnet18", pretrained=True)


def test_without_network_timm_says_so_too(monkeypatch):
    timm = pytest.importorskip("timm")

    def unreachable(*_, **__):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(WeightsMissing, match=r"mobilenetv1_100.*copy its Hugging Face cache"):
        timm_model("mobilenetv1_100", pretrained=True)


@pytest.mark.parametrize("build", [torchvision_model, timm_model])
def test_trained_weights_need_three_channels(build):
    name = "resnet18" if build is torchvision_model else "mobilenetv1_100"
    with pytest.raises(ValueError, match="in_channels must be 3 with pretrained weights, got 1"):
        build(name, in_channels=1, pretrained=True)


@pytest.mark.parametrize("build", [torchvision_model, timm_model])
def test_unknown_models_of_libraries(build):
    known = "mobilenet_v2" if build is torchvision_model else "deit_tiny_patch16_224"
    with pytest.raises(ValueError, match=f"'alexnet'; known: .*{known}"):
        build("alexnet")


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install qgen-lab\[vision\]"):
        build_model("timm/mobilenetv1_100")


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "vit"])
def test_somebody_elses_model_trains_bakes_and_travels(name, tmp_path):
    kwargs, shape = SMALLEST.get(name, OF_LIBRARIES)
    model = quantize_weights(build_model(name, **kwargs, seed=0), 4)
    images, labels = torch.randn(6, *shape), torch.arange(6)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.equal(bake(model)(images), expected)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        plain = build_model(name, **kwargs)
        plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert torch.equal(plain.eval()(images), expected)
