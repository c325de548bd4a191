"""The loss under noise on the weights: QGen's regularizer, what it drops, a Monte Carlo check.

Weights carry independent noise of mean zero and variance d^2 / 12, where d is the bin width of
their layer. To second order the loss rises by half the trace of its Hessian times that variance.
The Hessian has two halves: the Gauss-Newton half gives R(Delta) of Eq. 7 of QGen (arXiv
2404.11769); the half that Eq. 7 drops weighs the curvature of the outputs with the residuals.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.utils import parametrize

from qgen_lab import qat
from qgen_lab.flatness.function import (
    LOSSES,
    WeightFunction,
    channel_dim,
    check_at_least,
    check_choice,
    fitted_targets,
    weight_function,
    weight_layers,
)

EXACT_LIMIT = 2**25
"""Weights times all outputs up to which ``method="auto"`` is exact: half a minute or less."""
_VMAP_ELEMENTS = 2**22  # numbers that a vectorised derivative holds at once, about

BinWidths = float | Mapping[str, float | Tensor]
Scales = dict[str, Tensor]  # by layer, each shaped to multiply the layer's weights


@dataclass(frozen=True)
class NoiseRegularizer:
    """Second-order increase of the loss under uniform noise on the weights, in its two halves.

    Attributes
    ----------
    total, per_layer : float, dict of float
        R(Delta) of Eq. 7, the Gauss-Newton half, in units of the loss.
    dropped, dropped_per_layer : float, dict of float
        The residual half, which Eq. 7 drops.
    second_order : float
        Their sum, ``E[L(w + Delta)] - L(w)`` up to fourth order in the bin width.
    standard_error, dropped_standard_error, second_order_standard_error : float
        Of the three totals, over the random projections; 0 where `method` is exact.
    per_layer_standard_error, dropped_per_layer_standard_error : dict of float
    bin_widths : dict of float
        In units of the weights; the root mean square where channels have their own.
    value : float
        ``L(w)``, the loss without noise.
    loss, method, batch_norm : str
    draws, samples : int
        Random projections (0 where exact); samples in the data.
    """

    total: float
    dropped: float
    second_order: float
    standard_error: float
    dropped_standard_error: float
    second_order_standard_error: float
    per_layer: dict[str, float]
    dropped_per_layer: dict[str, float]
    per_layer_standard_error: dict[str, float]
    dropped_per_layer_standard_error: dict[str, float]
    bin_widths: dict[str, float]
    value: float
    loss: str
    method: str
    batch_norm: str
    draws: int
    samples: int

    def __repr__(self) -> str:
        return (
            f"NoiseRegularizer(total={self.total:.4g} ± {self.standard_error:.2g}, "
            f"dropped={self.dropped:.4g} ± {self.dropped_standard_error:.2g}, "
            f"loss={self.loss!r}, value={self.value:.4g}, layers={len(self.per_layer)}, "
            f"method={self.method!r}, draws={self.draws}, samples={self.samples})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a layer: bin width, both halves with standard errors, their sum."""
        frame = pd.DataFrame(
            {
                "bin_width": self.bin_widths,
                "regularizer": self.per_layer,
                "regularizer_standard_error": self.per_layer_standard_error,
                "dropped": self.dropped_per_layer,
                "dropped_standard_error": self.dropped_per_layer_standard_error,
            }
        ).rename_axis("layer")
        return frame.assign(second_order=frame["regularizer"] + frame["dropped"])


