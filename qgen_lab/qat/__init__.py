"""Quantization-aware training: quantizers, models and the training loop."""

from qgen_lab.qat.checkpoints import CheckpointRefused
from qgen_lab.qat.ensemble import Ensemble, Member, fit_ensemble
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
from qgen_lab.qat.transformers import (
    BinRegularization,
    attention_layers,
    bin_regularizer,
    by_head,
    distillation,
)

__all__ = [
    "LSQ",
    "MODELS",
    "BinRegularization",
    "CheckpointRefused",
    "Cooldown",
    "Diverged",
    "Ensemble",
    "Evaluation",
    "FixedCodebook",
    "History",
    "Member",
    "Quantizer",
    "Recipe",
    "WeightsMissing",
    "accuracy",
    "attention_layers",
    "bake",
    "bin_regularizer",
    "bin_widths",
    "bits_per_layer",
    "build_model",
    "by_head",
    "codes",
    "distillation",
    "evaluate",
    "fit",
    "fit_ensemble",
    "learning_rates",
    "mlp",
    "nin",
    "parameter_groups",
    "quantization_noise",
    "quantize_weights",
    "recipes",
    "resnet18",
    "resnet50",
    "step_sizes",
    "timm_model",
    "torchvision_model",
    "vit",
]
