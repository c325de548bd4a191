"""Round finished networks in four ways, beside networks that were trained under quantization.

`QGEN_DATA=folder python book/results/rounding_after_training/run.py` does what is missing and
writes the tables beside this file once all is there. Three stages can be named alone: `train`
trains every network in full precision and in few bits; `layers` rounds each layer of one
full-precision network of each kind for itself, and layers whose inputs have a power law as their
spectrum; `networks` rounds whole networks.

Networks that share a kind and a seed share data, initial weights, order of the samples and budget;
they differ in the bits alone. Bits 32 mean full precision, and only those networks are rounded.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from qgen_lab.codebooks import Codebook, uniform
from qgen_lab.data import Splits, load_dataset
from qgen_lab.experiments.provenance import git_revision, provenance, write_json
from qgen_lab.qat import (
    Recipe,
    build_model,
    evaluate,
    fit,
    quantize_weights,
    reestimate_batch_norm,
    round_layer,
    round_model,
    second_moments,
)
from qgen_lab.qat.quantizers import quantized_slots

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # trained networks and finished rows; not in git

STAGES = ("train", "layers", "networks")
FULL_PRECISION = 32
BITS = (2, 3, 4)
METHODS = ("nearest", "compensated", "cooled", "coordinate")
MAIN = {"quantizer": "lsq", "step": "weights", "batch_norm": "re-estimated"}
VARIED = ("nearest", "cooled")
ONE_DESCENT = {"rates": (1.9,), "reheats": 0}
LAYER_METHODS = {
    **dict.fromkeys(METHODS),
    "compensated + coordinate": "compensated",
    "cooled + coordinate": "cooled",
}  # and whose answer coordinate descent polishes
LAYER_SEED = 0  # the seed whose layers are rounded one by one, fixed before any run
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
POWER_LAW = {"inputs": 128, "outputs": 64, "seeds": 3}


@dataclass(frozen=True)
class Kind:
    """A network, its data, and how it is trained."""

    data: dict
    model: dict
    recipe: Recipe
    seeds: tuple[int, ...]
    calibration: int | None = None  # rounding sees the first so many training images; None: all
    test_size: int | None = None  # the first so many test images; None: all
    variants: tuple[dict, ...] = ()  # other arguments of `round_model`, for some methods
    brief: bool = False  # whether whole networks are cooled by one descent a layer, to save time


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
        variants=(
            {"quantizer": "uniform"},
            {"step": "outputs"},
            {"batch_norm": "folded"},
            {"batch_norm": "kept"},
        ),
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
        variants=({"step": "outputs"},),
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
        calibration=256,
        test_size=2000,
        brief=True,
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
        quantize_weights(model, bits, "lsq")
    return model


def train(name: str, seed: int, bits: int) -> None:
    """Train one network and store what it holds at the end."""
    kind, start = KINDS[name], time.process_time()
    model = build(kind, seed, bits)
    fit(model, load(kind, seed).train, kind.recipe, seed=seed, progress=False)
    seconds = time.process_time() - start
    trained = {"state": model.state_dict(), "seconds": seconds, "revision": git_revision()}
    store(weights_of(name, seed, bits), lambda path: torch.save(trained, path))


def trained(name: str, seed: int, bits: int) -> nn.Module:
    """The network as `train` left it."""
    model = build(KINDS[name], seed, bits)
    model.load_state_dict(torch.load(weights_of(name, seed, bits))["state"])
    return model.eval()


def part(name: str, seed: int, what: str) -> Path:
    """Where something finished waits."""
    return PARTS / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{what}"


def store(path: Path, write) -> None:
    """Write a file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    unfinished.rename(path)


def layers(name: str, bits: int) -> None:
    """Round each layer of one network for itself, on the inputs that the float network gives it."""
    kind = KINDS[name]
    data, model = load(kind, LAYER_SEED), trained(name, LAYER_SEED, FULL_PRECISION)
    chosen = list(quantized_slots(build(kind, LAYER_SEED, bits)))
    calibration = data.train.take(slice(0, kind.calibration))
    grams = second_moments(model, calibration, chosen)
    fresh = second_moments(model, data.test.take(slice(0, len(calibration))), chosen)
    rows, spectra = [], {}
    for layer, gram in grams.items():
        weight = model.get_parameter(weight_name(model, layer)).detach()
        values = torch.linalg.eigvalsh(gram).flip(-1)
        spectra[f"{name}/{layer}"] = (values / values.mean()).clamp(min=0).float().tolist()
        key = {"network": name, "layer": layer, "inputs": weight[0].numel(), "outputs": len(weight)}
        rows += [key | row for row in rounded_rows(bits, weight, gram, fresh[layer])]
    store_rows(layers_of(name, bits), rows, spectra=spectra)