def noise_regularizer(
    model: nn.Module,
    data,
    bin_widths: BinWidths | None = None,
    *,
    loss: str = "squared",
    method: str = "auto",
    draws: int = 64,
    batch_norm: str = "frozen",
    batch_size: int = 256,
    seed: int = 0,
) -> NoiseRegularizer:
    """R(Delta) of Eq. 7, per layer and in total, and the half that Eq. 7 drops.

    Losses are summed over the outputs of a sample and averaged over samples: ``|f - y|^2`` without
    a factor one half, or cross-entropy in nats.

    Parameters
    ----------
    model : torch.nn.Module
        From one tensor to one tensor, of shape (samples, outputs) for cross-entropy, (samples, ...)
        for the squared loss. Quantized models are taken at their quantized weights. The model is
        copied, never changed.
    data : Dataset or pair of Tensor
        ``(inputs, targets)``. With outputs (samples, classes), whole-number targets are classes,
        for the squared loss one-hot rows. All are held in memory: of a large set, pass
        ``data.take(indices)``.
    bin_widths : float, or mapping of layer name to float or Tensor; optional
        One number for all linear and convolution layers, or one for each layer named, or a tensor
        with one for each of its output channels. Only the weights of these layers carry noise.
        By default those of a quantized model.
    loss : {"squared", "cross_entropy"}
    method : {"auto", "exact", "projections"}
        "exact" goes through every output of every sample and every weight; "projections" estimates
        both traces from products with `draws` vectors of random signs; "auto" is exact while
        weights times outputs of all samples are at most `EXACT_LIMIT`.
    draws : int
        Number of projections, at least 2.
    batch_norm : {"frozen", "batch"}
        With "frozen" all layers are in evaluation mode. With "batch", batch norm uses the
        statistics of each batch: they move with the noise, and couple the samples of the batch.
    batch_size : int
        Samples evaluated together, in the order given. It changes the result only with
        ``batch_norm="batch"``; with projections, smaller batches have smaller standard errors.
    seed : int
        Of the random signs.

    Returns
    -------
    NoiseRegularizer

    Raises
    ------
    TypeError
        If the data are of another kind.
    ValueError
        For an unknown layer, loss, method or mode; a bin width that is negative or not finite; data
        that are empty or do not match the outputs; a loss that is not finite.

    Notes
    -----
    Where all layers are piecewise linear and batch norm is frozen, automatic differentiation finds
    the dropped half to be zero. The curvature sits in the kinks, which only `noise_response` sees.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import mlp
    >>> model = mlp(64, [8], 10, seed=0)
    >>> found = noise_regularizer(model, load_dataset("digits").test, bin_widths=0.1)
    >>> list(found.per_layer)
    ['1', '3']
    """
    check_choice("method", method, ("auto", "exact", "projections"))
    check_at_least("draws", draws, 2)
    bin_widths = _default("bin_widths", bin_widths, qat.bin_widths(model))
    layers = bin_widths if isinstance(bin_widths, Mapping) else None
    function = weight_function(
        model, data, layers, loss=loss, batch_norm=batch_norm, batch_size=batch_size
    )
    widths = _broadcast_bin_widths(function, bin_widths)
    deviations = {name: width / math.sqrt(12) for name, width in widths.items()}

    if method == "auto":
        work = function.size * sum(f.numel() for f in function.outputs)
        method = "exact" if work <= EXACT_LIMIT else "projections"
    if method == "exact":
        parts = [_exact_gauss_newton(function, deviations), _exact_residual(function, deviations)]
        halves = torch.stack(parts)[None]
    else:
        halves = _projected_halves(function, deviations, draws, seed)

    total, total_error = _mean_and_error(halves.sum(2))
    second_order, second_order_error = _mean_and_error(halves.sum((1, 2)))
    by_layer = [
        dict(zip(function.weights, row, strict=True))
        for row in torch.cat(_mean_and_error(halves)).tolist()
    ]
    return NoiseRegularizer(
        *total.tolist(),
        second_order.item(),
        *total_error.tolist(),
        second_order_error.item(),
        *by_layer,
        bin_widths={name: _root_mean_square(width) for name, width in widths.items()},
        value=function.value,
        loss=loss,
        method=method,
        batch_norm=batch_norm,
        draws=draws if method == "projections" else 0,
        samples=function.samples,
    )


