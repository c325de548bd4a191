"""Errors over widths of what can be deployed, on the instances of `../optimal_width`.

Two samples per weight, label noise 0.1, no ridge in training, 200 weights, uniform codebooks of 2
bits. Straight-through training with small steps: mean error of the last iterates, error of their
rounded average. Full-precision least squares and tuned ridge regression, rounded to nearest. The
best fits on the same instances, by annealing, are in `../optimal_width/students.csv`.

    OMP_NUM_THREADS=1 python book/results/deployed_width/run.py
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    Instance,
    TeacherStudent,
    largest_stable_rate,
    round_ridge,
    sample,
    schedules,
    straight_through_descent,
)

HERE = Path(__file__).parent
N, INSTANCES, SEED = 200, 24, 20261121  # as in ../optimal_width/run.py: the same instances
BITS, ALPHA, NOISE = 2, 2.0, 0.1
WIDTHS = (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.1, 2.4)
# Rates in units of the largest stable one, each for a number of steps.
PHASES = ((0.5, 1000), (0.1, 1000), (0.02, 6000))


def deployed(drawn: Instance, width: float) -> dict[str, float]:
    """Errors of one instance at one width."""
    problem = TeacherStudent(uniform(BITS, width), ALPHA, NOISE)
    bound = largest_stable_rate(drawn, problem)
    rates = np.concatenate([schedules.constant(rate * bound, steps) for rate, steps in PHASES])
    begin = rates.size - PHASES[-1][1] // 2
    run = straight_through_descent(
        drawn, problem, rates, record_at=np.arange(begin, rates.size + 1, 5), average_from=begin
    )
    return {
        "last_iterate": run.gen_error.mean(),
        "rounded_average": drawn.gen_error(run.rounded),
        "rounded_ridge": round_ridge(drawn, problem, ridge=0.0).gen_error,
        "rounded_tuned_ridge": round_ridge(drawn, problem).gen_error,
    }


def main():
    """Write `errors.csv` and `provenance.json`."""
    started, rows = time.perf_counter(), []
    for instance in range(INSTANCES):
        rng = np.random.default_rng([SEED, instance])
        drawn = sample(TeacherStudent(uniform(1, 1.0), ALPHA, NOISE), N, rng)
        rows += [{"instance": instance, "width": w} | deployed(drawn, w) for w in WIDTHS]
    pd.DataFrame(rows).to_csv(HERE / "errors.csv", index=False, float_format="%.6g")
    config = {
        "n": N, "instances": INSTANCES, "bits": BITS, "alpha": ALPHA, "noise_variance": NOISE,
        "widths": WIDTHS, "phases": PHASES,
    }  # fmt: skip
    command = "OMP_NUM_THREADS=1 python book/results/deployed_width/run.py"
    seconds = time.perf_counter() - started
    write_json(provenance(command, config, [SEED], seconds), HERE / "provenance.json")


if __name__ == "__main__":
    main()