def weight_name(model: nn.Module, layer: str) -> str:
    """Name of a layer's weight: attention layers hold that of `in_proj` themselves."""
    names = dict(model.named_parameters())
    return f"{layer}.weight" if f"{layer}.weight" in names else f"{layer}_weight"


def rounded_rows(bits: int, weight: Tensor, gram: Tensor, fresh: Tensor) -> list[dict]:
    """Errors of all methods; `fresh` is the Gram matrix of inputs that are not rounded for."""
    codebook = least_squares_codebook(bits, weight)
    floor, found, rows = output_floor(gram, codebook, weight), {}, []
    for method, polished in LAYER_METHODS.items():
        if polished:
            start = found[polished].weight
            found[method] = round_layer(weight, gram, codebook, "coordinate", start=start)
        else:
            found[method] = round_layer(weight, gram, codebook, method)
        rows.append(
            {
                "bits": bits,
                "method": method,
                "error": found[method].output_error,
                "test_error": relative_error(found[method].weight, weight, fresh),
                "floor": floor,
                "seconds": found[method].seconds,
            }
        )
    return rows


def least_squares_codebook(bits: int, weight: Tensor) -> Codebook:
    """Uniform levels of the width that leaves the least squared error of the weights."""
    values = weight.detach().double().flatten().numpy()
    books = [uniform(bits, share * abs(values).max()) for share in np.linspace(0.05, 1, 191)]
    return min(books, key=lambda book: (book.noise(values) ** 2).sum())


def output_floor(gram: Tensor, codebook: Codebook, weight: Tensor) -> float:
    """Error that no method undercuts on fine grids: a cell of the lattice as round as a ball."""
    spacing, inputs = float(codebook.spacing[0]), gram.shape[-1]
    log_determinant = torch.linalg.slogdet(gram).logabsdet.double()
    rows = weight.detach().double().flatten(1)
    ball = inputs * unit_ball_moment(inputs) * spacing**2
    floor = len(rows) * ball * torch.exp(log_determinant / inputs)
    return (floor / ((rows @ gram) * rows).sum()).item()


def unit_ball_moment(dimension: int) -> float:
    """Mean squared coordinate of a ball of volume one; tends to 1 / (2 pi e)."""
    return math.exp(2 / dimension * math.lgamma(dimension / 2 + 1)) / (math.pi * (dimension + 2))


