"""Train small networks on digits at five precisions in three conditions, every run with its twins.

`python book/results/digits_qat/run.py` trains what is missing and writes the tables beside this
file once all runs are whole. Name seeds to train only those: several processes share the work.
Runs that share a condition and a seed share data, wrong labels, initial weights, order of the
samples and budget; they differ in the bits alone (32 means full precision).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kstest, uniform
from torch.nn.functional import cross_entropy

from qgen_lab.data import Dataset, Splits, load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import (
    Diverged,
    Recipe,
    evaluate,
    fit,
    nin,
    quantization_noise,
    quantize_weights,
    step_sizes,
)

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

BITS = (32, 16, 8, 4, 2)
SEEDS = tuple(range(16))
STORED_SEED = 0  # the seed whose clean weights are stored, fixed before any run
MODEL = {"depth": 2, "width_multiplier": 32, "base_width": 1, "in_channels": 1}
CONDITIONS = {
    "clean": {},
    "label-noise": {"label_noise": 0.25},
    "few-images": {"size": 256},
}
FULL = Recipe(
    epochs=45, batch_size=64, learning_rate=0.05, schedule="multi-step", milestones=(30, 40)
)
RECIPES = {
    "clean": FULL,
    "label-noise": FULL,
    "few-images": replace(FULL, epochs=120, milestones=(80, 107)),
}


def train(condition: str, bits: int, seed: int) -> dict:
    """One run: its row of figures, its curves, its test losses image by image, its step sizes."""
    splits = load_dataset("digits", seed=seed, **CONDITIONS[condition])
    model = nin(**MODEL, seed=seed)
    if bits < 32:
        quantize_weights(model, bits)
    first_steps = {name: float(step) for name, step in step_sizes(model).items()}
    tests = []
    run = {"condition": condition, "bits": bits, "seed": seed, "diverged": False}
    start = time.perf_counter()
    try:
        history = fit(
            model,
            splits,
            RECIPES[condition],
            seed=seed,
            on_epoch=lambda epoch, model: tests.append(evaluate(model, splits.test)),
        )
    except Diverged:
        return {"run": run | {"diverged": True, "seconds": time.perf_counter() - start}}
    seconds = time.perf_counter() - start
    curves = {
        "train_loss": history.train_loss,
        "running_loss": history.running_loss,
        "test_loss": np.array([test.loss for test in tests]),
        "test_accuracy": np.array([test.metrics["accuracy"] for test in tests]),
    }
    kept, test = history.kept_epoch - 1, evaluate(model, splits.test)
    run |= {
        "kept_epoch": history.kept_epoch,
        "train_loss": history.train.loss,
        "train_accuracy": history.train.metrics["accuracy"],
        "running_loss": history.running_loss[kept],
        "test_loss": test.loss,
        "test_accuracy": test.metrics["accuracy"],
        "last_train_loss": history.train_loss[-1],
        "last_running_loss": history.running_loss[-1],
        "last_test_loss": tests[-1].loss,
        "last_test_accuracy": tests[-1].metrics["accuracy"],
        **true_labels(model, condition, seed, splits),
        "seconds": seconds,
    }
    steps = [
        {"layer": name, "first_step": first_steps[name], **layer}
        for name, layer in step_table(model).items()
    ]
    if (condition, seed) == ("clean", STORED_SEED):
        np.savez(PARTS / f"weights-{bits}.npz", **weights(model, bits))
    losses = per_image(model, splits.test).half()
    return {"run": run, "curves": curves, "steps": steps, "test_losses": losses.tolist()}


def true_labels(model: torch.nn.Module, condition: str, seed: int, splits: Splits) -> dict:
    """How the model fares on its training images with their true labels, and on the wrong ones."""
    if "label_noise" not in CONDITIONS[condition]:
        return {}
    truth = load_dataset("digits", seed=seed).train
    images, given = splits.train.batch()
    if not torch.equal(truth.inputs, splits.train.inputs):
        raise RuntimeError("label noise changed the images or their order")
    result = evaluate(model, truth)
    wrong = given != truth.targets
    with torch.no_grad():
        learned = model(images).argmax(1) == given
    return {
        "true_train_loss": result.loss,
        "true_train_accuracy": result.metrics["accuracy"],
        "wrong_labels_learned": learned[wrong].float().mean().item(),
    }


def per_image(model: torch.nn.Module, data: Dataset) -> torch.Tensor:
    """Loss of each image, shape (images,)."""
    images, labels = data.batch()
    with torch.no_grad():
        return cross_entropy(model(images), labels, reduction="none")


def step_table(model: torch.nn.Module) -> dict[str, dict]:
    """Step, spread of the float weights, and what the noise looks like in units of the step."""
    table = {}
    for name, noise in quantization_noise(model).items():
        weight = model.get_submodule(name).parametrizations.weight.original.detach()
        step = float(step_sizes(model)[name])
        weight, noise = weight.double().numpy().ravel(), noise.double().numpy().ravel() / step
        table[name] = {
            "step": step,
            "weight_std": weight.std(),
            "clipped_share": (np.abs(noise) > 0.5 + 1e-4).mean(),
            "noise_mean": noise.mean(),
            "noise_rms": np.sqrt((noise**2).mean()),
            "noise_weight_correlation": np.corrcoef(noise, weight)[0, 1],
            "distance_from_uniform": kstest(noise, uniform(-0.5, 1.0).cdf).statistic,
        }
    return table


def weights(model: torch.nn.Module, bits: int) -> dict[str, np.ndarray]:
    """Float weights (and step) of each convolution, under the keys `bits/layer/what`."""
    arrays = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            quantized = hasattr(module, "parametrizations")
            weight = module.parametrizations.weight.original if quantized else module.weight
            arrays[f"{bits}/{name}/weight"] = weight.detach().contiguous().numpy()
    for name, step in step_sizes(model).items():
        arrays[f"{bits}/{name}/step"] = step.numpy()
    return arrays


def part(condition: str, bits: int, seed: int) -> Path:
    """Where a finished run waits."""
    return PARTS / f"{condition}-{bits:02d}-{seed:02d}.json"


def stacked(parts: dict[tuple, dict], pick: Callable[[dict], list]) -> dict[str, np.ndarray]:
    """One array a condition, its first axes bits and seeds; diverged runs are NaN."""
    arrays = {}
    for condition in CONDITIONS:
        whole = {
            key[1:]: np.array(pick(record), dtype=np.float32)
            for key, record in parts.items()
            if key[0] == condition and not record["run"]["diverged"]
        }
        missing = np.full_like(next(iter(whole.values())), np.nan)
        arrays[condition] = np.array(
            [[whole.get((bits, seed), missing) for seed in SEEDS] for bits in BITS]
        )
    return arrays


def write_tables(origin: dict) -> None:
    """Gather all runs into the stored tables; images in the order of the test set."""
    keys = [(c, b, s) for c in CONDITIONS for b in BITS for s in SEEDS]
    parts = {key: json.loads(part(*key).read_text()) for key in keys}
    runs = pd.DataFrame([record["run"] for record in parts.values()])
    runs.to_csv(HERE / "runs.csv", index=False, float_format="%.6g")
    steps = [
        {name: record["run"][name] for name in ("condition", "bits", "seed")} | row
        for record in parts.values()
        for row in record.get("steps", [])
    ]
    pd.DataFrame(steps).to_csv(HERE / "steps.csv", index=False, float_format="%.6g")
    curves = stacked(parts, lambda record: list(record["curves"].values()))
    np.savez_compressed(HERE / "curves.npz", **curves)
    losses = stacked(parts, lambda record: record["test_losses"])
    losses = {condition: array.astype(np.float16) for condition, array in losses.items()}
    np.savez_compressed(HERE / "test_losses.npz", **losses)
    stored = [np.load(PARTS / f"weights-{bits}.npz") for bits in BITS if bits != 16]
    np.savez_compressed(HERE / "weights.npz", **{k: v for file in stored for k, v in file.items()})
    seconds = sum(record["run"]["seconds"] for record in parts.values())
    write_json(origin | {"seconds": round(seconds, 1)}, HERE / "provenance.json")


def main(seeds: list[int]) -> None:
    """Train what is missing of these seeds; write the tables when no run at all is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "bits": BITS,
        "model": MODEL,
        "conditions": CONDITIONS,
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "stored_weights": {"condition": "clean", "seed": STORED_SEED},
        "note": "size, budget and rate were chosen on seeds 901 to 904, not among the results",
    }
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/digits_qat/run.py", config, SEEDS, seconds=0)
    for seed in seeds:
        for condition in CONDITIONS:
            for bits in BITS:
                target = part(condition, bits, seed)
                if not target.exists():
                    result = json.dumps(train(condition, bits, seed), default=lambda a: a.tolist())
                    unfinished = target.with_suffix(".tmp")
                    unfinished.write_text(result)
                    unfinished.rename(target)
    finished = [part(c, b, s) for c in CONDITIONS for b in BITS for s in SEEDS]
    if all(path.exists() for path in finished):
        write_tables(origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, default=list(SEEDS))
    main(parser.parse_args().seeds)
