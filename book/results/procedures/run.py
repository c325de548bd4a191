"""Procedures for quantized least squares, on the same instances.

    OMP_NUM_THREADS=1 python book/results/procedures/run.py

Five experiments; rules of decision were fixed before the numbers.

*Isotropic* and *correlated* inputs: every procedure on the same instances, once at the ridge that
the energies are compared at, once at the ridge of least mean error, which is chosen for each
procedure among `RIDGES` on other instances. One procedure beats another if the 95% interval of
the paired difference, Bonferroni over the procedures, leaves out zero. The ranking turns round at
the exponent where the mean difference to the rounded ridge, linear between the exponents listed,
first falls to zero; its interval is the bootstrap's over instances.

*Diabetes*: standardised features with squares and products. On each half of the data the evidence
is maximised for the variances of noise and signal, which are the problem's figures; labels are in
units of the signal's standard deviation. A predicted width holds if the mean held-out error there
is at most 5% above the least mean error of that procedure over the widths listed.

*Learned step*: LSQ's in the linear model, in plain NumPy. *Trajectories*: two runs from different
starts, side by side. Times are seconds of one processor. What is done is kept in `parts`.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_diabetes

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.theory import (
    Instance,
    TeacherStudent,
    anneal,
    at_temperature,
    configuration,
    coordinate_descent,
    decimate,
    largest_stable_rate,
    recommend_width,
    ridge_weights,
    round_compensated,
    round_ridge,
    sample,
    schedules,
    straight_through_descent,
)

HERE = Path(__file__).parent
PARTS = HERE / "parts"

N = 200
NOISE = 0.1
POWERS = (1, 2, 4, 16)
CONSTANT_STEPS, AVERAGED_FROM, COOLDOWN_STEPS = 3000, 1000, 1000
SWEEPS = 2000
WARMTH = 2.0  # temperature of message passing over that where it is stable no more
RIDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
TUNING, TESTS = range(12), range(24)  # instances; the first 16 where inputs are independent

ISOTROPIC = ((1, 0.8, 2.0), (2, 1.5, 1.0), (2, 1.5, 2.0), (2, 1.5, 6.0), (3, 2.0, 2.0))
CORRELATED = (2, 1.5, 2.0)  # bits, width, alpha
EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5)

SPLITS = range(20)
REAL_BITS = (1, 2, 3)
REAL_WIDTHS = tuple(np.geomspace(0.35, 3.5, 10).round(3).tolist())
REAL_POWERS = (2, 4)

LEARNED = {"n": 500, "alpha": 2.0, "bits": (1, 2, 3, 4), "instances": 5, "steps": 6000}
LEARNED_RUNS = (  # first step in units of LSQ's own, masked, rate over the largest stable one
    (0.5, True, 0.25),
    (2.0, True, 0.25),
    (1.0, False, 0.25),
    (1.0, True, 0.05),
)
FIXED = [(2.0, 2, width) for width in (1.0, 1.15, 1.3, 1.45, 1.6, 1.8)]  # alpha, bits, width
FIXED += [(2.0, 3, width) for width in (1.5, 1.65, 1.8, 1.95, 2.1, 2.3)]
FIXED += [(a, b, w) for a in (1.3, 4.0, 8.0) for b, w in ((1, 0.8), (2, 1.3), (3, 2.0), (4, 3.0))]

FOLLOWED = {"n": 400, "exponents": (0.0, 1.5), "instances": 5, "steps": 2000, "power": 4}


# --- the procedures -----------------------------------------------------------------------------


def solve(
    instance: Instance, problem: TeacherStudent, seed: int, wanted: set[str], powers=POWERS
) -> dict[str, tuple[np.ndarray, float]]:
    """Weights and seconds of every procedure wanted, at the problem's ridge.

    Straight-through training starts from the tuned ridge solution, with half of the largest stable
    rate; a cooldown goes on from the end of the constant rate, and its seconds count both.
    """
    ridge = problem.ridge
    simple: dict[str, Callable] = {
        "rounded ridge": lambda: round_ridge(instance, problem, ridge).weights,
        "compensated rounding": lambda: round_compensated(instance, problem, ridge).weights,
        "coordinate descent": lambda: coordinate_descent(instance, problem).weights,
        "annealing": lambda: anneal(instance, problem, SWEEPS, seed).weights,
        "message passing, decimated": lambda: message_passing(instance, problem),
    }
    found = {name: timed(simple[name]) for name in simple if name in wanted}
    trained = {f"straight-through, power {power}": power for power in powers}
    if not wanted & {"straight-through, constant", "rounded average", *trained}:
        return found
    rate = largest_stable_rate(instance, problem) / 2
    train = partial(straight_through_descent, instance, problem)
    rates = schedules.constant(rate, CONSTANT_STEPS)
    start = ridge_weights(instance, problem)
    begin, spent = timed(lambda: train(rates, start=start, average_from=AVERAGED_FROM))
    found["straight-through, constant"] = begin.weights, spent
    found["rounded average"] = begin.rounded, spent
    for name, power in trained.items():
        if name in wanted:
            rates = schedules.cooldown(rate, COOLDOWN_STEPS, power)
            end, more = timed(lambda rates=rates: train(rates, start=begin.latent))
            found[name] = end.weights, spent + more
    return {name: result for name, result in found.items() if name in wanted}


def message_passing(instance: Instance, problem: TeacherStudent) -> np.ndarray:
    """Decimation, warm enough for message passing to settle on independent inputs."""
    warm = replace(problem, temperature=WARMTH * stability_edge(problem))
    return decimate(instance, warm).weights


_edges: dict[tuple, float] = {}


def stability_edge(problem: TeacherStudent) -> float:
    """Temperature below which message passing does not settle; solved once a problem."""
    key = (problem.codebook, problem.alpha, problem.ridge)
    if key not in _edges:
        _edges[key] = float(at_temperature(problem))
    return _edges[key]


def timed(function: Callable) -> tuple:
    """What the function returns, and the seconds of one processor that it took."""
    start = time.process_time()
    return function(), time.process_time() - start


NAMES = [
    "rounded ridge", "compensated rounding", "coordinate descent", "rounded average",
    "straight-through, constant", *(f"straight-through, power {power}" for power in POWERS),
    "message passing, decimated", "annealing",
]  # fmt: skip


# --- isotropic and correlated inputs ------------------------------------------------------------


def tuning(problem: TeacherStudent, exponent: float, seed: int) -> pd.DataFrame:
    """Error of every procedure at every ridge, on an instance that is not tested on."""
    instance = sample(problem, N, np.random.default_rng([0, seed]), exponent)
    rows = []
    for ridge in RIDGES:
        at, wanted = replace(problem, ridge=ridge), set(NAMES)
        if exponent > 0 and ridge != NOISE:  # does not settle at any
            wanted.remove("message passing, decimated")
        for name, (weights, _) in solve(instance, at, seed, wanted).items():
            rows.append((name, ridge, float(instance.gen_error(weights))))
        if ridge > 0:
            error = float(instance.gen_error(ridge_weights(instance, problem, ridge)))
            rows.append(("full precision", ridge, error))
    return pd.DataFrame(rows, columns=["procedure", "ridge", "gen_error"])


def test(
    problem: TeacherStudent, exponent: float, seed: int, chosen: dict[str, float]
) -> pd.DataFrame:
    """Every procedure on one instance: error at the chosen ridge, energy at the problem's."""
    instance = sample(problem, N, np.random.default_rng([1, seed]), exponent)
    low = solve(instance, problem, seed, set(NAMES))
    rows = []
    for ridge in sorted(set(chosen.values())):
        wanted = {name for name in NAMES if chosen[name] == ridge}
        at = replace(problem, ridge=ridge)
        found = low if at == problem else solve(instance, at, seed, wanted)
        for name in wanted:
            (weights, _), (cold, seconds) = found[name], low[name]
            energy = configuration(instance, problem, cold).energy
            rows.append((name, instance.gen_error(weights), energy, seconds))
    error = instance.gen_error(ridge_weights(instance, problem, chosen["full precision"]))
    rows.append(("full precision", error, np.nan, np.nan))
    columns = ["procedure", "gen_error", "energy", "seconds"]
    return pd.DataFrame(rows, columns=columns).assign(seed=seed)


