"""All models of a group in each operation: batched products on a CPU or a GPU, in torch."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batches import Source
from qgen_lab.qat.ensemble import stacked
from qgen_lab.qat.ensemble.optimizers import OPTIMIZERS, RowOptimizer
from qgen_lab.qat.ensemble.protocol import Cohort, Member, Outcome
from qgen_lab.qat.schedules import learning_rates
from qgen_lab.qat.training import Diverged, Evaluation, _check, _diverged, _Epoch, _history
from qgen_lab.qat.training import _NotFinite as NotFinite

# Models that share each operation. On a CPU their activations should stay in the cache; more save
# nothing, since the rows of the products are long already.
GROUP = 16

# What `Recipe` can ask for beyond this engine, and the value that does not ask for it.
_PLAIN = {
    "augmentation": "none",
    "precision": "float32",
    "sharpness_radius": 0.0,
    "average_codes_from": None,
    "reestimate_batch_norm": False,
}


class Batched:
    """Trains groups of models, their parameters in one matrix.

    Notes
    -----
    Memory: four to six copies of the parameters (gradient, optimizer, kept epoch) and, for a
    training step, about three times the activations of `GROUP` models, plus the patches under each
    kernel larger than one pixel.
    """

    name = "batched"

    def refuses(self, cohort: Cohort) -> str | None:
        """Models beyond a stack of common layers, data in an iterable, options of recipes."""
        data = cohort.data.train if isinstance(cohort.data, Splits) else cohort.data
        if not isinstance(data, Dataset | tuple):
            return f"the data are a {type(data).__name__}, not a Dataset or a pair of tensors"
        for member in cohort.members:
            reason = _refuses_recipe(member)
            if reason is not None:
                return reason
        reasons = (stacked.refuses(model) for model in cohort.models)
        return next((reason for reason in reasons if reason is not None), None)

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Train group after group, or `workers` groups side by side."""
        order = sorted(range(len(cohort)), key=lambda i: cohort.members[i].recipe.optimizer)
        size = min(GROUP, -(-len(order) // cohort.workers))
        groups = [order[i : i + size] for i in range(0, len(order), size)]

        def fit_group(indices: list[int]) -> list[Outcome]:
            return _Run(cohort.take(indices), bar).outcomes()

        outcomes = {}
        with ThreadPoolExecutor(cohort.workers) as pool:
            for indices, found in zip(groups, pool.map(fit_group, groups), strict=True):
                outcomes |= dict(zip(indices, found, strict=True))
        return [outcomes[i] for i in range(len(cohort))]


def _refuses_recipe(member: Member) -> str | None:
    recipe = member.recipe
    if recipe.optimizer not in OPTIMIZERS:
        return f"recipe.optimizer is {recipe.optimizer!r}, not one of {sorted(OPTIMIZERS)}"
    for name, plain in _PLAIN.items():
        value = getattr(recipe, name, plain)
        if value != plain:
            return f"recipe.{name} is {value!r}, not {plain!r}"
    return None


class _Run:
    """The training of one group."""

    def __init__(self, cohort: Cohort, bar: tqdm):
        self.members, self.models, self.bar = cohort.members, cohort.models, bar
        self.recipes = [member.recipe for member in cohort.members]
        data = cohort.data
        splits = (data.train, data.validation) if isinstance(data, Splits) else (data, None)
        self.training, self.validation = (
            Source(part, self.models[0]) if part is not None else None for part in splits
        )
        self.loss = cohort.loss
        self.metrics = _check(self.models[0], self.training, cohort.loss, cohort.metrics)
        self.stack = stacked.Stack(self.models)
        self.optimizer = RowOptimizer(self.recipes, self.stack.parameters, self.stack.decayed)
        self.rates = self._rates()
        self.generators = [torch.Generator().manual_seed(m.seed) for m in self.members]
        self.alive = [True] * len(self.models)
        self.kept = [part.clone() for part in self.stack.state()]
        self.kept_epoch = [0] * len(self.models)
        self.epochs: list[list[_Epoch]] = [[] for _ in self.models]
        self.problems: list[tuple[int, NotFinite] | None] = [None] * len(self.models)

    def outcomes(self) -> list[Outcome]:
        """Train; how it went for each model."""
        for epoch in range(1, self.recipes[0].epochs + 1):
            if any(self.alive):
                self._epoch(epoch)
            self.bar.update(len(self.models))
        self.stack.write_back(self.kept)
        return [self._outcome(k) for k in range(len(self.models))]

    def _rates(self) -> Tensor:
        """Rates of shape (epochs, steps, K)."""
        steps = self.training.steps(self.recipes[0])
        rates = torch.stack([torch.from_numpy(learning_rates(r, steps)) for r in self.recipes], 1)
        return rates.to(self.stack.parameters).detach().unflatten(0, (-1, steps))

    def _epoch(self, number: int) -> None:
        start = time.perf_counter()
        running_loss = self._train(number)
        train = self._evaluate(self.training)
        validation = self._evaluate(self.validation) if self.validation is not None else None
        self._lose(number, 0, torch.tensor([result.loss for result in train]), None, None)
        seconds = (time.perf_counter() - start) / len(self.models)
        for k in self._alive():
            rate = self.rates[number - 1, 0, k].item()
            valid = validation and validation[k]
            row = _Epoch(number, rate, running_loss[k], train[k], valid, seconds)
            self.epochs[k].append(row)
            best = self.epochs[k][self.kept_epoch[k] - 1].train.loss
            if self.recipes[k].keep == "last" or not self.kept_epoch[k] or train[k].loss < best:
                self.kept_epoch[k] = number
        self._keep([k for k in self._alive() if self.kept_epoch[k] == number])
        for k in self._alive():
            bound = self.recipes[k].stop_at_loss
            self.alive[k] = bound is None or train[k].loss > bound

    def _train(self, number: int) -> list[float]:
        """One epoch of steps; mean of the batches' losses, a number a model."""
        total, samples = torch.zeros(len(self.models), dtype=torch.float64), 0
        for step, (inputs, targets) in enumerate(self._shuffled(), start=1):
            outputs = self.stack(_samples_last(inputs), training=True)
            losses = vmap(self.loss)(outputs, targets)
            (gradient,) = torch.autograd.grad(losses.sum(), self.stack.parameters)
            values = losses.detach().double().cpu()
            self._lose(number, step, values, inputs, targets)
            with torch.no_grad():
                self.optimizer.step(gradient, self.rates[number - 1, step - 1])
            self.stack.raise_steps()
            total += values * targets.shape[1]
            samples += targets.shape[1]
        return (total / samples).tolist()

    def _shuffled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch: inputs (K, N, ...), targets (K, N, ...), in each model's order."""
        data, size = self.training.data, len(self.training.targets)
        orders = torch.stack([torch.randperm(size, generator=g) for g in self.generators])
        steps = self.rates.shape[1]
        for rows in orders.to(self.training.device).split(self.recipes[0].batch_size, 1)[:steps]:
            flat = rows.flatten()
            if isinstance(data, Dataset):
                inputs, targets = data.batch(flat)
            else:
                inputs, targets = data.inputs[flat], data.targets[flat]
            yield inputs.unflatten(0, rows.shape), targets.unflatten(0, rows.shape)

    @torch.no_grad()
    def _evaluate(self, source: Source) -> list[Evaluation]:
        """The clean pass of all models; means weighed by batch size, summed in float64."""
        values, sizes = [], []
        for inputs, targets in source.batches():
            outputs = self.stack(_samples_last(inputs[None]), training=False)
            means = [
                _mean(vmap(measure, in_dims=(0, None))(outputs, targets))
                for measure in (self.loss, *self.metrics.values())
            ]
            values.append(torch.stack(means))
            sizes.append(len(targets))
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        table = torch.einsum("b,bmk->km", weights, torch.stack(values).cpu()).tolist()
        return [
            Evaluation(row[0], dict(zip(self.metrics, row[1:], strict=True)), sum(sizes))
            for row in table
        ]

    def _alive(self) -> list[int]:
        return [k for k, alive in enumerate(self.alive) if alive]

    def _lose(self, epoch: int, step: int, losses: Tensor, inputs, targets) -> None:
        """Mark the models whose loss is not finite, and keep them as they are now."""
        if bool(losses.isfinite().all()):
            return
        lost = [k for k in self._alive() if not losses[k].isfinite()]
        for k in lost:
            batches = self.training.batches() if step == 0 else [(inputs[k], targets[k])]
            self.problems[k] = epoch, NotFinite(step, losses[k].item(), batches)
            self.alive[k] = False
        self._keep(lost)

    def _keep(self, rows: list[int]) -> None:
        for kept, now in zip(self.kept, self.stack.state(), strict=True):
            kept[rows] = now[rows]

    def _outcome(self, k: int) -> Outcome:
        history = _history(self.epochs[k], self.kept_epoch[k]) if self.epochs[k] else None
        model, problem = self.models[k], self.problems[k]
        diverged: Diverged | None = None
        if problem is not None:
            model.train(problem[1].step > 0)
            diverged = _diverged(model, self.recipes[k], *problem, history)
        model.eval()
        return Outcome(history, diverged)


def _samples_last(inputs: Tensor) -> Tensor:
    return inputs.movedim(1, -1).contiguous()


def _mean(values: Tensor) -> Tensor:
    """Mean per model of one value per model or per sample."""
    return values.double().reshape(len(values), -1).mean(1)
