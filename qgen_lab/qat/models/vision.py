"""The models of torchvision and timm by name, also for images of 32x32, and with trained weights.

Nothing is written again here: a builder asks the library for its model and changes, where asked,
the number of channels and classes and the strides at which the image enters.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

from qgen_lab._torchvision import torchvision
from qgen_lab.qat.models.plain import require_positive, seeded

__all__ = ["TIMM", "TORCHVISION", "WeightsMissing", "timm_model", "torchvision_model", "vit"]

TORCHVISION = {
    "resnet18": ("conv1", "maxpool"),
    "resnet50": ("conv1", "maxpool"),
    "mobilenet_v2": ("features.0.0",),
    "vgg19_bn": (),
}
"""torchvision's models, each with the layers whose stride becomes 1 for images of 32x32."""

TIMM = {
    "mobilenetv1_100": (("conv_stem",), {}),
    "deit_tiny_patch16_224": ((), {"img_size": 32, "patch_size": 4}),
    "swin_tiny_patch4_window7_224": ((), {"img_size": 32, "patch_size": 2}),
}
"""timm's models, each with such layers, and with its arguments, for images of 32x32."""


class WeightsMissing(FileNotFoundError):
    """Trained weights are not on this machine and cannot be downloaded; it says what to do."""


def torchvision_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    for_32x32: bool = False,
    pretrained: bool = False,
    *,
    seed: int | None = None,
) -> nn.Module:
    """A model of torchvision.

    Parameters
    ----------
    name : {"resnet18", "resnet50", "mobilenet_v2", "vgg19_bn"}
        As torchvision names it; this VGG-19 is the one with batch norm. In `MODELS` the names
        begin with ``torchvision/``.
    num_classes, in_channels : int
        Classes, and channels of the images.
    for_32x32 : bool
        Let the image enter at stride 1: the first convolution, and in residual networks the max
        pool behind it. All else stays, so trained weights fit. VGG enters at stride 1 anyway; of
        32x32 pixels one is left before its linear layers, which it would repeat 49 times: the
        first of them sums its weights over the 49, the same function with 39 million weights in
        place of 140.
    pretrained : bool
        Start from torchvision's default weights for ImageNet. The last layer is kept where
        ``num_classes=1000`` and drawn anew otherwise.
    seed : int, optional
        Seed of the initial weights; by default they come from PyTorch's global random state.

    Returns
    -------
    torch.nn.Module
        Maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).

    Raises
    ------
    ValueError
        If the name is unknown, a size is not a positive integer, or trained weights are asked for
        with other than three channels.
    WeightsMissing
        If trained weights are neither on this machine nor to be had.
    """
    _check(name, TORCHVISION, num_classes, in_channels, pretrained)
    trained = torchvision.models.get_model_weights(name).DEFAULT
    classes = len(trained.meta["categories"]) if pretrained else num_classes
    advice = f"put {trained.url} into {torch.hub.get_dir()}/checkpoints"
    with seeded(seed), _explained(name, advice):
        model = torchvision.models.get_model(
            name, weights=trained if pretrained else None, num_classes=classes, progress=False
        )
        if num_classes != classes:
            _replace_last_linear(model, num_classes)
        if in_channels != 3:
            _replace_first_convolution(model, in_channels)
    if for_32x32:
        _set_stride_one(model, TORCHVISION[name])
        if isinstance(model, torchvision.models.VGG):
            _drop_repeated_inputs(model)
    return model


def timm_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    for_32x32: bool = False,
    pretrained: bool = False,
    *,
    seed: int | None = None,
) -> nn.Module:
    """A model of timm; needs the extra ``vision``.

    Parameters
    ----------
    name : {"mobilenetv1_100", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"}
        As timm names it. In `MODELS` the names begin with ``timm/``.
    num_classes, in_channels, pretrained, seed
        As in `torchvision_model`; the weights are timm's default ones.
    for_32x32 : bool
        Take images of 32x32 in place of 224x224: the stem of MobileNet with stride 1, patches of 4
        in DeiT and of 2 in Swin. All else stays; timm resizes what trained weights need.

    Returns
    -------
    torch.nn.Module
        Maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).

    Raises
    ------
    ValueError, WeightsMissing
        As `torchvision_model`.
    ModuleNotFoundError
        If timm is not installed.
    """
    _check(name, TIMM, num_classes, in_channels, pretrained)
    timm = _import_timm(name)
    layers, adapted = TIMM[name] if for_32x32 else ((), {})
    advice = "run the same call on a machine with network and copy its Hugging Face cache here"
    with seeded(seed), _explained(name, advice):
        model = timm.create_model(
            name, num_classes=num_classes, in_chans=in_channels, pretrained=pretrained, **adapted
        )
    _set_stride_one(model, layers)
    return model