def compare(
    name: str, problem: TeacherStudent, exponent: float, tests: range
) -> tuple[pd.DataFrame, ...]:
    """Tuning, then tests; both tables."""
    tuned = pd.concat(
        kept(f"{name}_tuning_{seed}", tuning, problem, exponent, seed) for seed in TUNING
    )
    means = tuned.groupby(["procedure", "ridge"], sort=False).gen_error.mean()
    chosen = {each: float(means[each].idxmin()) for each in ["full precision", *NAMES]}
    tested = pd.concat(
        kept(f"{name}_test_{seed}", test, problem, exponent, seed, chosen) for seed in tests
    )
    return means.reset_index(), tested


def isotropic() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Independent inputs: several bits and sample ratios; energies without a ridge."""
    tables = []
    for bits, width, alpha in ISOTROPIC:
        problem = TeacherStudent(uniform(bits, width), alpha, NOISE)
        pair = compare(f"isotropic_{bits}_{alpha:g}", problem, 0.0, TESTS[:16])
        tables.append([t.assign(bits=bits, width=width, alpha=alpha) for t in pair])
    return tuple(pd.concat(each) for each in zip(*tables, strict=True))


def correlated() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectra that fall as a power; energies at the ridge of the noise."""
    bits, width, alpha = CORRELATED
    problem = TeacherStudent(uniform(bits, width), alpha, NOISE, ridge=NOISE)
    tables = []
    for exponent in EXPONENTS:
        pair = compare(f"correlated_{exponent:g}", problem, exponent, TESTS)
        tables.append([t.assign(exponent=exponent) for t in pair])
    return tuple(pd.concat(each) for each in zip(*tables, strict=True))


