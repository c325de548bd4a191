"""Train small networks under many schedules, and deploy each in three ways.

`python book/results/end_of_training/run.py` trains what is missing and writes `runs.csv` beside
this file once all is there. Name conditions to train only those: several processes share the work.

Runs that share a condition and a seed share data, wrong labels, initial weights, order of the
samples and number of steps. Schedules that agree up to some step share the computation up to
there: the runs branch where their rates part. Bits 32 mean full precision.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from qgen_lab.data import Dataset, Splits, load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import Recipe, evaluate, nin, quantize_weights
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.ensemble.stack import Stack
from qgen_lab.qat.schedules import Cooldown, learning_rates

HERE = Path(__file__).parent
PARTS = HERE / "parts"  # finished runs, until all are there; not in git

FULL_PRECISION = 32
POWERS, SHARES = (1, 2, 4), (0.01, 0.1, 0.5)
AVERAGED_FROM = 0.75  # averages begin after this share of the steps


@dataclass(frozen=True)
class Condition:
    """Data, network, budget and what is compared in it."""

    data: dict
    model: dict
    recipe: Recipe
    bits: tuple[int, ...]
    seeds: tuple[int, ...]
    schedules: tuple[str, ...]
    halved: bool = False  # images of half the height and width, means of four pixels
    test_size: int | None = None  # the first so many test images; None: all


def _names(base: str, powers: tuple[int, ...] = POWERS, shares: tuple[float, ...] = SHARES):
    return tuple(f"{base} power {power} over {share:.0%}" for power in powers for share in shares)


DIGITS = {"depth": 2, "width_multiplier": 12, "base_width": 1, "in_channels": 1}
RECIPE = Recipe(epochs=27, batch_size=64, learning_rate=0.1, weight_decay=5e-4)
CONSTANT = ("constant", "cosine", *_names("constant"))
ALL = (
    *CONSTANT, "exponential", "stepped", *_names("stepped", shares=(0.01, 0.1)),
    *_names("stepped", (1,), (0.5,)),
)  # fmt: skip
AVERAGED = ("constant", "cosine", "exponential", "stepped", "constant power 1 over 10%")
CONDITIONS = {
    "label-noise": Condition(
        {"name": "digits", "size": 1408, "label_noise": 0.2},
        DIGITS, RECIPE, (32, 4, 3, 2, 1), tuple(range(8)), ALL,
    ),
    "few-images": Condition(
        {"name": "digits", "size": 320},
        DIGITS, replace(RECIPE, epochs=120), (32, 4, 3, 2, 1), tuple(range(8)), ALL,
    ),
    "full-batch": Condition(
        {"name": "digits", "size": 384, "label_noise": 0.2},
        DIGITS | {"width_multiplier": 8},
        replace(RECIPE, epochs=500, batch_size=384, learning_rate=0.02),
        (32, 2, 1), tuple(range(8)), CONSTANT,
    ),
    # Added when the others were in: their lengths, 5, 50 and 250 steps, were no fair test.
    "full-batch-long": Condition(
        {"name": "digits", "size": 384, "label_noise": 0.2},
        DIGITS | {"width_multiplier": 8},
        replace(RECIPE, epochs=1500, batch_size=384, learning_rate=0.02),
        (32, 2, 1), tuple(range(10, 18)),
        ("constant", *_names("constant", (1, 4), (0.02, 0.08, 0.32))),
    ),
    "cifar": Condition(
        {"name": "cifar10", "size": 5120},
        {"depth": 3, "width_multiplier": 24, "base_width": 1},
        replace(RECIPE, epochs=10), (32, 4, 2, 1), (0, 1, 2),
        (*CONSTANT, "stepped", "stepped power 1 over 10%"), halved=True, test_size=5000,
    ),
}  # fmt: skip


def recipe_of(schedule: str, recipe: Recipe) -> Recipe:
    """The recipe of a schedule named as in `CONDITIONS`."""
    base, *cooled = schedule.split(" ")
    thirds = tuple(round(recipe.epochs * part / 3) for part in (1, 2))
    recipe = {
        "constant": recipe,
        "stepped": replace(recipe, schedule="multi-step", milestones=thirds, gamma=0.1),
        "exponential": replace(recipe, schedule="exponential", gamma=0.01),
        "cosine": replace(recipe, schedule="cosine"),
    }[base]
    if cooled:
        power, share = float(cooled[1]), float(cooled[3].rstrip("%")) / 100
        recipe = replace(recipe, cooldown=Cooldown(power, share))
    return recipe


class Runs:
    """Networks of one kind that see the same batches, each at rates of its own."""

    def __init__(self, models: list[nn.Module], weight_decay: float) -> None:
        self.stack = Stack(models)
        self.weight_decay = weight_decay * self.stack.decayed
        self.momentum = torch.zeros_like(self.stack.parameters)
        self.codes = self.stack.codes()
        self.moved = torch.zeros_like(self.codes)
        self.code_sums, self.latent_sums = (torch.zeros_like(self.codes).double() for _ in "12")

    def state(self) -> list[Tensor]:
        """All that training changes, one row a network."""
        averages = [self.codes, self.moved, self.code_sums, self.latent_sums]
        return [*self.stack.state(), self.momentum, *averages]

    def step(self, inputs: Tensor, targets: Tensor, rates: Tensor) -> None:
        """One step of SGD with momentum 0.9, `rates` of shape (networks,)."""
        outputs = self.stack(inputs, training=True).flatten(0, 1)
        total = cross_entropy(outputs, targets.repeat(len(rates)), reduction="sum")
        (gradient,) = torch.autograd.grad(total / len(targets), self.stack.parameters)
        with torch.no_grad():
            gradient.addcmul_(self.weight_decay, self.stack.parameters)
            self.momentum.mul_(0.9).add_(gradient)
            self.stack.parameters.addcmul_(self.momentum, rates[:, None], value=-1)
        self.stack.raise_steps()

    @torch.no_grad()
    def average(self, first: bool) -> None:
        """Take the codes and the float weights as they are now into their means."""
        codes = self.stack.codes()
        if not first:
            self.moved.logical_or_(codes != self.codes)
        self.codes.copy_(codes)
        self.code_sums += codes
        self.latent_sums += self.stack.parameters[:, self.stack.weights]

    @torch.no_grad()
    def deploy(self, deployed: str, updates: int) -> list[nn.Module]:
        """The networks with their last weights, or the mean ones of the kind asked for."""
        parameters, *rest = self.stack.state()
        parameters = parameters.clone()
        if deployed == "rounded average":
            steps = self.stack.lsq.step_per_weight(parameters[:, self.stack.steps])
            parameters[:, self.stack.weights] = (self.code_sums / updates * steps).float()
        elif deployed == "latent average":
            parameters[:, self.stack.weights] = (self.latent_sums / updates).float()
        self.stack.write_back([parameters, *rest])
        return self.stack.models


def branches(rates: np.ndarray, bits: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Steps where rates of shape (rows, steps) part, and from there on whose run each row shares.

    Rows of different bits share none. Runs are numbered from 0 and go on until the next entry.
    """
    labels, found = bits, []
    for step, now in enumerate(rates.T):
        _, refined = np.unique(np.stack([labels, now]), axis=1, return_inverse=True)
        if step == 0 or refined.max() > labels.max():
            labels = refined.ravel()
            found.append((step, labels))
    return found


