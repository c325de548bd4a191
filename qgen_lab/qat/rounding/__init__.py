"""After training: few-bit weights for a finished network, layer by layer, and no more training."""

from qgen_lab.qat.rounding.layer import LayerProblem, RoundedLayer, methods, round_layer
from qgen_lab.qat.rounding.moments import second_moments

__all__ = ["LayerProblem", "RoundedLayer", "methods", "round_layer", "second_moments"]
