"""Ground states by annealing, and overlaps by parallel tempering: nothing here knows of replicas.

    python book/results/ground_states/run.py

`annealed.csv`: the lowest energy found, and its errors, averaged over instances with the control
variates of `centred_moments` and `centred_rounding`. Up to 60 weights two independent halves of the
restarts are compared: where both end at the same energy, it is very likely the lowest. If a half
finds the ground state with probability p, the halves agree with p^2, and both miss it with
(1 - p)^2; the restarts were settled by that. Large instances get one run.

`overlaps.csv`, `histograms.csv`: overlaps of four replicas that never meet, at temperatures above
and below the one where replica symmetry becomes unstable. The replicas start anywhere; the mean
overlap in the first and the second half of the measured sweeps says whether they have settled.

A size that is in a table is not run again: delete the table to start anew.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    Instance,
    TeacherStudent,
    anneal,
    at_temperature,
    centred_moments,
    controlled_mean,
    parallel_tempering,
    sample,
)

HERE = Path(__file__).parent
SEED = 20261122
PROBLEMS = {  # bits, width, samples per weight; label noise 0.1, no ridge
    "A": (1, 1.0, 1.5),
    "B": (1, 1.0, 0.5),
    "C": (2, 2.0, 2.0),
    "D": (3, 2.0, 2.0),
    "E": (3, 2.0, 0.8),
}
EASY = [  # weights, instances, sweeps, restarts in each half
    (10, 6000, 300, 8),
    (20, 4000, 300, 16),
    (30, 3000, 500, 16),
    (40, 2000, 1000, 16),
    (60, 800, 1000, 32),
]
HARDER = [(n, 6 * count // 10, *search) for n, count, *search in EASY[:4]]
HARD = [*HARDER[:3], (40, 720, 1000, 64)]
HARDEST = [(5, 600, 300, 32), (10, 200, 4000, 32), (15, 60, 4000, 32)]
LARGE = [(400, 24, 1000, 1), (400, 24, 20_000, 1)]
ANNEALED = {
    "A": [*EASY, *LARGE],
    "B": [*HARD, *LARGE],
    "C": HARDER,
    "D": [*HARDER, *LARGE],
    "E": HARDEST,
}
TEMPERED = [  # problem, weights, instances, measured sweeps
    ("A", 32, 24, 4000),
    ("C", 32, 24, 4000),
    ("A", 64, 24, 6000),
    ("C", 64, 24, 6000),
    ("A", 128, 24, 8000),
]
LADDER = np.geomspace(0.25, 3, 12)  # in units of the stability temperature
BINS = (np.arange(-16, 18) - 0.501) / 16  # of the overlap over the width squared
NAMES = ("energy", "gen_error", "train_error", "self_overlap")


def problem_of(name: str) -> TeacherStudent:
    """The problem of that name."""
    bits, width, alpha = PROBLEMS[name]
    return TeacherStudent(uniform(bits, width), alpha)


def centred_rounding(drawn: Instance, problem: TeacherStudent) -> list[float]:
    """Three more control variates.

    What rounding the teacher costs, in its own units and in the outputs, and where there are more
    samples than weights what least squares leaves.
    """
    alpha, noise_variance, codebook = problem.alpha, problem.noise_variance, problem.codebook
    x = np.linspace(-9, 9, 200_001)
    mean_cost = np.trapezoid(norm.pdf(x) * (x - codebook.quantize(x)) ** 2, x)
    rounded = codebook.quantize(drawn.teacher)
    in_outputs = np.mean((drawn.y - drawn.X @ rounded) ** 2)
    controls = [
        np.mean((rounded - drawn.teacher) ** 2) - mean_cost,
        in_outputs - mean_cost - noise_variance,
    ]
    if alpha > 1:
        left = drawn.y - drawn.X @ np.linalg.lstsq(drawn.X, drawn.y)[0]
        controls.append(left @ left / len(drawn.teacher) - noise_variance * (alpha - 1))
    return controls


def annealed(name: str, n: int, count: int, sweeps: int, restarts: int) -> dict:
    """Averages over instances of the best weights found."""
    problem, values, controls, agreed = problem_of(name), [], [], 0
    for k in range(count):
        rng = np.random.default_rng([SEED, ord(name), n, k])
        drawn = sample(problem, n, rng)
        halves = [anneal(drawn, problem, sweeps, rng, restarts) for _ in range(1 + (n <= 60))]
        best = min(halves, key=lambda found: found.energy)
        agreed += np.ptp([found.energy for found in halves]) < 1e-9
        values.append([getattr(best, observable) for observable in NAMES])
        controls.append([*centred_moments(drawn, problem), *centred_rounding(drawn, problem)])
    mean, error = controlled_mean(values, controls)
    row = {"problem": name, "n": n, "instances": count, "sweeps": sweeps, "restarts": restarts}
    for k, observable in enumerate(NAMES):
        row |= {observable: mean[k], f"{observable}_se": error[k]}
    return row | {"agreed": agreed / count if n <= 60 else np.nan}


def overlaps(name: str, n: int, count: int, sweeps: int) -> tuple[list[dict], list[dict]]:
    """Moments of the overlap, and its histogram at the two ends of the ladder."""
    problem = problem_of(name)
    ladder = at_temperature(problem) * LADDER
    scale = problem.codebook.levels[-1] ** 2
    samples, swaps = [], []
    for k in range(count):
        rng = np.random.default_rng([SEED + 1, ord(name), n, k])
        tempered = parallel_tempering(sample(problem, n, rng), problem, ladder, sweeps, rng)
        samples.append(tempered.overlap_samples)
        swaps.append(tempered.swap_rate.min())
    q = np.array(samples)  # (instances, sweeps, T, pairs)
    within = q.var(axis=(1, 3))  # the same instance, different states
    first, second = q[:, : sweeps // 2].mean(axis=(1, 3)), q[:, sweeps // 2 :].mean(axis=(1, 3))
    mean, drift = q.mean(axis=(1, 3)), second - first
    root = np.sqrt(count)
    moments = [
        {
            "problem": name, "n": n, "instances": count, "sweeps": sweeps, "temperature": T,
            "in_units": LADDER[t], "overlap": mean[:, t].mean(),
            "overlap_se": mean[:, t].std(ddof=1) / root, "variance": within[:, t].mean(),
            "variance_se": within[:, t].std(ddof=1) / root, "drift": drift[:, t].mean(),
            "drift_se": drift[:, t].std(ddof=1) / root, "least_swap_rate": min(swaps),
        }
        for t, T in enumerate(ladder)
    ]  # fmt: skip
    shapes = []
    for t in (0, LADDER.size - 1):
        share = np.histogram(q[:, :, t] / scale, BINS)[0] / q[:, :, t].size
        shapes += [
            {"problem": name, "n": n, "temperature": ladder[t], "bin": i, "share": s}
            for i, s in enumerate(share)
        ]
    return moments, shapes


def append(rows: list[dict], table: str) -> None:
    """Add rows to a table."""
    path = HERE / table
    frame = pd.DataFrame(rows)
    frame.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.8g")


def known(table: str, *columns: str) -> set:
    """What a table holds already."""
    path = HERE / table
    return set(pd.read_csv(path)[list(columns)].itertuples(index=False)) if path.exists() else set()


def anneal_all() -> None:
    """Fill `annealed.csv`."""
    for name, sizes in ANNEALED.items():
        for n, count, sweeps, restarts in sizes:
            if (name, n, sweeps) in known("annealed.csv", "problem", "n", "sweeps"):
                continue
            start = time.process_time()
            row = annealed(name, n, count, sweeps, restarts)
            append([row | {"seconds": round(time.process_time() - start, 1)}], "annealed.csv")
            print(name, n, sweeps, flush=True)


def temper_all() -> None:
    """Fill `overlaps.csv` and `histograms.csv`."""
    for name, n, count, sweeps in TEMPERED:
        if (name, n) in known("overlaps.csv", "problem", "n"):
            continue
        start = time.process_time()
        moments, shapes = overlaps(name, n, count, sweeps)
        seconds = {"seconds": round(time.process_time() - start, 1)}
        append([row | seconds for row in moments], "overlaps.csv")
        append(shapes, "histograms.csv")
        print(name, n, flush=True)


def main() -> None:
    """Add what is missing to the tables; the record of where it came from at the end."""
    anneal_all()
    temper_all()
    seconds = pd.read_csv(HERE / "annealed.csv").seconds.sum()
    seconds += pd.read_csv(HERE / "overlaps.csv").groupby(["problem", "n"]).seconds.first().sum()
    config = {
        "problems": {
            name: dict(zip(("bits", "width", "alpha"), each, strict=True))
            for name, each in PROBLEMS.items()
        },
        "noise_variance": 0.1, "ridge": 0.0, "annealed": ANNEALED,
        "tempered": TEMPERED, "ladder": LADDER.tolist(),
        "replicas": 4, "bins": BINS.tolist(),
    }  # fmt: skip
    record = provenance("python book/results/ground_states/run.py", config, [SEED], seconds)
    write_json(record, HERE / "provenance.json")


if __name__ == "__main__":
    main()
