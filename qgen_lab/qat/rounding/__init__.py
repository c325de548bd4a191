"""After training: few-bit weights for a finished network, layer by layer, and no more training."""

from qgen_lab.qat.rounding.layer import LayerProblem, RoundedLayer, methods, round_layer
from qgen_lab.qat.rounding.model import LayerRounding, RoundingReport, round_model
from qgen_lab.qat.rounding.moments import second_moments
from qgen_lab.qat.rounding.steps import criteria

__all__ = [
    "LayerProblem",
    "LayerRounding",
    "RoundedLayer",
    "RoundingReport",
    "criteria",
    "methods",
    "round_layer",
    "round_model",
    "second_moments",
]
