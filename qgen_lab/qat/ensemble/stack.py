"""K models of one architecture as one: a matrix of parameters, one row a model."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from qgen_lab.qat.ensemble.layers import (
    TWINS,
    WEIGHTED,
    BatchNorm,
    float_weight,
    kind_of,
    layers_of,
    own_parameters,
    quantizer_of,
    signature,
)
from qgen_lab.qat.ensemble.lsq import StackedLSQ


class Stack:
    """K models with one state.

    The columns of `parameters` are the float weights that may be quantized, then all other
    parameters, then the steps of LSQ.

    Parameters
    ----------
    models : list of nn.Module
        As `layers.refuses` allows, of one architecture. They are only read until `write_back`.

    Raises
    ------
    ValueError
        If the models differ in their layers or the shapes of these.
    """

    def __init__(self, models: list[nn.Module]):
        self.models = models
        columns = _layers_side_by_side(models)
        weighted = {name: c for name, c in columns.items() if kind_of(c[0]) in WEIGHTED}
        # Which layers have each parameter, and how to read it off one.
        self._sources = {f"{name}.weight": (c, float_weight) for name, c in weighted.items()}
        for name, layers in columns.items():
            for key, read in own_parameters(layers[0]).items():
                self._sources[f"{name}.{key}"] = layers, read
        rows = [_rows(*source) for source in self._sources.values()]
        self.lsq = StackedLSQ(
            [float_weight(layers[0]) for layers in weighted.values()],
            [[quantizer_of(layer) for layer in layers] for layers in weighted.values()],
        )
        self._sizes = [part.shape[1] for part in rows]
        ends = list(accumulate(self._sizes))
        self.columns = {
            name: slice(end - size, end)
            for name, size, end in zip(self._sources, self._sizes, ends, strict=True)
        }
        self.weights = slice(0, sum(self._sizes[: len(weighted)]))
        self.steps = slice(sum(self._sizes), None)
        self.parameters = torch.cat([*rows, self.lsq.steps], 1).requires_grad_()
        self._layers = [TWINS[kind_of(c[0])](name, c) for name, c in columns.items()]
        self.norms = [layer for layer in self._layers if isinstance(layer, BatchNorm)]

    @property
    def decayed(self) -> Tensor:
        """Which columns take weight decay: all but the steps."""
        decayed = torch.ones_like(self.parameters[0], dtype=torch.bool)
        decayed[self.steps] = False
        return decayed

    def __call__(self, inputs: Tensor, training: bool) -> Tensor:
        """Outputs of shape (K, N, ...) for inputs (K, C, H, W, N) or (K, D, N); K may be 1."""
        split = [self.weights.stop, self.steps.start - self.weights.stop]
        split.append(self.parameters.shape[1] - sum(split))
        weights, others, steps = self.parameters.split(split, 1)
        quantized = self.lsq(weights, steps)
        count = len(self.lsq.shapes)
        parts = [
            *quantized.split(self._sizes[:count], 1),
            *others.split(self._sizes[count:], 1),
        ]
        named = dict(zip(self._sources, parts, strict=True))
        x = inputs
        for layer in self._layers:
            x = layer(x, named, training)
        return x.movedim(-1, 1)

    @torch.no_grad()
    def raise_steps(self) -> None:
        """Put steps that the optimizer has brought below their floor back on it."""
        self.parameters[:, self.steps].clamp_(min=self.lsq.floor)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Codes of all weights, shape (K, weights); meaningless in full precision."""
        step = self.lsq.step_per_weight(self.parameters[:, self.steps])
        return self.lsq.codes(self.parameters[:, self.weights] / step)

    def put_codes(self, parameters: Tensor, k: int, codes: Tensor) -> None:
        """Make codes, not always whole, the float weights of row `k` where they are quantized."""
        step = self.lsq.step_per_weight(parameters[:, self.steps])[k]
        weights = parameters[k, self.weights]
        weights.copy_(torch.where(self.lsq.full[k], weights, codes * step))

    def state(self) -> list[Tensor]:
        """All that training changes, one row a model; not copies."""
        return [self.parameters.detach(), *(part for norm in self.norms for part in norm.state)]

    @torch.no_grad()
    def write_back(self, state: list[Tensor]) -> None:
        """Put a state into the models."""
        parameters, *statistics = state
        parts = parameters[:, : self.steps.start].split(self._sizes, 1)
        for (layers, read), rows in zip(self._sources.values(), parts, strict=True):
            for layer, row in zip(layers, rows, strict=True):
                read(layer).copy_(row.view(read(layer).shape))
        self.lsq.write_back(parameters[:, self.steps])
        count = len(BatchNorm.buffers)
        for n, norm in enumerate(self.norms):
            norm.write_back(statistics[count * n : count * (n + 1)])


def _layers_side_by_side(models: list[nn.Module]) -> dict[str, list[nn.Module]]:
    """The K instances of each layer."""
    layers = [dict(layers_of(model)) for model in models]
    for name in layers[0].keys() | set().union(*layers):
        if len({signature(own[name]) if name in own else None for own in layers}) > 1:
            raise ValueError(f"the models are not of one architecture: layer {name!r} differs")
    return {name: [own[name] for own in layers] for name in layers[0]}


def _rows(layers: list[nn.Module], read: Callable[[nn.Module], Tensor]) -> Tensor:
    return torch.stack([read(layer).detach().flatten() for layer in layers])
