"""Straight-through training on instances against its limit, and where the limit fails.

    OMP_NUM_THREADS=1 python book/results/straight_through/run.py [PART ...]

`statements.csv`: small steps; the time average against a convex solver, the iterates against the
stochastic rounding of its solution. `variants.csv`: other optimizers, rates and batches against the
limit of many weights. `one_pass.csv`: fresh samples at a finite rate against the stationary law.
A part that is done is not run again; seconds are processor time.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from qgen_lab.codebooks import lloyd_max, power_of_two, uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    TeacherStudent,
    average_weights,
    largest_stable_rate,
    one_pass,
    one_pass_descent,
    sample,
    schedules,
    straight_through,
    straight_through_descent,
)

HERE = Path(__file__).parent
N, SEEDS = 600, range(8)
CODEBOOKS = {
    "uniform 1": uniform(1, 0.7),
    "uniform 2": uniform(2, 1.33),
    "uniform 3": uniform(3, 1.86),
    "power of two 2": power_of_two(2, 1.6),
    "power of two 3": power_of_two(3, 1.8),
    "Lloyd-Max 2": lloyd_max(2),
}
DECAYS = (0.0, 0.3)
APPROACH, MEASURED = 1000, 8000  # steps at each of two larger rates, then at the small one
SMALL = 0.02  # of the largest stable rate

VARIANTS = {
    "gradient": {},
    "momentum 0.9": {"optimizer": "momentum"},
    "adam": {"optimizer": "adam"},
    "masked": {"masked": True},
    "batches of a tenth": {"batch_size": 0.1},
    "batches of a hundredth": {"batch_size": 0.01},
}
PROBLEMS = {
    "2 bits, 1.33, alpha 2": TeacherStudent(uniform(2, 1.33), 2.0),
    "2 bits, 3, alpha 4": TeacherStudent(uniform(2, 3.0), 4.0),
    "2 bits, 1.33, alpha 0.4": TeacherStudent(uniform(2, 1.33), 0.4),
}
RATES = {"gradient": (0.02, 0.1, 0.5, 0.9, 1.35), "momentum 0.9": (0.01,), "adam": (0.001, 0.01)}

ONE_PASS = [
    (name, codebook, rate)
    for name, codebook in {
        "uniform 1": uniform(1, 0.7),
        "uniform 2": uniform(2, 1.33),
        "uniform 3": uniform(3, 1.86),
        "Lloyd-Max 3": lloyd_max(3),
    }.items()
    for rate in (0.2, 0.5, 1.0)
]


def stochastic_rounding(codebook, v) -> float:
    """Mean of `(v - l) (u - v)`, l and u the levels around v."""
    upper = np.clip(np.searchsorted(codebook.levels, v, side="right"), 1, len(codebook) - 1)
    return ((v - codebook.levels[upper - 1]) * (codebook.levels[upper] - v)).mean()


def small_steps(problem, decay, seed) -> dict:
    """One run against the convex solver on the same instance."""
    instance = sample(problem, N, seed)
    bound = largest_stable_rate(instance, problem, decay)
    rates = np.concatenate([
        schedules.constant(bound / 2, APPROACH),
        schedules.constant(bound / 10, APPROACH),
        schedules.constant(SMALL * bound, MEASURED),
    ])  # fmt: skip
    begin = rates.size - MEASURED // 2
    run = straight_through_descent(
        instance, problem, rates, latent_decay=decay, average_from=begin,
        record_at=np.arange(begin, rates.size + 1, 5),
    )  # fmt: skip
    solution = average_weights(instance, problem, decay)
    v = solution.weights
    error = instance.gen_error(v)
    return {
        "seed": seed,
        "solver_converged": solution.converged,
        "squared_distance": np.square(run.average - v).mean(),
        "iterate": run.gen_error.mean(),
        "iterate_predicted": error + stochastic_rounding(problem.codebook, v),
        "average": instance.gen_error(run.average),
        "average_predicted": error,
        "rounded": instance.gen_error(run.rounded),
        "rounded_predicted": instance.gen_error(problem.codebook.quantize(v)),
    }


def statements() -> pd.DataFrame:
    """Small steps: codebooks, decays, instances."""
    rows = []
    for name, codebook in CODEBOOKS.items():
        for decay in DECAYS:
            problem = TeacherStudent(codebook, 2.0)
            limit = straight_through(problem, decay)
            rows += [
                {"codebook": name, "latent_decay": decay}
                | small_steps(problem, decay, seed)
                | {
                    "iterate_limit": limit.iterate_gen_error,
                    "average_limit": limit.average_gen_error,
                    "rounded_limit": limit.rounded_gen_error,
                }
                for seed in SEEDS
            ]
    return pd.DataFrame(rows)


def variants() -> pd.DataFrame:
    """Optimizers, rates and batches; two starts each."""
    rows = []
    for name, problem in PROBLEMS.items():
        limit = straight_through(problem)
        for variant in VARIANTS:
            for relative in RATES.get(variant, (0.1,)):
                for seed in SEEDS:
                    instance = sample(problem, N, seed)
                    options = dict(VARIANTS[variant])
                    if "batch_size" in options:
                        options["batch_size"] = round(options["batch_size"] * instance.y.size)
                    kept = 0.9 if variant.startswith("momentum") else 0.0
                    bound = largest_stable_rate(instance, problem, momentum=kept)
                    rate = relative if variant == "adam" else relative * bound
                    steps = 3000
                    start = np.random.default_rng([seed, 1]).standard_normal((2, N))
                    run = straight_through_descent(
                        instance, problem, schedules.constant(rate, steps), start=start,
                        record_at=np.arange(steps // 2, steps + 1, 10), seed=seed,
                        allow_unstable=True, **options,
                    )  # fmt: skip
                    rows.append({
                        "problem": name, "variant": variant, "relative_rate": relative,
                        "seed": seed, "iterate": run.gen_error.mean(),
                        "average": instance.gen_error(run.average).mean(),
                        "rounded": instance.gen_error(run.rounded).mean(),
                        "between_starts": np.square(run.average[0] - run.average[1]).mean(),
                        "flip_share": run.flip_share[1:].mean(),
                        "iterate_limit": limit.iterate_gen_error,
                        "average_limit": limit.average_gen_error,
                        "rounded_limit": limit.rounded_gen_error,
                    })  # fmt: skip
    return pd.DataFrame(rows)


def stationary_on_teacher(codebook, rate, seed, noise=0.1) -> float:
    """The stationary error with the very teacher of the run: masses of the cells, added up."""
    teacher = np.random.default_rng(seed).normal(0.0, 1.0, N // 3)  # drawn first in the run
    levels, edges = codebook.levels, codebook.thresholds
    inside = (teacher > levels[0]) & (teacher < levels[-1])
    slope = teacher[inside, None] - levels
    clipped = teacher - np.clip(teacher, levels[0], levels[-1])

    def excess(error):
        steep = slope / (rate * (error + noise) / 2)
        height = np.cumsum(steep[:, 1:-1] * np.diff(edges), axis=1)
        height = np.concatenate([np.zeros((len(steep), 1)), height], axis=1)
        density = np.exp(height - height.max(axis=1, keepdims=True))
        inner = np.diff(density, axis=1) / steep[:, 1:-1]
        outer = density[:, [0, -1]] / np.abs(steep[:, [0, -1]])
        mass = np.concatenate([outer[:, :1], inner, outer[:, 1:]], axis=1)
        squared = (mass * slope**2).sum(axis=1) / mass.sum(axis=1)
        return (squared.sum() + np.square(clipped).sum()) / teacher.size - error

    return brentq(excess, 1e-3, 10.0)


def stationary() -> pd.DataFrame:
    """Twelve codebooks and rates, fresh samples."""
    rows = []
    for name, codebook, rate in ONE_PASS:
        limit = one_pass(codebook, rate)
        # Nearly saturated latent weights settle last, after some 100, whatever the rate.
        times = np.linspace(100, 200, 41)
        rows += [
            {
                "codebook": name, "learning_rate": rate, "seed": seed,
                "gen_error": one_pass_descent(codebook, rate, times, N // 3, seed).gen_error.mean(),
                "limit": limit.gen_error,
                "limit_on_teacher": stationary_on_teacher(codebook, rate, seed),
            }
            for seed in SEEDS
        ]  # fmt: skip
    return pd.DataFrame(rows)


PARTS = {"statements": statements, "one_pass": stationary, "variants": variants}


def main(names):
    """Run the parts that are named and not there yet; the time adds up over calls."""
    stored = HERE / "provenance.json"
    seconds = json.loads(stored.read_text())["seconds"] if stored.exists() else 0.0
    for name in names:
        path = HERE / f"{name}.csv"
        if not path.exists():
            start = time.process_time()
            PARTS[name]().to_csv(path, index=False, float_format="%.6g")
            seconds += time.process_time() - start
    config = {
        "n": N,
        "codebooks": {name: codebook.levels.tolist() for name, codebook in CODEBOOKS.items()},
        "latent_decay": DECAYS,
        "steps": [APPROACH, APPROACH, MEASURED],
        "rates": ["bound / 2", "bound / 10", f"{SMALL} bound"],
        "problems": list(PROBLEMS),
        "variants": VARIANTS,
        "relative_rates": RATES,
        "one_pass": [[name, rate] for name, _, rate in ONE_PASS],
    }
    command = "OMP_NUM_THREADS=1 python book/results/straight_through/run.py"
    record = provenance(command, config, SEEDS, seconds)
    write_json(record, stored)


if __name__ == "__main__":
    main(sys.argv[1:] or PARTS)
