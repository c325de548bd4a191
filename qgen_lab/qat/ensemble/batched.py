"""All models of a group in each operation: batched products on a CPU or a GPU, in torch."""

import torch
from torch.func import vmap
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.ensemble import layers
from qgen_lab.qat.ensemble.group import GroupRun, fit_in_groups, samples_last
from qgen_lab.qat.ensemble.optimizers import OPTIMIZERS, RowOptimizer
from qgen_lab.qat.ensemble.protocol import Cohort, Member, Outcome

# What a recipe can ask for beyond this engine, and the value that does not ask for it.
_PLAIN = {"augmentation": "none", "precision": "float32", "sharpness_radius": 0.0}


class Batched:
    """Trains groups of models, their parameters in one matrix.

    Notes
    -----
    Groups are as large as `group.GROUP_BYTES` of activations allow: 32 MiB on a CPU, 8 GiB on a
    GPU. A step needs about that, the patches under each kernel larger than one pixel (its inputs
    times its taps over its strides), and four to six copies of the group's parameters.
    """

    name = "batched"

    def refuses(self, cohort: Cohort) -> str | None:
        """Models beyond a stack of common layers, data in an iterable, options of recipes."""
        data = cohort.data.train if isinstance(cohort.data, Splits) else cohort.data
        if not isinstance(data, Dataset | tuple):
            return f"the data are a {type(data).__name__}, not a Dataset or a pair of tensors"
        reasons = [_refuses_recipe(member) for member in cohort.members]
        reasons += [layers.refuses(model) for model in cohort.models]
        return next((reason for reason in reasons if reason is not None), None)

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Train group after group, or `workers` groups side by side."""
        return fit_in_groups(BatchedRun, cohort, bar)


def _refuses_recipe(member: Member) -> str | None:
    recipe = member.recipe
    if recipe.optimizer not in OPTIMIZERS:
        return f"recipe.optimizer is {recipe.optimizer!r}, not one of {sorted(OPTIMIZERS)}"
    for name, plain in _PLAIN.items():
        value = getattr(recipe, name)
        if value != plain:
            return f"recipe.{name} is {value!r}, not {plain!r}"
    return None


class BatchedRun(GroupRun):
    """Steps by automatic differentiation of the sum of all losses."""

    def __init__(self, cohort: Cohort):
        super().__init__(cohort)
        self.optimizer = RowOptimizer(self.recipes, self.stack.parameters, self.stack.decayed)

    def train_epoch(self, number: int) -> list[float]:
        """Take the steps of one epoch."""
        total, count = torch.zeros(len(self.models), dtype=torch.float64), 0
        for step, indices in enumerate(self.shuffled(), start=1):
            inputs, targets = self.samples(indices)
            losses = vmap(self.loss)(self.stack(samples_last(inputs), training=True), targets)
            (gradient,) = torch.autograd.grad(losses.sum(), self.stack.parameters)
            values = losses.detach().double().cpu()
            self.end_if_not_finite(number, step, values, indices)
            position = (number - 1) * self.steps + step - 1
            with torch.no_grad():
                self.optimizer.step(gradient, self.rates[position])
            self.stack.raise_steps()
            self.average.update(position)
            total += values * indices.shape[1]
            count += indices.shape[1]
        return (total / count).tolist()
