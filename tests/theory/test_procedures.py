"""The stored comparison of procedures: whole, made by the script beside it, and able to run."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

from qgen_lab.codebooks import uniform
from qgen_lab.experiments.statistics import mean_interval, paired_difference
from qgen_lab.theory import TeacherStudent, ridge_weights, sample

PROCEDURES = Path(__file__).parents[2] / "book" / "results" / "procedures"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("procedures_run", PROCEDURES / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def correlated():
    return pd.read_csv(PROCEDURES / "correlated.csv")


# --- the tables are whole, and the script's -----------------------------------------------------


def test_provenance_describes_the_script_as_it_stands(script):
    record = json.loads((PROCEDURES / "provenance.json").read_text())
    assert record["config"] == json.loads(json.dumps(script.configuration_record()))
    assert record["seeds"] == list(script.TESTS)


def test_every_instance_is_there_once(script, correlated):
    keys = [(e, s) for e in script.EXPONENTS for s in script.TESTS]
    isotropic = pd.read_csv(PROCEDURES / "isotropic.csv")
    cases = [(*case, s) for case in script.ISOTROPIC for s in script.TESTS[:16]]
    for quantity in ("gen_error", "energy"):
        rows = correlated[correlated.quantity == quantity]
        assert list(zip(rows.exponent, rows.seed, strict=True)) == keys
        rows = isotropic[isotropic.quantity == quantity]
        assert list(zip(rows.bits, rows.width, rows.alpha, rows.seed, strict=True)) == cases
    for table in (correlated, isotropic):
        assert np.isfinite(table[script.NAMES]).all(axis=None)


def test_ridges_are_chosen_on_other_instances(script):
    problem = TeacherStudent(uniform(*script.CORRELATED[:2]), 2.0, script.NOISE)
    tuned, tested = (sample(problem, 30, np.random.default_rng([k, 0])) for k in (0, 1))
    assert np.corrcoef(tuned.X.ravel(), tested.X.ravel())[0, 1] < 0.1


def test_small_files():
    assert sum(path.stat().st_size for path in PROCEDURES.glob("*.csv")) < 300_000


# --- the parts of the script that the library does not have -------------------------------------


def test_evidence_is_the_likelihood_of_the_labels(script):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 15)) / np.sqrt(15)
    y = X @ rng.standard_normal(15) + 0.5 * rng.standard_normal(40)

    def likelihood(noise, signal):
        covariance = noise * np.eye(40) + signal * X @ X.T
        return multivariate_normal(np.zeros(40), covariance).logpdf(y)

    noise, signal = script.evidence(X, y)
    best = likelihood(noise, signal)
    for factor in (0.9, 0.97, 1.03, 1.1):
        assert likelihood(factor * noise, signal) < best
        assert likelihood(noise, factor * signal) < best
        assert likelihood(factor * noise, factor * signal) < best


def test_features_are_products_without_repeats(script):
    features, labels = script.diabetes()
    assert features.shape == (labels.size, 10 + 45 + 9)
    assert features.std(axis=0).min() > 0.1
    assert np.linalg.matrix_rank(features) == 64


@pytest.mark.parametrize("bits", [1, 2])
def test_learned_step_does_not_depend_on_its_start(script, monkeypatch, bits):
    monkeypatch.setattr(script, "LEARNED", script.LEARNED | {"n": 60, "steps": 6000})
    small, large = (script.learn_step(1, bits, start, True, 0.1) for start in (0.6, 1.6))
    assert small["width"] == pytest.approx(large["width"], rel=0.03)
    assert small["average"] < small["rounded"] < small["iterate"]


def test_procedures_asked_for_are_those_given(script):
    problem = TeacherStudent(uniform(2, 1.5), 2.0, 0.1, ridge=0.1)
    instance = sample(problem, 24, 0)
    for wanted in (set(script.NAMES), {"rounded average"}, {"straight-through, power 2"}):
        found = script.solve(instance, problem, 0, wanted)
        assert set(found) == wanted
        for weights, seconds in found.values():
            assert np.isin(weights, problem.codebook.levels).all()
            assert seconds >= 0
    full = ridge_weights(instance, problem)
    assert (found["straight-through, power 2"][0] != full).any()


def test_script_runs_and_goes_on_where_it_stopped(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(script, "N", 20)
    monkeypatch.setattr(script, "CONSTANT_STEPS", 60)
    monkeypatch.setattr(script, "AVERAGED_FROM", 30)
    monkeypatch.setattr(script, "COOLDOWN_STEPS", 30)
    monkeypatch.setattr(script, "SWEEPS", 20)
    monkeypatch.setattr(script, "TUNING", range(1))
    monkeypatch.setattr(script, "TESTS", range(2))
    monkeypatch.setattr(script, "RIDGES", (0.1,))
    monkeypatch.setattr(script, "EXPONENTS", (0.0, 1.0))
    monkeypatch.setattr(script, "ISOTROPIC", ((1, 0.8, 2.0),))
    monkeypatch.setattr(script, "SPLITS", range(1))
    monkeypatch.setattr(script, "REAL_BITS", (1, 2))
    monkeypatch.setattr(script, "REAL_WIDTHS", (1.0,))
    learned = {"n": 30, "alpha": 2.0, "bits": (2,), "instances": 1, "steps": 40}
    monkeypatch.setattr(script, "LEARNED", learned)
    monkeypatch.setattr(script, "FIXED", [(2.0, 2, 1.0)])
    monkeypatch.setattr(
        script, "FOLLOWED", script.FOLLOWED | {"n": 30, "instances": 2, "steps": 30}
    )
    script.main()
    names = {path.name for path in PROCEDURES.glob("*.csv")}
    assert {path.name for path in tmp_path.glob("*.csv")} == names
    for name in names:
        again, stored = (pd.read_csv(folder / name) for folder in (tmp_path, PROCEDURES))
        assert again.columns.tolist() == stored.columns.tolist(), name
    assert not (tmp_path / "parts").exists()


# --- what the book says of them -----------------------------------------------------------------


SEARCHES = [
    "compensated rounding",
    "coordinate descent",
    "straight-through, power 2",
    "straight-through, power 4",
    "straight-through, power 16",
    "annealing",
]


def against_rounded_ridge(table, exponent, name, quantity="gen_error"):
    """Paired difference over the instances; the level is Bonferroni's for ten procedures."""
    rows = table[(table.exponent == exponent) & (table.quantity == quantity)]
    return paired_difference(rows[name], rows["rounded ridge"], level=1 - 0.05 / 10)