# --- real features ------------------------------------------------------------------------------


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Ten features, their products and squares (but that of a feature of two values), labels."""
    data, labels = load_diabetes(return_X_y=True, scaled=False)
    data = (data - data.mean(axis=0)) / data.std(axis=0)
    first, second = np.triu_indices(data.shape[1])
    two_valued = np.array([np.unique(column).size == 2 for column in data.T])
    kept_pairs = ~((first == second) & two_valued[first])
    products = (data[:, first] * data[:, second])[:, kept_pairs]
    return np.hstack([data, products]), labels


def evidence(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Variances of noise and weights that maximise the likelihood of the labels."""
    squares, basis = np.linalg.eigh(X @ X.T)
    squares, projections = np.maximum(squares, 0), np.square(basis.T @ y)

    def loss(log_ratio: float) -> float:
        spread = squares + np.exp(log_ratio)
        return y.size * np.log(np.mean(projections / spread)) + np.log(spread).sum()

    ratio = np.exp(minimize_scalar(loss, bounds=(-8, 8), method="bounded").x)
    signal = float(np.mean(projections / (squares + ratio)))
    return float(ratio * signal), signal


def predicted_widths(alpha: float, ratio: float) -> dict[str, list[float]]:
    """Best width for each number of bits and each thing deployed; signal variance 1."""
    best = {}
    for deployed in set(DEPLOYED.values()):
        advice = recommend_width(REAL_BITS, alpha, ratio, ratio, deployed=deployed)
        best[deployed] = advice.width_per_signal_std.tolist()
    return best


DEPLOYED = {
    "rounded ridge": "rounded ridge", "rounded average": "rounded average",
    "straight-through, constant": "last iterate",
    "compensated rounding": "ground state",
    "coordinate descent": "ground state", "annealing": "ground state",
    **{f"straight-through, power {power}": "ground state" for power in REAL_POWERS},
}  # fmt: skip