def load(condition: Condition, seed: int) -> Splits:
    """The data of one condition and seed."""
    splits = load_dataset(seed=seed, **condition.data)
    train, test = splits.train, splits.test.take(slice(0, condition.test_size))
    if condition.halved:
        train, test = (_halved(part) for part in (train, test))
    return Splits(train, None, test)


def _halved(data: Dataset) -> Dataset:
    pixels = functional.avg_pool2d(data.inputs.permute(0, 3, 1, 2).float(), 2).round()
    return replace(data, inputs=pixels.permute(0, 2, 3, 1).to(torch.uint8).contiguous())


def train(condition: Condition, seed: int) -> list[dict]:
    """All precisions and schedules of one condition and seed, each deployed in each way."""
    start = time.process_time()
    splits = load(condition, seed)

    recipe = condition.recipe
    per_epoch = len(splits.train) // recipe.batch_size
    rates = [learning_rates(recipe_of(s, recipe), per_epoch) for s in condition.schedules]
    table = np.tile(np.array(rates, dtype=np.float32), (len(condition.bits), 1))
    bits = np.repeat(condition.bits, len(rates))
    parted = dict(branches(table, bits))
    batches = _batches(splits.train, recipe, seed)
    begin = int(AVERAGED_FROM * table.shape[1])
    runs = labels = None
    for step, (inputs, targets) in enumerate(batches):
        if step in parted:
            runs, labels = _branch(runs, labels, parted[step], bits, condition, seed), parted[step]
        now = np.zeros(labels.max() + 1, dtype=np.float32)
        now[labels] = table[:, step]
        runs.step(inputs, targets, torch.from_numpy(now))
        if step >= begin:
            runs.average(first=step == begin)
    found = {"bits": bits, "schedule": np.tile(condition.schedules, len(condition.bits))}
    rows = _results(runs, labels, found, splits, updates=table.shape[1] - begin)
    seconds = time.process_time() - start
    return [{"seed": seed} | row | {"seconds": seconds / len(rows)} for row in rows]