def relative_error(rounded: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Squared output error, relative to the squared outputs of the float weights."""
    change, rows = ((w.detach().double().flatten(1)) for w in (rounded - weight, weight))
    return (((change @ gram) * change).sum() / ((rows @ gram) * rows).sum()).item()


def power_laws(bits: int) -> None:
    """Round Gaussian weights on inputs whose spectrum is a power law in a random basis."""
    inputs, outputs = POWER_LAW["inputs"], POWER_LAW["outputs"]
    rows = []
    for seed in range(POWER_LAW["seeds"]):
        rng = np.random.default_rng(seed)
        weight = torch.from_numpy(rng.standard_normal((outputs, inputs)))
        basis = np.linalg.qr(rng.standard_normal((inputs, inputs))).Q
        for exponent in EXPONENTS:
            gram = torch.from_numpy(basis * np.arange(1, inputs + 1.0) ** -exponent @ basis.T)
            for row in rounded_rows(bits, weight, gram, gram):
                rows.append({"exponent": exponent, "seed": seed} | row)
    store_rows(power_laws_of(bits), rows)


def networks(name: str, seed: int, bits: int, method: str) -> None:
    """Evaluate one network: `trained` at these bits, or in full precision and rounded to them."""
    kind, data = KINDS[name], load(KINDS[name], seed)
    if method == "trained":
        rows = [result(trained(name, seed, bits), data, "re-estimated")]
    else:
        rows = [
            rounded(name, seed, bits, method, data, **choice) for choice in choices(kind, method)
        ]
    key = {"network": name, "seed": seed, "bits": bits, "method": method}
    rows = [key | row for row in rows]
    store_rows(row_of(*key.values()), rows)


def rounded(name: str, seed: int, bits: int, method: str, data: Splits, **choice) -> dict:
    """Round the full-precision network and evaluate it."""
    model, start = trained(name, seed, FULL_PRECISION), time.process_time()
    calibration = data.train.take(slice(0, KINDS[name].calibration))
    options = ONE_DESCENT if KINDS[name].brief and method == "cooled" else {}
    report = round_model(model, calibration, bits, method, progress=False, **choice, **options)
    seconds = time.process_time() - start
    row = choice | result(model, data, choice["batch_norm"])
    return row | {"output_error": report.to_frame().output_error.median(), "seconds": seconds}


def choices(kind: Kind, method: str) -> list[dict]:
    """Other arguments of `round_model`: LSQ's grid of least weight error, and then the variants.

    So all methods have the same levels, and the levels are of the kind that was trained with.
    """
    variants = kind.variants if method in VARIED else ()
    return [MAIN | change for change in ({}, *variants)]


def result(model: nn.Module, data: Splits, batch_norm: str) -> dict:
    """Losses and accuracies; batch norm re-estimated on all training images unless told not to."""
    if batch_norm == "re-estimated":
        reestimate_batch_norm(model, data.train)
    row = {}
    for split in ("train", "test"):
        found = evaluate(model, getattr(data, split))
        row |= {f"{split}_loss": found.loss, f"{split}_accuracy": found.metrics["accuracy"]}
    return row


def write_tables(origin: dict) -> None:
    """Gather everything into the stored tables."""
    weights = [torch.load(weights_of(*key)) for key in runs(KINDS)]
    parts = {
        "networks": [read(row_of(*key)) for key in roundings(KINDS)],
        "layers": [read(layers_of(name, bits)) for name in KINDS for bits in BITS],
        "power_laws": [read(power_laws_of(bits)) for bits in BITS],
    }
    seconds = sum(trained["seconds"] for trained in weights)
    revisions = {"train": sorted({trained["revision"] for trained in weights})}
    for name, found in parts.items():
        table = pd.DataFrame([row for part in found for row in part["rows"]])
        table.to_csv(HERE / f"{name}.csv", index=False, float_format="%.6g")
        revisions[name] = sorted({part["revision"] for part in found})
        seconds += table.seconds.sum()
    spectra = {k: np.float32(v) for part in parts["layers"] for k, v in part["spectra"].items()}
    np.savez_compressed(HERE / "spectra.npz", **spectra)
    origin["config"]["revisions"] = revisions
    write_json(origin | {"seconds": round(float(seconds), 1)}, HERE / "provenance.json")


def store_rows(path: Path, rows: list[dict], **more) -> None:
    """Write rows and the revision that they come from."""
    record = {"rows": rows, "revision": git_revision(), **more}
    store(path, lambda unfinished: unfinished.write_text(json.dumps(record)))


def weights_of(name: str, seed: int, bits: int) -> Path:
    """Where a trained network waits."""
    return part(name, seed, f"{bits}.pt")


def row_of(name: str, seed: int, bits: int, method: str) -> Path:
    """Where the figures of a network wait."""
    return part(name, seed, f"{bits}-{method}.json")


def layers_of(name: str, bits: int) -> Path:
    """Where the rounded layers of a kind wait."""
    return part(name, LAYER_SEED, f"{bits}-layers.json")


def power_laws_of(bits: int) -> Path:
    """Where layers with power laws wait."""
    return PARTS / f"power-laws-{bits}.json"


def read(path: Path):
    """What a finished part holds."""
    return json.loads(path.read_text())


def runs(names) -> list[tuple[str, int, int]]:
    """Kind, seed and bits of each network; full precision first, since rounding waits for it."""
    every = (FULL_PRECISION, *BITS)
    return [(name, seed, bits) for bits in every for name in names for seed in KINDS[name].seeds]


def roundings(names) -> list[tuple[str, int, int, str]]:
    """Kind, seed, bits and method of each row: as trained, and rounded."""
    found = [(*key, "trained") for key in runs(names)]
    return found + [(*k, m) for m in METHODS for k in runs(names) if k[-1] < FULL_PRECISION]


def main(stages: list[str], only: list[str]) -> None:
    """Do what is missing of these stages and kinds; write the tables when nothing is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "bits": BITS,
        "kinds": {name: asdict(kind) for name, kind in KINDS.items()},
        "layers": {"seed": LAYER_SEED, "methods": LAYER_METHODS},
        "one_descent": ONE_DESCENT,
        "power_laws": {"exponents": EXPONENTS, **POWER_LAW},
        "note": "sizes and budgets were set by the time of an epoch on seed 901; seconds are "
        "processor time on a shared machine",
    }
    # Made before the work: the revision and the versions are those that round.
    command = "python book/results/rounding_after_training/run.py"
    seeds = sorted({seed for kind in KINDS.values() for seed in kind.seeds})
    origin = provenance(command, config, seeds, seconds=0)
    singly = [(name, bits) for name in only for bits in BITS]
    work = {
        "train": [(train, key, weights_of(*key)) for key in runs(only)],
        "layers": [(layers, key, layers_of(*key)) for key in singly]
        + [(power_laws, (bits,), power_laws_of(bits)) for bits in BITS],
        "networks": [(networks, key, row_of(*key)) for key in roundings(only)],
    }
    for stage in stages:
        for do, key, target in work[stage]:
            if not target.exists():
                do(*key)
    whole = [weights_of(*key) for key in runs(KINDS)] + [row_of(*key) for key in roundings(KINDS)]
    whole += [power_laws_of(bits) for bits in BITS]
    whole += [layers_of(name, bits) for name in KINDS for bits in BITS]
    if all(target.exists() for target in whole):
        write_tables(origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=STAGES, metavar="stage")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    main(arguments.stages, arguments.only)
