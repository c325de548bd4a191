"""Train small networks on digits with even and uneven levels, every run with its twins.

`python book/results/nonuniform_levels/run.py` trains what is missing and writes the table beside
this file once all runs are whole. Runs that share a condition and a seed share data, wrong labels,
initial weights, order of the samples and budget; they differ in quantizer and bits alone.
"""

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from qgen_lab.codebooks import lloyd_max
from qgen_lab.data import load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import (
    Diverged,
    FixedCodebook,
    FixedWidth,
    Recipe,
    evaluate,
    fit,
    nin,
    quantization_noise,
    quantize_weights,
)
from qgen_lab.qat.quantizers import quantized_slots

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

BITS = (2, 3, 4)
SEEDS = tuple(range(8))
# Half range, in standard deviations, of the even levels of least squared error for Gaussian weights
WIDTHS = {2: 1.494, 3: 2.051, 4: 2.514}
QUANTIZERS = {
    "even, learned": lambda bits: "lsq",
    "even, held": lambda bits: FixedWidth(WIDTHS[bits], relative=True),
    "Lloyd-Max, learned": lambda bits: "lloyd-max",
    "Lloyd-Max, held": lambda bits: partial(FixedCodebook.attach, lloyd_max(bits), relative=True),
    "powers of two": lambda bits: "power-of-two",
}
CELLS = [("full precision", 32), *((name, bits) for name in QUANTIZERS for bits in BITS)]
MODEL = {"depth": 2, "width_multiplier": 16, "base_width": 1, "in_channels": 1}
CONDITIONS = {"label-noise": {"size": 512, "label_noise": 0.25}, "few-images": {"size": 256}}
BUDGET = {"batch_size": 64, "learning_rate": 0.05, "schedule": "multi-step"}
RECIPES = {
    "label-noise": Recipe(epochs=24, milestones=(16, 21), **BUDGET),
    "few-images": Recipe(epochs=48, milestones=(32, 42), **BUDGET),
}


def train(condition: str, quantizer: str, bits: int, seed: int) -> dict:
    """One run: its row of figures."""
    splits = load_dataset("digits", seed=seed, **CONDITIONS[condition])
    model = nin(**MODEL, seed=seed)
    if quantizer in QUANTIZERS:
        quantize_weights(model, bits, QUANTIZERS[quantizer](bits))
    row = {"condition": condition, "quantizer": quantizer, "bits": bits, "seed": seed}
    start = time.process_time()
    try:
        history = fit(model, splits, RECIPES[condition], seed=seed)
    except Diverged:
        return row | {"diverged": True, "cpu_seconds": time.process_time() - start}
    test = evaluate(model, splits.test)
    return row | {
        "diverged": False,
        "kept_epoch": history.kept_epoch,
        "train_loss": history.train.loss,
        "test_loss": test.loss,
        "test_accuracy": test.metrics["accuracy"],
        "relative_noise": relative_noise(model),
        "cpu_seconds": time.process_time() - start,
    }


def relative_noise(model: torch.nn.Module) -> float:
    """Root mean square of the quantization noise over that of the float weights, over layers."""
    weights = {name: slot.original for name, slot in quantized_slots(model).items()}
    noises = quantization_noise(model)
    ratios = [(n.square().mean() / weights[name].var()).item() for name, n in noises.items()]
    return (sum(ratios) / len(ratios)) ** 0.5 if ratios else 0.0


def part(condition: str, quantizer: str, bits: int, seed: int) -> Path:
    """Where a finished run waits."""
    return PARTS / f"{condition}-{quantizer.replace(' ', '_')}-{bits}-{seed:02d}.json"


def main(seeds: list[int]) -> None:
    """Train what is missing of these seeds; write the table when no run at all is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "cells": CELLS,
        "widths": WIDTHS,
        "model": MODEL,
        "conditions": CONDITIONS,
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "note": "size and budget were chosen on seed 901, the rate is that of digits_qat",
    }
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/nonuniform_levels/run.py", config, SEEDS, seconds=0)
    for seed in seeds:
        for condition in CONDITIONS:
            for quantizer, bits in CELLS:
                target = part(condition, quantizer, bits, seed)
                if not target.exists():
                    unfinished = target.with_suffix(".tmp")
                    unfinished.write_text(json.dumps(train(condition, quantizer, bits, seed)))
                    unfinished.rename(target)
    finished = [part(c, q, b, s) for c in CONDITIONS for q, b in CELLS for s in SEEDS]
    if all(path.exists() for path in finished):
        runs = pd.DataFrame([json.loads(path.read_text()) for path in finished])
        runs.to_csv(HERE / "runs.csv", index=False, float_format="%.6g")
        seconds = round(float(runs["cpu_seconds"].sum()), 1)
        write_json(origin | {"seconds": seconds}, HERE / "provenance.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, default=list(SEEDS))
    main(parser.parse_args().seeds)
