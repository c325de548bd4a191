"""LSQ's arithmetic on the CPU: one pass over the weights per direction, into memory that is kept.

A quantizer is bound by memory traffic, and a fresh large array costs ten times its arithmetic in
page faults. So each direction is one compiled loop that writes into arrays used again.
"""

import threading
import weakref

import numba
import numpy as np
import torch
from torch import Tensor

# Sums may be reordered, so that they vectorise; nothing else is relaxed.
compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})


_SIGNS = (-1, 1)


class _Slot:
    """Memory that stays, in the shape of `tensor`, and a weak reference to what was lent of it."""

    def __init__(self, tensor: Tensor):
        self.like = tensor.shape, tensor.stride()
        self.memory = torch.empty(tensor.numel()).numpy()  # torch aligns it for vector loads
        strides = [stride * self.memory.itemsize for stride in tensor.stride()]
        self.array = np.ndarray(tuple(tensor.shape), np.float32, self.memory, strides=strides)

    def lend(self) -> Tensor:
        view = self.array.view()
        self.loan = weakref.ref(view)
        return torch.from_numpy(view)  # holds the view as long as anyone holds its storage


class Pool:
    """Memory for the results of one layer, lent again once nothing refers to it.

    A saved graph, a view or a gradient keeps its loan, so no live value is ever overwritten. One
    training step needs two slots; `kept` is the most that stay.
    """

    kept = 4

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def empty_like(self, tensor: Tensor) -> tuple[Tensor, np.ndarray]:
        """Return a float32 tensor laid out as a dense `tensor`, not filled, and its flat memory."""
        with self._lock:
            slot = next((slot for slot in self._slots if slot.loan() is None), None)
            if slot is None or slot.like != (tensor.shape, tensor.stride()):
                outgrown, slot = slot, _Slot(tensor)
                self._slots = [s for s in self._slots if s is not outgrown]
                if len(self._slots) < self.kept:
                    self._slots.append(slot)
            return slot.lend(), slot.memory

    def __reduce__(self):
        return Pool, ()  # a copy starts with no memory of its own


def plain(tensor: Tensor) -> bool:
    """Whether `tensor` is float32 numbers in the CPU's memory."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def dense(tensor: Tensor) -> bool:
    """Whether `tensor` fills its memory without gaps, output channels first."""
    return _memory_format(tensor) is not None


def being_transformed() -> bool:
    """Whether a transform of `torch.func`, or the compiler, is tracing the operations."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def quantize(weight: Tensor, step: Tensor, low: int, high: int, pool: Pool) -> Tensor:
    """Return `step * round(clip(weight / step))`, for the codes -1 and 1 `step * sign(weight)`.

    Parameters
    ----------
    weight : Tensor
        Plain and dense.
    step : Tensor
        Shape `()`, or `(steps,)`: as many runs of weights, equally long, have a step each.
    low, high : int
        Lowest and highest code; -1 and 1 stand for the two signs, without a zero.
    pool : Pool
        Where the memory of the result comes from.
    """
    result, memory = pool.empty_like(weight)
    loop = _sign if (low, high) == _SIGNS else _round
    loop(flat(weight), flat(step), low, high, memory)
    return result


def gradients(
    weight: Tensor, step: Tensor, low: int, high: int, grad: Tensor, scale: float, pool: Pool
) -> tuple[Tensor, Tensor]:
    """Return the gradients to the weights and to the step.

    Parameters
    ----------
    weight, step, low, high, pool
        As for `quantize`.
    grad : Tensor
        Gradient to the quantized weights, plain; never written to, since others may read it.
    scale : float
        Factor of the step's gradient.
    """
    grad = grad.contiguous(memory_format=_memory_format(weight))
    for_step = np.empty(step.numel(), np.float32)
    grad_step = torch.from_numpy(for_step).view(step.shape)
    if (low, high) == _SIGNS:
        _sign_gradient(flat(weight), flat(grad), scale, for_step)
        return grad, grad_step
    grad_weight, memory = pool.empty_like(weight)
    _round_gradients(flat(weight), flat(step), low, high, flat(grad), scale, memory, for_step)
    return grad_weight, grad_step


def nearest(weight: Tensor, levels: Tensor, pool: Pool) -> Tensor:
    """Return the nearest level of each weight, ties to the level of even index.

    Parameters
    ----------
    weight : Tensor
        Plain and dense.
    levels : Tensor
        Ascending, float64, shape `(steps, levels)`: as many runs of weights, equally long, have
        levels of their own.
    pool : Pool
        Where the memory of the result comes from.
    """
    result, memory = pool.empty_like(weight)
    _nearest(flat(weight), levels.detach().numpy(), memory)
    return result


