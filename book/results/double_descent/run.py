"""Small and middle-sized instances: is there a peak at the interpolation threshold?

Two bits of width 2, label noise 0.1, a small ridge. Instances of 6 and 12 weights are solved
exactly: all `4**n` weight vectors are compared, so nothing depends on a search. Instances of 200
weights are annealed. The same instances are given to ridge regression confined to the box
[-2, 2] (infinitely many levels), as a control that does have a peak.

    python book/results/double_descent/run.py
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import lsq_linear

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import TeacherStudent, sample
from qgen_lab.theory.monte_carlo import anneal

HERE = Path(__file__).parent
WIDTH, RIDGES = 2.0, (1e-2, 1e-3)
INSTANCES = {200: 24, 6: 2000, 12: 200}  # by the number of weights
EXACT_UP_TO, SWEEPS = 12, 20_000
ALPHAS = np.arange(1, 11) / 6  # whole numbers of samples for 6 and 12 weights
SEED = 20261121


def vectors(levels, n):
    """All weight vectors of length n, one a row."""
    return np.stack(np.meshgrid(*[levels] * n), axis=-1).reshape(-1, n)


def ground_state(X, y, levels, ridge):
    """Weights of least energy: each half's vectors once, and all their pairs as a product."""
    n = X.shape[1]
    half = n // 2
    left, right = vectors(levels, half), vectors(levels, n - half)
    gram, field = X.T @ X + ridge * np.eye(n), X.T @ y
    coupling = left @ gram[:half, half:]
    own = [
        np.einsum("ij,jk,ik->i", side, gram[part, part], side) / 2 - side @ field[part]
        for side, part in ((left, slice(half)), (right, slice(half, n)))
    ]
    best, weights = np.inf, None
    for start in range(0, len(left), 256):
        energy = coupling[start : start + 256] @ right.T
        energy += own[0][start : start + 256, None]
        energy += own[1]
        i, j = divmod(int(energy.argmin()), len(right))
        if energy[i, j] < best:
            best, weights = energy[i, j], np.concatenate([left[start + i], right[j]])
    return weights


def confined(X, y, ridge):
    """Ridge regression within the box."""
    n = X.shape[1]
    stacked = np.vstack([X, np.sqrt(ridge) * np.eye(n)])
    target = np.append(y, np.zeros(n))
    return lsq_linear(stacked, target, (-WIDTH, WIDTH), method="bvls", tol=1e-12).x


def one(problem, n, rng):
    """Errors on one instance: generalization and training, of the quantized fit and of the box."""
    drawn = sample(problem, n, rng)
    if n <= EXACT_UP_TO:
        w = ground_state(drawn.X, drawn.y, problem.codebook.levels, problem.ridge)
    else:
        w = anneal(drawn, problem, SWEEPS, rng).weights
    students = (w, confined(drawn.X, drawn.y, problem.ridge))
    return [
        error
        for v in students
        for error in (np.mean((v - drawn.teacher) ** 2), np.mean((drawn.y - drawn.X @ v) ** 2))
    ]


def main():
    """Write `instances.csv` as it grows, and `provenance.json` at the end."""
    started, rows = time.perf_counter(), []
    names = ("gen_error", "train_error", "box_gen_error", "box_train_error")
    for n, count in INSTANCES.items():
        for ridge in RIDGES:
            for alpha in ALPHAS:
                rng = np.random.default_rng([SEED, n, round(6 * alpha)])  # alike for all ridges
                problem = TeacherStudent(uniform(2, WIDTH), alpha, ridge=ridge)
                found = np.array([one(problem, n, rng) for _ in range(count)])
                mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / np.sqrt(count)
                row = {"n": n, "ridge": ridge, "alpha": round(alpha, 6), "instances": count}
                for k, name in enumerate(names):
                    row |= {name: f"{mean[k]:.5f}", f"{name}_se": f"{error[k]:.5f}"}
                rows.append(row)
                pd.DataFrame(rows).to_csv(HERE / "instances.csv", index=False)
    config = {
        "bits": 2, "width": WIDTH, "noise_variance": 0.1, "ridges": RIDGES,
        "instances": INSTANCES, "alphas": ALPHAS.tolist(), "sweeps": SWEEPS,
    }  # fmt: skip
    record = provenance(
        "python book/results/double_descent/run.py", config, [SEED], time.perf_counter() - started
    )
    write_json(record, HERE / "provenance.json")


if __name__ == "__main__":
    main()