@pytest.mark.parametrize("exponent", [0.0, 0.125, 0.25, 0.375])
def test_nothing_beats_the_rounded_ridge_while_inputs_are_hardly_correlated(
    script, correlated, exponent
):
    for name in set(script.NAMES) - {"rounded ridge"}:
        assert against_rounded_ridge(correlated, exponent, name).low > 0, name


@pytest.mark.parametrize("exponent", [1.0, 1.5])
@pytest.mark.parametrize("name", SEARCHES)
def test_searches_beat_the_rounded_ridge_where_inputs_are_correlated(correlated, exponent, name):
    assert against_rounded_ridge(correlated, exponent, name).high < 0


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_lower_energies_everywhere(script, correlated, name):
    for exponent in script.EXPONENTS:
        assert against_rounded_ridge(correlated, exponent, name, "energy").high < 0


def test_a_constant_rate_is_the_worse_the_more_inputs_are_correlated(script, correlated):
    errors = correlated[correlated.quantity == "gen_error"].groupby("exponent")
    means = errors["straight-through, constant"].mean().loc[0.25:]
    assert (np.diff(means) > 0).all()
    for exponent in script.EXPONENTS:
        name = "straight-through, constant"
        assert against_rounded_ridge(correlated, exponent, name).low > 0


def test_message_passing_needs_independent_inputs(correlated):
    name = "message passing, decimated"
    assert against_rounded_ridge(correlated, 0.0, name, "energy").high < 0
    for exponent in (0.375, 0.5, 0.75, 1.0, 1.5):
        assert against_rounded_ridge(correlated, exponent, name, "energy").low > 0