def level_gradients(
    weight: Tensor, levels: Tensor, grad: Tensor, learned: bool, pool: Pool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients to the weights and, if they are learned, to the levels (float64).

    Parameters
    ----------
    weight, levels, pool
        As for `nearest`.
    grad : Tensor
        Gradient to the quantized weights, plain; never written to, since others may read it.
    learned : bool
        Whether the levels take a gradient.
    """
    grad = grad.contiguous(memory_format=_memory_format(weight))
    arrays = flat(weight), levels.detach().numpy(), flat(grad)
    grad_weight, grad_levels = grad, torch.empty_like(levels) if learned else None
    two = levels.shape[1] == 2
    if not two:
        grad_weight, memory = pool.empty_like(weight)
        _pass_inside(*arrays, memory)
    if learned:
        (_two_level_gradients if two else _level_gradients)(*arrays, grad_levels.numpy())
    return grad_weight, grad_levels


def spread(weight: Tensor, steps: int) -> Tensor:
    """Return the standard deviation of each of `steps` runs of weights, float64, `(steps,)`."""
    result = np.empty(steps)
    _spread(flat(weight), result)
    return torch.from_numpy(result)


def _memory_format(tensor: Tensor) -> torch.memory_format | None:
    if tensor.is_contiguous():
        return torch.contiguous_format
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dim and tensor.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


def flat(tensor: Tensor) -> np.ndarray:
    """View a dense tensor's memory as it lies."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


# The loops below take memory as it lies: one run of weights per step, output channels first. Each
# run is sliced before its loop, since loops over offsets into a longer array do not vectorise.


@compiled
def _round(weight, step, low, high, result):
    low, high = np.float32(low), np.float32(high)
    run = weight.size // step.size
    for c in range(step.size):
        w, s, out = weight[c * run : (c + 1) * run], step[c], result[c * run : (c + 1) * run]
        for i in range(w.size):
            v = w[i] / s
            v = low if v < low else (high if v > high else v)  # not-a-number passes through
            out[i] = np.rint(v) * s


@compiled
def _round_gradients(weight, step, low, high, grad, scale, grad_weight, grad_step):
    low, high = np.float32(low), np.float32(high)
    zero = np.float32(0)
    run = weight.size // step.size
    for c in range(step.size):
        w, s, g = weight[c * run : (c + 1) * run], step[c], grad[c * run : (c + 1) * run]
        out = grad_weight[c * run : (c + 1) * run]
        total = 0.0
        for i in range(w.size):
            v = w[i] / s
            inside = (v > low) & (v < high)
            code = np.rint(low if v < low else (high if v > high else v))
            out[i] = g[i] if inside else zero
            total += np.float64(g[i] * (code - v if inside else code))
        grad_step[c] = scale * total


@compiled
def _sign(weight, step, low, high, result):
    run = weight.size // step.size
    for c in range(step.size):
        w, s, out = weight[c * run : (c + 1) * run], step[c], result[c * run : (c + 1) * run]
        for i in range(w.size):
            out[i] = s if w[i] >= 0 else (-s if w[i] < 0 else w[i])


@compiled
def _sign_gradient(weight, grad, scale, grad_step):
    run = weight.size // grad_step.size
    for c in range(grad_step.size):
        w, g = weight[c * run : (c + 1) * run], grad[c * run : (c + 1) * run]
        total = 0.0
        for i in range(w.size):
            total += np.float64(g[i] if w[i] >= 0 else -g[i])
        grad_step[c] = scale * total


# Levels, even or uneven. The loops go block by block, so that passes over a block stay in cache.

_BLOCK = 1024
_FEW = 16  # so many levels are compared one by one, more of them by bisection


@compiled
def _tables(levels, values, bounds):
    """Levels in float32, and between them the largest number that goes to the lower one."""
    for k in range(levels.size):
        values[k] = np.float32(levels[k])
    for k in range(levels.size - 1):
        threshold = levels[k] / 2 + levels[k + 1] / 2
        bound = np.float32(threshold)
        to_upper = k % 2 == 1 and np.float64(bound) == threshold  # a tie goes to the even index
        if np.float64(bound) > threshold or to_upper:
            bound = np.nextafter(bound, np.float32(-np.inf))
        bounds[k] = bound


@compiled
def _count_below(bounds, w, count):
    """Fill `count` with the number of ascending bounds that lie below each weight."""
    for i in range(w.size):
        count[i] = 0
    if bounds.size <= _FEW:
        for k in range(bounds.size):
            bound = bounds[k]
            for i in range(w.size):
                count[i] += np.int32(w[i] > bound)
        return
    size = np.int32(bounds.size + 1)
    while size > 1:
        half = np.int32(size // 2)
        for i in range(w.size):
            count[i] += half if bounds[np.uint32(count[i] + half - 1)] < w[i] else np.int32(0)
        size -= half


@compiled
def _spread(weight, result):
    run = weight.size // result.size
    for c in range(result.size):
        w = weight[c * run : (c + 1) * run]
        total = squares = 0.0
        for i in range(run):
            total += np.float64(w[i])
            squares += np.float64(w[i]) ** 2
        result[c] = np.sqrt(max(squares / run - (total / run) ** 2, 0.0))


@compiled
def _nearest(weight, levels, result):
    n, run = levels.shape[1], weight.size // len(levels)
    values, bounds = np.empty(n, np.float32), np.empty(n - 1, np.float32)
    count = np.empty(_BLOCK, np.int32)
    for c in range(len(levels)):
        _tables(levels[c], values, bounds)
        for start in range(c * run, (c + 1) * run, _BLOCK):
            stop = min(start + _BLOCK, (c + 1) * run)
            w, out = weight[start:stop], result[start:stop]
            if n <= _FEW:
                first = values[0]
                for i in range(w.size):
                    out[i] = first if w[i] == w[i] else w[i]  # not-a-number passes through
                for k in range(n - 1):
                    bound, value = bounds[k], values[k + 1]
                    for i in range(w.size):
                        out[i] = value if w[i] > bound else out[i]
            else:
                _count_below(bounds, w, count)
                for i in range(w.size):
                    out[i] = values[np.uint32(count[i])] if w[i] == w[i] else w[i]


@compiled
def _pass_inside(weight, levels, grad, result):
    run, zero = weight.size // len(levels), np.float32(0)
    for c in range(len(levels)):
        low, high = np.float32(levels[c, 0]), np.float32(levels[c, -1])
        w, g = weight[c * run : (c + 1) * run], grad[c * run : (c + 1) * run]
        out = result[c * run : (c + 1) * run]
        for i in range(w.size):
            out[i] = g[i] if (w[i] > low) & (w[i] < high) else zero


@compiled
def _level_gradients(weight, levels, grad, grad_levels):
    n, run = levels.shape[1], weight.size // len(levels)
    values, bounds = np.empty(n, np.float32), np.empty(n - 1, np.float32)
    # Of the interval below each level, and of the one above the last: where it begins, its length,
    # the bound inside it, and what a weight beyond the levels adds.
    begin, length = np.zeros(n + 1, np.float32), np.full(n + 1, np.inf, np.float32)
    middle, beyond = np.full(n + 1, np.inf, np.float32), np.zeros(n + 1, np.float32)
    beyond[0] = beyond[n] = 1
    count = np.empty(_BLOCK, np.int32)
    for c in range(len(levels)):
        _tables(levels[c], values, bounds)
        for k in range(1, n):
            begin[k], middle[k] = values[k - 1], bounds[k - 1]
            length[k] = values[k] - values[k - 1]  # if zero, no weight lies in between
        values[n - 1] = np.nextafter(values[n - 1], np.float32(-np.inf))  # on it is beyond it
        sums = np.zeros((4, n + 1))  # side by side, since one sum waits for the one before
        for start in range(c * run, (c + 1) * run, _BLOCK):
            stop = min(start + _BLOCK, (c + 1) * run)
            w, g = weight[start:stop], grad[start:stop]
            _count_below(values, w, count)
            for i in range(w.size):
                k = np.uint32(count[i])
                share = (w[i] - begin[k]) / length[k] - np.float32(w[i] > middle[k])
                sums[i & 3, k] += g[i] * (beyond[k] + share)
        grad_levels[c] = sums[:, 1:].sum(0) - sums[:, :-1].sum(0)
        grad_levels[c, 0] += 2 * sums[:, 0].sum()


@compiled
def _two_level_gradients(weight, levels, grad, grad_levels):
    run = weight.size // len(levels)
    values, bounds = np.empty(2, np.float32), np.empty(1, np.float32)
    for c in range(len(levels)):
        _tables(levels[c], values, bounds)
        w, g, bound = weight[c * run : (c + 1) * run], grad[c * run : (c + 1) * run], bounds[0]
        lower = upper = 0.0
        for i in range(w.size):
            upper += np.float64(g[i]) if w[i] > bound else 0.0
            lower += np.float64(g[i]) if w[i] <= bound else 0.0
        grad_levels[c, 0], grad_levels[c, 1] = lower, upper
