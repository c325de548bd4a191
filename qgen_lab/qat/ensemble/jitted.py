"""One model after another, in compiled loops: for networks too small to keep torch busy.

Nothing else depends on this engine: without it `fit_ensemble` is slower, and else the same.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qgen_lab.qat.batches import Source, device_of
from qgen_lab.qat.ensemble import kernels
from qgen_lab.qat.ensemble.batched import Batched
from qgen_lab.qat.ensemble.group import GroupRun, fit_in_groups
from qgen_lab.qat.ensemble.layers import kind_of, layers_of
from qgen_lab.qat.ensemble.protocol import Cohort, Outcome
from qgen_lab.qat.ensemble.stack import Stack

_OPTIMIZERS = {
    "sgd": kernels.SGD,
    "adam": kernels.ADAM,
    "adamw": kernels.ADAMW,
    "rmsprop": kernels.RMSPROP,
}
_UNIT = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
_END = (nn.AdaptiveAvgPool2d, nn.Flatten)


class Jitted:
    """Networks of convolution, batch norm and ReLU in turn, averaged at the end, as `nin` builds.

    A first use compiles for some seconds; what is compiled is cached on disk. Clean passes are
    those of the batched engine.

    Notes
    -----
    Memory: as the batched engine's for the parameters; the activations of one model a worker.
    """

    name = "jitted"

    def refuses(self, cohort: Cohort) -> str | None:
        """What the batched engine does, other layers and losses, biases, averages, and GPUs."""
        reason = Batched().refuses(cohort)
        if reason is not None:
            return reason
        model = cohort.models[0]
        if cohort.loss is not cross_entropy:
            return "the loss is not torch.nn.functional.cross_entropy"
        if not _is_convolutional(model):
            return "the layers are not Conv2d (without bias), BatchNorm2d and ReLU in turn"
        if device_of(model).type != "cpu":
            return f"the models are on {device_of(model)}, not on a CPU"
        if any(member.recipe.average_codes_from is not None for member in cohort.members):
            return "recipe.average_codes_from is not None"
        return None

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Train group after group, or `workers` groups side by side."""
        return fit_in_groups(JittedRun, cohort, bar)


def _is_convolutional(model: nn.Module) -> bool:
    layers = [layer for _, layer in layers_of(model)]
    kinds = tuple(map(kind_of, layers))
    count = (len(kinds) - len(_END)) // len(_UNIT)
    has_bias = any(layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d))
    return count > 0 and kinds == _UNIT * count + _END and not has_bias


class JittedRun(GroupRun):
    """Steps by compiled loops on the rows of the stack's parameters."""

    def __init__(self, cohort: Cohort):
        super().__init__(cohort)
        self.images = {
            source: _images(source) for source in (self.training, self.validation) if source
        }
        self.units = _units(self.stack, self.models[0], self.training)
        parameters = self.stack.parameters.detach()
        self.parameters = parameters.numpy()
        self.lsq = [self._lsq(k) for k in range(len(self.models))]
        self.memory = parameters.new_zeros((len(parameters), 3, parameters.shape[1])).numpy()
        self.counts = np.zeros((len(parameters), 1), np.int64)
        size = min(self.batch_size, len(self.training.targets))
        weights = self.stack.weights.stop
        self.buffers = kernels.buffers_for(self.units, self.parameters, weights, size)

    def train_epoch(self, number: int) -> list[float]:
        """Train each model for an epoch."""
        batches = list(self.shuffled())
        orders = torch.cat(batches, 1).numpy()
        means = [0.0] * len(self.models)
        for k in self.running():
            means[k], failed = self._train_one(k, number, orders[k])
            if failed:
                losses = torch.zeros(len(self.models))
                losses[k] = means[k]
                self.end_if_not_finite(number, failed, losses, batches[failed - 1])
        return means

    def outputs(self, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
        """All outputs in one batch."""
        images, targets = self.images[source]
        logits = np.empty((len(self.models), len(targets), self.units[-1].outputs), images.dtype)
        size = min(self.batch_size, len(self.training.targets))
        for k in range(len(self.models)):
            parameters, statistics = self.parameters[k], self._statistics(k)
            kernels.predict(
                *(self.units, images, size, parameters, self.lsq[k], statistics),
                *(self.buffers, logits[k]),
            )
        yield torch.from_numpy(logits), targets

    def _train_one(self, k: int, number: int, order: np.ndarray) -> tuple[float, int]:
        recipe = self.recipes[k]
        images, targets = self.images[self.training]
        rates = self.rates[(number - 1) * self.steps : number * self.steps, k]
        rule = _OPTIMIZERS[recipe.optimizer], recipe.momentum, recipe.weight_decay
        statistics = self._statistics(k)
        loss, failed = kernels.train_epoch(
            *(self.units, images, targets.numpy(), order, self.batch_size),
            *(rates.double().numpy(), rule, self.parameters[k], self.lsq[k], statistics),
            *(self.memory[k], self.counts[k], self.buffers),
        )
        self._put_statistics(k, statistics, failed or self.steps)
        return loss, failed

    def _lsq(self, k: int) -> tuple:
        lsq = self.stack.lsq
        column, scale = lsq.per_weight(lsq.column), lsq.per_weight(lsq.scale)
        parts = (column, lsq.low, lsq.high, scale, lsq.one_bit, lsq.full, lsq.floor)
        return self.stack.steps.start, *(part[k].numpy() for part in parts)

    def _statistics(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the running means and variances of all layers."""
        return tuple(
            torch.cat([norm.state[i][k] for norm in self.stack.norms]).numpy() for i in range(2)
        )

    def _put_statistics(self, k: int, statistics: tuple[np.ndarray, ...], steps: int) -> None:
        sizes = [norm.state[0].shape[1] for norm in self.stack.norms]
        for i, values in enumerate(map(torch.from_numpy, statistics)):
            for norm, part in zip(self.stack.norms, values.split(sizes), strict=True):
                norm.state[i][k] = part
        for norm in self.stack.norms:
            norm.state[2][k] += steps


def _images(source: Source) -> tuple[np.ndarray, Tensor]:
    """Inputs of shape (C * H * W, N), and targets."""
    inputs, targets = zip(*source.batches(), strict=True)
    return torch.cat(inputs).flatten(1).T.contiguous().numpy(), torch.cat(targets)


def _units(stack: Stack, model: nn.Module, source: Source) -> np.recarray:
    """The table of layers."""
    inputs, _ = next(source.batches())
    rows = list(_rows(stack, list(layers_of(model)), *inputs.shape[1:]))
    return np.array(rows, kernels.UNIT).view(np.recarray)


def _rows(
    stack: Stack, layers: list[tuple[str, nn.Module]], channels: int, *image: int
) -> Iterator[tuple]:
    statistics = 0
    for (name, conv), (norm_name, norm) in zip(layers[:-2:3], layers[1:-2:3], strict=True):
        sizes = zip(image, conv.kernel_size, conv.stride, conv.padding, strict=True)
        output = [(size + 2 * p - k) // s + 1 for size, k, s, p in sizes]
        yield (
            *(channels, *image, conv.out_channels, *output),
            *(*conv.kernel_size, *conv.stride, *conv.padding),
            stack.columns[f"{name}.weight"].start,
            stack.columns[f"{norm_name}.weight"].start,
            stack.columns[f"{norm_name}.bias"].start,
            statistics,
            norm.momentum,
            norm.eps,
        )
        channels, image = conv.out_channels, output
        statistics += conv.out_channels
