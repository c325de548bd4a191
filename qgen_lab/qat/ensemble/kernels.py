"""Training of one small network in compiled loops: convolution, batch norm and ReLU, repeated.

Activations have the samples last, `(channels, height * width * N)`, so every loop runs along
contiguous memory. Nothing is allocated within a step.
"""

import numba
import numpy as np

# Sums may be reordered and products fused, so that they vectorise; nothing else is relaxed.
_compiled = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}
)

_SIZES = (
    *("channels", "height", "width", "outputs", "rows", "columns"),  # of input and output
    *("kernel_rows", "kernel_columns", "stride_rows", "stride_columns"),
    *("padding_rows", "padding_columns"),
    *("weight", "gamma", "beta"),  # first column among the parameters
    "statistics",  # first place among the running statistics
)
# One convolution with its batch norm.
UNIT = np.dtype([*((n, np.int64) for n in _SIZES), ("momentum", np.float64), ("eps", np.float64)])

SGD, ADAM, ADAMW, RMSPROP = range(4)


@_compiled
def train_epoch(
    units, images, targets, order, batch_size, rates, rule, parameters, lsq, statistics, memory,
    count, buffers,
):  # fmt: skip
    """Take one optimizer step per batch and rate.

    Parameters
    ----------
    units : recarray of UNIT
        The layers.
    images : ndarray (C * H * W, samples)
        Inputs, `targets` their classes; `order` the samples in the order of this epoch.
    rates : ndarray (steps,)
        Learning rates.
    rule : tuple
        Optimizer (`SGD`, ...), momentum and weight decay, as in a recipe.
    parameters : ndarray (P,)
        Float weights, other parameters, steps of LSQ; changed.
    lsq : tuple
        First column of the steps; of each weight its step's column counted from there, and its
        `low`, `high`, `scale`, `one_bit`, `full` as in `StackedLSQ`; of each step its floor.
    statistics : pair of ndarray
        Running mean and variance; changed.
    memory : ndarray (3, P)
        The optimizer's two, and the gradient; changed.
    count : ndarray (1,)
        Steps so far; changed.
    buffers : tuple of ndarray
        See `buffers_for`.

    Returns
    -------
    loss : float
        Mean over the samples of the losses before each step.
    failed : int
        0, or the number of the step, from 1, at which the loss was not finite; `loss` is then that
        loss, and the step was not taken.
    """
    total, samples = 0.0, 0
    for step in range(rates.size):
        batch = order[step * batch_size : (step + 1) * batch_size]
        _forward(units, images, batch, parameters, lsq, statistics, True, buffers)
        loss = _loss(units, targets, batch, buffers)
        if not np.isfinite(loss):
            return loss, step + 1
        total += loss * batch.size
        samples += batch.size
        _backward(units, parameters, batch.size, buffers, memory[2])
        _quantize_backward(parameters, lsq, memory[2])
        count[0] += 1
        _move(parameters, memory, lsq[0], rule, rates[step], count[0])
        floor = lsq[-1]
        for i in range(floor.size):
            parameters[lsq[0] + i] = max(parameters[lsq[0] + i], floor[i])
    return total / samples, 0


@_compiled
def predict(units, images, batch_size, parameters, lsq, statistics, buffers, logits):
    """Fill `logits`, shape (samples, classes), in evaluation mode; parameters as `train_epoch`."""
    samples = np.arange(images.shape[1])
    for start in range(0, samples.size, batch_size):
        batch = samples[start : start + batch_size]
        _forward(units, images, batch, parameters, lsq, statistics, False, buffers)
        average = _average(units, batch.size, buffers)
        for b in range(batch.size):
            for c in range(average.shape[0]):
                logits[start + b, c] = average[c, b]


