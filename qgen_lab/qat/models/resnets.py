"""Residual networks for images of 32x32, thinner than the usual ones."""

from collections import OrderedDict

from torch import nn

from qgen_lab._torchvision import torchvision
from qgen_lab.qat.models.plain import require_positive, seeded

__all__ = ["resnet18", "resnet50"]

BasicBlock = torchvision.models.resnet.BasicBlock
Bottleneck = torchvision.models.resnet.Bottleneck


def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    base_width: int = 16,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-18 for images of 32x32, with a free width.

    Post-activation: each block ends with an addition and a ReLU, as in the original. Two things
    differ from torchvision's ResNet-18, whose blocks, names and initial weights these are: the stem
    is one 3x3 convolution of stride 1, without max pool, and the four stages have
    ``base_width * (1, 2, 4, 8)`` channels. With ``base_width=64`` it is the usual ResNet-18 for
    CIFAR; the default of 16 has 1/16 of its weights.

    Parameters
    ----------
    num_classes, in_channels : int
        Classes, and channels of the images.
    base_width : int
        Channels of the stem and of the first stage.
    seed : int, optional
        Seed of the initial weights; by default they come from PyTorch's global random state.

    Returns
    -------
    torch.nn.Sequential
        Maps images of shape (N, in_channels, H, W), any H and W, to logits of shape
        (N, num_classes). The last stage sees an eighth of the height and the width.

    Raises
    ------
    ValueError
        If a size is not a positive integer.

    References
    ----------
    He et al., "Deep residual learning for image recognition" (2016), arXiv 1512.03385.
    """
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, base_width, seed)


def resnet50(
    num_classes: int = 10,
    in_channels: int = 3,
    base_width: int = 16,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """ResNet-50 for images of 32x32, with a free width.

    As `resnet18`, with 3, 4, 6 and 3 bottlenecks, whose inner layers have ``base_width`` channels
    times 1, 2, 4 and 8 and whose outputs have four times as many. A stage halves the image at the
    3x3 convolution of its first block, as torchvision does.
    """
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, base_width, seed)


def _resnet(
    block: type[nn.Module],
    depths: tuple[int, ...],
    num_classes: int,
    in_channels: int,
    base_width: int,
    seed: int | None,
) -> nn.Sequential:
    require_positive(num_classes=num_classes, in_channels=in_channels, base_width=base_width)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(in_channels, base_width, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(base_width),
            relu=nn.ReLU(inplace=True),
        )
        channels = base_width
        for stage, depth in enumerate(depths):
            width = base_width * 2**stage
            first = _shrinking_block(block, channels, width, stride=2 if stage else 1)
            channels = width * block.expansion
            others = [block(channels, width) for _ in range(depth - 1)]
            layers[f"layer{stage + 1}"] = nn.Sequential(first, *others)
        layers |= {
            "avgpool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "fc": nn.Linear(channels, num_classes),
        }
        model = nn.Sequential(layers)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _shrinking_block(
    block: type[nn.Module], in_channels: int, width: int, stride: int
) -> nn.Module:
    """First block of a stage; where it changes the shape, a 1x1 convolution fits the shortcut."""
    out_channels = width * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return block(in_channels, width, stride, shortcut)
