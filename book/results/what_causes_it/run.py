"""What explains the effect of few bits? LSQ, and what may stand behind it, on digits.

`python book/results/what_causes_it/run.py` trains what is missing, measures its sharpness, and
writes the tables beside this file once all runs are whole. Runs that share a condition and a seed
share data, wrong labels, initial weights, order of the samples and budget; the arm is all that
differs. Bin widths of noise and penalty are those of the LSQ run with the same condition and seed.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from qgen_lab.data import Dataset, Splits, load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.flatness import NoisePenalty
from qgen_lab.flatness.function import WeightFunction, weight_function
from qgen_lab.qat import Recipe, bake, bin_widths, evaluate, fit, nin, quantize_weights
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.quantizers import FixedWidth, NoiseInjection

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

SEEDS = tuple(range(8))
MODEL = {"depth": 2, "base_width": 1, "in_channels": 1}
CONDITIONS = {
    "label-noise": {"size": 512, "label_noise": 0.25},
    "few-images": {"size": 256},
}
SPLITS = ("train", "validation", "test")
VALIDATION = 0.25  # share of the training images that is set apart first; true labels
BASE = Recipe(
    epochs=32,
    batch_size=64,
    learning_rate=0.05,
    schedule="multi-step",
    milestones=(22, 29),
    keep="last",
    reestimate_batch_norm=True,
)
RECIPES = {"label-noise": BASE, "few-images": replace(BASE, epochs=50, milestones=(34, 45))}


@dataclass(frozen=True)
class Arm:
    """What is done to a network besides training it in full precision.

    Parameters
    ----------
    bits : int, optional
        Of LSQ.
    noise, penalty : int, optional
        Bits of the LSQ run whose bin widths are taken, relative to the weights.
    recipe : dict
        What changes in the recipe.
    channels : int
    """

    bits: int | None = None
    noise: int | None = None
    penalty: int | None = None
    recipe: dict = field(default_factory=dict)
    channels: int = 16


ARMS = {
    "full": Arm(),
    **{f"lsq-{bits}": Arm(bits=bits) for bits in (16, 4, 2)},
    **{f"noise-{bits}": Arm(noise=bits) for bits in (4, 2)},
    **{f"penalty-{bits}": Arm(penalty=bits) for bits in (4, 2)},
    **{f"sam-{r:g}": Arm(recipe={"sharpness_radius": r}) for r in (0.05, 0.15)},
    **{f"decay-{decay:g}": Arm(recipe={"weight_decay": decay}) for decay in (0.003, 0.01, 0.03)},
    **{f"sam-{r:g}-lsq-2": Arm(bits=2, recipe={"sharpness_radius": r}) for r in (0.05, 0.15)},
    **{f"narrow-{channels}": Arm(channels=channels) for channels in (10, 6)},
}

# Cut for time, when of few images only seed 0 was trained.
LEFT_OUT = {
    "label-noise": (),
    "few-images": ("decay-0.03", "sam-0.05-lsq-2", "sam-0.15-lsq-2", "narrow-10", "narrow-6"),
}

# Noise and radius in units of the scale T of each weight: 1, the standard deviation of its layer,
# the root mean square of its filter, its own size.
SIGMA = {"absolute": 0.03, "layer": 0.15, "filter": 0.15, "weight": 0.15}
RADIUS = {"absolute": 0.1, "layer": 0.5, "filter": 0.5, "weight": 0.5}
DRAWS = 8  # each with both signs
IMAGES = 256  # of the training set


def train(condition: str, name: str, seed: int) -> dict:
    """One run: its row of figures, its sharpness, its bin widths, the curves of full precision."""
    arm = ARMS[name]
    splits = load_dataset("digits", seed=seed, validation=VALIDATION, **CONDITIONS[condition])
    model = build(condition, arm, seed)
    objective = None
    if arm.penalty is not None:
        objective = NoisePenalty(widths_of(condition, seed, arm.penalty), relative=True)
    curves = []
    watch = partial(record_epoch, splits, curves) if name == "full" else None
    start = time.process_time()
    recipe = replace(RECIPES[condition], **arm.recipe)
    fit(model, splits.train, recipe, seed=seed, objective=objective, on_epoch=watch)
    seconds = time.process_time() - start
    key = {"condition": condition, "arm": name, "seed": seed}
    figures = {}
    for split in SPLITS:
        found = evaluate(model, getattr(splits, split))
        figures |= {f"{split}_loss": found.loss, f"{split}_accuracy": found.metrics["accuracy"]}
    sharpness = measure(model, splits.train, seed, quantized=arm.bits is not None)
    return {
        "run": key | figures | {"seconds": seconds},
        "curves": [key | row for row in curves],
        "sharpness": [key | row for row in sharpness],
        "widths": [key | row for row in width_table(model)] if arm.bits else [],
    }


def build(condition: str, arm: Arm, seed: int) -> nn.Module:
    """The network before training, with quantizers or noise on its weights."""
    model = nin(width_multiplier=arm.channels, **MODEL, seed=seed)
    if arm.bits is not None:
        quantize_weights(model, arm.bits)
    if arm.noise is not None:
        for layer, width in widths_of(condition, seed, arm.noise).items():
            # The grid of two bits has four levels: three bins from end to end.
            grid = FixedWidth(1.5 * width, relative=True)
            quantize_weights(model, 2, partial(NoiseInjection, grid=grid), layers=layer)
    return model


def record_epoch(splits: Splits, curves: list, epoch: int, model: nn.Module) -> None:
    """Append the clean losses after an epoch."""
    losses = {f"{s}_loss": evaluate(model, getattr(splits, s)).loss for s in SPLITS}
    curves.append({"epoch": epoch, **losses})


def width_table(model: nn.Module) -> list[dict]:
    """Bin width and standard deviation of the float weights, layer by layer."""
    deviations = {name: weight.std(correction=0).item() for name, weight in floats(model).items()}
    widths = {name: width.item() for name, width in bin_widths(model).items()}
    return [
        {"layer": name, "bin_width": widths[name], "weight_std": deviations[name]}
        for name in widths
    ]


def widths_of(condition: str, seed: int, bits: int) -> dict[str, float]:
    """Bin widths of a finished LSQ run over the standard deviation of its weights."""
    rows = json.loads(part(condition, f"lsq-{bits}", seed).read_text())["widths"]
    return {row["layer"]: row["bin_width"] / row["weight_std"] for row in rows}


def floats(model: nn.Module) -> dict[str, Tensor]:
    """Float weights of the quantized layers."""
    return {
        name: model.get_submodule(name).parametrizations.weight.original.detach()
        for name in bin_widths(model)
    }


def measure(model: nn.Module, data: Dataset, seed: int, quantized: bool) -> list[dict]:
    """Rise of the training loss near the weights: by noise, and along the gradient.

    A quantized network has three kinds of nearness: to its quantized weights; to its float weights
    in a network without quantizers; and to its float weights with the quantizers behind them.
    """
    few = data.take(torch.arange(IMAGES))
    function = weight_function(model, few, loss="cross_entropy")
    places = {"deployed": (function.weights, partial(loss_at, function))}
    if quantized:
        plain = weight_function(without_quantizers(model, data), few, loss="cross_entropy")
        places["float"] = (plain.weights, partial(loss_at, plain))
        places["through"] = (plain.weights, partial(loss_through, model, function))
    rows = []
    for around, (weights, loss) in places.items():
        value, gradient = loss_and_gradient(loss, weights)
        norm = math.sqrt(sum(w.square().sum().item() for w in weights.values()))
        where = {"around": around, "value": value, "weight_norm": norm}
        for scale, scales in weight_scales(weights).items():
            noisy = average_loss(loss, weights, scales, SIGMA[scale], seed)
            worst = loss(uphill(weights, scales, gradient, RADIUS[scale])).item()
            rows.append(where | {"scale": scale, "average": noisy - value, "worst": worst - value})
    return rows


def without_quantizers(model: nn.Module, data: Dataset) -> nn.Module:
    """A network with the float weights, batch norm estimated for them."""
    centre, network = floats(model), bake(copy.deepcopy(model))
    for name, weight in centre.items():
        network.get_submodule(name).weight.data.copy_(weight)
    reestimate_batch_norm(network, data)
    return network


def loss_through(model: nn.Module, function: WeightFunction, weights: dict[str, Tensor]) -> Tensor:
    """Training loss of the quantized network when its float weights are these."""
    quantizers = {name: model.get_submodule(name).parametrizations.weight[0] for name in weights}
    return loss_at(function, {name: quantizers[name](w) for name, w in weights.items()})


def loss_at(function: WeightFunction, weights: dict[str, Tensor]) -> Tensor:
    """Training loss with these weights, running statistics of batch norm as they are."""
    [(x, y)] = function.batches
    return function.loss.value(function(weights, x), y).mean()


def loss_and_gradient(loss: Callable, weights: dict[str, Tensor]) -> tuple[float, dict]:
    """Loss and its gradient in the weights."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    value = loss(leaves)
    gradient = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), dict(zip(leaves, gradient, strict=True))


