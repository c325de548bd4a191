"""Quantization-aware training: quantizers, models and the training loop."""

from qgen_lab.qat.models import MODELS, build_model, mlp, nin

__all__ = ["MODELS", "build_model", "mlp", "nin"]
