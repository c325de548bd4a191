"""Throughput of ensembles: models times training images per second, against eager training.

The eager baseline is a training loop as one writes it, one model after another: our quantizer, the
images in PyTorch's usual layout, SGD, and the clean pass over the training set after each epoch,
which `fit` makes too. "sequential" is `fit` itself, with channels last. All do the same work: 4-bit
LSQ, momentum 0.9, batches of 128, some epochs, each with its clean pass; building models counts.
One thread, one process; each round runs every variant once, the order rotated; medians over rounds.
The floor is the arithmetic of the convolutions (three products a training step, one in the clean
pass) at the rate of a large matrix product in the same run.

    python benchmarks/ensembles.py [--rounds N]
    python benchmarks/ensembles.py --pool 0.2 --workers 2

`--pool` trains that share of the pool of 972 small networks on digits (three optimizers, rates,
decays, widths and depths, four precisions; 30 epochs), one call an architecture, and gives the time
of the whole.
"""

import argparse
import math
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qgen_lab.data import Dataset, load_dataset
from qgen_lab.qat import Member, Recipe, fit_ensemble, nin, parameter_groups, quantize_weights

BITS = 4


def build(depth: int, width: int, channels: int, seed: int) -> nn.Module:
    return nin(depth, width, in_channels=channels, base_width=1, seed=seed)


def eager(start: Callable[[int], nn.Module], data: Dataset, recipe: Recipe, models: int) -> None:
    """Epochs and clean passes of each model, in plain PyTorch."""
    inputs, targets = data.batch()
    inputs = inputs.contiguous()
    for seed in range(models):
        model = quantize_weights(start(seed), BITS)
        groups = parameter_groups(model, recipe.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
        for _ in range(recipe.epochs):
            model.train()
            for rows in torch.randperm(len(targets)).split(recipe.batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs[rows]), targets[rows])
                loss.backward()
                optimizer.step()
                if not math.isfinite(loss.item()):
                    raise ArithmeticError("diverged")
            model.eval()
            with torch.no_grad():
                for rows in torch.arange(len(targets)).split(256):
                    cross_entropy(model(inputs[rows]), targets[rows])


def by_engine(
    engine: str, start: Callable[[int], nn.Module], data: Dataset, recipe: Recipe, models: int
) -> None:
    members = [Member(recipe, BITS, seed) for seed in range(models)]
    fit_ensemble(start, members, data, engine=engine, progress=False)


def throughput(task: dict, rounds: int) -> pd.DataFrame:
    """Images per second of each variant, and the ratio to the eager loop of the same round."""
    start = partial(build, task["depth"], task["width"], task["data"].inputs.shape[-1])
    recipe = Recipe(epochs=task["epochs"])
    variants = {"eager": (eager, min(2, task["models"]))}
    for engine in ("sequential", "batched", "jitted"):
        count = min(2, task["models"]) if engine == "sequential" else task["models"]
        variants[engine] = partial(by_engine, engine), count
    rates = {name: [] for name in variants}
    order = list(variants)
    for number in tqdm(range(rounds + 1), disable=None):
        for name in order:
            run, models = variants[name]
            begin = time.perf_counter()
            run(start, task["data"], recipe, models)
            if number:  # the first round compiles
                images = models * recipe.epochs * len(task["data"])
                rates[name].append(images / (time.perf_counter() - begin))
        order = order[1:] + order[:1]
    reference = np.array(rates["eager"])
    rows = {
        name: {
            "models": variants[name][1],
            "images/s": np.median(values),
            "times eager": np.median(np.array(values) / reference),
        }
        for name, values in rates.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    floor = matrix_rate() / operations_per_image(start(0), task["data"])
    table.loc["floor"] = [np.nan, floor, floor / np.median(reference)]
    return table


def operations_per_image(model: nn.Module, data: Dataset) -> float:
    """Multiplications and additions of three products in training, one in the clean pass."""
    inputs, _ = data.batch(slice(0, 1))
    total = 0
    for layer in model:
        inputs = layer(inputs) if not isinstance(layer, nn.BatchNorm2d) else inputs
        if isinstance(layer, nn.Conv2d):
            total += 2 * layer.weight.numel() * inputs[0, 0].numel()
    return 4.0 * total


def matrix_rate() -> float:
    """Operations per second of a product of large matrices."""
    a, b, out = (torch.randn(1024, 1024) for _ in range(3))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / np.median(times)


def pool(share: float, workers: int, engine: str) -> None:
    """Train a share of the 972 networks, spread evenly over all settings."""
    data = load_dataset("digits").train
    settings = product(
        [("sgd", 0.1), ("adam", 0.01), ("rmsprop", 0.003)],
        [1.0, 0.3, 0.1],
        [0.0, 1e-4, 1e-3],
        [None, 8, 4, 2],
    )
    recipe = Recipe(epochs=30, schedule="multi-step", milestones=(15, 25))
    members = [
        Member(
            replace(recipe, optimizer=name, learning_rate=rate * factor, weight_decay=decay),
            bits,
            seed,
        )
        for seed, ((name, rate), factor, decay, bits) in enumerate(settings)
    ]
    stride = round(1 / share)
    seconds, models, used, lost = 0.0, 0, set(), 0
    for depth, width in product([1, 2, 3], [8, 10, 12]):
        chosen = members[(depth + width) % stride :: stride]
        begin = time.perf_counter()
        ensemble = fit_ensemble(
            partial(build, depth, width, 1), chosen, data, engine=engine, workers=workers
        )
        elapsed = time.perf_counter() - begin
        seconds += elapsed
        models += len(chosen)
        used.add(ensemble.engine)
        lost += sum(problem is not None for problem in ensemble.diverged)
        print(f"depth {depth}, width {width}: {len(chosen)} models, {elapsed:.1f} s, {ensemble}")
    whole = seconds * 9 * len(members) / models
    rate = models * recipe.epochs * len(data) / seconds
    print(
        f"{models} models, 30 epochs, {workers} workers, engine {'/'.join(sorted(used))}: "
        f"{seconds:.0f} s, {rate:,.0f} images/s, {lost} diverged; all 972: {whole:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=None)
    parser.add_argument("--pool", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread")
    if options.pool:
        pool(options.pool, options.workers, options.engine)
    else:
        digits = load_dataset("digits").train
        images: Tensor = torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8)
        cifar = Dataset(images, torch.randint(10, (512,)), tuple("0123456789"), 0.5, 0.25)
        tasks = {
            "digits8": {"width": 8, "depth": 2, "data": digits, "epochs": 5, "models": 32},
            "digits16": {"width": 16, "depth": 2, "data": digits, "epochs": 5, "models": 20},
            "cifar200": {"width": 200, "depth": 3, "data": cifar, "epochs": 2, "models": 1},
        }
        for name in options.tasks or tasks:
            task = tasks[name]
            table = throughput(task, options.rounds)
            size = "x".join(map(str, task["data"].inputs.shape[1:]))
            print(f"\n{name}: NiN, depth {task['depth']}, {task['width']} channels, {size}")
            print(table.round({"images/s": 0, "times eager": 2}).to_string(na_rep="-"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
