"""Both halves of the noise term during training, and real quantization noise, on digits.

Run in the repository root: `python book/results/quantization_as_regularization/run.py`. It writes
`during_training.csv`, `real_noise.csv`, `weights.npz` and `provenance.json` beside itself.
"""

import copy
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from qgen_lab import qat
from qgen_lab.data import Dataset, load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.flatness import noise_regularizer, noise_response

HERE = Path(__file__).parent
SEEDS = range(8)
EPOCHS = (0, 1, 2, 4, 8, 16, 32, 64)
BITS = (2, 3, 4, 6, 8)
HIDDEN = 16
DRAWS = 100
BASE = qat.Recipe(
    epochs=max(EPOCHS), batch_size=32, learning_rate=0.02, weight_decay=0.0, keep="last"
)


def squared_error(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distance to the one-hot target, summed over outputs, averaged over samples."""
    return (f - one_hot(y, f.shape[1])).square().sum(1).mean()


LOSSES = {"squared": squared_error, "cross_entropy": cross_entropy}


def network(activation: str, seed: int) -> nn.Module:
    """Return the one hidden layer that all of this is about."""
    return qat.mlp(64, [HIDDEN], 10, activation, seed=seed)


def during_training(train: Dataset) -> pd.DataFrame:
    """Both halves, with the bin widths that 4-bit LSQ would start from, epoch by epoch."""
    rows = []
    for loss, function in LOSSES.items():
        for seed in SEEDS:

            def record(epoch, model, loss=loss, seed=seed):
                if epoch in EPOCHS:
                    steps = qat.step_sizes(qat.quantize_weights(copy.deepcopy(model), 4))
                    found = noise_regularizer(model, train, steps, loss=loss, method="exact")
                    halves = {"regularizer": found.total, "dropped": found.dropped}
                    rows.append(
                        {"loss": loss, "seed": seed, "epoch": epoch, "value": found.value, **halves}
                    )

            model = network("tanh", seed)
            record(0, model)
            qat.fit(model, train, BASE, loss=function, seed=seed, on_epoch=record)
    return pd.DataFrame(rows)


def real_noise(train: Dataset) -> pd.DataFrame:
    """Loss increase around the float weights by uniform noise, real noise, and its random signs."""
    rows = []
    for seed in SEEDS:
        trained = network("tanh", seed)
        qat.fit(trained, train, replace(BASE, epochs=20), seed=seed)
        for bits in BITS:
            quantized = qat.quantize_weights(copy.deepcopy(trained), bits)
            rows.append({"seed": seed, "when": "after", **responses(quantized, train, bits)})
            recipe = replace(BASE, epochs=10, learning_rate=0.01)
            qat.fit(quantized, train, recipe, seed=seed)
            rows.append({"seed": seed, "when": "during", **responses(quantized, train, bits)})
    return pd.DataFrame(rows)


def responses(quantized: nn.Module, train: Dataset, bits: int) -> dict:
    """Measure around the float weights, the centre to which Eq. 4 adds its noise."""
    steps = qat.step_sizes(quantized)
    delta = {name: -noise for name, noise in qat.quantization_noise(quantized).items()}
    around = float_weights(quantized)
    shared = {"loss": "cross_entropy"}
    predicted = noise_regularizer(around, train, steps, method="exact", **shared)
    uniform = noise_response(around, train, steps, draws=DRAWS, **shared)
    signs = noise_response(around, train, noise="signs", delta=delta, draws=DRAWS, **shared)
    actual = noise_response(around, train, noise="delta", delta=delta, **shared)
    variance = [(delta[name].square().sum() / (steps[name] ** 2 / 12)).item() for name in delta]
    weights = sum(noise.numel() for noise in delta.values())
    return {
        "bits": bits,
        "value": predicted.value,
        "regularizer": predicted.total,
        "second_order": predicted.second_order,
        "uniform": uniform.increase,
        "signs": signs.increase,
        "actual": actual.increase,
        "variance_ratio": sum(variance) / weights,
    }


def float_weights(quantized: nn.Module) -> nn.Module:
    """Return a plain model with the float weights of a quantized one."""
    state = {
        name.replace("parametrizations.weight.original", "weight"): value
        for name, value in quantized.state_dict().items()
    }
    model = network("tanh", seed=0)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def snapshots(train: Dataset) -> dict[str, np.ndarray]:
    """Weights of four small networks after one epoch, for exact checks in the chapter."""
    arrays = {}
    for activation in ("tanh", "relu"):
        for loss, function in LOSSES.items():
            model = network(activation, seed=0)
            qat.fit(model, train, replace(BASE, epochs=1, learning_rate=0.01), loss=function)
            for name, value in model.state_dict().items():
                arrays[f"{activation}/{loss}/{name}"] = value.numpy()
    return arrays


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.perf_counter()
    train = load_dataset("digits").train
    np.savez(HERE / "weights.npz", **snapshots(train))
    during_training(train).to_csv(HERE / "during_training.csv", index=False, float_format="%.6g")
    real_noise(train).to_csv(HERE / "real_noise.csv", index=False, float_format="%.6g")
    config = {
        "hidden": HIDDEN,
        "epochs": EPOCHS,
        "bits": BITS,
        "draws": DRAWS,
        "recipe": asdict(BASE),
    }
    command = "python book/results/quantization_as_regularization/run.py"
    record = provenance(command, config, SEEDS, time.perf_counter() - start)
    write_json(record, HERE / "provenance.json")
