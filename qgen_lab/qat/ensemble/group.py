"""Training of one group of models side by side: all but the steps themselves."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import vmap
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.batches import Source
from qgen_lab.qat.divergence import NotFinite, diverged_at
from qgen_lab.qat.ensemble.averages import CodeAverages
from qgen_lab.qat.ensemble.layers import WEIGHTED, kind_of, layers_of
from qgen_lab.qat.ensemble.protocol import Cohort, Outcome
from qgen_lab.qat.ensemble.stack import Stack
from qgen_lab.qat.evaluation import Evaluation, checked_metrics, evaluate
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.schedules import learning_rates
from qgen_lab.qat.training import Epoch, History, history_of

# Bytes of activations that a group may have in a training step. On a CPU more than some dozen MB no
# longer fit into its caches, and longer operations gain nothing.
GROUP_BYTES = {"cpu": 32 * 2**20, "gpu": 8 * 2**30}
_COPIES = 3  # of a convolution's output in a step: as it is, normalised, and after ReLU


def fit_in_groups(run: type["GroupRun"], cohort: Cohort, bar: tqdm) -> list[Outcome]:
    """Train group after group of a cohort, or `workers` groups side by side."""
    order = sorted(range(len(cohort)), key=lambda i: cohort.members[i].recipe.optimizer)
    size = min(_group_size(cohort), math.ceil(len(order) / cohort.workers))
    groups = [order[i : i + size] for i in range(0, len(order), size)]

    def train_group(indices: list[int]) -> "GroupRun":
        started = run(cohort.take(indices))
        started.train(bar)
        return started

    with ThreadPoolExecutor(cohort.workers) as pool:
        trained = (map if cohort.workers == 1 else pool.map)(train_group, groups)
        outcomes = [outcome for group in trained for outcome in group.outcomes()]
    by_index = dict(zip(chain(*groups), outcomes, strict=True))
    return [by_index[i] for i in range(len(cohort))]


def _group_size(cohort: Cohort) -> int:
    """How many models' activations `GROUP_BYTES` hold."""
    model, recipe = cohort.models[0], cohort.members[0].recipe
    source = Source(cohort.data.train if isinstance(cohort.data, Splits) else cohort.data, model)
    checked_metrics(model, source, cohort.loss, cohort.metrics)
    x, _ = next(source.batches(1))
    numbers = 0
    model.eval()
    with torch.no_grad():
        for _, layer in layers_of(model):
            x = layer(x)
            numbers += x.numel() if kind_of(layer) in WEIGHTED else 0
    bytes_per_model = _COPIES * numbers * x.element_size() * recipe.batch_size
    kind = "cpu" if x.device.type == "cpu" else "gpu"
    return max(1, GROUP_BYTES[kind] // bytes_per_model)


class GroupRun(ABC):
    """One training run of a stack of models: what `fit` does around the steps, for all at once."""

    def __init__(self, cohort: Cohort):
        self.models = cohort.models
        self.recipes = [member.recipe for member in cohort.members]
        self.batch_size = self.recipes[0].batch_size
        data = cohort.data
        splits = (data.train, data.validation) if isinstance(data, Splits) else (data, None)
        self.training, self.validation = (
            Source(part, self.models[0]) if part is not None else None for part in splits
        )
        self.loss = cohort.loss
        self.metrics = checked_metrics(self.models[0], self.training, cohort.loss, cohort.metrics)
        self.stack = Stack(self.models)
        self.steps = self.training.steps(self.recipes[0])
        rates = [torch.from_numpy(learning_rates(r, self.steps)) for r in self.recipes]
        self.rates = torch.stack(rates, 1).to(self.stack.parameters.detach())
        self.average = CodeAverages(self.stack, self.recipes, len(self.rates))
        self.orders = [torch.Generator().manual_seed(m.seed) for m in cohort.members]
        self.progress = [_Progress(recipe) for recipe in self.recipes]
        self.kept = [part.clone() for part in self.stack.state()]

    @abstractmethod
    def train_epoch(self, number: int) -> list[float]:
        """Take the steps of one epoch, counted from 1; mean of its losses, a number a model.

        Call `end_if_not_finite` before each step is taken, and `average.update` after it.
        """

    def train(self, bar: tqdm) -> None:
        """Train all epochs and put the kept states into the models."""
        for number in range(1, self.recipes[0].epochs + 1):
            if self.running():
                self._epoch(number)
            bar.update(len(self.models))
        self.average.put(self.kept[0])
        self.stack.write_back(self.kept)

    def outcomes(self) -> list[Outcome]:
        """How it went for each model, with what recipes ask for at the end.

        Not in a thread: passes over single models handle PyTorch's global random state.
        """
        return [self._outcome(k) for k in range(len(self.models))]

    def outputs(self, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of all models, shape (K, N, ...), and targets, batch by batch of a clean pass."""
        for inputs, targets in source.batches():
            yield self.stack(samples_last(inputs[None]), training=False), targets

    def running(self) -> list[int]:
        """The models that are still trained."""
        return [k for k, progress in enumerate(self.progress) if progress.running]

    def shuffled(self) -> Iterator[Tensor]:
        """Indices of the samples of each batch of an epoch, (K, N), each model in its order."""
        size = len(self.training.targets)
        orders = torch.stack([torch.randperm(size, generator=order) for order in self.orders])
        batches = orders.to(self.training.device).split(self.batch_size, 1)
        yield from batches[: self.steps]  # a single sample left over is skipped with batch norm

    def samples(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at indices of any shape, which becomes their leading dimensions."""
        data, rows = self.training.data, indices.flatten()
        if isinstance(data, Dataset):
            inputs, targets = data.batch(rows)
        else:
            inputs, targets = data.inputs[rows], data.targets[rows]
        return inputs.unflatten(0, indices.shape), targets.unflatten(0, indices.shape)

    def end_if_not_finite(self, epoch: int, step: int, losses: Tensor, indices: Tensor) -> None:
        """End the training of models whose loss is not finite, as they are before this step."""
        if bool(losses.isfinite().all()):
            return
        lost = [k for k in self.running() if not losses[k].isfinite()]
        for k in lost:
            batches = [self.samples(indices[k])] if step else self.training.batches()
            self.progress[k].end(epoch, NotFinite(step, losses[k].item(), batches))
        self._keep(lost)

    def _epoch(self, number: int) -> None:
        start = time.perf_counter()
        running_loss = self.train_epoch(number)
        train = self._evaluate(self.training)
        validation = self._evaluate(self.validation) if self.validation is not None else None
        losses = torch.tensor([result.loss for result in train])
        self.end_if_not_finite(number, 0, losses, torch.empty(0))
        seconds = (time.perf_counter() - start) / len(self.models)
        improved = []
        for k in self.running():
            rate = self.rates[(number - 1) * self.steps, k].item()
            valid = validation and validation[k]
            row = Epoch(number, rate, running_loss[k], train[k], valid, seconds)
            if self.progress[k].add(row):
                improved.append(k)
        self._keep(improved)

    @torch.no_grad()
    def _evaluate(self, source: Source) -> list[Evaluation]:
        """The clean pass of all models; means weighed by batch size, summed in float64."""
        values, sizes = [], []
        for outputs, targets in self.outputs(source):
            measures = (self.loss, *self.metrics.values())
            results = [vmap(measure, in_dims=(0, None))(outputs, targets) for measure in measures]
            values.append(torch.stack([_mean_per_model(result) for result in results]))
            sizes.append(len(targets))
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        table = torch.einsum("b,bmk->km", weights, torch.stack(values).cpu()).tolist()
        return [
            Evaluation(loss, dict(zip(self.metrics, metrics, strict=True)), sum(sizes))
            for loss, *metrics in table
        ]

    def _keep(self, rows: list[int]) -> None:
        if rows:
            for kept, now in zip(self.kept, self.stack.state(), strict=True):
                kept[rows] = now[rows]

    def _outcome(self, k: int) -> Outcome:
        model, progress = self.models[k], self.progress[k]
        history = progress.history()
        if progress.problem is not None:
            epoch, problem = progress.problem
            model.train(problem.step > 0)
            diverged = diverged_at(model, progress.recipe, epoch, problem, history)
            model.eval()
            return Outcome(history, diverged)
        recipe = progress.recipe
        if recipe.reestimate_batch_norm:
            reestimate_batch_norm(model, self.training.data)
        if recipe.reestimate_batch_norm or recipe.average_codes_from is not None:
            history = replace(
                history,
                train=self._alone(model, self.training),
                validation=self.validation and self._alone(model, self.validation),
            )
        model.eval()
        return Outcome(history)

    def _alone(self, model: nn.Module, source: Source) -> Evaluation:
        return evaluate(model, source.data, self.loss, self.metrics)


class _Progress:
    """Where one model's training stands."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.running = True
        self.epochs: list[Epoch] = []
        self.kept_epoch = 0
        self.problem: tuple[int, NotFinite] | None = None

    def add(self, row: Epoch) -> bool:
        """Take in an epoch; whether it is the one to keep so far."""
        best = self.epochs[self.kept_epoch - 1].train.loss if self.epochs else float("inf")
        self.epochs.append(row)
        stop = self.recipe.stop_at_loss
        self.running = stop is None or row.train.loss > stop
        is_kept = self.recipe.keep == "last" or row.train.loss < best
        if is_kept:
            self.kept_epoch = row.number
        return is_kept

    def end(self, epoch: int, problem: NotFinite) -> None:
        """Stop for good."""
        self.running, self.problem = False, (epoch, problem)

    def history(self) -> History | None:
        """The epochs so far."""
        return history_of(self.epochs, self.kept_epoch) if self.epochs else None


def _mean_per_model(values: Tensor) -> Tensor:
    """Mean of one value per model, or of one per model and sample."""
    return values.double().reshape(len(values), -1).mean(1)


def samples_last(inputs: Tensor) -> Tensor:
    """(K, N, ...) to (K, ..., N), in the order of memory that the products want."""
    return inputs.movedim(1, -1).contiguous()
