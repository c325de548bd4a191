"""Rounding a finished layer: few-bit weights whose outputs stay close to the float layer's.

A layer turns an input `x` into `W x`. Over the data, the squared output error of rounded weights
`V` is a sum over the rows `(v - w)' G (v - w)`, with the Gram matrix `G` of the inputs: one
discrete least-squares problem an output, all with the same matrix. `methods` are procedures that
look for a good `V`, each for all rows at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qgen_lab.codebooks import Codebook

__all__ = ["LayerProblem", "RoundedLayer", "methods", "round_layer"]


@dataclass(frozen=True, eq=False, repr=False)
class RoundedLayer:
    """What `round_layer` found.

    Attributes
    ----------
    weight : Tensor
        The rounded weights, in the shape, dtype and on the device of the float ones.
    output_error : float
        Squared output error over the data, relative to the squared outputs of the float weights.
    nearest_error : float
        The same for rounding to the nearest level.
    row_errors : Tensor, shape (outputs,)
        Squared output error of each output, in the units of `gram`, float64.
    method : str
        How they were found.
    seconds : float
        Wall time.
    """

    weight: Tensor
    output_error: float
    nearest_error: float
    row_errors: Tensor
    method: str
    seconds: float

    def __repr__(self) -> str:
        return (
            f"RoundedLayer(shape={tuple(self.weight.shape)}, method={self.method!r}, "
            f"output_error={self.output_error:.3g}, nearest_error={self.nearest_error:.3g}, "
            f"seconds={self.seconds:.2g})"
        )


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Float weights of a layer, the Gram matrix of its inputs, and the levels; all float64.

    Attributes
    ----------
    weight : Tensor, shape (outputs, inputs)
        Float weights.
    gram : Tensor, shape (inputs, inputs)
        Symmetric, without negative eigenvalues.
    levels : Tensor, shape (1, K) or (outputs, K)
        Ascending levels, for all rows or for each.
    """

    weight: Tensor
    gram: Tensor
    levels: Tensor

    @cached_property
    def thresholds(self) -> Tensor:
        """Midpoints between neighbouring levels."""
        return self.levels[:, 1:] / 2 + self.levels[:, :-1] / 2

    def nearest(self, target: Tensor) -> Tensor:
        """Nearest level of each entry, shape (outputs, any); at a threshold the lower one."""
        target = target.contiguous()
        if len(self.levels) == 1:
            return self.levels[0].take(torch.bucketize(target, self.thresholds[0]))
        return self.levels.gather(1, torch.searchsorted(self.thresholds, target))

    def error(self, rounded: Tensor) -> Tensor:
        """Squared output error of each row, shape (outputs,)."""
        change = rounded - self.weight
        return ((change @ self.gram) * change).sum(1)


def nearest(problem: LayerProblem, start: Tensor) -> Tensor:
    """Round `start` to the nearest levels: the best there is where inputs are isotropic."""
    return problem.nearest(start)


def compensated(problem: LayerProblem, start: Tensor, damping: float = 0.01) -> Tensor:
    """Round column by column, and refit the columns still to come after each.

    GPTQ (Frantar et al. 2023, arXiv 2210.17323), columns ordered by the diagonal of `G`, the
    largest first.

    Parameters
    ----------
    problem : LayerProblem
        What to round.
    start : Tensor, shape (outputs, inputs)
        Weights to round: the float ones.
    damping : float
        Added to the diagonal of `G`, as a share of its mean.
    """
    order = problem.gram.diagonal().argsort(descending=True, stable=True)
    gram = problem.gram[order][:, order].clone()
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1)
    gram.diagonal()[gram.diagonal() == 0] = mean  # a dead input: any value does
    gram.diagonal().add_(damping * mean)
    # Row j of the factor says how the columns after j answer to the rounding of column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    answer = torch.linalg.cholesky(inverse, upper=True)
    target = start[:, order]
    rounded = torch.empty_like(target)
    for j in range(target.shape[1]):
        rounded[:, j : j + 1] = problem.nearest(target[:, j : j + 1])
        miss = (target[:, j] - rounded[:, j]) / answer[j, j]
        target[:, j + 1 :].addr_(miss, answer[j, j + 1 :], alpha=-1)
    return rounded[:, order.argsort()]


def coordinate(
    problem: LayerProblem, start: Tensor, sweeps: int = 50, greedy: bool = False
) -> Tensor:
    """Coordinate descent: a weight goes to its best level while the others are held.

    Parameters
    ----------
    problem : LayerProblem
        What to round.
    start : Tensor, shape (outputs, inputs)
        Weights whose nearest levels are the beginning.
    sweeps : int
        At most so many moves of each weight; it ends where no move makes the error smaller.
    greedy : bool
        Move in each row the weight that gains most (CDQuant, arXiv 2406.17542), in place of one
        column after the other.
    """
    rounded = problem.nearest(start)
    curvature = problem.gram.diagonal()
    slope = (rounded - problem.weight) @ problem.gram
    visit = _visit_best if greedy else _visit_in_turn
    for _ in range(sweeps):
        if not visit(problem, rounded, slope, curvature):
            break
    return rounded


