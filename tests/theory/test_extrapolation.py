import json
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qgen_lab.codebooks import Codebook, uniform
from qgen_lab.theory import (
    TeacherStudent,
    centred_moments,
    controlled_mean,
    enumerate_states,
    extrapolate,
    sample,
    solve_rs,
)

FALSE_ALARM = 1e-4
JIT = not numba.config.DISABLE_JIT
STORED = Path(__file__).parents[2] / "book" / "results" / "enumeration"


@pytest.mark.parametrize("problem", [
    TeacherStudent(uniform(1, 1.0), 1.5, 0.3),
    TeacherStudent(uniform(1, 1.0), 0.5, 0.1, signal_variance=2.0),
])  # fmt: skip
def test_moments_have_mean_zero(problem):
    moments = np.array([centred_moments(sample(problem, 6, seed), problem) for seed in range(4000)])
    errors = moments.std(axis=0, ddof=1) / np.sqrt(len(moments))
    limit = stats.norm.isf(FALSE_ALARM / 2 / errors.size)
    assert moments.shape == (4000, 9)
    assert (np.abs(moments.mean(axis=0)) < limit * errors).all()


def test_moments_are_what_they_say():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, 0.3)
    drawn = sample(problem, 4, seed=0)
    (samples, n), w0 = drawn.X.shape, drawn.teacher
    noise, eigenvalues = drawn.y - drawn.X @ w0, np.linalg.eigvalsh(drawn.X.T @ drawn.X)
    expected = [
        np.sum(w0**2) / n - 1,
        np.sum((drawn.X @ w0) ** 2) / n - 1.5,
        np.sum((drawn.X.T @ drawn.X @ w0) ** 2) / n - (1.5**2 + 1.5 + 1.5 / n),
        eigenvalues.sum() / n - 1.5,
        np.sum(eigenvalues**2) / n - (1.5**2 + 1.5 + 1.5 / n),
        (drawn.X @ w0) @ noise / n,
        (drawn.X @ w0) @ drawn.X @ drawn.X.T @ noise / n,
        np.sum(noise**2) / samples - 0.3,
        np.sum((drawn.X.T @ noise) ** 2) / n - 0.3 * 1.5,
    ]
    assert centred_moments(drawn, problem) == pytest.approx(expected, rel=1e-12)


def test_controls_take_out_the_scatter_that_they_know():
    rng = np.random.default_rng(0)
    controls = rng.normal(size=(500, 3))
    known = 2 + controls @ [1.0, -3.0, 0.5]
    mean, error = controlled_mean(np.stack([known, known + rng.normal(size=500)], axis=1), controls)
    assert mean[0] == pytest.approx(2, abs=1e-12)
    assert error[0] == pytest.approx(0, abs=1e-12)
    assert error[1] == pytest.approx(1 / np.sqrt(500), rel=0.2)
    assert abs(mean[1] - 2) < stats.norm.isf(FALSE_ALARM / 2) * error[1]


def test_without_controls_it_is_the_mean():
    values = np.random.default_rng(1).exponential(size=(200, 2, 3))
    mean, error = controlled_mean(values, np.empty((200, 0)))
    assert mean == pytest.approx(values.mean(axis=0), rel=1e-12)
    assert error == pytest.approx(values.std(axis=0, ddof=1) / np.sqrt(200), rel=1e-12)


def test_a_control_that_is_always_zero_does_no_harm():
    values = np.random.default_rng(2).normal(size=100)
    with_zero, _ = controlled_mean(values, np.zeros((100, 1)))
    assert with_zero == pytest.approx(values.mean(), rel=1e-12)


def test_standard_errors_are_those_of_repetitions():
    """Skewed scatter that grows with the control: 400 repetitions, their spread within 15%."""
    rng = np.random.default_rng(3)
    control = rng.normal(size=(400, 300, 1))
    values = control[..., 0] + (1 + control[..., 0] ** 2) * (rng.exponential(size=(400, 300)) - 1)
    results = [controlled_mean(v, c) for v, c in zip(values, control, strict=True)]
    means, errors = np.array(results).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(means.std(), rel=0.15)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="4 samples for 3 controls: give more than 4"):
        controlled_mean(np.ones(4), np.ones((4, 3)))


coefficients = st.lists(st.floats(-5, 5), min_size=3, max_size=3)


