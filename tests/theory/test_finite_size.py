from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen_lab.codebooks import Codebook, power_of_two, uniform
from qgen_lab.theory import (
    Instance,
    TeacherStudent,
    configuration,
    enumerate_states,
    sample,
)
from qgen_lab.theory.finite_size import _walk, quadratic_form

AVERAGES = [
    "energy", "overlap", "replica_overlap", "self_overlap", "gen_error", "gen_error_mean",
    "train_error", "free_energy", "entropy",
]  # fmt: skip
SIZES = (
    {2: 13, 3: 8, 4: 6, 5: 5, 8: 4}
    if not numba.config.DISABLE_JIT
    else {2: 9, 3: 5, 4: 4, 5: 4, 8: 3}
)


def all_states(problem: TeacherStudent, n: int) -> np.ndarray:
    return np.array(list(product(problem.codebook.levels, repeat=n)))


def all_energies(instance: Instance, problem: TeacherStudent, states: np.ndarray) -> np.ndarray:
    residuals = instance.y - states @ instance.X.T
    return ((residuals**2).sum(1) + problem.ridge * (states**2).sum(1)) / 2


def boltzmann(energies: np.ndarray, temperature: float) -> np.ndarray:
    factors = np.exp(-(energies - energies.min()) / temperature)
    return factors / factors.sum()


def plain_averages(instance: Instance, problem: TeacherStudent, temperature: float) -> dict:
    """Every average from its definition, with the list of all states in memory."""
    n, teacher = instance.teacher.size, instance.teacher
    states = all_states(problem, n)
    energies = all_energies(instance, problem, states)
    p = boltzmann(energies, temperature)
    mean = p @ states
    log_partition = np.log(np.exp(-(energies - energies.min()) / temperature).sum())
    return {
        "energy": p @ energies / n,
        "overlap": p @ (states @ teacher) / n,
        "replica_overlap": mean @ mean / n,
        "self_overlap": p @ (states**2).sum(1) / n,
        "gen_error": p @ ((states - teacher) ** 2).sum(1) / n,
        "gen_error_mean": ((mean - teacher) ** 2).sum() / n,
        "train_error": p @ np.mean((instance.y - states @ instance.X.T) ** 2, axis=1),
        "free_energy": (energies.min() - temperature * log_partition) / n,
        "entropy": -np.sum(p[p > 0] * np.log(p[p > 0])) / n,
    }


PROBLEMS = [
    TeacherStudent(uniform(1, 1.0), 1.5),
    TeacherStudent(uniform(1, 0.5), 0.5, 0.3, ridge=0.2),
    TeacherStudent(uniform(2, 1.5), 1.0, ridge=0.05),
    TeacherStudent(uniform(2, 1.5, include_zero=True), 2.0, ridge=0.1),
    TeacherStudent(power_of_two(3, 2.0), 1.5, 0.1, 0.0, 0.0, 2.0),
    TeacherStudent(Codebook([-1.3, -0.4, -0.35, 0.9, 2.5]), 0.6, ridge=0.01),
]


# --- the slow, obvious twin ---------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_averages_are_those_of_the_full_list_of_states(problem):
    n = SIZES[len(problem.codebook)]
    drawn = sample(problem, n, seed=5)
    temperatures = [2.0, 0.3, 0.02]
    exact = enumerate_states(drawn, problem, temperatures)
    for k, temperature in enumerate(temperatures):
        expected = plain_averages(drawn, problem, temperature)
        for name in AVERAGES:
            value = getattr(exact, name)[k]
            assert value == pytest.approx(expected[name], rel=1e-11, abs=1e-12), name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_ground_state_is_the_lowest_of_the_list(problem):
    n = SIZES[len(problem.codebook)]
    drawn = sample(problem, n, seed=6)
    states = all_states(problem, n)
    energies = all_energies(drawn, problem, states)
    exact = enumerate_states(drawn, problem)
    assert (exact.ground_state.weights == states[energies.argmin()]).all()
    assert exact.ground_state.energy == pytest.approx(energies.min() / n, rel=1e-12)


