"""How a rate that goes to zero ends straight-through training.

    OMP_NUM_THREADS=1 python book/results/cooldown/run.py

Every run begins with the latent weights that a long constant rate has left, and goes on with one of
the schedules. Two runs an instance, from different starts. An instance that is done is not run
again; `runs.csv` has the end of every run, `trajectories.csv` means over instances and starts,
`freezing_*.npz` when each weight of the first instance was moved for the last time. The share of
weights that flip in a step is that of the last step, or, for the schedules whose course is kept, of
the last hundredth of the steps.
"""

import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    TeacherStudent,
    average_weights,
    largest_stable_rate,
    sample,
    schedules,
    straight_through_descent,
)

HERE = Path(__file__).parent
N, BEFORE, SEEDS = 400, 4000, range(16)
CASES = {
    "isotropic": (TeacherStudent(uniform(2, 1.5), 1.5, 0.1, ridge=0.05), 0.0),
    "correlated": (TeacherStudent(uniform(2, 1.5), 2.0, 0.1, ridge=0.1), 1.5),
}
POWERS, LENGTHS = (1, 2, 4, 16), (10, 30, 100, 400, 4000, 40_000)
FOLLOWED = [
    "constant, 4000", "cooldown 1, 4000", "cooldown 4, 4000", "drop, 3000", "two drops, 3000"
]  # fmt: skip


def all_schedules() -> dict[str, np.ndarray]:
    """Rates relative to that of the constant part, by name."""
    found = {"constant, 4000": schedules.constant(1, 4000)}
    for power in POWERS:
        for length in LENGTHS:
            found[f"cooldown {power}, {length}"] = schedules.cooldown(1, length, power)
    for length in (5, 30, 300, 3000):
        found[f"drop, {length}"] = schedules.constant(0.1, length)
        found[f"two drops, {length}"] = schedules.stepped(0.1, [length, length])
    for length in (40, 400, 20_000):
        found[f"exponential, {length}"] = schedules.exponential(1, length, decades=4)
    found["inverse time, 20000"] = schedules.inverse_time(1, 20_000, fold=50)
    for length in (400, 4000):
        found[f"cosine, {length}"] = schedules.cosine(1, length)
    return found


def freezing(run, problem, sure) -> float:
    """Rank correlation of the last change with how far the average is from the nearest level."""
    codebook = problem.codebook
    distance = np.abs(sure - codebook.quantize(sure))
    inside = (sure > codebook.levels[0] + 1e-6) & (sure < codebook.levels[-1] - 1e-6)
    return float(np.mean([spearmanr(distance[inside], c[inside])[0] for c in run.last_change]))


def run_instance(case: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The end of every schedule, and the course of some."""
    problem, exponent = CASES[case]
    instance = sample(problem, N, seed, covariance_exponent=exponent)
    rate = largest_stable_rate(instance, problem) / 2
    starts = np.stack([np.zeros(N), np.random.default_rng([seed, 1]).standard_normal(N)])
    begin = straight_through_descent(
        instance, problem, schedules.constant(rate, BEFORE), start=starts
    ).latent
    sure = average_weights(instance, problem).weights
    ends, courses = [], []
    for name, relative in all_schedules().items():
        steps = relative.size
        followed = name in FOLLOWED
        record_at = np.linspace(0, steps, 101).astype(int) if followed else [steps - 1, steps]
        run = straight_through_descent(
            instance, problem, rate * relative, start=begin, record_at=record_at
        )
        correlation = freezing(run, problem, sure) if steps >= 100 else np.nan
        agreement = np.mean(run.weights[0] == run.weights[1])
        for k in range(2):
            ends.append({
                "case": case, "seed": seed, "start": k, "schedule": name,
                "gen_error": run.gen_error[-1, k], "energy": run.energy[-1, k],
                "train_error": run.train_error[-1, k], "flip_share": run.flip_share[-1, k],
                "freezing_correlation": correlation, "agreement": agreement,
            })  # fmt: skip
        if followed:
            courses.append(run.to_frame().assign(case=case, seed=seed, schedule=name))
        if name == "cooldown 4, 4000" and seed == SEEDS[0]:
            np.savez_compressed(
                HERE / f"freezing_{case}.npz", average=sure, last_change=run.last_change,
                rounded_average=problem.codebook.quantize(sure), weights=run.weights,
            )  # fmt: skip
    return pd.DataFrame(ends), pd.concat(courses)


def main():
    """Run what is missing and put everything together."""
    parts = HERE / "parts"
    parts.mkdir(exist_ok=True)
    for seed in SEEDS:
        for case in CASES:
            path = parts / f"{case}_{seed}.pkl"
            if not path.exists():
                start = time.perf_counter()
                pd.to_pickle((*run_instance(case, seed), time.perf_counter() - start), path)
    ends, courses, seconds = zip(
        *(pd.read_pickle(parts / f"{c}_{s}.pkl") for c in CASES for s in SEEDS), strict=True
    )
    pd.concat(ends).to_csv(HERE / "runs.csv", index=False, float_format="%.6g")
    columns = ["gen_error", "train_error", "energy", "flip_share"]
    grouped = pd.concat(courses).groupby(["case", "schedule", "step"], sort=False)[columns]
    grouped.mean().reset_index().to_csv(HERE / "trajectories.csv", index=False, float_format="%.5g")
    config = {
        "n": N, "steps_before": BEFORE, "rate": "half of largest_stable_rate",
        "cases": {
            name: {
                "levels": problem.codebook.levels.tolist(), "alpha": problem.alpha,
                "noise_variance": problem.noise_variance, "ridge": problem.ridge,
                "covariance_exponent": exponent,
            }
            for name, (problem, exponent) in CASES.items()
        },
        "schedules": list(all_schedules()),
    }  # fmt: skip
    command = "OMP_NUM_THREADS=1 python book/results/cooldown/run.py"
    write_json(provenance(command, config, SEEDS, sum(seconds)), HERE / "provenance.json")
    shutil.rmtree(parts)


if __name__ == "__main__":
    main()
