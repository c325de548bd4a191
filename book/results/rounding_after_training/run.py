"""Round finished networks in four ways, beside networks that were trained under quantization.

`QGEN_DATA=folder python book/results/rounding_after_training/run.py` does what is missing and
writes the tables beside this file once all is there. Three stages can be named alone: `train`
trains every network in full precision and in few bits; `layers` rounds each layer of one
full-precision network of each kind for itself; `networks` rounds whole networks.

Networks that share a kind and a seed share data, initial weights, order of the samples and budget;
they differ in the bits alone. Bits 32 mean full precision, and only those networks are rounded.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from qgen_lab.data import Splits, load_dataset
from qgen_lab.experiments.provenance import git_revision
from qgen_lab.qat import Recipe, build_model, fit, quantize_weights

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # trained networks and finished rows; not in git

FULL_PRECISION = 32
BITS = (2, 3, 4)


@dataclass(frozen=True)
class Kind:
    """A network, its data, and how it is trained."""

    data: dict
    model: dict
    recipe: Recipe
    seeds: tuple[int, ...]
    exclude: tuple[str, ...] = ()  # layers that stay in full precision
    calibration: int | None = None  # rounding sees the first so many training images; None: all
    test_size: int | None = None  # the first so many test images; None: all


NIN = {"name": "nin", "depth": 2, "width_multiplier": 32, "base_width": 1, "in_channels": 1}
VIT = {
    "name": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "mlp_dim": 32,
    "num_classes": 10,
    "in_channels": 1,
}
CIFAR = {"name": "cifar10", "size": 3000}
KINDS = {
    "digits NiN": Kind(
        {"name": "digits", "size": 256},
        NIN,
        Recipe(120, 64, learning_rate=0.05, schedule="cosine", keep="last"),
        tuple(range(8)),
    ),
    "digits NiN, wrong labels": Kind(
        {"name": "digits", "label_noise": 0.25},
        NIN,
        Recipe(45, 64, learning_rate=0.05, schedule="cosine", keep="last"),
        tuple(range(8)),
    ),
    "digits ViT": Kind(
        {"name": "digits"},
        VIT,
        Recipe(30, 64, "adamw", learning_rate=4e-3, schedule="cosine", keep="last"),
        tuple(range(8)),
        # The inputs of this layer of torch's attention are out of sight of a hook.
        exclude=("*.out_proj",),
    ),
    "CIFAR-10 NiN": Kind(
        CIFAR,
        {"name": "nin", "depth": 3, "width_multiplier": 48, "base_width": 1},
        Recipe(12, 64, weight_decay=5e-4, schedule="cosine", keep="last"),
        (0, 1, 2),
        calibration=512,
        test_size=5000,
    ),
    "CIFAR-10 ResNet-18": Kind(
        CIFAR,
        {"name": "resnet18", "base_width": 16},
        Recipe(6, 64, weight_decay=5e-4, schedule="cosine", keep="last"),
        (0, 1, 2),
        calibration=512,
        test_size=5000,
    ),
}


def load(kind: Kind, seed: int) -> Splits:
    """The data of one kind and seed."""
    splits = load_dataset(**kind.data, seed=seed)
    return Splits(splits.train, None, splits.test.take(slice(0, kind.test_size)))


def build(kind: Kind, seed: int, bits: int) -> nn.Module:
    """The network at the start of its training."""
    model = build_model(**kind.model, seed=seed)
    if bits < FULL_PRECISION:
        quantize_weights(model, bits, "lsq", exclude=kind.exclude or None)
    return model


def train(name: str, seed: int, bits: int) -> None:
    """Train one network and store what it holds at the end."""
    kind, start = KINDS[name], time.process_time()
    model = build(kind, seed, bits)
    fit(model, load(kind, seed).train, kind.recipe, seed=seed, progress=False)
    seconds = time.process_time() - start
    trained = {"state": model.state_dict(), "seconds": seconds, "revision": git_revision()}
    store(part(name, seed, f"{bits}.pt"), lambda path: torch.save(trained, path))


def trained(name: str, seed: int, bits: int) -> nn.Module:
    """The network as `train` left it."""
    model = build(KINDS[name], seed, bits)
    model.load_state_dict(torch.load(part(name, seed, f"{bits}.pt"))["state"])
    return model.eval()


def part(name: str, seed: int, what: str) -> Path:
    """Where something finished waits."""
    return PARTS / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{what}"


def store(path: Path, write) -> None:
    """Write a file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    unfinished.rename(path)


def main(stages: list[str], only: list[str]) -> None:
    """Do what is missing of these stages and kinds; write the tables when nothing is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    if "train" in stages:
        for bits in (FULL_PRECISION, *BITS):  # full precision first: rounding waits for it
            for name in only:
                for seed in KINDS[name].seeds:
                    if not part(name, seed, f"{bits}.pt").exists():
                        train(name, seed, bits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["train", "layers", "networks"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    main(arguments.stages, arguments.only)
