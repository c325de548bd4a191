"""Flatness of a trained model: how its loss answers to noise on its weights."""

from qgen_lab.flatness.noise import (
    NoisePenalty,
    NoiseRegularizer,
    NoiseResponse,
    noise_regularizer,
    noise_response,
)

__all__ = [
    "NoisePenalty",
    "NoiseRegularizer",
    "NoiseResponse",
    "noise_regularizer",
    "noise_response",
]