def _exact_gauss_newton(function: WeightFunction, deviations: Scales) -> Tensor:
    """1/2 E tr(J' S S' J Sigma) per layer, from every row of S' J; S S' is the loss's Hessian."""
    total = torch.zeros(len(function.weights), dtype=torch.float64)
    for f, (x, _) in zip(function.outputs, function.batches, strict=True):
        if function.coupled:
            chunk = max(1, _VMAP_ELEMENTS // function.size)
            rows = _squared_rows(function, deviations, x, chunk)
        else:
            chunk = max(1, _VMAP_ELEMENTS // (function.size * f[0].numel()))
            one = lambda sample: _squared_rows(function, deviations, sample[None])  # noqa: E731
            rows = vmap(one, chunk_size=chunk)(x).sum(0)
        total += rows.double().cpu()
    return total / 2 / function.samples


def _squared_rows(
    function: WeightFunction, deviations: Scales, x: Tensor, chunk: int | None = None
) -> Tensor:
    """Squared norms of the rows of S' J of the samples x, weighed by Sigma; shape (layers,)."""
    f, pull_back = vjp(lambda weights: function(weights, x), function.weights)

    def squared_row(u: Tensor) -> Tensor:
        (row,) = pull_back(function.loss.hessian_root(f, u))
        return _squared_norms(row, deviations)

    basis = torch.eye(f.numel(), dtype=f.dtype, device=f.device).view(-1, *f.shape)
    return vmap(squared_row, chunk_size=chunk)(basis).sum(0)


def _exact_residual(function: WeightFunction, deviations: Scales) -> Tensor:
    """1/2 E sum_k slope_k tr(grad^2 f_k Sigma) per layer, from one Hessian product a weight."""
    total = torch.zeros(len(function.weights), dtype=torch.float64)
    for f, (x, y) in zip(function.outputs, function.batches, strict=True):
        residual = _residual(function, f, x, y)
        chunk = max(1, _VMAP_ELEMENTS // (16 * x.numel()))
        for i, name in enumerate(function.weights):
            diagonal = _hessian_diagonal(residual, function.weights, name, chunk)
            total[i] += (diagonal * deviations[name] ** 2).double().sum().cpu()
    return total / 2 / function.samples


def _residual(
    function: WeightFunction, f: Tensor, x: Tensor, y: Tensor
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Outputs weighed by the loss's slope at f, held still: its Hessian is the residual half."""
    slope = function.loss.slope(f, y)
    return lambda weights: (function(weights, x) * slope).sum()


def _hessian_diagonal(
    scalar: Callable[[dict[str, Tensor]], Tensor],
    weights: dict[str, Tensor],
    name: str,
    chunk: int,
) -> Tensor:
    """Diagonal of the Hessian of a scalar in the weights of one layer, in their shape."""
    weight = weights[name]
    position = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    # Reverse over reverse: one graph serves all products. PyTorch's forward over forward mode is
    # wrong for batch and layer norm.
    _, hessian = vjp(grad(lambda layer: scalar({**weights, name: layer})), weight)

    def entry(index: Tensor) -> Tensor:
        unit = (position == index).to(weight.dtype)
        return (unit * hessian(unit)[0]).sum()

    return vmap(entry, chunk_size=chunk)(position.flatten()).view(weight.shape)


def _projected_halves(
    function: WeightFunction, deviations: Scales, draws: int, seed: int
) -> Tensor:
    """Unbiased estimates of both halves per layer, of shape (draws, 2, layers)."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.zeros(draws, 2, len(function.weights), dtype=torch.float64)
    for f, (x, y) in zip(function.outputs, function.batches, strict=True):
        _, hessian = vjp(grad(_residual(function, f, x, y)), function.weights)
        _, pull_back = vjp(lambda weights, x=x: function(weights, x), function.weights)
        for draw in halves:
            (row,) = pull_back(function.loss.hessian_root(f, _signs(f, generator)))
            v = {n: deviations[n] * _signs(w, generator) for n, w in function.weights.items()}
            (product,) = hessian(v)
            draw[0] += _squared_norms(row, deviations).cpu()
            draw[1] += torch.stack([(v[n] * product[n]).sum() for n in v]).cpu()
    return halves / 2 / function.samples


def _squared_norms(row: dict[str, Tensor], deviations: Scales) -> Tensor:
    return torch.stack([(row[name] * deviations[name]).square().sum() for name in row])


@dataclass(frozen=True)
class NoisePenalty:
    """Objective for `qgen_lab.qat.fit`: the loss plus R(Delta) of Eq. 7, in place of noise.

    Of R(Delta) each call takes an unbiased estimate from one pullback of the batch, with one vector
    of random signs a sample, and differentiates it again. As for dropout, signs come from PyTorch's
    global random state, which `fit` seeds.

    Parameters
    ----------
    bin_widths : float, or mapping of layer name to float or Tensor
        As in `noise_regularizer`; a mapping names the layers. Layers have plain weights.
    loss : {"cross_entropy", "squared"}
        As in `noise_regularizer`.
    strength : float
        Factor on R(Delta); 1 is Eq. 7. With 0 only the loss is left.
    relative : bool
        Bin widths in units of the standard deviation of the layer's weights at that moment, which
        is not differentiated. Absolute widths lose their meaning under batch norm, where weights
        can grow at no cost.

    Raises
    ------
    ValueError
        For an unknown loss, or a strength that is negative or not finite. When called, for layers
        that are not there or are quantized, bin widths that are negative or not finite, and
        targets that do not match the outputs.

    Notes
    -----
    With the Jacobian J of all outputs of a batch of N samples, the Hessian ``S S'`` of their summed
    loss in the outputs, and random signs u, ``E |Sigma^(1/2) J' S u|^2 / (2 N)`` is R(Delta). In
    training mode J includes the batch statistics of batch norm.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import Recipe, fit, nin
    >>> model = nin(2, 8, in_channels=1, base_width=1, seed=0)
    >>> penalty = NoisePenalty(0.5, relative=True)
    >>> history = fit(model, load_dataset("digits"), Recipe(epochs=1), objective=penalty)
    """

    bin_widths: BinWidths
    loss: str = "cross_entropy"
    strength: float = 1.0
    relative: bool = False

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength = {self.strength}: must be finite and not negative")

    def __call__(
        self, model: nn.Module, inputs: Tensor, outputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the mean loss of a batch plus `strength` times the estimate, a scalar."""
        loss = LOSSES[self.loss]
        value = loss.value(outputs, fitted_targets(outputs, targets, self.loss)).mean()
        if self.strength == 0:
            return value
        layers = self._layers(model)
        signs = _signs(outputs, None)
        rows = torch.autograd.grad(
            outputs,
            [layer.weight for layer in layers.values()],
            loss.hessian_root(outputs, signs),
            create_graph=True,
        )
        widths = [self._bin_width(name, layer) for name, layer in layers.items()]
        norms = [(row * d).square().sum() for row, d in zip(rows, widths, strict=True)]
        return value + self.strength / (24 * len(outputs)) * torch.stack(norms).sum()

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers whose weights carry noise, shared weights once."""
        available = weight_layers(model)
        named = list(self.bin_widths if isinstance(self.bin_widths, Mapping) else available)
        unknown = [name for name in named if name not in available]
        if unknown or not named:
            raise ValueError(
                f"no layers named {unknown}: linear and convolution layers are {list(available)}"
            )
        if any(parametrize.is_parametrized(available[name]) for name in named):
            raise ValueError("the model's layers are quantized: a penalty is for plain weights")
        once = {id(available[name].weight): name for name in reversed(named)}
        return {name: available[name] for name in reversed(once.values())}

    def _bin_width(self, name: str, layer: nn.Module) -> Tensor:
        """Bin width of a layer, in the units of its weights."""
        weight = layer.weight.detach()
        width = _broadcast_bin_width(name, self.bin_widths, weight, channel_dim(layer))
        return width * weight.std(correction=0) if self.relative else width


@dataclass(frozen=True)
class NoiseResponse:
    """What noise on the weights does to a model, measured by evaluating it.

    Attributes
    ----------
    increase, increase_standard_error : float
        Mean of ``L(w + Delta) - L(w)`` over the draws.
    output_change, output_change_standard_error : float
        How far the outputs move, whatever the targets: mean of ``|f(w + Delta) - f(w)|^2`` for the
        squared loss, of the divergence ``KL(p(w) || p(w + Delta))`` for cross-entropy. To second
        order in the noise this is R(Delta).
    value : float
        ``L(w)``, the loss without noise.
    loss, noise, batch_norm : str
    draws, samples : int
    """

    increase: float
    increase_standard_error: float
    output_change: float
    output_change_standard_error: float
    value: float
    loss: str
    noise: str
    batch_norm: str
    draws: int
    samples: int


@torch.no_grad()
def noise_response(
    model: nn.Module,
    data,
    bin_widths: BinWidths | None = None,
    *,
    noise: str = "uniform",
    delta: Mapping[str, Tensor] | None = None,
    loss: str = "squared",
    draws: int = 200,
    batch_norm: str = "frozen",
    batch_size: int = 4096,
    seed: int = 0,
) -> NoiseResponse:
    """Measure by Monte Carlo how loss and outputs respond to noise on the weights.

    Parameters
    ----------
    model, data, bin_widths, loss, batch_norm, batch_size
        As in `noise_regularizer`. Name one layer in `bin_widths` or `delta` to disturb it alone.
    noise : {"uniform", "delta", "signs"}
        "uniform" is independent noise from ``-bin_width / 2`` to ``bin_width / 2``; "delta" is the
        one disturbance `delta`, as it is; "signs" gives the sizes of `delta` random signs.
    delta : mapping of layer name to Tensor, optional
        By default the noise of a quantized model, ``Delta = w - w_hat``: added to the quantized
        weights, it leads back to the float ones.
    draws : int
        Number of random disturbances, at least 2. Each acts with both signs, so that the first
        order of the loss cancels. Equal seeds give equal draws at all bin widths.
    seed : int

    Returns
    -------
    NoiseResponse

    Raises
    ------
    TypeError, ValueError
        As `noise_regularizer`; and for a `delta` that does not fit its layer.
    """
    check_choice("noise", noise, ("uniform", "delta", "signs"))
    check_at_least("draws", draws, 2)
    if noise == "uniform":
        size = bin_widths = _default("bin_widths", bin_widths, qat.bin_widths(model))
    else:
        size = delta = _default("delta", delta, qat.quantization_noise(model))
    function = weight_function(
        model,
        data,
        size if isinstance(size, Mapping) else None,
        loss=loss,
        batch_norm=batch_norm,
        batch_size=batch_size,
    )
    if noise == "uniform":
        scales, draw = _broadcast_bin_widths(function, bin_widths), _uniform
    else:
        scales, draw = _fitting_delta(function, delta), _signs

    if noise == "delta":
        responses = _response(function, scales)[None]
    else:
        generator = torch.Generator().manual_seed(seed)
        responses = torch.empty(draws, 2, dtype=torch.float64)
        for i in range(draws):
            step = {n: scales[n] * draw(w, generator) for n, w in function.weights.items()}
            back = {n: -disturbance for n, disturbance in step.items()}
            responses[i] = (_response(function, step) + _response(function, back)) / 2

    mean, error = _mean_and_error(responses)
    return NoiseResponse(
        increase=mean[0].item(),
        increase_standard_error=error[0].item(),
        output_change=mean[1].item(),
        output_change_standard_error=error[1].item(),
        value=function.value,
        loss=loss,
        noise=noise,
        batch_norm=batch_norm,
        draws=len(responses),
        samples=function.samples,
    )


def _response(function: WeightFunction, disturbance: dict[str, Tensor]) -> Tensor:
    """Increase of the loss and change of the outputs, both averaged over the samples."""
    disturbed = {name: w + disturbance[name] for name, w in function.weights.items()}
    loss, total = function.loss, torch.zeros(2, dtype=torch.float64)
    for f, (x, y) in zip(function.outputs, function.batches, strict=True):
        g = function(disturbed, x)
        total[0] += (loss.value(g, y).double() - loss.value(f, y).double()).sum().cpu()
        total[1] += loss.change(f, g).double().sum().cpu()
    return total / function.samples


def _mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and its standard error; a single draw is exact."""
    if len(draws) == 1:
        return draws[0], torch.zeros_like(draws[0])
    return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent numbers from -1/2 to 1/2, drawn on the CPU: the same on every device."""
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5).to(like)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2.0 * torch.randint(2, like.shape, generator=generator) - 1.0).to(like)


def _root_mean_square(width: Tensor) -> float:
    return width.square().mean().sqrt().item()


def _default(argument: str, given, of_quantized: Mapping[str, Tensor]):
    """What is given, or else what the quantizers of the model say."""
    if given is None and not of_quantized:
        raise ValueError(f"{argument} = None needs a quantized model: give {argument}")
    return of_quantized if given is None else given


def _broadcast_bin_widths(function: WeightFunction, bin_widths: BinWidths) -> Scales:
    """Bin width of each layer, shaped to multiply its weights."""
    return {
        name: _broadcast_bin_width(name, bin_widths, weight, function.channel_dim(name))
        for name, weight in function.weights.items()
    }


def _broadcast_bin_width(name: str, bin_widths: BinWidths, weight: Tensor, channels: int) -> Tensor:
    """Bin width of one layer, whose dimension `channels` counts its output channels."""
    given = bin_widths[name] if isinstance(bin_widths, Mapping) else bin_widths
    width = torch.as_tensor(given, dtype=weight.dtype, device=weight.device).detach()
    if not bool(((width >= 0) & width.isfinite()).all()):
        raise ValueError(f"bin_widths[{name!r}] = {given}: must be finite and not negative")
    if width.dim() == 1 and len(width) == weight.shape[channels]:
        width = width.view([-1 if i == channels else 1 for i in range(weight.dim())])
    elif width.dim():
        raise ValueError(
            f"bin_widths[{name!r}] has shape {tuple(width.shape)}: give one number, or one for "
            f"each of the {weight.shape[channels]} output channels"
        )
    return width


def _fitting_delta(function: WeightFunction, delta: Mapping[str, Tensor]) -> Scales:
    for name, weight in function.weights.items():
        if delta[name].shape != weight.shape or not bool(delta[name].isfinite().all()):
            raise ValueError(
                f"delta[{name!r}] of shape {tuple(delta[name].shape)} must be finite, with the "
                f"shape of the weights, {tuple(weight.shape)}"
            )
    return {name: delta[name].detach().to(w) for name, w in function.weights.items()}
