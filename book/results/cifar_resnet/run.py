"""Train thin ResNet-18 on real CIFAR-10 at four precisions, every run with its twins.

`QGEN_DATA=folder python book/results/cifar_resnet/run.py` trains what is missing and writes the
tables beside this file once all runs are whole. Runs that share a seed share their 4,000 training
images, initial weights, order of the samples and budget; they differ in the bits alone (32 means
full precision). The recipe is the paper's for residual networks, its 200 epochs shortened to 8.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from qgen_lab.data import Dataset, load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import (
    Diverged,
    bin_widths,
    build_model,
    fit,
    quantize_weights,
    recipes,
    step_sizes,
)

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

BITS = (32, 8, 4, 2)
SEEDS = (0, 1, 2)
MODEL = {"name": "resnet18", "base_width": 16}
DATA = {"name": "cifar10", "size": 4000}
RECIPE = replace(recipes["qgen-resnet"], epochs=8, milestones=(3, 6))


def train(bits: int, seed: int) -> dict:
    """One run: its row of figures, its curves, its bin widths, its test losses image by image."""
    splits = load_dataset(**DATA, seed=seed)
    model = build_model(**MODEL, seed=seed)
    if bits < 32:
        quantize_weights(model, bits)
    first_steps = {name: float(step) for name, step in step_sizes(model).items()}
    run = {"bits": bits, "seed": seed, "diverged": False}
    wall, processor = time.perf_counter(), time.process_time()
    try:
        history = fit(model, splits.train, RECIPE, seed=seed)
    except Diverged:
        return {"run": run | {"diverged": True}}
    run["seconds"] = time.perf_counter() - wall
    run["processor_seconds"] = time.process_time() - processor
    losses, right = per_image(model, splits.test)
    run |= {
        "kept_epoch": history.kept_epoch,
        "train_loss": history.train.loss,
        "train_accuracy": history.train.metrics["accuracy"],
        "running_loss": history.running_loss[history.kept_epoch - 1],
        "test_loss": losses.double().mean().item(),
        "test_accuracy": right.double().mean().item(),
    }
    curves = history.to_frame().drop(columns="seconds").assign(bits=bits, seed=seed)
    widths = [
        {"bits": bits, "seed": seed, "layer": name, "first_step": first_steps[name], **layer}
        for name, layer in width_table(model).items()
    ]
    return {
        "run": run,
        "curves": curves.to_dict("records"),
        "widths": widths,
        "test_losses": losses.half().tolist(),
    }


@torch.no_grad()
def per_image(model: torch.nn.Module, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each image, and whether its class has the largest logit, both of shape (images,)."""
    losses, right = [], []
    for images, labels in data.batches(256):
        logits = model(images)
        losses.append(cross_entropy(logits, labels, reduction="none"))
        right.append(logits.argmax(1) == labels)
    return torch.cat(losses), torch.cat(right)


def width_table(model: torch.nn.Module) -> dict[str, dict]:
    """Bin width of each quantized layer, and the spread and number of its float weights."""
    table = {}
    for name, width in bin_widths(model).items():
        weight = model.get_submodule(name).parametrizations.weight.original.detach()
        spread = weight.double().std(correction=0).item()
        table[name] = {
            "bin_width": float(width),
            "weight_std": spread,
            "weights": weight.numel(),
        }
    return table


def part(bits: int, seed: int) -> Path:
    """Where a finished run waits."""
    return PARTS / f"{bits:02d}-{seed:02d}.json"


def write_tables(origin: dict) -> None:
    """Gather all runs into the stored tables; test images in the order of the test set."""
    keys = [(bits, seed) for bits in BITS for seed in SEEDS]
    parts = {key: json.loads(part(*key).read_text()) for key in keys}
    for table, rows in {
        "runs": [record["run"] for record in parts.values()],
        "curves": [row for record in parts.values() for row in record.get("curves", [])],
        "widths": [row for record in parts.values() for row in record.get("widths", [])],
    }.items():
        pd.DataFrame(rows).to_csv(HERE / f"{table}.csv", index=False, float_format="%.6g")
    losses = {
        f"{bits}-{seed}": np.array(parts[bits, seed]["test_losses"], dtype=np.float16)
        for bits, seed in keys
        if not parts[bits, seed]["run"]["diverged"]
    }
    np.savez_compressed(HERE / "test_losses.npz", **losses)
    seconds = sum(record["run"].get("seconds", 0) for record in parts.values())
    write_json(origin | {"seconds": round(seconds, 1)}, HERE / "provenance.json")


def main(seeds: list[int]) -> None:
    """Train what is missing of these seeds; write the tables when no run at all is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "bits": BITS,
        "model": MODEL,
        "data": DATA,
        "recipe": asdict(RECIPE),
        "note": "nothing was tuned: rate, decay, momentum and batch are the paper's, the rate "
        "falls after the same shares of the epochs; sizes were set by the time of one step",
    }
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/cifar_resnet/run.py", config, SEEDS, seconds=0)
    for seed in seeds:
        for bits in BITS:
            target = part(bits, seed)
            if not target.exists():
                unfinished = target.with_suffix(".tmp")
                unfinished.write_text(json.dumps(train(bits, seed)))
                unfinished.rename(target)
    if all(part(bits, seed).exists() for bits in BITS for seed in SEEDS):
        write_tables(origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, default=list(SEEDS))
    main(parser.parse_args().seeds)
