"""Quantizers: few-bit weights during training, gradients to the float weights behind them.

`quantize_weights` attaches one quantizer to each chosen layer as a parametrization of its weight
(`torch.nn.utils.parametrize`): `layer.weight` is then quantized, and the float weight that the
optimizer moves stays at `layer.parametrizations.weight.original`. `bake` makes it plain again.
"""

from qgen_lab.qat.quantizers.activations import (
    UnsignedLSQ,
    activation_steps,
    quantize_activations,
)
from qgen_lab.qat.quantizers.attach import (
    Slot,
    bake,
    bin_widths,
    bits_per_layer,
    codes,
    parameter_groups,
    quantization_noise,
    quantize_weights,
    quantized_slots,
    registry,
    step_sizes,
)
from qgen_lab.qat.quantizers.base import Quantizer, with_gradient_of
from qgen_lab.qat.quantizers.codebooks import (
    FixedCodebook,
    FixedWidth,
    LevelQuantizer,
    LloydMax,
    PowerOfTwo,
    Uniform,
)
from qgen_lab.qat.quantizers.lsq import LSQ
from qgen_lab.qat.quantizers.noise import NoiseInjection

__all__ = [
    "LSQ",
    "FixedCodebook",
    "FixedWidth",
    "LevelQuantizer",
    "LloydMax",
    "NoiseInjection",
    "PowerOfTwo",
    "Quantizer",
    "Slot",
    "Uniform",
    "UnsignedLSQ",
    "activation_steps",
    "bake",
    "bin_widths",
    "bits_per_layer",
    "codes",
    "parameter_groups",
    "quantization_noise",
    "quantize_activations",
    "quantize_weights",
    "quantized_slots",
    "registry",
    "step_sizes",
    "with_gradient_of",
]
