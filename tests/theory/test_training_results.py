"""The stored runs of straight-through training say what the book says of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

RESULTS = Path(__file__).parents[2] / "book" / "results"
COOLDOWN = RESULTS / "cooldown"
STRAIGHT_THROUGH = RESULTS / "straight_through"


@pytest.fixture(scope="module")
def statements():
    return pd.read_csv(STRAIGHT_THROUGH / "statements.csv")


def test_the_time_average_solves_the_convex_problem(statements):
    assert statements.solver_converged.all()
    assert len(statements) == 12 * 8
    assert statements.squared_distance.max() < 1e-5


def test_the_iterates_are_a_stochastic_rounding_of_the_average(statements):
    """Each case's mean over eight instances within 2e-3 of the prediction on the same instances."""
    difference = statements.assign(off=statements.iterate - statements.iterate_predicted)
    assert difference.groupby(["codebook", "latent_decay"]).off.mean().abs().max() < 2e-3


@pytest.mark.parametrize("name", ["average", "iterate", "rounded"])
def test_the_instances_have_the_errors_of_the_limit(statements, name):
    """Bonferroni over 36 comparisons at a false-alarm probability of 1e-3 in all."""
    off = (statements[name] - statements[f"{name}_limit"]).groupby(
        [statements.codebook, statements.latent_decay]
    )  # fmt: skip
    bound = t.ppf(1 - 1e-3 / 36 / 2, 7)
    assert (off.mean().abs() < bound * off.std() / np.sqrt(off.size())).all()


def test_fresh_samples_settle_at_the_stationary_law():
    """Twelve points within three standard errors of eight runs, on the runs' own teachers.

    Beside the limit itself the tails of few teachers would decide.
    """
    runs = pd.read_csv(STRAIGHT_THROUGH / "one_pass.csv")
    off = (runs.gen_error - runs.limit_on_teacher).groupby([runs.codebook, runs.learning_rate])
    assert len(off) == 12
    assert (off.mean().abs() < 3 * off.std() / np.sqrt(off.size())).all()
    assert (runs.groupby("codebook").limit_on_teacher.std() > 0).all()


@pytest.fixture(scope="module")
def energies():
    """Energy by case and schedule (rows) and instance (columns), averaged over two starts.

    Schedules of power 2 were run on more instances: one difference had been at the border.
    """
    runs = pd.concat([pd.read_csv(COOLDOWN / name) for name in ("runs.csv", "length.csv")])
    return runs.pivot_table(index=["case", "schedule"], columns="seed", values="energy")


def interval(values: pd.Series, comparisons: int = 1) -> tuple[float, float]:
    """95% interval of the mean over instances, Bonferroni over the comparisons."""
    values = values.dropna()
    n = len(values)
    half = t.ppf(1 - 0.025 / comparisons, n - 1) * values.std() / np.sqrt(n)
    return values.mean() - half, values.mean() + half


@pytest.mark.parametrize("power", [1, 2, 4, 16])
def test_the_length_of_a_cooldown_does_not_matter(energies, power):
    """Means within each other's intervals, and eight differences on the same instances are zero."""
    ends = energies.loc["isotropic"].loc[[f"cooldown {power}, {T}" for T in (400, 4000, 40_000)]]
    for _, one in ends.iterrows():
        low, high = interval(one)
        assert (low < ends.mean(axis=1)).all()
        assert (ends.mean(axis=1) < high).all()
    for row in (0, 2):
        low, high = interval(ends.iloc[row] - ends.iloc[1], comparisons=8)
        assert low < 0 < high


def test_the_power_of_a_cooldown_does_matter(energies):
    ends = energies.loc["isotropic"]
    for lower, higher in ((1, 2), (2, 4), (4, 16)):
        gain = ends.loc[f"cooldown {lower}, 4000"] - ends.loc[f"cooldown {higher}, 4000"]
        assert interval(gain)[0] > 0


@pytest.mark.parametrize("case", ["isotropic", "correlated"])
def test_training_on_after_a_drop_undoes_it(energies, case):
    ends = energies.loc[case]
    assert interval(ends.loc["drop, 3000"] - ends.loc["drop, 30"])[0] > 0
    if case == "isotropic":  # and a slow exponential never did anything
        low, high = interval(ends.loc["exponential, 20000"] - ends.loc["constant, 4000"])
        assert low < 0 < high
