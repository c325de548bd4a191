"""Quantization-aware training: quantizers, models and the training loop."""

from qgen_lab.qat.models import MODELS, build_model, mlp, nin
from qgen_lab.qat.quantizers import (
    LSQ,
    FixedCodebook,
    Quantizer,
    bake,
    bits_per_layer,
    codes,
    parameter_groups,
    quantization_noise,
    quantize_weights,
    step_sizes,
)

__all__ = [
    "LSQ",
    "MODELS",
    "FixedCodebook",
    "Quantizer",
    "bake",
    "bits_per_layer",
    "build_model",
    "codes",
    "mlp",
    "nin",
    "parameter_groups",
    "quantization_noise",
    "quantize_weights",
    "step_sizes",
]
