"""The step of a layer's grid, chosen before its weights are rounded to it."""

from collections.abc import Callable

import torch
from torch import Tensor

from qgen_lab.codebooks import Codebook
from qgen_lab.qat.quantizers import Quantizer
from qgen_lab.qat.quantizers.codebooks import least_squares_scale
from qgen_lab.qat.rounding.layer import round_layer
from qgen_lab.theory import recommend_width

# Steps that are tried, in units of the one of least squared weight error, and how briefly.
_FACTORS = torch.tensor([0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
_BRIEF = {
    "cooled": {"constant_steps": 100, "steps": 100, "rates": (1.9,), "reheats": 0},
    "coordinate": {"sweeps": 5},
}


def of_least_weight_error(quantizer: Quantizer, weight: Tensor, gram: Tensor, method: str) -> None:
    """Least squared error of the weights, rounded to the nearest level."""
    rows = quantizer.sharing.rows(weight).float().cpu().contiguous()
    scale = least_squares_scale(rows, _unit_levels(quantizer, weight).cpu())
    quantizer.put_step_size(scale.view(quantizer.sharing.shape))


def of_least_output_error(quantizer: Quantizer, weight: Tensor, gram: Tensor, method: str) -> None:
    """Least squared error of the outputs, rounded by the method itself, in few steps.

    Which step is best depends on the method: cooled descent makes more of finer levels.
    """
    of_least_weight_error(quantizer, weight, gram, method)
    first, sharing, errors = quantizer.step_size.clone(), quantizer.sharing, []
    brief = _BRIEF.get(method, {})
    for factor in _FACTORS.tolist():
        quantizer.put_step_size(factor * first)
        rounded = round_layer(weight, gram, row_levels(quantizer, weight), method, **brief)
        errors.append(rounded.row_errors.view(sharing.steps, -1).sum(1))
    best = _FACTORS.to(first)[torch.stack(errors).argmin(0)]
    quantizer.put_step_size(best.view(sharing.shape) * first)


def recommended(quantizer: Quantizer, weight: Tensor, gram: Tensor, method: str) -> None:
    """What `recommend_width` says of rounded ridge weights: isotropic inputs, Gaussian weights."""
    unit = _unit_levels(quantizer, weight)
    codebook = Codebook(unit.cpu().numpy())
    # With the ridge tuned to the noise neither of them matters, nor do the samples.
    advice = recommend_width(
        round(quantizer.bits), alpha=1.0, noise_variance=0.1, ridge=0.1, deployed="rounded ridge",
        codebook=lambda bits, width: codebook.with_width(width),
    )  # fmt: skip
    rows = quantizer.sharing.rows(weight).double()
    spread = rows.square().mean(1).sqrt().view(quantizer.sharing.shape)
    quantizer.put_step_size(advice.width / unit.abs().max() * spread)


# How to choose the step, by name: `(quantizer, weight, gram, method)`; they set the quantizer's.
criteria: dict[str, Callable[[Quantizer, Tensor, Tensor, str], None]] = {
    "weights": of_least_weight_error,
    "outputs": of_least_output_error,
    "recommended": recommended,
}


def row_levels(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Levels of each output of a layer, float64, shape (outputs, K); (1, K) if all share them."""
    levels = quantizer.levels_for(weight).detach()
    if len(levels) == 1:
        return levels
    return levels.repeat_interleave(len(weight) // len(levels), dim=0)


def _unit_levels(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Levels at step one, shape (K,)."""
    return quantizer.levels_for(weight).detach()[0] / quantizer.step_size.double().reshape(-1)[0]