@pytest.mark.parametrize("name", SEARCHES)
def test_the_ranking_turns_round_between_three_eighths_and_three_quarters(correlated, name):
    """The mean difference of every bootstrap sample but 5% first falls to zero in between."""
    errors = correlated[correlated.quantity == "gen_error"].pivot(index="seed", columns="exponent")
    difference = (errors[name] - errors["rounded ridge"]).loc[:, 0.375:0.75].to_numpy()
    drawn = np.random.default_rng(0).integers(0, len(difference), (4000, len(difference)))
    first, _, last = difference[drawn].mean(axis=1).T
    assert np.mean((first > 0) & (last < 0)) > 0.95


def test_cooled_training_and_compensated_rounding_are_a_draw_where_both_win(correlated):
    """Two and a half percent of the rounded ridge's error, whichever is ahead."""
    errors = correlated[correlated.quantity == "gen_error"].set_index("exponent")
    for exponent in (1.0, 1.5):
        rows = errors.loc[exponent]
        for power in (2, 4, 16):
            difference = paired_difference(
                rows[f"straight-through, power {power}"], rows["compensated rounding"]
            )
            assert abs(difference.estimate) < 0.025 * rows["rounded ridge"].mean()


def test_nothing_beats_the_rounded_ridge_on_independent_inputs(script):
    """As proved. Searches find lower energies, and generalize worse for it."""
    isotropic = pd.read_csv(PROCEDURES / "isotropic.csv")
    for case, rows in isotropic.groupby(["bits", "alpha"]):
        errors, energies = (rows[rows.quantity == q] for q in ("gen_error", "energy"))
        for name in set(script.NAMES) - {"rounded ridge"}:
            difference = paired_difference(errors[name], errors["rounded ridge"], 1 - 0.05 / 10)
            assert difference.high > 0, (case, name)
        for name in ("compensated rounding", "coordinate descent", "annealing"):
            difference = paired_difference(energies[name], energies["rounded ridge"], 1 - 0.05 / 10)
            assert difference.high < 0, (case, name)


# --- LSQ ----------------------------------------------------------------------------------------


def test_the_learned_step_settles_below_the_widths_that_are_best():
    """Below the best for a last iterate, and further below the best for a rounded average."""
    learned = pd.read_csv(PROCEDURES / "learned_step.csv")
    best = pd.read_csv(PROCEDURES / "best_widths.csv").set_index(["bits", "deployed"]).width
    for bits in (2, 3, 4):
        settled = mean_interval(learned[(learned.bits == bits) & (learned.speed == 0.05)].width)
        assert settled.high < best[bits, "last iterate"] < best[bits, "rounded average"]


def test_the_start_of_the_learned_step_leaves_a_trace_at_one_bit_only():
    """There weights that a narrow, masked start leaves beyond the range hold it wider, for good."""
    learned = pd.read_csv(PROCEDURES / "learned_step.csv").query("speed == 0.25")
    for bits, runs in learned.groupby("bits"):
        widths = runs.pivot(index="seed", columns=["start", "masked"], values="width")
        assert np.abs(widths[2.0, True] / widths[1.0, False] - 1).max() < 0.01
        trace = paired_difference(widths[0.5, True], widths[1.0, False])
        if bits == 1:
            assert 0 < trace.low < trace.high < 0.04
        else:
            assert max(abs(trace.low), abs(trace.high)) < 0.01


def test_swings_follow_the_data():
    """Measured by the data they are larger than independent ones by about `1 + D / alpha`."""
    fixed = pd.read_csv(PROCEDURES / "fixed_step.csv")
    mean = fixed.groupby(["alpha", "bits", "width"]).mean().reset_index()
    swing = (mean.train_error - mean.average_train_error) / (mean.iterate - mean.average)
    guess = 1 + mean.moving / mean.alpha
    assert np.abs(guess / swing - 1).max() < 0.1
    assert (swing > 1.05).all()
