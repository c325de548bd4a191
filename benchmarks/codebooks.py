"""CPU time to round 10^7 float32 weights to a codebook, beside peers and the memory's own speed.

All run in one process with one thread, interleaved; each time is the median over the rounds. The
floor is the time to copy as many bytes as rounding must move: four read, four written per weight
(eight written for codes). The twin is NumPy's `searchsorted`, torch's is `bucketize`; both look up
the levels afterwards, round ties their own way and do not look for NaN.

    python benchmarks/codebooks.py [--rounds N] [--weights N]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

from qgen_lab.codebooks import Codebook, lloyd_max, lsq_grid, power_of_two, uniform

CODEBOOKS = {
    "lsq_grid, 1 bit": lsq_grid(1, 0.2),
    "lsq_grid, 4 bits": lsq_grid(4, 0.2),
    "uniform, 8 bits": uniform(8, 3.0),
    "power_of_two, 8 bits": power_of_two(8, 3.0),
    "lloyd_max, 4 bits": lloyd_max(4),
    "lloyd_max, 8 bits": lloyd_max(8),
    "lloyd_max, 16 bits": lloyd_max(16),
}


def contenders(codebook: Codebook, w: np.ndarray) -> dict:
    """What is timed, by column name."""
    levels, thresholds = codebook.levels.astype(w.dtype), codebook.thresholds.astype(w.dtype)
    torch_w, torch_levels, torch_thresholds = map(torch.from_numpy, (w, levels, thresholds))
    return {
        "quantize": lambda: codebook.quantize(w),
        "code": lambda: codebook.code(w),
        "NumPy": lambda: levels[np.searchsorted(thresholds, w)],
        "torch": lambda: torch_levels[torch.bucketize(torch_w, torch_thresholds)],
        "floor": lambda: w.copy(),
        "floor of code": lambda: w.astype(np.float64),
    }


def seconds(call) -> float:
    """CPU time of one call: other work on the machine hardly touches it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=int, default=10**7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    w = np.random.default_rng(0).normal(size=arguments.weights).astype(np.float32)
    for codebook in CODEBOOKS.values():
        codebook.quantize(w[:9]), codebook.code(w[:9])  # compile

    calls = {name: contenders(codebook, w) for name, codebook in CODEBOOKS.items()}
    rounds = [
        {(name, who): seconds(call) for name, row in calls.items() for who, call in row.items()}
        for _ in range(arguments.rounds)
    ]
    medians = pd.DataFrame(rounds).median()
    medians.index = pd.MultiIndex.from_tuples(medians.index)
    table = medians.unstack(sort=False)
    table["quantize / floor"] = table["quantize"] / table["floor"]
    table["code / floor"] = table["code"] / table["floor of code"]
    table["NumPy / quantize"] = table["NumPy"] / table["quantize"]
    table["torch / quantize"] = table["torch"] / table["quantize"]
    print(f"{w.size:.0e} float32 weights, CPU seconds, one thread, {arguments.rounds} rounds")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