def split(seed: int) -> pd.DataFrame:
    """Held-out errors on one half after learning on the other, over the variance of the labels."""
    features, labels = diabetes()
    order = np.random.default_rng([2, seed]).permutation(labels.size)
    train, held_out = np.array_split(order, 2)
    n = features.shape[1]
    mean, std = features[train].mean(axis=0), features[train].std(axis=0)
    X = (features - mean) / std / np.sqrt(n)
    y = labels - labels[train].mean()
    noise, signal = evidence(X[train], y[train])
    ratio, y = noise / signal, y / np.sqrt(signal)
    alpha = train.size / n
    instance = Instance(X[train], y[train], np.zeros(n))

    def error(weights: np.ndarray) -> float:
        return float(np.mean((y[held_out] - X[held_out] @ weights) ** 2) / y[held_out].var())

    rows = []
    best = predicted_widths(alpha, ratio)
    for place, bits in enumerate(REAL_BITS):
        listed = {width: set(DEPLOYED) for width in REAL_WIDTHS}
        for name, what in DEPLOYED.items():
            listed.setdefault(best[what][place], set()).add(name)
        for width, wanted in listed.items():
            problem = TeacherStudent(uniform(bits, width), alpha, ratio, ratio)
            found = solve(instance, problem, seed, wanted, REAL_POWERS)
            columns = {name: error(weights) for name, (weights, _) in found.items()}
            row = {"seed": seed, "bits": bits, "width": width}
            rows.append(row | {"predicted": width not in REAL_WIDTHS} | columns)
    full = error(ridge_weights(instance, TeacherStudent(uniform(1, 1.0), alpha, ratio)))
    return pd.DataFrame(rows).assign(
        ratio=ratio, explained=signal / (signal + noise), full_precision=full
    )


