"""CPU time of a straight-through step beside its two products, and of one limit of the theory.

A step's gradient is `X' (X w - y)`: two products with a vector. They are the floor, and every time
is a multiple of theirs, measured in one process with one thread, interleaved, the median over the
rounds. In short runs a step makes both; from about N / 8 steps on `X' X` is formed once, and a step
makes one product with that. The peer is the same loop in plain NumPy. Below, milliseconds of one
`straight_through` and `one_pass`: the goal is 2.

    python benchmarks/straight_through.py [--rounds N]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from qgen_lab.codebooks import lloyd_max, uniform
from qgen_lab.theory import (
    TeacherStudent,
    one_pass,
    sample,
    schedules,
    straight_through,
    straight_through_descent,
)

SIZES = (500, 1000, 2000)
PROBLEM = TeacherStudent(uniform(2, 1.33), 2.0)
LIMITS = {
    "straight_through, 2 bits": lambda: straight_through(PROBLEM),
    "straight_through, 2 bits, ridge": lambda: straight_through(
        TeacherStudent(uniform(2, 1.33), 2.0, ridge=0.1)
    ),
    "straight_through, 4 bits, latent decay": lambda: straight_through(
        TeacherStudent(uniform(4, 2.3), 2.0), 0.3
    ),
    "straight_through, 4 bits, both": lambda: straight_through(
        TeacherStudent(lloyd_max(4), 1.2, ridge=0.1), 0.3
    ),
    "one_pass, 2 bits": lambda: one_pass(uniform(2, 1.33), 0.3),
    "one_pass, 4 bits": lambda: one_pass(uniform(4, 2.3), 0.3),
}


def seconds(call) -> float:
    """CPU time of one call: other work on the machine hardly touches it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def steps_of(instance) -> dict:
    """What is timed, by name: the call, and the number of steps it makes."""
    X, y = instance.X, instance.y
    n = X.shape[1]
    short = n // 16  # steps; too few to form X' X
    codebook, w = PROBLEM.codebook, instance.teacher.copy()

    def products():
        for _ in range(short):
            (X @ w - y) @ X

    def plain():
        latent = np.zeros(n)
        for _ in range(short):
            latent -= 0.1 * ((X @ codebook.quantize(latent) - y) @ X)

    def descent(steps):
        return lambda: straight_through_descent(
            instance, PROBLEM, schedules.constant(0.1, steps), allow_unstable=True
        )

    return {
        "two products": (products, short),
        "step, N / 16 steps": (descent(short), short),
        "step, N / 4 steps": (descent(n // 4), n // 4),
        "step, N steps": (descent(n), n),
        "NumPy": (plain, short),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    straight_through_descent(sample(PROBLEM, 20, 0), PROBLEM, [0.1])  # compile

    rows = {}
    for n in SIZES:
        calls = steps_of(sample(PROBLEM, n, seed=0))
        times = pd.DataFrame(
            {name: seconds(call) / steps for name, (call, steps) in calls.items()}
            for _ in range(rounds)
        )
        ratios = times.div(times["two products"], axis=0).median()
        rows[n] = {"two products [us]": 1e6 * times["two products"].median()} | {
            f"{name} / two products": ratios[name] for name in calls if name != "two products"
        }
    print(f"N weights, 2 N samples, float64, CPU time, one thread, median of {rounds} rounds")
    print(pd.DataFrame(rows).T.rename_axis("N").round(2).to_string())

    for call in LIMITS.values():
        call()
    limits = {
        name: np.median([1e3 * seconds(call) for _ in range(20 * rounds)])
        for name, call in LIMITS.items()
    }
    print("\nmilliseconds a limit")
    print(pd.Series(limits).round(2).to_string())


if __name__ == "__main__":
    main()
