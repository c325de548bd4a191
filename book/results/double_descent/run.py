"""Exact ground states of small instances: is there a peak at the interpolation threshold?

Two bits of width 2, 0.1 label noise, ridge 0.001. All `4**n` weight vectors of an instance are
compared, so nothing depends on a search; the same instances are given to ridge regression, with
and without the box [-2, 2], as controls that do have a peak.

    python book/results/double_descent/run.py
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.linalg import solve
from scipy.optimize import lsq_linear

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import TeacherStudent, sample

HERE = Path(__file__).parent
WIDTH, RIDGE = 2.0, 1e-3
INSTANCES = {6: 4000, 12: 800}  # by the number of weights
ALPHAS = np.arange(1, 11) / 6  # whole numbers of samples
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


def controls(X, y, ridge):
    """Ridge regression, free and confined to the box."""
    n = X.shape[1]
    free = solve(X.T @ X + ridge * np.eye(n), X.T @ y, assume_a="pos")
    stacked = np.vstack([X, np.sqrt(ridge) * np.eye(n)])
    confined = lsq_linear(
        stacked, np.append(y, np.zeros(n)), (-WIDTH, WIDTH), method="bvls", tol=1e-12
    ).x
    return free, confined


def one(problem, n, rng):
    """Generalization error of the three, and training error of the ground state."""
    drawn = sample(problem, n, rng)
    w = ground_state(drawn.X, drawn.y, problem.codebook.levels, RIDGE)
    students = (w, *controls(drawn.X, drawn.y, RIDGE))
    errors = [np.mean((v - drawn.teacher) ** 2) for v in students]
    return [*errors, np.mean((drawn.y - drawn.X @ w) ** 2)]


def main():
    """Write `exact.csv` as it grows, and `provenance.json` at the end."""
    started, rows = time.perf_counter(), []
    names = ("ground_state", "free", "box", "ground_state_train")
    for n, count in INSTANCES.items():
        for alpha in ALPHAS:
            rng = np.random.default_rng([SEED, n, round(6 * alpha)])
            problem = TeacherStudent(uniform(2, WIDTH), alpha, ridge=RIDGE)
            found = np.array([one(problem, n, rng) for _ in range(count)])
            mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / np.sqrt(count)
            row = {"n": n, "samples": round(alpha * n), "instances": count}
            for k, name in enumerate(names):
                row |= {name: round(mean[k], 5), f"{name}_error": round(error[k], 5)}
            rows.append(row)
            pd.DataFrame(rows).to_csv(HERE / "exact.csv", index=False)
    config = {
        "bits": 2, "width": WIDTH, "ridge": RIDGE, "noise_variance": 0.1,
        "instances": INSTANCES, "alphas": ALPHAS.tolist(),
    }  # fmt: skip
    record = provenance(
        "python book/results/double_descent/run.py", config, [SEED], time.perf_counter() - started
    )
    write_json(record, HERE / "provenance.json")


if __name__ == "__main__":
    main()
