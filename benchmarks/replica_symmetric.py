"""Time to solve the replica-symmetric equations, beside peers and the exponentials it takes.

1. One solution (2 bits, T = 0.1) beside plain iteration of the same map, to the same fixed point:
   with `scipy.integrate.quad`, and with the trapezoid rule on 1,801 nodes in NumPy. Interleaved,
   medians over the rounds. The error is that of the order parameters against one reference.
2. One solution over bits and temperatures, and its floor: the exponentials in one evaluation of
   the map at the solution (Gaussian density, levels that take part, a logarithm for the entropy),
   times the evaluations made, times the measured time of one exponential.
3. Phase diagrams of width x alpha at T = 0.05 with their boundaries, for 1 to 4 bits.
4. Compilation: the first call of a fresh process without a cache.

    python benchmarks/replica_symmetric.py [--rounds N] [--grid N]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from math import exp

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numba
import numpy as np
import pandas as pd
from scipy.integrate import quad

from qgen_lab.codebooks import uniform
from qgen_lab.theory import TeacherStudent, phase_diagram, solve_rs
from qgen_lab.theory.quadrature import gaussian_rule
from qgen_lab.theory.scalar_channel import is_even, transitions

PROBLEM = TeacherStudent(uniform(2, 1.5), 1.5, temperature=0.1)
RESIDUAL = 1e-11  # of the plain iterations; ours goes on to rounding
FIRST_CALL = """
import time
from qgen_lab.codebooks import uniform
from qgen_lab.theory import TeacherStudent, solve_rs
problem = TeacherStudent(uniform(2, 1.5), 1.5, temperature={temperature})
start = time.perf_counter()
solve_rs(problem)
print(time.perf_counter() - start)
"""


def mean_weight(problem, field, stiffness):
    """Mean of one weight at each value of the field."""
    levels = problem.codebook.levels
    energy = stiffness * (levels - field) ** 2 / 2 + problem.ridge * levels**2 / 2
    weight = np.exp((energy.min(axis=-1, keepdims=True) - energy) / problem.temperature)
    return weight @ levels / weight.sum(axis=-1)


def iterated(problem, averages):
    """Slope, mean square and passes of the plain map; `averages` gives E[r <w>] and E[<w>^2]."""
    alpha, rho = problem.alpha, problem.signal_variance
    stiffness, noise = alpha, (rho + problem.noise_variance) / alpha
    for passes in range(1, 10_000):
        covariance, q = averages(problem, stiffness, rho + noise)
        slope = covariance / (rho + noise)
        new_stiffness = alpha * stiffness / (stiffness + slope)
        new_noise = (rho + problem.noise_variance - 2 * rho * slope + q) / alpha
        change = max(abs(new_stiffness / stiffness - 1), abs(new_noise / noise - 1))
        stiffness, noise = new_stiffness, new_noise
        if change < RESIDUAL:
            return slope, q, passes
    raise RuntimeError("the plain map did not converge")


def by_quad(problem, stiffness, variance):
    deviation = np.sqrt(variance)

    def integral(f):
        def integrand(r):
            density = exp(-0.5 * (r / deviation) ** 2) / (np.sqrt(2 * np.pi) * deviation)
            return density * f(r, mean_weight(problem, r, stiffness))

        return quad(integrand, -9 * deviation, 9 * deviation, epsabs=0, epsrel=1e-11, limit=500)[0]

    return integral(lambda r, w: r * w), integral(lambda r, w: w * w)


NODES = np.linspace(-9, 9, 1801)
WEIGHTS = np.exp(-(NODES**2) / 2) * (NODES[1] - NODES[0]) / np.sqrt(2 * np.pi)


def by_trapezoid(problem, stiffness, variance):
    field = np.sqrt(variance) * NODES
    w = mean_weight(problem, field[:, None], stiffness)
    return WEIGHTS @ (field * w), WEIGHTS @ w**2


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def seconds_a_call(call):
    """Over as many calls as fill 50 ms: a single short one would time the caches."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < 0.05:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def against_peers(rounds):
    reference = iterated(PROBLEM, by_quad)[:2]
    solution = solve_rs(PROBLEM)
    calls = {
        "solve_rs": lambda: solve_rs(PROBLEM),
        "quad": lambda: iterated(PROBLEM, by_quad),
        "trapezoid": lambda: iterated(PROBLEM, by_trapezoid),
    }
    times = pd.DataFrame(
        [{name: seconds_a_call(call) for name, call in calls.items()} for _ in range(rounds)]
    ).median()
    found = {
        "solve_rs": (solution.overlap, solution.replica_overlap, solution.iterations),
        "quad": (*reference, iterated(PROBLEM, by_quad)[2]),
        "trapezoid": iterated(PROBLEM, by_trapezoid),
    }
    error = {name: np.abs(np.subtract(f[:2], reference)).max() for name, f in found.items()}
    return pd.DataFrame(
        {
            "ms": times * 1e3,
            "ratio to solve_rs": times / times["solve_rs"],
            "evaluations": {name: f[2] for name, f in found.items()},
            "distance to quad": {name: f"{e:.0e}" for name, e in error.items()},
        }
    )


