"""Quantization-aware training: quantizers, models and the training loop."""