def spectrum() -> dict:
    """How fast the eigenvalues of the features' correlations fall."""
    features, _ = diabetes()
    values = np.sort(np.linalg.eigvalsh(np.corrcoef(features.T)))[::-1]
    rank = np.arange(1, values.size + 1)
    middle = slice(0, values.size // 2)
    slope = np.polyfit(np.log(rank[middle]), np.log(values[middle]), 1)[0]
    return {
        "weights": int(values.size),
        "exponent_of_first_half": round(float(-slope), 3),
        "largest": round(float(values[0]), 3),
        "median": round(float(np.median(values)), 4),
    }


# --- LSQ's learned step -------------------------------------------------------------------------


def learned_problem(bits: int, width: float = 1.0, alpha: float | None = None) -> TeacherStudent:
    """The problem in which steps are learned."""
    return TeacherStudent(uniform(bits, width), alpha or LEARNED["alpha"], NOISE)


def learn_step(seed: int, bits: int, start: float, masked: bool, speed: float) -> dict:
    """LSQ on one instance: gradient descent on latent weights and step together, small rates."""
    problem = learned_problem(bits)
    instance = sample(problem, LEARNED["n"], np.random.default_rng([3, seed]))
    gram, pull = instance.X.T @ instance.X, instance.X.T @ instance.y
    rate = speed * largest_stable_rate(instance, problem)
    outer = (2**bits - 1) / 2
    latent = ridge_weights(instance, problem)
    step = start * 2 * np.abs(latent).mean() / np.sqrt(outer)
    step_rate = rate / (latent.size * outer)
    total, errors, losses, steps, beyond = 0.0, [], [], [], []
    for t in range(LEARNED["steps"]):
        scaled = latent / step
        codes = np.clip(np.floor(scaled) + 0.5, -outer, outer)
        weights = step * codes
        gradient = gram @ weights - pull
        inside = np.abs(scaled) <= outer
        if 2 * t >= LEARNED["steps"]:
            total = total + weights
            steps.append(step)
            errors.append(instance.gen_error(weights))
            losses.append((weights @ (gradient - pull) + instance.y @ instance.y) / instance.y.size)
            beyond.append(1 - inside.mean())
        step = step - step_rate * (gradient @ np.where(inside, codes - scaled, codes))
        latent = latent - rate * (gradient * inside if masked else gradient)
    settled, average = np.mean(steps), total / len(steps)
    rounded = uniform(bits, settled * outer).quantize(average)
    return {
        "seed": seed, "bits": bits, "start": start, "masked": masked, "speed": speed,
        "width": settled * outer, "width_std": np.std(steps) * outer, "beyond": np.mean(beyond),
        "iterate": np.mean(errors), "train_error": np.mean(losses),
        "rounded": instance.gen_error(rounded), "average": instance.gen_error(average),
    }  # fmt: skip


def learned_step(seed: int) -> pd.DataFrame:
    """One instance: LSQ from several starts, masked or not, and at a slower rate."""
    return pd.DataFrame(
        [learn_step(seed, bits, *run) for bits in LEARNED["bits"] for run in LEARNED_RUNS]
    )


def fixed_step(seed: int) -> pd.DataFrame:
    """Training at fixed widths: means over the second half of the steps, and of the average."""
    rows = []
    for alpha, bits, width in FIXED:
        problem = learned_problem(bits, width, alpha)
        instance = sample(problem, LEARNED["n"], np.random.default_rng([3, seed]))
        rate = largest_stable_rate(instance, problem) / 4
        run = straight_through_descent(
            instance, problem, schedules.constant(rate, 3000),
            start=ridge_weights(instance, problem), record_at=range(1500, 3001, 5),
        )  # fmt: skip
        average = configuration(instance, problem, run.average)
        rows.append({
            "seed": seed, "alpha": alpha, "bits": bits, "width": width,
            "iterate": run.gen_error.mean(), "train_error": run.train_error.mean(),
            "average": average.gen_error, "average_train_error": average.train_error,
            "rounded": instance.gen_error(run.rounded),
            "moving": np.mean(np.abs(run.average) < width * (1 - 1e-6)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def best_fixed_widths() -> pd.DataFrame:
    """The theory's best widths for what is deployed."""
    rows = []
    for deployed in ("last iterate", "rounded average", "ground state"):
        advice = recommend_width(LEARNED["bits"], LEARNED["alpha"], NOISE, deployed=deployed)
        columns = {"width": advice.width_per_signal_std, "gen_error": advice.gen_error}
        rows.append(pd.DataFrame({"bits": LEARNED["bits"], "deployed": deployed} | columns))
    return pd.concat(rows)


# --- trajectories -------------------------------------------------------------------------------


def trajectory(exponent: float, seed: int) -> pd.DataFrame:
    """Two runs from different starts, with what they share; then each goes on in two ways."""
    bits, width, alpha = CORRELATED
    problem = TeacherStudent(uniform(bits, width), alpha, NOISE, ridge=NOISE)
    rng = np.random.default_rng([4, seed])
    instance = sample(problem, FOLLOWED["n"], rng, exponent)
    steps, rate = FOLLOWED["steps"], largest_stable_rate(instance, problem) / 2
    starts = np.stack([np.zeros(FOLLOWED["n"]), rng.standard_normal(FOLLOWED["n"])])
    early = np.unique(np.geomspace(1, steps, 24).astype(int))
    late = steps - np.unique(np.geomspace(1, steps, 24).astype(int))[::-1]
    late = np.append(late[late > 0], steps)
    constant = schedules.constant(rate, steps)
    table, latent = followed(instance, problem, constant, early, starts)
    tables = [table.assign(schedule="beginning")]
    falling = schedules.cooldown(rate, steps, FOLLOWED["power"])
    for name, rates in (("constant", constant), ("cooldown", falling)):
        table, _ = followed(instance, problem, rates, late, latent)
        tables.append(table.assign(schedule=name))
    return pd.concat(tables).assign(exponent=exponent, seed=seed)


def followed(instance, problem, rates, at, latent) -> tuple[pd.DataFrame, np.ndarray]:
    """Figures of both runs at the steps listed, averaged over the two; stretch by stretch."""
    rows, done = [], 0
    for step in at:
        run = straight_through_descent(instance, problem, rates[done:step], start=latent)
        latent, done = run.latent, step
        rows.append({
            "step": step, "gen_error": run.gen_error[-1].mean(), "energy": run.energy[-1].mean(),
            "flip_share": run.flip_share[-1].mean(),
            "overlap": np.mean(run.weights[0] * run.weights[1]),
            "self_overlap": np.mean(run.weights**2),
            "agreement": np.mean(run.weights[0] == run.weights[1]),
        })  # fmt: skip
    return pd.DataFrame(rows), latent


# --- all of it ----------------------------------------------------------------------------------


def kept(name: str, function: Callable[..., pd.DataFrame], *arguments) -> pd.DataFrame:
    """The table that `function` makes, from `parts` if it is there; its seconds in `attrs`."""
    path = PARTS / f"{name}.pkl"
    if not path.exists():
        table, seconds = timed(lambda: function(*arguments))
        pd.to_pickle((table, seconds), path)
        print(name, round(seconds, 1), flush=True)
    table, seconds = pd.read_pickle(path)
    _seconds[name] = seconds
    return table


_seconds: dict[str, float] = {}


def write(name: str, table: pd.DataFrame) -> None:
    """Store a table beside this script."""
    table.to_csv(HERE / name, index=False, float_format="%.4g")


def write_comparison(name: str, tuned: pd.DataFrame, tested: pd.DataFrame, case: list[str]) -> None:
    """Means that the ridge was chosen by; instances with a column a procedure; median seconds."""
    write(f"{name}_tuning.csv", tuned)
    names = ["full precision", *NAMES]
    wide = [
        tested.pivot(index=[*case, "seed"], columns="procedure", values=what)[names]
        .assign(quantity=what)
        .set_index("quantity", append=True)
        for what in ("gen_error", "energy")
    ]
    write(f"{name}.csv", pd.concat(wide).reset_index())
    seconds = tested.groupby([*case, "procedure"], sort=False).seconds.median()
    write(f"{name}_seconds.csv", seconds.unstack()[NAMES].reset_index())


def configuration_record() -> dict:
    """All that the tables depend on."""
    return {
        "n": N, "noise_variance": NOISE, "isotropic": ISOTROPIC, "correlated": CORRELATED,
        "exponents": EXPONENTS, "ridges": RIDGES, "powers": POWERS,
        "steps": [CONSTANT_STEPS, AVERAGED_FROM, COOLDOWN_STEPS], "sweeps": SWEEPS,
        "warmth": WARMTH, "tuning_seeds": list(TUNING), "diabetes": spectrum(),
        "splits": len(SPLITS), "real_bits": REAL_BITS, "real_widths": REAL_WIDTHS,
        "learned_step": LEARNED, "learned_runs": LEARNED_RUNS, "fixed_step": FIXED,
        "trajectories": FOLLOWED,
    }  # fmt: skip


def main():
    """Run what is missing, then write the tables."""
    PARTS.mkdir(exist_ok=True)
    write_comparison("correlated", *correlated(), ["exponent"])
    write_comparison("isotropic", *isotropic(), ["bits", "width", "alpha"])
    write("diabetes.csv", pd.concat(kept(f"split_{seed}", split, seed) for seed in SPLITS))
    instances = range(LEARNED["instances"])
    learned = [kept(f"learned_{seed}", learned_step, seed) for seed in instances]
    write("learned_step.csv", pd.concat(learned))
    write("fixed_step.csv", pd.concat(kept(f"fixed_{s}", fixed_step, s) for s in instances))
    write("best_widths.csv", kept("best_widths", best_fixed_widths))
    courses = pd.concat(
        kept(f"trajectory_{exponent:g}_{seed}", trajectory, exponent, seed)
        for exponent in FOLLOWED["exponents"]
        for seed in range(FOLLOWED["instances"])
    )
    grouped = courses.drop(columns="seed").groupby(["exponent", "schedule", "step"], sort=False)
    errors = grouped.sem().add_suffix("_error")
    write("trajectories.csv", grouped.mean().join(errors).reset_index())
    command = "OMP_NUM_THREADS=1 python book/results/procedures/run.py"
    record = provenance(command, configuration_record(), TESTS, sum(_seconds.values()))
    write_json(record, HERE / "provenance.json")
    shutil.rmtree(PARTS)


if __name__ == "__main__":
    main()