@settings(max_examples=50)
@given(coefficients, st.integers(0, 10**6))
def test_a_polynomial_is_found_again_whatever_the_weights(c, seed):
    sizes = np.array([4, 6, 8, 12, 20])
    errors = np.random.default_rng(seed).uniform(0.01, 1, sizes.size)
    fit = extrapolate(sizes, c[0] + c[1] / sizes + c[2] / sizes**2, errors)
    assert fit.value == pytest.approx(c[0], abs=1e-9)
    assert fit.chi_squared == pytest.approx(0, abs=1e-9)
    assert fit.degrees_of_freedom == 2
    assert fit(1 / sizes) == pytest.approx(c[0] + c[1] / sizes + c[2] / sizes**2, abs=1e-9)


def test_fit_and_error_are_those_of_numpy():
    rng = np.random.default_rng(4)
    sizes, values, errors = np.arange(3, 11), rng.normal(size=8), rng.uniform(0.1, 1, 8)
    for degree in (1, 2, 3):
        fit = extrapolate(sizes, values, errors, degree)
        slow, covariance = np.polyfit(1 / sizes, values, degree, w=1 / errors, cov="unscaled")
        assert fit.value == pytest.approx(slow[-1], rel=1e-9)
        assert fit.standard_error == pytest.approx(np.sqrt(covariance[-1, -1]), rel=1e-9)
    assert repr(fit).startswith("Extrapolation(value=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4, 6], [1, 2], [1, 1]), "at least 3"),
        (([4, 6, 8], [1, 2], [1, 1, 1]), r"shapes \(3,\), \(2,\) and \(3,\)"),
        (([4, 6, 8], [1, 2, 3], [1, 1, 0]), "give positive numbers"),
        (([0, 6, 8], [1, 2, 3], [1, 1, 1]), "give positive numbers"),
    ],
)
def test_bad_sizes_and_errors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        extrapolate(*arguments)


# --- enumerated instances against replica symmetry ----------------------------------------------


def test_small_instances_lead_to_replica_symmetry():
    """A short version of the stored run: one bit, replicon 0.7."""
    problem = TeacherStudent(uniform(1, 1.0), 0.5, temperature=0.3)
    names = ["entropy", "overlap", "replica_overlap", "gen_error", "train_error"]
    sizes, instances = ([6, 8, 10, 12], 400) if JIT else ([2, 4, 6], 60)
    averages = []
    for n in sizes:
        drawn = [sample(problem, n, np.random.default_rng([n, k])) for k in range(instances)]
        exact = [enumerate_states(each, problem) for each in drawn]
        values = [[getattr(each, name) for name in names] for each in exact]
        averages.append(controlled_mean(values, [centred_moments(d, problem) for d in drawn]))
    means, errors = np.swapaxes(averages, 0, 1)
    theory = solve_rs(problem)
    bound = stats.norm.isf(FALSE_ALARM / 2 / len(names))
    for k, name in enumerate(names):
        fit = extrapolate(sizes, means[:, k], errors[:, k])
        assert abs(fit.value - getattr(theory, name)) < bound * fit.standard_error, name
        if JIT:
            assert fit.standard_error < 0.2 * getattr(theory, name)


def test_the_stored_enumeration_agrees_with_replica_symmetry():
    """The rule of the chapter "Typical case", at its level of 1% over all limits."""
    sizes = pd.read_csv(STORED / "sizes.csv")
    problems = json.loads((STORED / "provenance.json").read_text())["config"]
    assert len(problems) == 6
    deviations = {}
    for name, config in problems.items():
        problem = TeacherStudent(
            Codebook(config["levels"]), config["alpha"], config["noise_variance"], config["ridge"]
        )
        for temperature in config["counted_temperatures"]:
            theory = solve_rs(replace(problem, temperature=temperature))
            assert theory.replicon > 0.4
            rows = sizes[(sizes.problem == name) & (sizes.temperature == temperature)]
            for observable, group in rows.groupby("observable"):
                assert dict(zip(group.n, group.instances, strict=True)) == {
                    int(n): count for n, count in config["instances"].items()
                }
                if group.standard_error.max() < 1e-12:
                    continue  # the norm of one-bit weights
                fit = extrapolate(group.n, group["mean"], group.standard_error)
                value = (
                    theory.free_energy + temperature * theory.entropy
                    if observable == "energy"
                    else getattr(theory, observable)
                )
                deviations[name, temperature, observable] = (
                    (fit.value - value) / fit.standard_error,
                    stats.chi2.sf(fit.chi_squared, fit.degrees_of_freedom),
                )
    assert len(deviations) == 104
    z, misfit = np.array(list(deviations.values())).T
    assert np.abs(z).max() < stats.norm.isf(0.01 / 2 / z.size)
    assert misfit.min() > 0.01 / z.size
