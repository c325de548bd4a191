"""Activations with few bits: what comes out of a ReLU, rounded to an unsigned grid."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qgen_lab.codebooks import check_bits
from qgen_lab.qat import kernels
from qgen_lab.qat.quantizers.base import Quantizer, Sharing
from qgen_lab.qat.quantizers.choice import LayerChoice, bits_of, choose
from qgen_lab.qat.quantizers.lsq import LSQ

RECTIFIERS = (nn.ReLU, nn.ReLU6)


class UnsignedLSQ(LSQ):
    """LSQ of activations that are never negative: codes from 0 to `high = 2**bits - 1`.

    The step starts from the first batch, in training or evaluation, at `2 mean|x| / sqrt(high)`.
    Its gradient is scaled by `1 / sqrt(n high)`, where `n` is the number of activations of one
    example. The rest is as for weights; one bit has the levels zero and the step.

    Parameters
    ----------
    bits : int
        From 1 to 16.
    """

    def __init__(self, bits: int):
        Quantizer.__init__(self)
        self.bits = check_bits(bits)
        self.low, self.high = 0, 2**bits - 1
        self.sharing = Sharing()
        self._pool = kernels.Pool()
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("floor", torch.tensor(torch.finfo(torch.float32).tiny))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def _start(self, activations: Tensor) -> None:
        activations = activations.double()
        magnitude, spread = activations.abs().mean(), activations.square().mean().sqrt()
        if magnitude > 0:
            self.step.copy_(2 * magnitude / self.high**0.5)
            self.floor.copy_(0.01 * spread / self.high)
            self.started.fill_(True)

    def forward(self, activations: Tensor) -> Tensor:
        """Return the quantized activations, dtype as given, with their gradients."""
        if not self.started:
            self._start(activations)
        features = activations.numel() / max(len(activations), 1)
        self.gradient_scale = (max(features, 1) * self.high) ** -0.5
        return super().forward(activations.to(self.step.dtype)).to(activations.dtype)


def quantize_activations(
    model: nn.Module,
    bits: int | Mapping[str, int],
    layers: LayerChoice | None = None,
    *,
    exclude: LayerChoice | None = None,
) -> nn.Module:
    """Quantize what comes out of a model's ReLU and ReLU6 layers, in place.

    Call it before the optimizer is built: the steps are parameters, without weight decay in
    `parameter_groups`. A layer that the model uses several times has one step. Rectifiers that are
    called as functions, without a layer, are not seen.

    Parameters
    ----------
    model : nn.Module
        Any model.
    bits : int or mapping
        From 1 to 16; or a mapping of layer names or patterns to bits, as in `quantize_weights`.
    layers, exclude : str, layer type, or several of them, optional
        The only rectifiers whose output to quantize, and rectifiers not to. All by default.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, a name, pattern or type matches no rectifier, or the output
        of one is quantized already. The model is then unchanged.
    """
    rectifiers = {n: layer for n, layer in model.named_modules() if isinstance(layer, RECTIFIERS)}
    if not rectifiers:
        raise ValueError("model has no ReLU and no ReLU6 layer whose output to quantize")
    widths = bits_of(choose(rectifiers, layers, exclude), bits)
    like = next(model.parameters(), torch.empty(()))  # of its dtype, on its device
    members = {name: UnsignedLSQ(width).to(like) for name, width in widths.items()}
    for name in widths:
        if hasattr(rectifiers[name], "output_quantizer"):
            raise ValueError(f"the output of layer {name!r} is quantized already: exclude it")
    for name, member in members.items():
        rectifiers[name].output_quantizer = member
        rectifiers[name].register_forward_hook(_quantize_output)
    return model


def _quantize_output(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return layer.output_quantizer(output)


def activation_steps(model: nn.Module) -> dict[str, Tensor]:
    """Step of each quantized activation, detached, shape `()`; NaN before the first batch."""
    quantized = (
        (name, layer.output_quantizer)
        for name, layer in model.named_modules()
        if isinstance(layer, RECTIFIERS) and hasattr(layer, "output_quantizer")
    )
    return {name: torch.where(q.started, q.step_size, torch.nan) for name, q in quantized}