def _visit_in_turn(problem, rounded, slope, curvature) -> bool:
    """Give every column its turn; whether anything moved."""
    any_moved = False
    for j in curvature.nonzero().flatten().tolist():
        column = slice(j, j + 1)
        move, gain = _best_moves(problem, rounded, slope, curvature, column)
        move = torch.where(gain > 0, move, 0)
        if move.any():
            rounded[:, column] += move
            slope.addr_(move[:, 0], problem.gram[j])
            any_moved = True
    return any_moved


def _visit_best(problem, rounded, slope, curvature) -> bool:
    """Make, in each row, the best move, as often as there are columns; whether anything moved."""
    row = torch.arange(len(rounded), device=rounded.device)
    for visit in range(rounded.shape[1]):
        move, gain = _best_moves(problem, rounded, slope, curvature, slice(None))
        column = gain.argmax(1)
        move = torch.where(gain[row, column] > 0, move[row, column], 0)
        if not move.any():
            return visit > 0
        rounded[row, column] += move
        slope += move[:, None] * problem.gram[column]
    return True


def _best_moves(problem, rounded, slope, curvature, columns) -> tuple[Tensor, Tensor]:
    """Move of each weight to its best level, and by how much it lowers the error.

    Gains that rounding errors could feign count as none, so that the descent comes to an end.
    """
    here, slope, curvature = rounded[:, columns], slope[:, columns], curvature[columns]
    safe = torch.where(curvature > 0, curvature, 1)
    move = problem.nearest(here - slope / safe) - here
    gain = -move * (2 * slope + curvature * move)
    feigned = 1e-12 * curvature * (here.square() + move.square())
    return move, torch.where(gain > feigned, gain, 0)


def cooled(
    problem: LayerProblem,
    start: Tensor,
    power: float = 4.0,
    steps: int = 400,
    constant_steps: int = 400,
    rates: tuple[float, ...] = (1.9, 1.0, 0.5),
    reheats: int = 1,
) -> Tensor:
    """Straight-through descent with a rate that is cooled to zero by a power.

    Latent weights go down the slope of the error at their nearest levels, each scaled by the
    diagonal of `G`. The rate is constant until slow directions have settled, then falls to zero:
    the surest weights freeze first, and the others make up for them. Every row is a problem of its
    own and keeps the best levels on its way, over a few descents that differ in their rate; each is
    heated up again from there.

    Parameters
    ----------
    problem : LayerProblem
        What to round.
    start : Tensor, shape (outputs, inputs)
        Latent weights to begin with.
    power : float
        The rate falls as `(1 - t / steps)**power`.
    steps, constant_steps : int
        Steps while it falls, and before.
    rates : tuple of float
        First rate of each descent, in units of one over the largest eigenvalue of the scaled `G`;
        below 2, where descent on the float weights becomes unstable.
    reheats : int
        How often the rate falls again, each time from the best levels so far.
    """
    curvature = problem.gram.diagonal()
    curvature = torch.where(curvature > 0, curvature, 1)
    scale = curvature.rsqrt()
    largest = _largest_eigenvalue(scale[:, None] * problem.gram * scale)
    rate = problem.gram.new_tensor(rates)[:, None] / (largest * curvature)
    # Products in float32. Latent weights in float64: late steps are far below float32's spacing.
    gram, weight = problem.gram.float(), problem.weight[:, None]
    latent = start[:, None].repeat(1, len(rates), 1)  # (outputs, rates, inputs)
    best = torch.empty_like(latent)
    least = gram.new_full(latent.shape[:2], torch.inf)
    constant, falling = [1.0] * constant_steps, [(1 - t / steps) ** power for t in range(steps)]
    for factors in [constant + falling] + [falling] * reheats:
        for factor in [*factors, 0.0]:
            rounded = problem.nearest(latent.flatten(1)).view_as(latent)
            change = (rounded - weight).float()
            slope = change @ gram
            error = (change * slope).sum(-1)
            better = error < least
            best[better], least[better] = rounded[better], error[better]
            latent.sub_(rate * slope, alpha=factor)
        latent = best.clone()
    errors = torch.stack([problem.error(answer) for answer in best.unbind(1)], 1)
    return best[torch.arange(len(best), device=best.device), errors.argmin(1)]


def _largest_eigenvalue(matrix: Tensor, rounds: int = 100) -> Tensor:
    """Largest eigenvalue, up to some percent, by the power method."""
    vector = matrix.diagonal() + matrix.sum(0).abs()
    vector = vector / vector.norm()
    for _ in range(rounds):
        vector = matrix @ vector
        vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
    return (vector @ matrix @ vector).clamp(min=torch.finfo(vector.dtype).tiny)


# Procedures by name: `(problem, start, **options)` to rounded weights.
methods: dict[str, Callable[..., Tensor]] = {
    "nearest": nearest,
    "compensated": compensated,
    "coordinate": coordinate,
    "cooled": cooled,
}