def buffers_for(units, parameters, weights, size):
    """Memory that training one model with batches of at most `size` samples works in."""
    inputs = units["channels"] * units["height"] * units["width"]
    outputs = units["outputs"] * units["rows"] * units["columns"]
    taps = units["channels"] * units["kernel_rows"] * units["kernel_columns"]
    patches = taps * units["rows"] * units["columns"]
    sizes = (
        sum(patches) * size,
        sum(outputs) * size,
        (inputs[0] + sum(outputs)) * size,  # the inputs, and each unit's output
        max(*outputs, *inputs) * size,
        max(patches) * size,
        units["outputs"][-1] * size,
        weights,
        sum(units["outputs"]),
    )
    return tuple(np.zeros(n, parameters.dtype) for n in sizes)


@_compiled
def _start(units, u, size):
    """Where the input of unit `u` lies among the activations."""
    first = units[0]
    start = first.channels * first.height * first.width * size if u else 0
    for i in range(u - 1):
        start += units[i].outputs * units[i].rows * units[i].columns * size
    return start


@_compiled
def _is_pointwise(unit):
    return (
        unit.kernel_rows * unit.kernel_columns * unit.stride_rows * unit.stride_columns == 1
        and unit.padding_rows + unit.padding_columns == 0
    )


@_compiled
def _forward(units, images, batch, parameters, lsq, statistics, training, buffers):
    patches, normal, active, _, _, _, quantized, inverse = buffers
    size = batch.size
    for p in range(images.shape[0]):
        source, target = images[p], active[p * size : (p + 1) * size]
        for i in range(size):
            target[i] = source[batch[i]]
    _quantize(parameters, lsq, quantized)
    first_patch, first_output = 0, 0
    for u in range(units.size):
        unit = units[u]
        taps = unit.channels * unit.kernel_rows * unit.kernel_columns
        length = unit.rows * unit.columns * size
        a, b = _start(units, u, size), _start(units, u + 1, size)
        weight = quantized[unit.weight : unit.weight + unit.outputs * taps]
        seen = active[a : a + taps * length]
        if not _is_pointwise(unit):
            seen = patches[first_patch : first_patch + taps * length]
            _take_patches(unit, active[a:], size, seen)
        out = normal[first_output : first_output + unit.outputs * length]
        out = out.reshape((unit.outputs, length))
        np.dot(weight.reshape((unit.outputs, taps)), seen.reshape((taps, length)), out)
        for c in range(unit.outputs):
            center, spread = _moments(unit, out[c], statistics, unit.statistics + c, training)
            scale = 1 / np.sqrt(spread + unit.eps)
            inverse[unit.statistics + c] = scale
            y = active[b + c * length : b + (c + 1) * length]
            gamma, beta = parameters[unit.gamma + c], parameters[unit.beta + c]
            _normalise(out[c], center, inverse[unit.statistics + c], gamma, beta, y)
        first_patch += taps * length
        first_output += unit.outputs * length


@_compiled
def _moments(unit, z, statistics, s, training):
    """Mean and variance to normalise by; in training the running ones at `s` follow."""
    mean, variance = statistics
    if not training:
        return mean[s], variance[s]
    center = _sum(z) / z.dtype.type(z.size)
    spread = _sum_of_squares(z, center) / z.dtype.type(z.size)
    mean[s] += unit.momentum * (center - mean[s])
    variance[s] += unit.momentum * (spread * z.size / (z.size - 1) - variance[s])
    return center, spread


@_compiled
def _sum(x):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i]
    return total


@_compiled
def _sum_of_squares(x, center):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += (x[i] - center) * (x[i] - center)
    return total


@_compiled
def _normalise(z, center, inverse, gamma, beta, y):
    """Normalise `z` in place; `y` becomes the ReLU of it, scaled and shifted."""
    for i in range(z.size):
        z[i] = (z[i] - center) * inverse
        value = gamma * z[i] + beta
        y[i] = value if value > 0 else (z.dtype.type(0) if value <= 0 else value)  # keeps NaN


@_compiled
def _take_patches(unit, image, size, out):
    """Copy what each place in the kernel sees; zero beyond the image."""
    position = 0
    for c in range(unit.channels):
        for i in range(unit.kernel_rows):
            for j in range(unit.kernel_columns):
                for y in range(unit.rows):
                    row = y * unit.stride_rows + i - unit.padding_rows
                    for x in range(unit.columns):
                        column = x * unit.stride_columns + j - unit.padding_columns
                        target = out[position : position + size]
                        position += size
                        if 0 <= row < unit.height and 0 <= column < unit.width:
                            place = ((c * unit.height + row) * unit.width + column) * size
                            target[:] = image[place : place + size]
                        else:
                            target[:] = 0


