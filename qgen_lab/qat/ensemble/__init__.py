"""Many models of one architecture, trained in one call.

`fit_ensemble` gives what as many calls of `fit` give, sooner. How it is done is an engine's matter:
"sequential" calls `fit`; "batched" holds one matrix of parameters, a row a model, and multiplies
batches of matrices. An engine says what it does not support; "auto" measures the rest.
"""

from qgen_lab.qat.ensemble.fitting import ENGINES, fit_ensemble
from qgen_lab.qat.ensemble.protocol import Engine, Ensemble, Member

__all__ = ["ENGINES", "Engine", "Ensemble", "Member", "fit_ensemble"]