@pytest.mark.parametrize("levels", [[0.0, 1.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
def test_every_state_is_visited_once(levels):
    """Without data the sums count: here the ridge alone gives the energy, and all is a product."""
    levels, n = np.array(levels), 4
    ridge, temperature = 0.7, 0.5
    gram = ridge * np.eye(n)
    one = np.exp(-ridge * levels**2 / 2 / temperature)
    count = levels.size**n
    lowest, codes, total, heat, collected = _walk(
        gram, np.zeros(n), 0.0, levels, np.array([temperature, 1e300]), count
    )
    assert lowest == pytest.approx(0, abs=1e-15)
    assert (levels[codes] == 0).all()
    assert total == pytest.approx([one.sum() ** n, count], rel=1e-12)
    assert collected[0] == pytest.approx(np.tile(one * one.sum() ** (n - 1), (n, 1)), rel=1e-12)
    assert collected[1] == pytest.approx(np.full((n, levels.size), count / levels.size), rel=1e-12)
    energy = n * (one @ (ridge * levels**2 / 2)) / one.sum()
    assert heat[0] / total[0] == pytest.approx(energy, rel=1e-12)


def test_the_quadratic_form_is_the_energy():
    problem = TeacherStudent(uniform(2, 1.0), 1.5, ridge=0.3)
    drawn = sample(problem, 7, seed=1)
    gram, pull, offset = quadratic_form(drawn, problem)
    w = np.linspace(-1, 1, 7)
    expected = (np.sum((drawn.y - drawn.X @ w) ** 2) + 0.3 * w @ w) / 2
    assert w @ gram @ w / 2 - pull @ w + offset == pytest.approx(expected, rel=1e-13)
    assert configuration(drawn, problem, w).energy == pytest.approx(expected / 7, rel=1e-13)


# --- limits and invariants ----------------------------------------------------------------------


def test_temperature_zero_is_the_ground_state_and_the_limit():
    problem = TeacherStudent(uniform(2, 1.5), 1.5, ridge=0.1)
    drawn = sample(problem, SIZES[4], seed=2)
    exact = enumerate_states(drawn, problem, [0.0, 5e-324, 1e-5])
    ground = exact.ground_state
    for k in range(3):
        for name in ("energy", "overlap", "self_overlap", "gen_error", "train_error"):
            assert getattr(exact, name)[k] == pytest.approx(getattr(ground, name), rel=1e-11)
        assert exact.replica_overlap[k] == pytest.approx(ground.self_overlap, rel=1e-11)
        assert exact.gen_error_mean[k] == pytest.approx(ground.gen_error, rel=1e-11)
        assert exact.free_energy[k] == pytest.approx(ground.energy, rel=1e-11)
        assert exact.entropy[k] == 0


def test_infinite_temperature_is_the_flat_law():
    problem = TeacherStudent(uniform(2, 1.5), 1.5)
    exact = enumerate_states(sample(problem, SIZES[4], seed=3), problem, 1e9)
    assert exact.entropy == pytest.approx(np.log(4), rel=1e-8)
    assert exact.replica_overlap == pytest.approx(0, abs=1e-8)
    assert exact.self_overlap == pytest.approx(np.mean(problem.codebook.levels**2), rel=1e-7)


small = st.builds(
    lambda levels, alpha, ridge, n, seed: (
        problem := TeacherStudent(Codebook(sorted(levels)), alpha, 0.1, ridge),
        sample(problem, n, seed),
    ),
    st.sets(st.integers(-8, 8).map(lambda k: k / 4), min_size=2, max_size=4),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from([0.0, 0.2]),
    st.integers(1, 4),
    st.integers(0, 10**6),
)


@settings(max_examples=30)
@given(small, st.floats(0.02, 5))
def test_thermodynamics(drawn, temperature):
    problem, instance = drawn
    step = 1e-4 * temperature
    exact = enumerate_states(
        instance, problem, [temperature - step, temperature, temperature + step]
    )
    free, entropy = exact.free_energy, exact.entropy
    assert -1e-12 <= entropy[1] <= np.log(len(problem.codebook)) + 1e-12
    assert free[1] == pytest.approx(exact.energy[1] - temperature * entropy[1], rel=1e-9, abs=1e-12)
    assert (free[0] - free[2]) / (2 * step) == pytest.approx(entropy[1], rel=1e-4, abs=1e-5)
    assert (exact.energy >= exact.ground_state.energy - 1e-12).all()
    assert (exact.replica_overlap <= exact.self_overlap + 1e-12).all()


@settings(max_examples=20)
@given(small, st.floats(0.1, 10), st.randoms(use_true_random=False))
def test_order_of_the_weights_and_units_play_no_part(drawn, scale, random):
    problem, instance = drawn
    order = random.sample(range(instance.teacher.size), instance.teacher.size)
    moved = Instance(
        scale * instance.X[::-1, order], scale * instance.y[::-1], instance.teacher[order]
    )
    stiffer = replace(problem, ridge=problem.ridge * scale**2)
    one = enumerate_states(instance, problem, 0.3)
    other = enumerate_states(moved, stiffer, 0.3 * scale**2)
    for name in ("entropy", "overlap", "replica_overlap", "self_overlap", "gen_error"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-11)
    assert other.energy == pytest.approx(one.energy * scale**2, rel=1e-9, abs=1e-11)


def test_threads_get_what_one_thread_gets():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3)
    drawn = [sample(problem, 8, seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda each: enumerate_states(each, problem).energy, drawn))
    assert together == [enumerate_states(each, problem).energy for each in drawn]


# --- what it looks like, and bad input ----------------------------------------------------------


def test_numbers_for_one_temperature_and_arrays_for_several():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3)
    drawn = sample(problem, 6, seed=0)
    one, several = enumerate_states(drawn, problem), enumerate_states(drawn, problem, [0.3, 0.6])
    assert isinstance(one.energy, float)
    assert one.temperature == 0.3
    assert several.energy[0] == pytest.approx(one.energy, rel=1e-13)
    frame = several.to_frame()
    assert frame.shape == (2, 10)
    assert frame["entropy"].to_list() == several.entropy.tolist()
    assert repr(one).startswith("Enumeration(temperature=0.3, energy=")
    assert repr(several) == "Enumeration(2 temperatures)"
    assert repr(one.ground_state).startswith("Configuration(6 weights, energy=")


def test_too_many_states_are_refused_with_the_time_they_would_take():
    problem = TeacherStudent(uniform(2, 1.0), 1.0, temperature=0.3)
    with pytest.raises(
        ValueError,
        match=r"12 weights on 4 levels have 4\^12 states, more than"
        r" max_states = 4194304: they would take about \d.* (seconds|minutes|hours)",
    ):
        enumerate_states(sample(problem, 12, 0), problem)
    with pytest.raises(ValueError, match=r"4\^40 states.* about 10\^\d+ years here; use fewer"):
        enumerate_states(sample(problem, 40, 0), problem)
    with pytest.raises(ValueError, match=r"max_states = 15: .* about \S+ seconds here"):
        enumerate_states(sample(problem, 2, 0), problem, max_states=15)
    assert enumerate_states(sample(problem, 2, 0), problem, max_states=16).entropy > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.ones((5, 3))}, r"X of shape \(5, 3\), y of shape \(6,\)"),
        ({"y": np.ones(5)}, r"y of shape \(5,\)"),
        ({"teacher": np.ones(3)}, r"teacher of shape \(3,\)"),
        ({"X": np.ones(6)}, r"X of shape \(6,\)"),
        ({"X": np.ones((6, 0)), "teacher": np.ones(0)}, r"X of shape \(6, 0\)"),
        ({"X": np.full((6, 4), np.nan)}, "instance.X holds NaN"),
        ({"y": np.full(6, np.inf)}, "instance.y holds NaN or infinity"),
        ({"teacher": np.full(4, np.nan)}, "instance.teacher holds NaN"),
    ],
)
def test_unsound_instances_are_refused(change, message):
    problem = TeacherStudent(uniform(1, 1.0), 1.5)
    with pytest.raises(ValueError, match=message):
        enumerate_states(replace(sample(problem, 4, 0), **change), problem)


@pytest.mark.parametrize("temperatures", [-0.1, [0.1, -1.0], np.nan, [np.inf]])
def test_temperatures_are_checked(temperatures):
    problem = TeacherStudent(uniform(1, 1.0), 1.5)
    with pytest.raises(ValueError, match=r"temperature = .*: give a finite number >= 0"):
        enumerate_states(sample(problem, 4, 0), problem, temperatures)
    with pytest.raises(TypeError, match="temperature = 'cold' is not a real number"):
        enumerate_states(sample(problem, 4, 0), problem, ["cold"])


def test_weights_of_another_length_are_refused():
    problem = TeacherStudent(uniform(1, 1.0), 1.5)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\): give one for each .* 4"):
        configuration(sample(problem, 4, 0), problem, np.ones(3))