@_compiled
def _put_patches(unit, patches, size, image):
    """Add each patch where it came from."""
    image[: unit.channels * unit.height * unit.width * size] = 0
    position = 0
    for c in range(unit.channels):
        for i in range(unit.kernel_rows):
            for j in range(unit.kernel_columns):
                for y in range(unit.rows):
                    row = y * unit.stride_rows + i - unit.padding_rows
                    for x in range(unit.columns):
                        column = x * unit.stride_columns + j - unit.padding_columns
                        source = patches[position : position + size]
                        position += size
                        if 0 <= row < unit.height and 0 <= column < unit.width:
                            place = ((c * unit.height + row) * unit.width + column) * size
                            target = image[place : place + size]
                            for b in range(size):
                                target[b] += source[b]


@_compiled
def _average(units, size, buffers):
    """Logits of shape (classes, N): the averages over positions of the last output."""
    active, average = buffers[2], buffers[5]
    unit = units[-1]
    positions = unit.rows * unit.columns
    share = active.dtype.type(1) / positions
    start = _start(units, units.size, size)
    for c in range(unit.outputs):
        target = average[c * size : (c + 1) * size]
        target[:] = 0
        for p in range(positions):
            source = active[start + (c * positions + p) * size :]
            for b in range(size):
                target[b] += source[b] * share
    return average[: unit.outputs * size].reshape((unit.outputs, size))


@_compiled
def _loss(units, targets, batch, buffers):
    """Mean cross entropy; leave the gradient to the last unit's output in its buffer."""
    grad = buffers[3]
    size = batch.size
    logits = _average(units, size, buffers)
    classes = logits.shape[0]
    positions = units[-1].rows * units[-1].columns
    total = 0.0
    for b in range(size):
        largest = logits[0, b]
        for c in range(1, classes):
            largest = max(largest, logits[c, b])
        total += largest - logits[targets[batch[b]], b]
        normaliser = logits.dtype.type(0)
        for c in range(classes):
            logits[c, b] = np.exp(logits[c, b] - largest)
            normaliser += logits[c, b]
        total += np.log(normaliser)
        for c in range(classes):
            logits[c, b] /= normaliser
        logits[targets[batch[b]], b] -= 1
    share = grad.dtype.type(1) / (positions * size)
    for c in range(classes):
        for p in range(positions):
            target = grad[(c * positions + p) * size : (c * positions + p + 1) * size]
            for b in range(size):
                target[b] = logits[c, b] * share
    return total / size


@_compiled
def _backward(units, parameters, size, buffers, gradient):
    """From the gradient to the last unit's output to those of all weights, gammas and betas."""
    patches, normal, active, grad, grad_patches, _, quantized, inverse = buffers
    first_patch, first_output = 0, 0
    for u in range(units.size):
        taps = units[u].channels * units[u].kernel_rows * units[u].kernel_columns
        first_patch += taps * units[u].rows * units[u].columns * size
        first_output += units[u].outputs * units[u].rows * units[u].columns * size
    for u in range(units.size - 1, -1, -1):
        unit = units[u]
        taps = unit.channels * unit.kernel_rows * unit.kernel_columns
        length = unit.rows * unit.columns * size
        first_patch -= taps * length
        first_output -= unit.outputs * length
        a, b = _start(units, u, size), _start(units, u + 1, size)
        for c in range(unit.outputs):
            g = grad[c * length : (c + 1) * length]
            z = normal[first_output + c * length : first_output + (c + 1) * length]
            for_gamma, for_beta = _norm_sums(g, z, active[b + c * length : b + (c + 1) * length])
            gradient[unit.gamma + c], gradient[unit.beta + c] = for_gamma, for_beta
            factor = parameters[unit.gamma + c] * inverse[unit.statistics + c]
            share = g.dtype.type(1) / length
            _norm_backward(g, z, factor, for_gamma * share, for_beta * share)
        seen = active[a : a + taps * length]
        if not _is_pointwise(unit):
            seen = patches[first_patch : first_patch + taps * length]
        end = unit.weight + unit.outputs * taps
        for_weight = gradient[unit.weight : end].reshape((unit.outputs, taps))
        for_output = grad[: unit.outputs * length].reshape((unit.outputs, length))
        np.dot(for_output, seen.reshape((taps, length)).T, for_weight)
        if u:
            weight = quantized[unit.weight : end].reshape((unit.outputs, taps))
            before = grad_patches[: taps * length]
            np.dot(weight.T, for_output, before.reshape((taps, length)))
            if _is_pointwise(unit):
                grad[: taps * length] = before
            else:
                _put_patches(unit, before, size, grad)


