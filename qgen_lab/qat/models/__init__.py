"""Networks by name: small ones to train many of, and those of torchvision and timm."""

from collections.abc import Callable
from functools import partial

from torch import nn

from qgen_lab.qat.models.plain import mlp, nin, seeded
from qgen_lab.qat.models.resnets import resnet18, resnet50
from qgen_lab.qat.models.vision import (
    TIMM,
    TORCHVISION,
    WeightsMissing,
    timm_model,
    torchvision_model,
    vit,
)

__all__ = [
    "MODELS",
    "WeightsMissing",
    "build_model",
    "mlp",
    "nin",
    "resnet18",
    "resnet50",
    "seeded",
    "timm_model",
    "torchvision_model",
    "vit",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "nin": nin,
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit": vit,
    **{f"torchvision/{name}": partial(torchvision_model, name) for name in TORCHVISION},
    **{f"timm/{name}": partial(timm_model, name) for name in TIMM},
}
"""Model builders by name. Add one's own here and `build_model` finds it."""


def build_model(name: str, **kwargs) -> nn.Module:
    """Build a model by its name in `MODELS`.

    Parameters
    ----------
    name : str
        A name in `MODELS`: ``"nin"``, ``"mlp"``, ``"resnet18"`` and ``"resnet50"`` (thin, for
        32x32), ``"vit"``, or a model of a library by its name there, such as
        ``"torchvision/mobilenet_v2"`` and ``"timm/deit_tiny_patch16_224"``.
    **kwargs
        Arguments of the builder: `nin`, `mlp`, `resnet18`, `resnet50`, `vit`,
        `torchvision_model` or `timm_model`.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the name is unknown; the message lists those that are known.

    Examples
    --------
    >>> model = build_model("nin", depth=2, width_multiplier=8, in_channels=1, base_width=1)
    """
    if name not in MODELS:
        raise ValueError(f"no model is named {name!r}; known: {sorted(MODELS)}")
    return MODELS[name](**kwargs)