def weight_scales(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The scale T of each weight, in four definitions."""
    scales = {
        "absolute": torch.ones_like,
        "layer": lambda w: w.std(correction=0).expand_as(w),
        "filter": lambda w: w.square().mean((1, 2, 3), keepdim=True).sqrt().expand_as(w),
        "weight": torch.abs,
    }
    return {name: {n: of(w) for n, w in weights.items()} for name, of in scales.items()}


@torch.no_grad()
def average_loss(loss: Callable, weights: dict, scales: dict, sigma: float, seed: int) -> float:
    """Mean loss under Gaussian noise of standard deviation sigma T, each draw with both signs."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(DRAWS):
        noise = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        for sign in (sigma, -sigma):
            total += loss({n: w + sign * scales[n] * noise[n] for n, w in weights.items()}).item()
    return total / (2 * DRAWS)


@torch.no_grad()
def uphill(weights: dict, scales: dict, gradient: dict, radius: float) -> dict[str, Tensor]:
    """The point of steepest first-order ascent at distance `radius`, lengths in units of T."""
    scaled = {n: scales[n] * gradient[n] for n in weights}
    norm = math.sqrt(sum(g.square().sum().item() for g in scaled.values()))
    return {n: w + radius / norm * scales[n] * scaled[n] for n, w in weights.items()}


def arms_of(condition: str) -> list[str]:
    """Arms that are trained in a condition."""
    return [name for name in ARMS if name not in LEFT_OUT[condition]]


def part(condition: str, arm: str, seed: int) -> Path:
    """Where a finished run waits."""
    return PARTS / f"{condition}-{arm}-{seed:02d}.json"


def main() -> None:
    """Train what is missing; write the tables when no run is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "model": MODEL,
        "conditions": CONDITIONS,
        "validation": VALIDATION,
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "left_out": LEFT_OUT,
        "sharpness": {"sigma": SIGMA, "radius": RADIUS, "draws": DRAWS, "images": IMAGES},
        "note": "sizes, budgets and grids were fixed on seeds 901 and up, not among the results; "
        "strengths are chosen on the validation images of each seed",
    }
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/what_causes_it/run.py", config, SEEDS, seconds=0)
    for condition in CONDITIONS:
        for arm in arms_of(condition):
            for seed in SEEDS:
                target = part(condition, arm, seed)
                if not target.exists():
                    unfinished = target.with_suffix(".tmp")
                    unfinished.write_text(json.dumps(train(condition, arm, seed)))
                    unfinished.rename(target)
    write_tables(origin)


def write_tables(origin: dict) -> None:
    """Gather all runs into the stored tables."""
    records = [
        json.loads(part(c, a, s).read_text()) for c in CONDITIONS for a in arms_of(c) for s in SEEDS
    ]
    pd.DataFrame([record["run"] for record in records]).to_csv(
        HERE / "runs.csv", index=False, float_format="%.6g"
    )
    for table in ("curves", "sharpness", "widths"):
        rows = [row for record in records for row in record[table]]
        pd.DataFrame(rows).to_csv(HERE / f"{table}.csv", index=False, float_format="%.6g")
    seconds = sum(record["run"]["seconds"] for record in records)
    write_json(origin | {"seconds": round(seconds, 1)}, HERE / "provenance.json")


if __name__ == "__main__":
    main()