@_compiled
def _norm_sums(g, z, y):
    """Mask `g` in place by the ReLU; its sum, and that of its product with `z`."""
    zero = g.dtype.type(0)
    for_gamma, for_beta = zero, zero
    for i in range(g.size):
        value = g[i] if y[i] > 0 else zero
        g[i] = value
        for_beta += value
        for_gamma += value * z[i]
    return for_gamma, for_beta


@_compiled
def _norm_backward(g, z, factor, for_gamma, for_beta):
    for i in range(g.size):
        g[i] = factor * (g[i] - for_beta - z[i] * for_gamma)


@_compiled
def _quantize(parameters, lsq, quantized):
    first_step, column, low, high, _, one_bit, full, _ = lsq
    for i in range(column.size):
        step = parameters[first_step + column[i]]
        v = parameters[i] / step
        if full[i]:
            quantized[i] = parameters[i]
        elif one_bit[i]:
            quantized[i] = step if v >= 0 else -step
        else:
            v = low[i] if v < low[i] else (high[i] if v > high[i] else v)
            quantized[i] = np.rint(v) * step


@_compiled
def _quantize_backward(parameters, lsq, gradient):
    """Mask the weights' gradients, and sum those of the steps."""
    first_step, column, low, high, scale, one_bit, full, _ = lsq
    gradient[first_step:] = 0
    for i in range(column.size):
        if full[i]:
            continue
        g = gradient[i]
        place = first_step + column[i]
        v = parameters[i] / parameters[place]
        if one_bit[i]:
            slope = 1 if v >= 0 else -1
        elif v > low[i] and v < high[i]:
            slope = np.rint(v) - v
        else:
            slope = low[i] if v <= low[i] else high[i]
            gradient[i] = 0
        gradient[place] += scale[i] * g * slope


@_compiled
def _move(parameters, memory, first_step, rule, rate, count):
    """One step of an optimizer as in `torch.optim`; the steps of LSQ take no weight decay."""
    optimizer, momentum, decay = rule
    first, second, gradient = memory
    if optimizer == ADAMW:
        for i in range(first_step):
            parameters[i] *= 1 - rate * decay
    else:
        for i in range(first_step):
            gradient[i] += decay * parameters[i]
    if optimizer == SGD:
        for i in range(parameters.size):
            first[i] = momentum * first[i] + gradient[i]
            parameters[i] -= rate * first[i]
    elif optimizer == RMSPROP:
        for i in range(parameters.size):
            second[i] = 0.99 * second[i] + 0.01 * gradient[i] * gradient[i]
            first[i] = momentum * first[i] + gradient[i] / (np.sqrt(second[i]) + 1e-8)
            parameters[i] -= rate * first[i]
    else:
        correction = np.sqrt(1 - 0.999**count)
        step = rate / (1 - momentum**count)
        for i in range(parameters.size):
            first[i] = momentum * first[i] + (1 - momentum) * gradient[i]
            second[i] = 0.999 * second[i] + 0.001 * gradient[i] * gradient[i]
            parameters[i] -= step * first[i] / (np.sqrt(second[i]) / correction + 1e-8)
