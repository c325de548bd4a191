"""CPU time to enumerate a state, beside NumPy on blocks of states and beside the exponential alone.

Exact Gibbs averages at one temperature. The twin lists the states in blocks of 4,096, takes their
energies by matrix products, and adds up Boltzmann factors, energies and weights; its reference
energy is given to it. The floor is one exponential a state, by NumPy. One thread, interleaved,
medians over the rounds.

    python benchmarks/enumeration.py [--rounds N]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from qgen_lab.codebooks import uniform
from qgen_lab.theory import TeacherStudent, enumerate_states, sample
from qgen_lab.theory.finite_size import quadratic_form

CASES = {(1, 16): 1.0, (1, 20): 1.0, (2, 10): 1.5, (3, 6): 2.0}  # bits, weights: width
BLOCK = 4096


def by_blocks(instance, problem, reference: float) -> tuple[float, np.ndarray]:
    """Mean energy and mean weights, states in the order of counting."""
    gram, pull, offset = quadratic_form(instance, problem)
    levels, n = problem.codebook.levels, pull.size
    place = levels.size ** np.arange(n)
    total, heat, weights = 0.0, 0.0, np.zeros(n)
    for start in range(0, levels.size**n, BLOCK):
        states = levels[np.arange(start, start + BLOCK)[:, None] // place % levels.size]
        energies = ((states @ gram / 2 - pull) * states).sum(axis=1) + offset
        factors = np.exp((reference - energies) / problem.temperature)
        total += factors.sum()
        heat += factors @ energies
        weights += factors @ states
    return heat / total / n, weights / total


def seconds(call) -> float:
    """CPU time of one call: other work on the machine hardly touches it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    calls, states = {}, {}
    for (bits, n), width in CASES.items():
        problem = TeacherStudent(uniform(bits, width), 1.5, temperature=0.3)
        drawn = sample(problem, n, seed=0)
        exact = enumerate_states(drawn, problem)
        reference = exact.ground_state.energy * n
        energy, weights = by_blocks(drawn, problem, reference)
        np.testing.assert_allclose(energy, exact.energy, rtol=1e-10)
        np.testing.assert_allclose(weights @ weights / n, exact.replica_overlap, rtol=1e-10)
        name = f"{bits} bit, {n} weights"
        states[name] = len(problem.codebook) ** n
        exponents = -np.random.default_rng(0).random(states[name])
        calls[name, "enumerate_states"] = lambda d=drawn, p=problem: enumerate_states(d, p)
        calls[name, "NumPy, blocks"] = lambda d=drawn, p=problem, r=reference: by_blocks(d, p, r)
        calls[name, "floor"] = lambda x=exponents: np.exp(x)
    medians = pd.DataFrame(
        [{key: seconds(call) for key, call in calls.items()} for _ in range(rounds)]
    ).median()
    medians.index = pd.MultiIndex.from_tuples(medians.index)
    table = medians.unstack(sort=False).mul(1e9).div(pd.Series(states), axis=0)
    table["NumPy / ours"] = table["NumPy, blocks"] / table["enumerate_states"]
    table["ours / floor"] = table["enumerate_states"] / table["floor"]
    print(f"CPU nanoseconds a state, one thread, {rounds} rounds")
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
