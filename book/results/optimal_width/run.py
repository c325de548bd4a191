"""Errors of instances over widths: students drawn at a temperature, and annealed ones.

Two samples per weight, label noise 0.1, no ridge, 200 weights, uniform codebooks of 1 to 4 bits at
multiples of the best width of the theory. Every instance is given to all bits and widths, so that
their errors differ by the codebook alone. What is there is not computed again.

    python book/results/optimal_width/run.py
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import TeacherStudent, anneal, heat_bath, optimal_width, sample

HERE = Path(__file__).parent
N, INSTANCES, SEED = 200, 24, 20261121
ALPHA, NOISE, TEMPERATURE = 2.0, 0.1, 0.2
BITS, MULTIPLES = (1, 2, 3, 4), (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75)
ANNEALING_SWEEPS, HEAT_BATH_SWEEPS, BURN_IN, CHAINS = 600, 100, 300, 4


def students(instance: int) -> pd.DataFrame:
    """Errors of one instance at all bits and widths."""
    rng = np.random.default_rng([SEED, instance])
    drawn = sample(TeacherStudent(uniform(1, 1.0), ALPHA, NOISE), N, rng)
    rows = []
    for bits in BITS:
        best = optimal_width(bits, ALPHA, NOISE).width
        for multiple in MULTIPLES:
            width = round(multiple * best, 4)
            problem = TeacherStudent(uniform(bits, width), ALPHA, NOISE, temperature=TEMPERATURE)
            cold = anneal(drawn, problem, ANNEALING_SWEEPS, rng)
            warm = heat_bath(drawn, problem, HEAT_BATH_SWEEPS, rng, CHAINS, BURN_IN)
            figures = (cold.gen_error, cold.energy, warm.gen_error, warm.energy)
            rows.append((instance, bits, multiple, width, *figures))
    names = ("annealed_gen_error", "annealed_energy", "gibbs_gen_error", "gibbs_energy")
    return pd.DataFrame(rows, columns=["instance", "bits", "multiple", "width", *names])


def main():
    """Write `students.csv` instance by instance, then `provenance.json`."""
    started, path = time.perf_counter(), HERE / "students.csv"
    parts = [pd.read_csv(path)] if path.exists() else []
    done = set(parts[0].instance) if parts else set()
    for instance in range(INSTANCES):
        if instance not in done:
            parts.append(students(instance))
            pd.concat(parts).to_csv(path, index=False, float_format="%.6g")
    config = {
        "n": N, "alpha": ALPHA, "noise_variance": NOISE, "temperature": TEMPERATURE, "bits": BITS,
        "multiples": MULTIPLES, "annealing_sweeps": ANNEALING_SWEEPS,
        "heat_bath_sweeps": HEAT_BATH_SWEEPS, "burn_in": BURN_IN, "chains": CHAINS,
        "instances": INSTANCES,
    }  # fmt: skip
    seconds = time.perf_counter() - started
    command = "python book/results/optimal_width/run.py"
    write_json(provenance(command, config, [SEED], seconds), HERE / "provenance.json")


if __name__ == "__main__":
    main()
