"""Networks by name: small ones to train many of, and those of torchvision and timm."""

from collections.abc import Callable

from torch import nn

from qgen_lab.qat.models.plain import mlp, nin, seeded
from qgen_lab.qat.models.resnets import resnet18, resnet50

__all__ = ["MODELS", "build_model", "mlp", "nin", "resnet18", "resnet50", "seeded"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "nin": nin,
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
"""Model builders by name. Add one's own here and `build_model` finds it."""


def build_model(name: str, **kwargs) -> nn.Module:
    """Build a model by its name in `MODELS`.

    Parameters
    ----------
    name : str
        A name in `MODELS`, such as ``"nin"`` or ``"resnet18"``.
    **kwargs
        Arguments of the builder.

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
