"""CPU time of an iteration of message passing, beside the products with the data that it contains.

All run in one process with one thread, interleaved; each time is the median over the rounds.
*One problem*: `amp` beside NumPy's two matrix-vector products. The floor reads `X` once at the
speed of the memory (measured: the time to find the largest entry of `X`), because a residual
depends on its own sample alone. *32 problems*: `amp_batch` beside 32 times two matrix-vector
products, and beside two matrix-matrix products. The floor is their arithmetic at the speed of a
large square product. An iteration is timed as the difference of a long and a short run.

    python benchmarks/message_passing.py [--rounds N] [--weights N] [--samples N]
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from qgen_lab.codebooks import families
from qgen_lab.theory import Instance, TeacherStudent, amp_batch

BATCH = 32
SHORT, LONG = 2, 7  # iterations


def problems(alpha: float) -> list[TeacherStudent]:
    """Eight codebooks at four temperatures."""
    return [
        TeacherStudent(make(bits, 1.5), alpha, temperature=temperature)
        for make in families.values()
        for bits in (2, 3)
        for temperature in (0.1, 0.2, 0.4, 0.8)
    ]


def seconds(call: Callable) -> float:
    """CPU time of one call: other work on the machine touches it less than the wall time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def iteration(instance: Instance, chosen: list[TeacherStudent]) -> float:
    """CPU time of one iteration, all problems together."""
    short, long = (
        seconds(lambda n=n: amp_batch(instance, chosen, max_iterations=n, tolerance=1e-300))
        for n in (SHORT, LONG)
    )
    return (long - short) / (LONG - SHORT)


def one_round(instance: Instance, square: np.ndarray) -> dict[str, float]:
    """All times, in milliseconds, at one precision."""
    X, y = instance.X, instance.y
    w, many_w = np.ones(X.shape[1], X.dtype), np.ones((BATCH, X.shape[1]), X.dtype)
    many_y = np.ones((BATCH, len(y)), X.dtype)
    chosen = problems(len(y) / X.shape[1])
    work = 2 * BATCH * X.size / len(square) ** 3
    times = {
        "amp": iteration(instance, chosen[:1]),
        "two products": seconds(lambda: (X @ w, y @ X)),
        "read X once": seconds(X.max),
        "amp_batch": iteration(instance, chosen),
        "two matrix products": seconds(lambda: (many_w @ X.T, many_y @ X)),
        "arithmetic": work * seconds(lambda: square @ square),
    }
    return {name: 1e3 * value for name, value in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=8000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (arguments.samples, arguments.weights)
    medians = {}
    for dtype in (np.float64, np.float32):
        X = rng.standard_normal(shape, np.float32).astype(dtype)
        X /= dtype(np.sqrt(shape[1]))
        teacher = rng.standard_normal(shape[1])
        instance = Instance(X, X @ teacher.astype(dtype), teacher)
        square = rng.standard_normal((1500, 1500)).astype(dtype)
        one_round(instance, square)  # compile, and touch all memory
        rounds = [one_round(instance, square) for _ in range(arguments.rounds)]
        medians[dtype.__name__] = pd.DataFrame(rounds).median()
    table = pd.DataFrame(medians).T
    double = table.loc["float64", "two products"]
    table["amp / two products"] = table["amp"] / table["two products"]
    table["amp / read X once"] = table["amp"] / table["read X once"]
    table["32 x two products / amp_batch"] = BATCH * table["two products"] / table["amp_batch"]
    table["32 x two products in float64 / amp_batch"] = BATCH * double / table["amp_batch"]
    table["two matrix products / amp_batch"] = table["two matrix products"] / table["amp_batch"]
    table["amp_batch / arithmetic"] = table["amp_batch"] / table["arithmetic"]
    print(f"X of {shape[0]} x {shape[1]}, CPU milliseconds an iteration, one thread, medians")
    print(table.T.round(2).to_string())


if __name__ == "__main__":
    main()
