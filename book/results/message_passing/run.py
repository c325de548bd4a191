"""Message passing on instances of 4,000 weights: `python book/results/message_passing/run.py`.

Two experiments; every seed is kept. *Points*: where the replicon is above 0.3, the first
iterations and where they settle, for every codebook family. Problems of one `alpha` share their 16
instances, so their deviations from theory are correlated. *Boundary*: what becomes of the
iteration, and of a small random change of its start, at temperatures around the stability boundary
and at zero. Finished instances are kept in `parts`, so that a run that was stopped can go on.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from qgen_lab.codebooks import families
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import TeacherStudent, sample, solve_rs
from qgen_lab.theory.message_passing import Trajectory, amp_batch

HERE = Path(__file__).parent
PARTS = HERE / "parts"

N = 4000
SETTINGS = (  # alpha, noise variance, ridge
    (0.8, 0.1, 0.05),
    (1.5, 0.1, 0.0),
    (2.5, 0.5, 0.0),
)
CODEBOOKS = [("uniform", 1, 1.0)] + [(f, b, w) for f in families for b, w in ((2, 1.2), (3, 2.0))]
TEMPERATURES = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8)
LEAST_REPLICON = 0.3
INSTANCES = 16
FIRST = 13  # entries of the trajectories that are stored
OBSERVABLES = ("overlap", "gen_error", "train_error")

BOUNDARY = (  # family, bits, width, ridge; alpha 1.5, noise variance 0.1
    ("uniform", 1, 1.0, 0.0),
    ("uniform", 2, 1.5, 0.05),
    ("power of two", 3, 2.0, 0.0),
)
RATIOS = (0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5, 2.0)  # temperature over the boundary's
BOUNDARY_INSTANCES = 8
LONG, AVERAGED = 300, 100  # iterations, and how many of the last ones are averaged
EARLY, LATE, CHANGE = 15, 25, 1e-6  # iterations between which a change of the start is followed


def points(setting: tuple[float, float, float]) -> list[tuple[dict, TeacherStudent]]:
    """Problems of one alpha: each at the lowest temperature listed that is stable enough."""
    alpha, noise_variance, ridge = setting
    found = []
    for family, bits, width in CODEBOOKS:
        codebook = families[family](bits, width)
        for temperature in TEMPERATURES:
            problem = TeacherStudent(codebook, alpha, noise_variance, ridge, temperature)
            if solve_rs(problem).replicon > LEAST_REPLICON:
                found.append((describe(problem, family, bits, width), problem))
                break
    return found


def describe(problem: TeacherStudent, family: str, bits: int, width: float) -> dict:
    """The columns that name a problem."""
    return {
        "family": family,
        "bits": bits,
        "width": width,
        "alpha": problem.alpha,
        "noise_variance": problem.noise_variance,
        "ridge": problem.ridge,
        "temperature": problem.temperature,
    }


def boundary_ladder() -> list[tuple[dict, TeacherStudent]]:
    """Temperatures in fixed ratios to that at which the replicon of the cooled solution is 0."""
    ladder = []
    for family, bits, width, ridge in BOUNDARY:
        problem = TeacherStudent(families[family](bits, width), 1.5, ridge=ridge)

        def replicon(log_temperature, problem=problem):
            return solve_rs(replace(problem, temperature=np.exp(log_temperature))).replicon

        edge = np.exp(brentq(replicon, np.log(0.01), np.log(1.0)))
        for ratio in (0.0, *RATIOS):
            at = replace(problem, temperature=float(ratio * edge))
            ladder.append((describe(at, family, bits, width) | {"ratio": ratio}, at))
    return ladder


def means_at(instance, problems, starts, entry: int) -> np.ndarray:
    """Means of the weights at an entry of the trajectory, one row a problem."""
    runs = amp_batch(instance, problems, starts, max_iterations=entry + 1, tolerance=1e-300)
    return np.stack([run.mean for run in runs])


def growth(instance, problems, rng) -> np.ndarray:
    """Factor an iteration by which the mean square of a small change of the start grows."""
    start = np.array([np.full(N, problem.codebook.levels.mean()) for problem in problems])
    moved = start + CHANGE * rng.standard_normal(start.shape)
    early, late = (
        np.square(
            means_at(instance, problems, moved, entry) - means_at(instance, problems, start, entry)
        ).mean(axis=1)
        for entry in (EARLY, LATE)
    )
    return (late / early) ** (1 / (LATE - EARLY))


def last(trajectory: Trajectory) -> dict:
    """Order parameters of the last entry."""
    return trajectory.to_frame().iloc[-1].to_dict()


def run_points(index: int, seed: int) -> tuple[list[dict], np.ndarray]:
    """One instance: a row a problem, and the first observables of each."""
    chosen = points(SETTINGS[index])
    problems = [problem for _, problem in chosen]
    runs = amp_batch(sample(problems[0], N, np.random.default_rng([1, index, seed])), problems)
    rows = [
        about | {"seed": seed, "iterations": run.iterations, "converged": run.converged}
        | {"residual": run.residual} | last(run.trajectory)
        for (about, _), run in zip(chosen, runs, strict=True)
    ]  # fmt: skip
    first = [[getattr(run.trajectory, name)[:FIRST] for name in OBSERVABLES] for run in runs]
    return rows, np.array(first, np.float32)


def run_boundary(seed: int) -> list[dict]:
    """One instance: a row a problem; where it does not settle, means over the last iterations."""
    ladder = boundary_ladder()
    problems = [problem for _, problem in ladder]
    rng = np.random.default_rng([2, seed])
    instance = sample(problems[0], N, rng)
    runs = amp_batch(instance, problems, max_iterations=LONG)
    warm = [k for k, problem in enumerate(problems) if problem.temperature > 0]
    factors = np.full(len(problems), np.nan)
    factors[warm] = growth(instance, [problems[k] for k in warm], rng)
    rows = []
    for (about, _), run, factor in zip(ladder, runs, factors, strict=True):
        late = slice(-1 if run.converged else -AVERAGED, None)
        rows.append(
            about
            | {"seed": seed, "iterations": run.iterations, "converged": run.converged}
            | {"residual": run.residual, "motion": np.square(run.changes[late]).mean()}
            | {"growth": factor, "fit": np.square(instance.y - instance.X @ run.mean).mean()}
            | run.trajectory.to_frame().iloc[late].mean().to_dict()
        )
    return rows


def main():
    """Run what is missing, then write the tables."""
    PARTS.mkdir(exist_ok=True)
    start = time.perf_counter()
    tables, firsts = [], []
    for index in range(len(SETTINGS)):
        for seed in range(INSTANCES):
            table, array = PARTS / f"points_{index}_{seed}.csv", PARTS / f"first_{index}_{seed}.npy"
            if not (table.exists() and array.exists()):
                rows, first = run_points(index, seed)
                np.save(array, first)
                pd.DataFrame(rows).to_csv(table, index=False, float_format="%.9g")
                print(index, seed, round(time.perf_counter() - start), flush=True)
            tables.append(pd.read_csv(table))
            firsts.append(np.load(array))
    boundaries = []
    for seed in range(BOUNDARY_INSTANCES):
        table = PARTS / f"boundary_{seed}.csv"
        if not table.exists():
            pd.DataFrame(run_boundary(seed)).to_csv(table, index=False, float_format="%.9g")
            print("boundary", seed, round(time.perf_counter() - start), flush=True)
        boundaries.append(pd.read_csv(table))
    pd.concat(tables).to_csv(HERE / "points.csv", index=False, float_format="%.6g")
    pd.concat(boundaries).to_csv(HERE / "boundary.csv", index=False, float_format="%.6g")
    # Axes: setting, instance, codebook, observable, iteration.
    shape = (len(SETTINGS), INSTANCES, len(CODEBOOKS), len(OBSERVABLES), FIRST)
    np.savez_compressed(HERE / "first_iterations.npz", values=np.array(firsts).reshape(shape))
    config = {
        "weights": N,
        "settings": SETTINGS,
        "codebooks": CODEBOOKS,
        "temperatures": TEMPERATURES,
        "least_replicon": LEAST_REPLICON,
        "boundary": BOUNDARY,
        "ratios": RATIOS,
        "boundary_instances": BOUNDARY_INSTANCES,
        "iterations": [LONG, AVERAGED],
        "change": [EARLY, LATE, CHANGE],
    }
    seconds = time.perf_counter() - start
    command = "python book/results/message_passing/run.py"
    write_json(provenance(command, config, range(INSTANCES), seconds), HERE / "provenance.json")


if __name__ == "__main__":
    main()