def _batches(data: Dataset, recipe: Recipe, seed: int):
    """Batches of all epochs as a stack takes them, samples last; in the order that `fit` has."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for inputs, targets in data.batches(recipe.batch_size, True, generator):
            yield inputs.movedim(0, -1)[None].contiguous(), targets


def _branch(
    runs: Runs | None, old: np.ndarray, new: np.ndarray, bits: np.ndarray, condition, seed: int
) -> Runs:
    """One run for each label in `new`, in the state of the run that its rows shared so far."""
    first = [np.flatnonzero(new == label)[0] for label in range(new.max() + 1)]
    models = [nin(**condition.model, seed=seed) for _ in first]
    for model, width in zip(models, bits[first].tolist(), strict=True):
        if width < FULL_PRECISION:
            quantize_weights(model, width)
    branched = Runs(models, condition.recipe.weight_decay)
    if runs is not None:
        for part, before in zip(branched.state(), runs.state(), strict=True):
            part.copy_(before[torch.from_numpy(old[first])])
    return branched


def _results(
    runs: Runs, labels: np.ndarray, found: dict[str, np.ndarray], splits: Splits, updates: int
) -> list[dict]:
    """Evaluate each network, batch norm re-estimated, in each way of deployment."""
    moving, rows = runs.moved.mean(1).tolist(), []
    for deployed in ("last iterate", "latent average", "rounded average"):
        models = runs.deploy(deployed, updates)
        for bits, schedule, run in zip(
            *map(np.ndarray.tolist, (*found.values(), labels)), strict=True
        ):
            full = bits == FULL_PRECISION
            if deployed != "last iterate" and schedule not in AVERAGED:
                continue
            if deployed == "rounded average" and full:
                continue
            model = reestimate_batch_norm(models[run], splits.train)
            row = {"bits": bits, "schedule": schedule, "deployed": deployed}
            row["share_moving"] = float("nan") if full else moving[run]
            for name in ("train", "test"):
                result = evaluate(model, getattr(splits, name))
                row[f"{name}_loss"] = result.loss
                row[f"{name}_accuracy"] = result.metrics["accuracy"]
            rows.append(row)
    return rows


def part(condition: str, seed: int) -> Path:
    """Where finished runs wait."""
    return PARTS / f"{condition}-{seed:02d}.json"


def write_tables(origin: dict) -> None:
    """Gather all runs into one table."""
    rows = [
        {"condition": name} | row
        for name, condition in CONDITIONS.items()
        for seed in condition.seeds
        for row in json.loads(part(name, seed).read_text())
    ]
    table = pd.DataFrame(rows)
    seconds = table.pop("seconds").sum()
    table.to_csv(HERE / "runs.csv", index=False, float_format="%.6g")
    write_json(origin | {"seconds": round(float(seconds), 1)}, HERE / "provenance.json")


def main(names: list[str]) -> None:
    """Train what is missing in these conditions; write the table when nothing at all is missing."""
    torch.set_num_threads(1)
    PARTS.mkdir(exist_ok=True)
    config = {
        "conditions": {name: asdict(condition) for name, condition in CONDITIONS.items()},
        "averaged_from": AVERAGED_FROM,
        "averages_deployed_under": AVERAGED,
        "note": "sizes, budgets and rates were chosen on seeds 901 and up, not among the results; "
        "seconds are processor time on a shared machine",
    }
    seeds = sorted({seed for condition in CONDITIONS.values() for seed in condition.seeds})
    # Made before the runs: the revision and the versions are those that train.
    command = "python book/results/end_of_training/run.py"
    origin = provenance(command, config, seeds, seconds=0)
    for name in names:
        condition = CONDITIONS[name]
        for seed in condition.seeds:
            target = part(name, seed)
            if not target.exists():
                unfinished = target.with_suffix(".tmp")
                unfinished.write_text(json.dumps(train(condition, seed)))
                unfinished.rename(target)
    finished = [part(name, seed) for name, c in CONDITIONS.items() for seed in c.seeds]
    if all(path.exists() for path in finished):
        write_tables(origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("conditions", nargs="*", default=list(CONDITIONS))
    main(parser.parse_args().conditions)
