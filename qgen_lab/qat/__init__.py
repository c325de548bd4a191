"""Quantization-aware training: quantizers, models and the training loop."""

from qgen_lab.qat.models import MODELS, build_model, mlp, nin
from qgen_lab.qat.quantizers import (
    LSQ,
    FixedCodebook,
    Quantizer,
    bake,
    bin_widths,
    bits_per_layer,
    codes,
    parameter_groups,
    quantization_noise,
    quantize_weights,
    step_sizes,
)
from qgen_lab.qat.recipes import Recipe, recipes
from qgen_lab.qat.schedules import Cooldown, learning_rates
from qgen_lab.qat.training import Diverged, Evaluation, History, accuracy, evaluate, fit

__all__ = [
    "LSQ",
    "MODELS",
    "Cooldown",
    "Diverged",
    "Evaluation",
    "FixedCodebook",
    "History",
    "Quantizer",
    "Recipe",
    "accuracy",
    "bake",
    "bin_widths",
    "bits_per_layer",
    "build_model",
    "codes",
    "evaluate",
    "fit",
    "learning_rates",
    "mlp",
    "nin",
    "parameter_groups",
    "quantization_noise",
    "quantize_weights",
    "recipes",
    "step_sizes",
]