@numba.njit
def _exponentials(x, out):
    for k in range(x.size):
        out[k] = exp(x[k])


def seconds_of_one_exponential():
    x = np.random.default_rng(0).uniform(-40, 0, 4096)
    out = np.empty_like(x)
    _exponentials(x, out)
    return min(seconds(lambda: _exponentials(x, out))[0] for _ in range(200)) / x.size


def exponentials(problem, solution):
    """Exponentials and logarithms in one evaluation of the map at the solution."""
    levels, alpha = problem.codebook.levels.copy(), problem.alpha
    stiffness = alpha / (1 + solution.susceptibility)
    if problem.temperature == 0:  # a density and an error function a threshold
        return 2 * (levels.size - 1)
    error = 1 + problem.noise_variance - 2 * solution.overlap + solution.replica_overlap
    centres, sizes = transitions(levels, stiffness, problem.ridge, problem.temperature)
    nodes, _ = gaussian_rule(np.sqrt(1 + error / alpha), centres, sizes, is_even(levels))
    curvature = stiffness + problem.ridge
    distance = (levels - nodes[:, None] * stiffness / curvature) ** 2
    excess = (distance - distance.min(axis=1, keepdims=True)) * curvature / problem.temperature
    taking_part = (excess < 90).sum() - nodes.size  # the nearest level's weight is 1
    return 2 * nodes.size + taking_part


def over_bits_and_temperatures(rounds):
    one = seconds_of_one_exponential()
    rows = []
    for bits, width in ((1, 1.0), (2, 1.5), (3, 2.0), (4, 2.3), (8, 3.0)):
        for temperature in (0.0, 1e-5, 1e-3, 0.1):
            problem = TeacherStudent(uniform(bits, width), 1.5, temperature=temperature)
            solution = solve_rs(problem)
            took = np.median([seconds_a_call(lambda p=problem: solve_rs(p)) for _ in range(rounds)])
            floor = exponentials(problem, solution) * solution.iterations * one
            rows.append(
                {
                    "bits": bits,
                    "T": temperature,
                    "µs": took * 1e6,
                    "evaluations": solution.iterations,
                    "floor, µs": floor * 1e6,
                    "ratio to floor": took / floor,
                }
            )
    return one, pd.DataFrame(rows).set_index(["bits", "T"])


def phase_diagrams(grid):
    rows = []
    widths, alphas = np.linspace(0.2, 5, grid), np.linspace(0.2, 5, grid)
    for bits in (1, 2, 3, 4):
        solving, diagram = seconds(lambda b=bits: phase_diagram(b, widths, alphas, 0.05))
        tracing, boundary = seconds(diagram.boundary)
        rows.append(
            {
                "bits": bits,
                "solving, s": solving,
                "boundary, s": tracing,
                "points": len(boundary.points),
                "converged": diagram["converged"].mean(),
            }
        )
    return pd.DataFrame(rows).set_index("bits")


def first_call(temperature):
    with tempfile.TemporaryDirectory() as folder:
        code = FIRST_CALL.format(temperature=temperature)
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--grid", type=int, default=100)
    arguments = parser.parse_args()
    for temperature in (0.0, 0.1):
        solve_rs(TeacherStudent(uniform(2, 1.5), 1.5, temperature=temperature))

    print(f"One solution, 2 bits, T = 0.1; {arguments.rounds} rounds")
    print(against_peers(arguments.rounds).round(3).to_string(), end="\n\n")
    one, table = over_bits_and_temperatures(arguments.rounds)
    print(f"One solution; the floor is exponentials of {one * 1e9:.1f} ns")
    print(table.round(1).to_string(), end="\n\n")
    grid, threads = arguments.grid, numba.config.NUMBA_NUM_THREADS
    table = phase_diagrams(grid)
    print(f"Phase diagrams, {grid} x {grid} in width and alpha at T = 0.05, {threads} threads")
    print(table.round(2).to_string())
    print(f"together {table[['solving, s', 'boundary, s']].to_numpy().sum():.1f} s", end="\n\n")
    print("First call of a fresh process without a cache")
    for temperature in (0.1, 0.0):
        print(f"T = {temperature}: {first_call(temperature):.1f} s")


if __name__ == "__main__":
    main()
