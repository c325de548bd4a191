"""Straight-through descent on an instance: the training that `straight_through` has the limit of.

Latent weights `u` move along the gradient of the energy at the quantized weights,

    u -= rate * (X' (X w - y) + ridge w + latent_decay u),    w = the levels nearest to u.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.problem import Instance, TeacherStudent, checked_number

_ADAM_DECAY = (0.9, 0.999)  # of the running means of gradient and squared gradient
_ADAM_FLOOR = 1e-8


@dataclass(frozen=True)
class Descent:
    """A run of straight-through descent; arrays of weights have the shape of `start`, (..., N).

    Attributes
    ----------
    weights, latent : ndarray, shape (..., N)
        Quantized and latent weights after the last step.
    average : ndarray, shape (..., N)
        Mean of the quantized weights over the steps from `average_from` on.
    rounded : ndarray, shape (..., N)
        `average` rounded to the codebook.
    last_change : ndarray of int, shape (..., N)
        The last step that moved the quantized weight, counted from 1; 0 if none did.
    step : ndarray of int, shape (R,)
        Steps made when a record was taken.
    gen_error, train_error, energy : ndarray, shape (R, ...)
        Of the quantized weights: generalization error, `|y - X w|^2` per sample, and
        `|y - X w|^2 / 2 + ridge |w|^2 / 2` per weight.
    flip_share : ndarray, shape (R, ...)
        Share of the quantized weights that a step moves, averaged over the steps since the
        record before; NaN in a record before the first step.
    """

    weights: NDArray[np.float64]
    latent: NDArray[np.float64]
    average: NDArray[np.float64]
    rounded: NDArray[np.float64]
    last_change: NDArray[np.int64]
    step: NDArray[np.int64]
    gen_error: NDArray[np.float64]
    train_error: NDArray[np.float64]
    energy: NDArray[np.float64]
    flip_share: NDArray[np.float64]

    def to_frame(self) -> pd.DataFrame:
        """The trajectory: one row a record and run, one column a quantity."""
        shape = self.gen_error.shape
        columns = {"step": np.broadcast_to(self.step.reshape(-1, *[1] * (len(shape) - 1)), shape)}
        if len(shape) > 1:
            columns["run"] = np.broadcast_to(np.arange(shape[1]), shape)
        for name in ("gen_error", "train_error", "energy", "flip_share"):
            columns[name] = getattr(self, name)
        return pd.DataFrame({name: column.ravel() for name, column in columns.items()})

    def __repr__(self) -> str:
        runs = f"{len(self.weights)} runs of " if self.weights.ndim > 1 else ""
        return f"Descent({runs}{self.weights.shape[-1]} weights, {len(self.step)} records)"


def straight_through_descent(
    instance: Instance,
    problem: TeacherStudent,
    rates: ArrayLike,
    *,
    latent_decay: float = 0.0,
    batch_size: int | None = None,
    optimizer: str = "gradient",
    momentum: float = 0.9,
    masked: bool = False,
    start: ArrayLike | None = None,
    record_at: ArrayLike | None = None,
    average_from: int | None = None,
    seed: int | np.random.Generator = 0,
    allow_unstable: bool = False,
) -> Descent:
    """Train quantized weights by straight-through gradient descent on the squared error.

    Parameters
    ----------
    instance : Instance
        Inputs, labels and teacher.
    problem : TeacherStudent
        Gives the codebook and the ridge, which acts on the quantized weights.
    rates : array_like, shape (steps,)
        Learning rate of every step, at least 0; `qgen_lab.theory.schedules` has the usual ones.
    latent_decay : float
        Weight decay on the latent weights, at least 0.
    batch_size : int, optional
        Samples a step, drawn anew without replacement in every pass over the data; the gradient
        is scaled to that of all samples. All samples by default.
    optimizer : {"gradient", "momentum", "adam"}
        Plain descent, heavy ball, or Adam.
    momentum : float
        Share of the velocity that "momentum" keeps, from 0 up to 1.
    masked : bool
        Whether the error's gradient is set to zero where the latent weight is beyond the range.
    start : array_like, shape (N,) or (runs, N), optional
        Latent weights to start from, zero by default; several rows are several runs.
    record_at : array_like of int, optional
        Numbers of steps made at which to record, 0 to `steps`; the end by default.
    average_from : int, optional
        Number of steps made from which the quantized weights are averaged; half by default.
    seed : int or numpy.random.Generator
        Draws the batches.
    allow_unstable : bool
        Go on where a rate is beyond `largest_stable_rate`.

    Returns
    -------
    Descent
        Final weights, averages and the records.

    Raises
    ------
    TypeError
        If a number is not a real number.
    ValueError
        If shapes do not match, a number is outside its range, inputs are not finite, or a rate
        is beyond `largest_stable_rate` and `allow_unstable` is not set (never with "adam").

    Notes
    -----
    Straight-through gradients: Bengio, Léonard and Courville, 2013, arXiv:1308.3432. With all
    samples and many steps `X' X` is formed once, which makes a step one product instead of two.
    """
    X, y = _checked_data(instance)
    rates = _checked_rates(rates)
    decay = checked_number("latent_decay", latent_decay)
    direction = _optimizer(optimizer, momentum)
    if optimizer != "adam" and not allow_unstable:
        _check_stability(instance, problem, rates.max(), decay, optimizer, momentum)
    steps, n = rates.size, X.shape[1]
    start = np.zeros(n) if start is None else np.asarray(start, dtype=np.float64)
    if start.ndim not in (1, 2) or start.shape[-1] != n or not np.isfinite(start).all():
        raise ValueError(
            f"start has shape {start.shape}: give finite numbers of shape ({n},) or (runs, {n})"
        )
    average_from = steps // 2 if average_from is None else average_from
    if not 0 <= average_from <= steps:
        raise ValueError(f"average_from = {average_from!r}: give a number from 0 to {steps}")
    recorder = _Recorder(instance, problem, steps, record_at)
    gradient = _gradient(X, y, batch_size, steps, start.size // n, seed)

    lowest, highest = problem.codebook.levels[[0, -1]]
    state = _State(problem.codebook, np.atleast_2d(start))
    total = np.zeros_like(state.weights)
    for step in range(steps + 1):
        if step >= average_from:
            total += state.weights
        recorder.visit(step, state)
        if step == steps:
            break
        push = gradient(state.weights)
        if problem.ridge > 0:
            push += problem.ridge * state.weights
        if masked:
            latent = state.latent()
            push[(latent < lowest) | (latent > highest)] = 0.0
        if decay > 0:
            push += decay * state.latent()
        state.move(rates[step], direction(push))
    average = total / (steps + 1 - average_from)
    arrays = {
        "weights": state.weights,
        "latent": state.latent(),
        "average": average,
        "rounded": problem.codebook.quantize(average),
        "last_change": state.last_change,
    }
    if start.ndim == 1:
        arrays = {name: array[0] for name, array in arrays.items()}
    return Descent(**arrays, **recorder.columns(one_run=start.ndim == 1))


class _State:
    """Latent weights, each as a threshold plus an offset, and the quantized weights.

    In a cooldown offsets fall with the rate, far below the rounding of the latent weight itself:
    as plain numbers, latent weights would stop moving long before the rate is zero.
    """

    def __init__(self, codebook: Codebook, start: NDArray):
        self.levels, self.thresholds = codebook.levels, codebook.thresholds
        # Gap k lies between levels k and k + 1; the outer two go on for ever.
        self.gap = np.searchsorted(codebook.levels[1:-1], start)
        self.offset = start - codebook.thresholds[self.gap]
        code = codebook.code(start)
        tie = self.offset == 0
        self.offset[tie] = np.where(code > self.gap, 1.0, -1.0)[tie] * np.finfo(np.float64).tiny
        self.weights = codebook.levels[code]
        self.last_change = np.zeros(start.shape, np.int64)
        self.flips = np.zeros(len(start), np.int64)
        self.step = 0

    def latent(self) -> NDArray[np.float64]:
        return self.thresholds[self.gap] + self.offset

    def move(self, rate: float, direction: NDArray) -> None:
        self.step += 1
        _move(
            rate, direction, self.levels, self.thresholds, self.step,
            self.gap, self.offset, self.weights, self.last_change, self.flips,
        )  # fmt: skip


@numba.njit(cache=True)
def _move(
    rate, direction, levels, thresholds, step, gap, offset, weights, last_change, flips
):  # fmt: skip
    """One step: new offsets and gaps, rounding, and who changed."""
    last_gap = thresholds.size - 1
    for run in range(offset.shape[0]):
        for i in range(offset.shape[1]):
            k, x = gap[run, i], offset[run, i] - rate * direction[run, i]
            while k > 0 and x < levels[k] - thresholds[k]:
                x += thresholds[k] - thresholds[k - 1]
                k -= 1
            while k < last_gap and x > levels[k + 1] - thresholds[k]:
                x -= thresholds[k + 1] - thresholds[k]
                k += 1
            gap[run, i], offset[run, i] = k, x
            weight = levels[k + 1] if x > 0 else levels[k]
            if weight != weights[run, i]:
                weights[run, i] = weight
                last_change[run, i] = step
                flips[run] += 1


def largest_stable_rate(
    instance: Instance,
    problem: TeacherStudent,
    latent_decay: float = 0.0,
    momentum: float = 0.0,
) -> float:
    """Learning rate beyond which descent with the full gradient is linearly unstable.

    `2 (1 + momentum) / (largest eigenvalue of X' X + ridge + latent_decay)`: beyond it weights on
    fine levels would oscillate with a growing amplitude along the stiffest direction.
    """
    X, _ = _checked_data(instance)
    n = X.shape[1]
    if n < 10:
        largest = np.linalg.norm(X, 2) ** 2
    else:
        square = LinearOperator((n, n), matvec=lambda v: X.T @ (X @ v), dtype=np.float64)
        largest = eigsh(square, k=1, tol=1e-6, v0=np.ones(n), return_eigenvectors=False)[0]
    return float(2 * (1 + momentum) / (largest + problem.ridge + latent_decay))


def _check_stability(instance, problem, rate, decay, optimizer, momentum) -> None:
    kept = momentum if optimizer == "momentum" else 0.0
    bound = largest_stable_rate(instance, problem, decay, kept)
    if rate >= bound:
        raise ValueError(
            f"rates reach {rate:.4g}: descent is linearly unstable from {bound:.4g} on; give"
            " smaller rates, or allow_unstable=True to go on anyway"
        )


def _checked_data(instance: Instance) -> tuple[NDArray, NDArray]:
    X, y = instance.X, instance.y
    if X.ndim != 2 or y.shape != X.shape[:1] or instance.teacher.shape != X.shape[1:]:
        raise ValueError(
            f"instance has X {X.shape}, y {y.shape} and teacher {instance.teacher.shape}: give"
            " shapes (M, N), (M,) and (N,)"
        )
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        raise ValueError("instance holds NaN or infinity in X or y: remove or replace them")
    return X, y


def _checked_rates(rates: ArrayLike) -> NDArray[np.float64]:
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 1 or rates.size == 0 or not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError(
            f"rates has shape {rates.shape}: give a list of finite numbers >= 0, one a step"
        )
    return rates


def _gradient(
    X: NDArray, y: NDArray, batch_size: int | None, steps: int, runs: int, seed
) -> Callable[[NDArray], NDArray]:
    """The error's gradient `X' (X w - y)` as a function of w, shape (runs, N)."""
    samples, n = X.shape
    if batch_size is not None and not 1 <= batch_size <= samples:
        raise ValueError(f"batch_size = {batch_size!r}: give a number from 1 to {samples}")
    if batch_size is not None and batch_size < samples:
        batches = _batches(samples, int(batch_size), np.random.default_rng(seed))

        def of_batch(w):
            rows = next(batches)
            part = X[rows]
            return (w @ part.T - y[rows]) @ part * (samples / len(rows))

        return of_batch
    # Forming X' X costs n products with X, at a matrix product's speed: for one run, whose vectors
    # wait for memory, five times faster. Afterwards each step saves two and costs one with it.
    speed = 5 if runs == 1 else 1
    if steps * runs * (2 * samples - n) * speed > samples * n:
        gram, target = X.T @ X, X.T @ y
        return lambda w: w @ gram - target
    if runs == 1:  # two products with a vector, which a matrix of one row is slower at
        return lambda w: ((X @ w[0] - y) @ X)[None]
    return lambda w: (w @ X.T - y) @ X


def _batches(samples: int, size: int, rng: np.random.Generator):
    """Rows of one batch after the other; a pass drops what does not fill a batch."""
    while True:
        order = rng.permutation(samples)
        for first in range(0, samples - size + 1, size):
            yield order[first : first + size]


def _optimizer(name: str, momentum: float) -> Callable[[NDArray], NDArray]:
    """The direction of a step as a function of its gradient; keeps the state between steps."""
    if name == "gradient":
        return lambda gradient: gradient
    if name == "momentum":
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum!r}: give a number from 0 up to 1")
        return _heavy_ball(momentum)
    if name == "adam":
        return _adam()
    raise ValueError(f"optimizer = {name!r}: give 'gradient', 'momentum' or 'adam'")


def _heavy_ball(momentum: float) -> Callable[[NDArray], NDArray]:
    velocity = 0.0

    def direction(gradient):
        nonlocal velocity
        velocity = momentum * velocity + gradient
        return velocity

    return direction


def _adam() -> Callable[[NDArray], NDArray]:
    first_decay, second_decay = _ADAM_DECAY
    step, first, second = 0, 0.0, 0.0

    def direction(gradient):
        nonlocal step, first, second
        step += 1
        first = first_decay * first + (1 - first_decay) * gradient
        second = second_decay * second + (1 - second_decay) * gradient**2
        mean, square = first / (1 - first_decay**step), second / (1 - second_decay**step)
        return mean / (np.sqrt(square) + _ADAM_FLOOR)

    return direction


class _Recorder:
    """Takes records of the quantized weights at the steps asked for."""

    def __init__(self, instance, problem, steps, record_at):
        asked = [steps] if record_at is None else record_at
        self.at = np.unique(np.asarray(asked, dtype=np.int64))
        if self.at.size == 0 or self.at[0] < 0 or self.at[-1] > steps:
            raise ValueError(f"record_at = {record_at!r}: give numbers of steps from 0 to {steps}")
        self.instance, self.ridge = instance, problem.ridge
        self.pending = set(self.at.tolist())
        self.flips, self.last = 0, 0
        self.rows = []

    def visit(self, step: int, state: _State) -> None:
        if step not in self.pending:
            return
        weights = state.weights
        n = weights.shape[-1]
        squared = np.square(weights @ self.instance.X.T - self.instance.y)
        energy = (squared.sum(axis=-1) + self.ridge * np.square(weights).sum(axis=-1)) / (2 * n)
        flips = (state.flips - self.flips) / n / (step - self.last) if step else energy * np.nan
        self.rows.append((self.instance.gen_error(weights), squared.mean(axis=-1), energy, flips))
        self.flips, self.last = state.flips.copy(), step

    def columns(self, one_run: bool) -> dict[str, NDArray]:
        names = ("gen_error", "train_error", "energy", "flip_share")
        columns = np.moveaxis(np.array(self.rows), 1, 0)  # quantity, record, run
        if one_run:
            columns = columns[:, :, 0]
        return {"step": self.at} | dict(zip(names, columns, strict=True))
