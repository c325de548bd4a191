from dataclasses import replace

import numpy as np
import pytest

from qgen_lab.codebooks import Codebook, power_of_two, uniform
from qgen_lab.theory import TeacherStudent, amp, anneal, enumerate_states, round_ridge, sample
from qgen_lab.theory.decimation import _remaining, decimate

PROBLEMS = [
    TeacherStudent(uniform(2, 1.5), 2.0, 0.1, 0.1, temperature=0.2),
    TeacherStudent(uniform(1, 0.8), 1.5, 0.1, temperature=0.4),
    TeacherStudent(power_of_two(3, 2.0), 2.5, 0.2, temperature=0.3),
    TeacherStudent(Codebook([-1.3, -0.4, 0.1, 0.9, 2.5]), 3.0, 0.5, temperature=0.3),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_at_once_is_the_rounded_mean_of_message_passing(problem):
    instance = sample(problem, 60, 3)
    found = decimate(instance, problem, fixed_share=1.0)
    mean = amp(instance, problem, max_iterations=200).mean
    np.testing.assert_array_equal(found.weights, problem.codebook.quantize(mean))
    assert found.rounds == 1


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_fixed_weights_leave_is_the_same_energy(problem):
    """Two settings of the free weights differ by as much in the whole as in what remains."""
    instance, rng = sample(problem, 30, 4), np.random.default_rng(0)
    weights = rng.choice(problem.codebook.levels, 30)
    free = np.array([0, 4, 5, 11, 17, 29])
    rest, part, scale = _remaining(instance, problem, weights, free)
    np.testing.assert_allclose(part.codebook.levels, scale * problem.codebook.levels)

    def energy(instance, problem, w):
        residual = instance.y - instance.X @ w
        return (residual @ residual + problem.ridge * w @ w) / 2

    whole, of_rest = [], []
    for _ in range(2):
        weights[free] = rng.choice(problem.codebook.levels, free.size)
        whole.append(energy(instance, problem, weights))
        of_rest.append(energy(rest, part, scale * weights[free]))
    assert np.diff(whole) == pytest.approx(np.diff(of_rest), rel=1e-9)
    assert rest.X.var() == pytest.approx(1 / free.size, rel=0.5)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_decimation_keeps_its_word(problem, share):
    instance = sample(problem, 80, 5)
    found = decimate(instance, problem, share)
    assert np.isin(found.weights, problem.codebook.levels).all()
    assert found.rounds == np.ceil(80 / np.ceil(share * 80))
    assert 0 <= found.settled <= found.rounds
    assert (found.weights == decimate(instance, problem, share).weights).all()
    # Between annealing and rounding, as a search for low energy must be.
    assert found.energy < round_ridge(instance, problem).energy
    assert found.energy < 1.15 * anneal(instance, problem, 300, 0).energy


def test_small_steps_find_lower_energies_than_one():
    problem = PROBLEMS[0]
    gains = []
    for seed in range(6):
        instance = sample(problem, 80, seed)
        one, many = (decimate(instance, problem, share).energy for share in (1.0, 0.05))
        gains.append(one - many)
    assert min(gains) > 0


def test_no_decimation_beats_enumeration():
    problem = replace(PROBLEMS[1], ridge=0.05)
    for seed in range(5):
        instance = sample(problem, 12, seed)
        least = enumerate_states(instance, problem).ground_state.energy
        assert decimate(instance, problem).energy >= least - 1e-12


def test_bad_input_is_refused():
    problem = PROBLEMS[0]
    instance = sample(problem, 20, 0)
    with pytest.raises(ValueError, match="temperature = 0"):
        decimate(instance, replace(problem, temperature=0.0))
    for share in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="fixed_share"):
            decimate(instance, problem, share)
