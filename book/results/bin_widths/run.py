"""Bin widths, layer by layer, of ResNet-50 and MobileNetV2 after a short training on CIFAR-10.

`QGEN_DATA=folder python book/results/bin_widths/run.py` trains what is missing and writes the table
beside this file. 150 steps of 64 images from random starts, the rate falling after the shares of
the training at which the paper's does: enough to see where the widths lie and which way they
move, not where they end. The widths of ResNet-18, trained longer, are in `cifar_resnet`.
"""

import importlib.util
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch

from qgen_lab.data import load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import build_model, fit, quantize_weights, recipes

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

spec = importlib.util.spec_from_file_location("cifar", HERE.parent / "cifar_resnet" / "run.py")
cifar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cifar)

BITS = (8, 4, 2)
SEED = 0
MODELS = {
    "ResNet-50": {"name": "resnet50", "base_width": 16},
    "MobileNetV2": {"name": "torchvision/mobilenet_v2", "for_32x32": True},
}
DATA = {"name": "cifar10", "size": 1920}
RECIPE = replace(recipes["qgen-resnet"], epochs=5, milestones=(2, 4), batch_size=64, keep="last")


def train(model_name: str, bits: int) -> list[dict]:
    """One run: a row a layer."""
    start = time.perf_counter()
    model = quantize_weights(build_model(**MODELS[model_name], seed=SEED), bits)
    first = {
        name: {"first_bin_width": row["bin_width"], "first_weight_std": row["weight_std"]}
        for name, row in cifar.width_table(model).items()
    }
    history = fit(model, load_dataset(**DATA, seed=SEED).train, RECIPE, seed=SEED)
    run = {
        "model": model_name,
        "bits": bits,
        "first_train_loss": history.train_loss[0],
        "train_loss": history.train.loss,
        "seconds": time.perf_counter() - start,
    }
    return [
        run | {"layer": name} | first[name] | row for name, row in cifar.width_table(model).items()
    ]


def main() -> None:
    """Train what is missing; write the table."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {"bits": BITS, "models": MODELS, "data": DATA, "recipe": asdict(RECIPE)}
    # Made before the runs: the revision and the versions are those that train.
    origin = provenance("python book/results/bin_widths/run.py", config, [SEED], seconds=0)
    rows = []
    for model_name in MODELS:
        for bits in BITS:
            target = PARTS / f"{model_name}-{bits}.json"
            if not target.exists():
                unfinished = target.with_suffix(".tmp")
                unfinished.write_text(json.dumps(train(model_name, bits)))
                unfinished.rename(target)
            rows += json.loads(target.read_text())
    table = pd.DataFrame(rows)
    seconds = table.groupby(["model", "bits"]).seconds.first().sum()
    table.drop(columns="seconds").to_csv(HERE / "widths.csv", index=False, float_format="%.6g")
    write_json(origin | {"seconds": round(seconds, 1)}, HERE / "provenance.json")


if __name__ == "__main__":
    main()
