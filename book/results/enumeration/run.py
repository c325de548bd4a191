"""Exact Gibbs averages of many small instances: `python book/results/enumeration/run.py`.

For each problem and number of weights the average over instances of every observable, with the
nine control variates of `centred_moments`. The samples per weight are such that `alpha n` is whole
at every size. A size that is already in the table is not run again: delete the table to start anew.

Sizes, numbers of instances and temperatures were settled on runs with other seeds. The rule of the
chapter "Typical case" counts the temperatures in `COUNTED`; the one in `COLD` lies where replica
symmetry is unstable or near it, or where its entropy is negative.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    TeacherStudent,
    centred_moments,
    controlled_mean,
    enumerate_states,
    sample,
)

HERE = Path(__file__).parent
TABLE = HERE / "sizes.csv"
SEED = 20240
OBSERVABLES = [
    "energy", "free_energy", "entropy", "overlap", "replica_overlap", "self_overlap",
    "gen_error", "gen_error_mean", "train_error",
]  # fmt: skip
PROBLEMS = {
    "A": TeacherStudent(uniform(1, 1.0), 1.5),
    "B": TeacherStudent(uniform(1, 1.0), 0.5),
    "C": TeacherStudent(uniform(2, 1.5), 1.5, ridge=0.05),
    "D": TeacherStudent(uniform(2, 1.5), 1.0),
    "E": TeacherStudent(uniform(3, 2.0), 1.0),
    "F": TeacherStudent(uniform(3, 2.0), 2.0),
}
COUNTED = {
    "A": (0.5, 0.8), "B": (0.2, 0.3), "C": (0.2, 0.4),
    "D": (0.2, 0.4), "E": (0.2, 0.4), "F": (0.1, 0.3),
}  # fmt: skip
COLD = {"A": 0.2, "B": 0.05, "C": 0.05, "D": 0.03, "E": 0.02, "F": 0.02}
ONE_BIT = {6: 16000, 8: 16000, 10: 16000, 12: 12000, 14: 6000, 16: 2000, 18: 400, 20: 100}
INSTANCES = {
    "A": ONE_BIT,
    "B": ONE_BIT,
    "C": {4: 25000, 6: 20000, 8: 4000, 10: 240},
    "D": {3: 12000, 4: 14000, 5: 14000, 6: 12000, 7: 6000, 8: 2000, 9: 500, 10: 120},
    "E": {3: 40000, 4: 40000, 5: 16000, 6: 2600, 7: 280},
    "F": {3: 40000, 4: 40000, 5: 16000, 6: 2600, 7: 280},
}


def measure(name: str, n: int, count: int) -> pd.DataFrame:
    """Averages over `count` instances; the ground state is the row of temperature 0."""
    problem, temperatures = PROBLEMS[name], [0.0, COLD[name], *COUNTED[name]]
    if round(problem.alpha * n) != problem.alpha * n:
        raise ValueError(f"alpha n = {problem.alpha * n} is not whole: choose another n")
    values, controls = [], []
    for k in range(count):
        drawn = sample(problem, n, np.random.default_rng([SEED, ord(name), n, k]))
        exact = enumerate_states(drawn, problem, temperatures)
        values.append([getattr(exact, observable) for observable in OBSERVABLES])
        controls.append(centred_moments(drawn, problem))
    mean, error = controlled_mean(values, controls)
    plain = np.std(values, axis=0, ddof=1) / np.sqrt(count)
    rows = [
        (name, n, count, temperature, observable, mean[i, t], error[i, t], plain[i, t])
        for t, temperature in enumerate(temperatures)
        for i, observable in enumerate(OBSERVABLES)
    ]
    columns = ["problem", "n", "instances", "temperature", "observable"]
    return pd.DataFrame(rows, columns=[*columns, "mean", "standard_error", "without_controls"])


def main() -> None:
    """Add what is missing to the table; the record of where it came from at the end."""
    known = pd.read_csv(TABLE) if TABLE.exists() else None
    done = set() if known is None else set(zip(known.problem, known.n, strict=True))
    for name, sizes in INSTANCES.items():
        for n, count in sizes.items():
            if (name, n) in done:
                continue
            start = time.process_time()
            frame = measure(name, n, count)
            frame["seconds"] = round(time.process_time() - start, 2)
            frame.to_csv(
                TABLE, mode="a", header=not TABLE.exists(), index=False, float_format="%.10g"
            )
            print(name, n, count, frame["seconds"][0], flush=True)
    seconds = pd.read_csv(TABLE).groupby(["problem", "n"])["seconds"].first().sum()
    config = {
        name: {
            "levels": problem.codebook.levels.tolist(),
            "alpha": problem.alpha,
            "noise_variance": problem.noise_variance,
            "ridge": problem.ridge,
            "counted_temperatures": COUNTED[name],
            "cold_temperature": COLD[name],
            "instances": INSTANCES[name],
        }
        for name, problem in PROBLEMS.items()
    }
    command = "python book/results/enumeration/run.py"
    write_json(provenance(command, config, [SEED], seconds), HERE / "provenance.json")


if __name__ == "__main__":
    main()