def vit(
    image_size: int = 32,
    patch_size: int = 4,
    num_layers: int = 6,
    num_heads: int = 3,
    hidden_dim: int = 192,
    mlp_dim: int = 768,
    num_classes: int = 10,
    in_channels: int = 3,
    dropout: float = 0.0,
    *,
    seed: int | None = None,
) -> nn.Module:
    """Vision transformer of any size: torchvision's class, which itself knows three channels only.

    Parameters
    ----------
    image_size, patch_size : int
        Side of the square images and of their patches, which must divide it.
    num_layers, num_heads, hidden_dim, mlp_dim : int
        Encoder blocks; attention heads, which must divide `hidden_dim`; features of a token;
        hidden units of a block's perceptron.
    num_classes, in_channels : int
        Classes, and channels of the images.
    dropout : float
        Share of the features that training drops.
    seed : int, optional
        Seed of the initial weights; by default they come from PyTorch's global random state.

    Returns
    -------
    torchvision.models.VisionTransformer
        Maps images of shape (N, in_channels, image_size, image_size) to logits of shape
        (N, num_classes). The last layer starts at zero, as torchvision has it.

    Raises
    ------
    ValueError
        If a size is not a positive integer or does not divide what it must.

    References
    ----------
    Dosovitskiy et al., "An image is worth 16x16 words" (2021), arXiv 2010.11929.
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "hidden_dim": hidden_dim,
        "mlp_dim": mlp_dim,
        "num_classes": num_classes,
    }
    require_positive(**sizes, in_channels=in_channels)
    for part, whole in {"patch_size": "image_size", "num_heads": "hidden_dim"}.items():
        if sizes[whole] % sizes[part]:
            raise ValueError(f"{part} must divide {whole}={sizes[whole]}, got {sizes[part]}")
    with seeded(seed):
        model = torchvision.models.VisionTransformer(**sizes, dropout=dropout)
        if in_channels != 3:
            model.conv_proj = nn.Conv2d(in_channels, hidden_dim, patch_size, stride=patch_size)
            fan_in = in_channels * patch_size**2
            nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / fan_in))
            nn.init.zeros_(model.conv_proj.bias)
    return model


def _check(name: str, known: dict, num_classes: int, in_channels: int, pretrained: bool) -> None:
    if name not in known:
        raise ValueError(f"no model is named {name!r}; known: {sorted(known)}")
    require_positive(num_classes=num_classes, in_channels=in_channels)
    if pretrained and in_channels != 3:
        raise ValueError(
            f"in_channels must be 3 with pretrained weights, got {in_channels}: "
            "repeat the channel of grey images three times"
        )


def _import_timm(name: str) -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(
            f"the model {name!r} comes from timm: pip install qgen-lab[vision]", name="timm"
        ) from error
    return timm


@contextmanager
def _explained(name: str, advice: str) -> Iterator[None]:
    """Turn a failed download into an error that says what to do."""
    try:
        yield
    except OSError as error:  # what urllib and the Hugging Face client raise without network
        raise WeightsMissing(
            f"the trained weights of {name!r} are not on this machine and could not be "
            f"downloaded ({error}): {advice}, or start from random weights (pretrained=False)"
        ) from error


def _replace_last_linear(model: nn.Module, num_classes: int) -> None:
    name, old = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Linear(old.in_features, num_classes))


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """The same for another number of channels, started as torchvision starts its convolutions."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(name, new)


def _set_stride_one(model: nn.Module, layers: tuple[str, ...]) -> None:
    for name in layers:
        layer = model.get_submodule(name)
        layer.stride = 1 if isinstance(layer.stride, int) else (1, 1)


@torch.no_grad()
def _drop_repeated_inputs(model: nn.Module) -> None:
    """Pool to one pixel in place of copies of one, whose weights are added up."""
    old = model.classifier[0]
    new = nn.utils.skip_init(nn.Linear, old.in_features // 49, old.out_features)
    new.weight.copy_(old.weight.view(old.out_features, -1, 49).sum(2))
    new.bias.copy_(old.bias)
    model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), new
