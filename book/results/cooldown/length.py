"""Does the length of a cooldown of power 2 matter? Fresh instances for the case at the border.

    OMP_NUM_THREADS=1 python book/results/cooldown/length.py

Of the eight paired differences in `runs.csv` between cooldowns of one power, isotropic inputs, that
of power 2 over 40,000 and 4,000 steps was at the border of what chance allows. The same runs again
on 64 other instances; their number was fixed before the first.
"""

import time

import numpy as np
import pandas as pd
from run import BEFORE, CASES, HERE, N

from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import largest_stable_rate, sample, schedules, straight_through_descent

SEEDS = range(100, 164)
POWER, LENGTHS = 2, (400, 4000, 40_000)


def main():
    """Both starts of every instance, cooled down over each length."""
    problem, _ = CASES["isotropic"]
    rows, began = [], time.process_time()
    for seed in SEEDS:
        instance = sample(problem, N, seed)
        rate = largest_stable_rate(instance, problem) / 2
        before = schedules.constant(rate, BEFORE)
        starts = np.stack([np.zeros(N), np.random.default_rng([seed, 1]).standard_normal(N)])
        latent = straight_through_descent(instance, problem, before, start=starts).latent
        for length in LENGTHS:
            rates = schedules.cooldown(rate, length, POWER)
            run = straight_through_descent(instance, problem, rates, start=latent)
            rows += [
                {
                    "case": "isotropic", "seed": seed, "start": k,
                    "schedule": f"cooldown {POWER}, {length}",
                    "gen_error": run.gen_error[-1, k], "energy": run.energy[-1, k],
                }
                for k in range(2)
            ]  # fmt: skip
    pd.DataFrame(rows).to_csv(HERE / "length.csv", index=False, float_format="%.6g")
    config = {"n": N, "steps_before": BEFORE, "power": POWER, "lengths": LENGTHS}
    command = "OMP_NUM_THREADS=1 python book/results/cooldown/length.py"
    record = provenance(command, config, SEEDS, time.process_time() - began)
    write_json(record, HERE / "length_provenance.json")


if __name__ == "__main__":
    main()