@torch.no_grad()
def round_layer(
    weight: Tensor,
    gram: Tensor,
    codebook: Codebook | Tensor,
    method: str = "cooled",
    *,
    start: Tensor | None = None,
    polish: bool = False,
    **options,
) -> RoundedLayer:
    """Round the weights of one layer so that its outputs change little.

    Every method is deterministic, works on all outputs at once, and keeps, output by output, what
    rounding to the nearest level gives where that is better.

    Parameters
    ----------
    weight : Tensor, shape (outputs, ...)
        Float weights of a linear layer or a convolution.
    gram : Tensor, shape (inputs, inputs) or (groups, inputs, inputs)
        From `second_moments`; `inputs` are the weights of one output. With groups, each serves an
        equal block of outputs.
    codebook : Codebook, or Tensor of shape (outputs, K)
        The levels, in units of the weights; or ascending levels for each output.
    method : str
        A name in `methods`.
    start : Tensor, shape of `weight`, optional
        Where the method begins, such as another method's answer; by default the float weights.
    polish : bool
        Whether cyclic coordinate descent follows.
    **options
        Of the method.

    Returns
    -------
    RoundedLayer

    Raises
    ------
    ValueError
        If the method is not known; if `weight` or `gram` hold values that are not finite, or their
        shapes do not fit; if `gram` is not symmetric or has a negative diagonal.

    Examples
    --------
    >>> import torch
    >>> from qgen_lab.codebooks import uniform
    >>> inputs = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> round_layer(torch.tensor([[0.4, 0.3]]), inputs, uniform(1, 0.5)).weight
    tensor([[0.5000, 0.5000]])
    """
    if method not in methods:
        raise ValueError(f"method={method!r} is not known; the names are: {', '.join(methods)}")
    started = time.perf_counter()
    problems = _problems(weight, gram, codebook)
    first = torch.cat([problem.weight for problem in problems])
    if start is not None:
        if start.shape != weight.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}: give {tuple(weight.shape)}")
        first = start.detach().to(first).reshape(first.shape)
    found, errors, plain_errors = [], [], []
    for problem, begin in zip(problems, first.chunk(len(problems)), strict=True):
        plain = problem.nearest(problem.weight)
        rounded = methods[method](problem, begin, **options)
        if polish:
            rounded = coordinate(problem, rounded)
        error, plain_error = problem.error(rounded), problem.error(plain)
        found.append(torch.where((error < plain_error)[:, None], rounded, plain))
        errors.append(torch.minimum(error, plain_error))
        plain_errors.append(plain_error)
    outputs = sum(((p.weight @ p.gram) * p.weight).sum() for p in problems)
    outputs = outputs.clamp(min=torch.finfo(outputs.dtype).tiny)
    return RoundedLayer(
        weight=torch.cat(found).reshape(weight.shape).to(weight),
        output_error=(torch.cat(errors).sum() / outputs).item(),
        nearest_error=(torch.cat(plain_errors).sum() / outputs).item(),
        row_errors=torch.cat(errors),
        method=f"{method} + coordinate" if polish else method,
        seconds=time.perf_counter() - started,
    )


def _problems(weight: Tensor, gram: Tensor, codebook: Codebook | Tensor) -> list[LayerProblem]:
    """One problem for each group of a convolution; one in all without groups."""
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give (outputs, inputs, ...)")
    rows = weight.detach().double().flatten(1)
    grams = gram.detach().to(rows).reshape(-1, *gram.shape[-2:])
    if gram.dim() not in (2, 3) or grams.shape[1:] != (rows.shape[1],) * 2:
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}: an output of weight {tuple(weight.shape)} has "
            f"{rows.shape[1]} inputs, so give ({rows.shape[1]}, {rows.shape[1]})"
        )
    if len(rows) % len(grams):
        raise ValueError(f"{len(rows)} outputs do not fall into {len(grams)} equal groups")
    if not rows.isfinite().all() or not grams.isfinite().all():
        raise ValueError("weight or gram holds values that are not finite")
    largest = grams.abs().amax()
    if (grams - grams.mT).abs().amax() > 1e-6 * largest:
        raise ValueError("gram is not symmetric: give the sum of x x' over the inputs x")
    if grams.diagonal(dim1=-2, dim2=-1).amin() < 0:
        raise ValueError("gram has a negative diagonal: give the sum of x x' over the inputs x")
    is_codebook = isinstance(codebook, Codebook)
    levels = (torch.tensor(codebook.levels) if is_codebook else codebook.detach()).to(rows)
    levels = levels.reshape(-1, levels.shape[-1])
    if len(levels) not in (1, len(rows)) or not (levels.diff(dim=1) > 0).all():
        raise ValueError(
            f"codebook has levels of shape {tuple(levels.shape)}: give ascending levels for all "
            f"outputs, or for each of the {len(rows)}"
        )
    each = levels.expand(len(rows), -1) if len(levels) > 1 else levels.expand(len(grams), -1)
    parts = zip(rows.chunk(len(grams)), (grams + grams.mT) / 2, each.chunk(len(grams)), strict=True)
    return [LayerProblem(*part) for part in parts]
