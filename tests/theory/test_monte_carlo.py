from itertools import product

import numba
import numpy as np
import pytest
from scipy import stats

from qgen_lab.codebooks import Codebook, uniform
from qgen_lab.theory import (
    TeacherStudent,
    anneal,
    enumerate_states,
    heat_bath,
    parallel_tempering,
    sample,
)
from qgen_lab.theory.finite_size import quadratic_form
from qgen_lab.theory.monte_carlo import _swap, _sweep

JIT = not numba.config.DISABLE_JIT
FALSE_ALARM = 1e-4  # of each statistical test, had its seed not been fixed
AVERAGES = [
    "energy", "overlap", "replica_overlap", "self_overlap", "gen_error", "gen_error_mean",
    "train_error",
]  # fmt: skip
UNEVEN = Codebook([-1.3, -0.2, 0.9])


# --- the slow, obvious twin ---------------------------------------------------------------------


def plain_sweep(instance, problem, w, temperatures, rng):
    """Each weight from the energies of the whole vector with the weight on every level."""
    levels, changed = problem.codebook.levels, 0
    for c, temperature in enumerate(temperatures):
        for i in range(w.shape[1]):
            candidates = np.tile(w[c], (levels.size, 1))
            candidates[:, i] = levels
            residuals = instance.y - candidates @ instance.X.T
            energies = (residuals**2).sum(1) / 2 + problem.ridge * (candidates**2).sum(1) / 2
            if temperature == 0:
                drawn = energies.argmin()
            else:
                cumulative = np.cumsum(np.exp(-(energies - energies.min()) / temperature))
                drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
            changed += w[c, i] != levels[drawn]
            w[c, i] = levels[drawn]
    return changed


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 1.0), 1.5),
        TeacherStudent(uniform(3, 2.0), 0.4, ridge=0.2),
        TeacherStudent(UNEVEN, 2.0, ridge=0.05),
    ],
)
def test_a_sweep_draws_what_its_twin_draws(problem):
    drawn = sample(problem, 9, seed=0)
    gram, pull, _ = quadratic_form(drawn, problem)
    rng, twin_rng = np.random.default_rng(3), np.random.default_rng(3)
    w = rng.choice(problem.codebook.levels, (4, 9))
    twin = twin_rng.choice(problem.codebook.levels, (4, 9))
    gradient, temperatures = w @ gram - pull, np.array([0.0, 0.05, 0.5, 1e3])
    for _ in range(20):
        changed = _sweep(gram, gradient, w, problem.codebook.levels, temperatures, rng)
        assert changed == plain_sweep(drawn, problem, twin, temperatures, twin_rng)
        assert (w == twin).all()
    assert gradient == pytest.approx(w @ gram - pull, abs=1e-12)
    assert rng.random() == twin_rng.random()


# --- the law that the moves keep ----------------------------------------------------------------


class Tiny:
    """All states of an instance of three weights on three levels, and draws from its law."""

    def __init__(self):
        self.problem = TeacherStudent(UNEVEN, 1.0, ridge=0.1)
        self.levels = self.problem.codebook.levels
        self.instance = sample(self.problem, 3, seed=4)
        self.gram, self.pull, self.offset = quadratic_form(self.instance, self.problem)
        self.states = np.array(list(product(self.levels, repeat=3)))
        self.energies = self.energy(self.states)

    def energy(self, w):
        return np.einsum("ci,ij,cj->c", w, self.gram, w) / 2 - w @ self.pull + self.offset

    def law(self, temperature):
        factors = np.exp(-(self.energies - self.energies.min()) / temperature)
        return factors / factors.sum()

    def draw(self, temperature, count, rng):
        return self.states[rng.choice(27, count, p=self.law(temperature))]

    def index(self, w):
        return np.searchsorted(self.levels, w) @ [9, 3, 1]

    def sweep(self, w, temperature, rng, order=(0, 1, 2)):
        order = list(order)
        moved, gram = w[:, order].copy(), np.ascontiguousarray(self.gram[np.ix_(order, order)])
        gradient = moved @ gram - self.pull[order]
        _sweep(gram, gradient, moved, self.levels, np.full(len(w), temperature), rng)
        return moved[:, np.argsort(order)]

    def p_value(self, w, temperature):
        """Chi-squared test of independent draws; states expected fewer than ten times as one."""
        expected = self.law(temperature) * len(w)
        counts = np.bincount(self.index(w), minlength=27)
        rare = expected < 10
        pool = lambda x: np.append(x[~rare], x[rare].sum() if rare.any() else [])  # noqa: E731
        return stats.chisquare(pool(counts), pool(expected)).pvalue


COUNT = 20_000 if JIT else 2_000


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_sweep_keeps_the_gibbs_law(temperature):
    tiny, rng = Tiny(), np.random.default_rng(1)
    before = tiny.draw(temperature, COUNT, rng)
    after = tiny.sweep(before, temperature, rng)
    assert (before != after).any()
    assert tiny.p_value(before, temperature) > FALSE_ALARM
    assert tiny.p_value(after, temperature) > FALSE_ALARM


def test_sweeps_forget_the_start():
    tiny, rng = Tiny(), np.random.default_rng(2)
    w = np.tile(tiny.states[0], (COUNT, 1))
    for _ in range(30):
        w = tiny.sweep(w, 1.0, rng)
    assert tiny.p_value(w, 1.0) > FALSE_ALARM
    assert tiny.p_value(w, 0.5) < FALSE_ALARM  # the test can tell a wrong temperature


def test_detailed_balance():
    """There and back in reverse order: as many go from a to b as from b to a."""
    tiny, rng = Tiny(), np.random.default_rng(3)
    before = tiny.draw(0.5, COUNT, rng)
    after = tiny.sweep(tiny.sweep(before, 0.5, rng), 0.5, rng, order=(2, 1, 0))
    flow = np.zeros((27, 27))
    np.add.at(flow, (tiny.index(before), tiny.index(after)), 1)
    both, net = flow + flow.T, flow - flow.T
    pairs = np.triu(both >= 20, 1)
    assert pairs.sum() > 10
    assert stats.chi2.sf(np.sum(net[pairs] ** 2 / both[pairs]), pairs.sum()) > FALSE_ALARM


def test_swaps_keep_the_law_of_every_temperature():
    tiny, rng = Tiny(), np.random.default_rng(4)
    ladder = np.array([0.1, 0.4, 1.2])
    count = 20_000
    w = np.concatenate([tiny.draw(t, count, rng) for t in ladder])
    place = np.arange(3 * count).reshape(3, count).T.copy()
    accepted = [_swap(place, tiny.energy(w), ladder, parity, rng) for parity in (0, 1, 0)]
    assert accepted[0][1] == accepted[1][0] == 0
    assert accepted[0][0] > 0.1 * count
    assert (np.sort(place.ravel()) == np.arange(3 * count)).all()
    for t, temperature in enumerate(ladder):
        assert tiny.p_value(w[place[:, t]], temperature) > FALSE_ALARM


# --- averages against enumeration ---------------------------------------------------------------


def worst(run, exact):
    """Largest deviation in standard errors over all averages and temperatures."""
    deviations = [
        np.abs(getattr(run, name) - getattr(exact, name)) / getattr(run.standard_error, name)
        for name in AVERAGES
        if np.max(getattr(run.standard_error, name)) > 1e-12
    ]
    assert len(deviations) >= 6
    return np.max(deviations)


@pytest.mark.parametrize(
    "problem",
    [
        TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3),
        TeacherStudent(uniform(2, 1.5), 1.0, ridge=0.05, temperature=0.2),
        TeacherStudent(UNEVEN, 2.0, temperature=0.5),
    ],
)
def test_heat_bath_averages_are_exact_within_their_errors(problem):
    drawn = sample(problem, 7 if JIT else 4, seed=8)
    chains = 24 if JIT else 12
    run = heat_bath(drawn, problem, 2000 if JIT else 500, seed=1, chains=chains)
    limit = stats.t.isf(FALSE_ALARM / 2 / len(AVERAGES), chains - 1)
    assert worst(run, enumerate_states(drawn, problem)) < limit
    assert run.temperature == problem.temperature


def test_parallel_tempering_averages_are_exact_within_their_errors():
    problem = TeacherStudent(uniform(1, 1.0), 1.5)
    drawn = sample(problem, 8, seed=9)
    ladder, replicas = [0.2, 0.4, 0.8], 12
    run = parallel_tempering(drawn, problem, ladder, 2000 if JIT else 300, 1, replicas)
    limit = stats.t.isf(FALSE_ALARM / 2 / len(AVERAGES) / len(ladder), replicas - 1)
    assert worst(run, enumerate_states(drawn, problem, ladder)) < limit
    assert run.overlap_samples.shape == (len(run.overlap_samples), 3, 66)
    assert ((run.swap_rate > 0) & (run.swap_rate < 1)).all()


def test_overlaps_of_replicas_have_the_exact_distribution():
    problem = TeacherStudent(uniform(1, 1.0), 1.0)
    n, temperature, replicas = 5, 0.4, 10
    drawn = sample(problem, n, seed=3)
    states = np.array(list(product(problem.codebook.levels, repeat=n)))
    energies = ((drawn.y - states @ drawn.X.T) ** 2).sum(1) / 2
    p = np.exp(-(energies - energies.min()) / temperature)
    p /= p.sum()
    values = np.arange(-n, n + 1, 2) / n
    overlaps = np.rint((states @ states.T + n) / 2).astype(int)
    exact = np.bincount(overlaps.ravel(), np.outer(p, p).ravel())

    run = parallel_tempering(drawn, problem, [temperature, 1.0], 4000 if JIT else 200, 5, replicas)
    # Five pairs that share no replica: independent, so their scatter is the error.
    first, second = np.triu_indices(replicas, 1)
    apart = (first % 2 == 0) & (second == first + 1)
    samples = run.overlap_samples[:, 0, apart]
    share = np.array([np.mean(np.abs(samples - v) < 1e-9, axis=0) for v in values])
    assert share.sum(axis=0) == pytest.approx(1)
    error = share.std(axis=1, ddof=1) / np.sqrt(5)
    limit = stats.t.isf(FALSE_ALARM / 2 / values.size, 4)
    common = exact > 1e-3
    assert common.sum() >= 4
    assert (np.abs(share.mean(axis=1) - exact) < limit * error)[common].all()


def test_standard_errors_shrink_with_the_root_of_the_sweeps():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.5)
    drawn = sample(problem, 6, seed=0)
    short, long = (heat_bath(drawn, problem, s, 0, chains=40) for s in (50, 800 if JIT else 450))
    ratio = short.standard_error.energy / long.standard_error.energy
    assert ratio == pytest.approx(4 if JIT else 3, rel=0.5)


# --- annealing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "n"), [(1, 12), (2, 6), (3, 4)])
def test_annealing_finds_ground_states(bits, n):
    problem = TeacherStudent(uniform(bits, 1.5), 1.5, ridge=0.05)
    for seed in range(5):
        drawn = sample(problem, n if JIT else n // 2, seed)
        ground = enumerate_states(drawn, problem).ground_state
        found = anneal(drawn, problem, 200 if JIT else 50, seed, restarts=10)
        assert (found.weights == ground.weights).all()
        assert found.energy == pytest.approx(ground.energy, rel=1e-12)


def test_no_change_of_one_weight_improves_annealed_weights():
    problem = TeacherStudent(uniform(2, 1.5), 0.8)
    drawn = sample(problem, 40 if JIT else 10, seed=1)
    found = anneal(drawn, problem, 20, seed=2)
    for i in range(found.weights.size):
        for level in problem.codebook.levels:
            w = found.weights.copy()
            w[i] = level
            energy = np.sum((drawn.y - drawn.X @ w) ** 2) / 2 / w.size
            assert energy >= found.energy - 1e-12


def test_slower_cooling_goes_lower():
    problem = TeacherStudent(uniform(1, 1.0), 0.8)
    drawn = sample(problem, 100 if JIT else 20, seed=3)
    fast, slow = (
        np.mean([anneal(drawn, problem, sweeps, seed).energy for seed in range(10)])
        for sweeps in (2, 500 if JIT else 60)
    )
    assert slow < fast


# --- seeds, looks and bad input -----------------------------------------------------------------


def test_a_seed_repeats_a_run_and_a_generator_moves_on():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3)
    drawn = sample(problem, 10, seed=0)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, again, other = (heat_bath(drawn, problem, 20, seed) for seed in (1, 1, 2))
    assert one.energy == again.energy != other.energy
    rng = np.random.default_rng(1)
    assert heat_bath(drawn, problem, 20, rng).energy == one.energy
    assert heat_bath(drawn, problem, 20, rng).energy != one.energy
    runs = [parallel_tempering(drawn, problem, [0.1, 0.2], 10, 7) for _ in range(2)]
    assert (runs[0].overlap_samples == runs[1].overlap_samples).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_results_say_what_they_are():
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3)
    drawn = sample(problem, 6, seed=0)
    run = heat_bath(drawn, problem, 10, 0)
    assert repr(run).startswith("MonteCarloAverages(temperature=0.3, energy=")
    assert run.to_frame().shape == run.standard_error.to_frame().shape == (1, 8)
    tempered = parallel_tempering(drawn, problem, [0.1, 0.2], 10, 0)
    assert repr(tempered) == "TemperedAverages(2 temperatures)"
    assert tempered.to_frame()["temperature"].to_list() == [0.1, 0.2]


def test_inputs_that_say_nothing_leave_the_codebook_free():
    problem = TeacherStudent(uniform(1, 1.0), 1.0, temperature=0.5)
    drawn = sample(problem, 4, seed=0)
    empty = type(drawn)(np.zeros_like(drawn.X), drawn.y, drawn.teacher)
    run = heat_bath(empty, problem, 100, 0)
    assert run.energy == pytest.approx(drawn.y @ drawn.y / 2 / 4)
    assert anneal(empty, problem, 5, 0).train_error == pytest.approx(np.mean(drawn.y**2))


def test_bad_arguments_are_refused():
    cold, problem = (TeacherStudent(uniform(1, 1.0), 1.5, temperature=t) for t in (0.0, 0.3))
    drawn = sample(problem, 6, seed=0)
    with pytest.raises(ValueError, match="temperature = 0: give a temperature above 0"):
        heat_bath(drawn, cold, 10, 0)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"sweeps = {wrong}: give a whole number, at least 1"):
            heat_bath(drawn, problem, wrong, 0)
        with pytest.raises(ValueError, match=f"sweeps = {wrong}"):
            anneal(drawn, problem, wrong, 0)
    with pytest.raises(ValueError, match="chains = 2: give a whole number, at least 3"):
        heat_bath(drawn, problem, 10, 0, chains=2)
    with pytest.raises(ValueError, match="replicas = 2: give a whole number, at least 3"):
        parallel_tempering(drawn, problem, [0.1, 0.2], 10, 0, replicas=2)
    with pytest.raises(ValueError, match="restarts = 0"):
        anneal(drawn, problem, 10, 0, restarts=0)
    with pytest.raises(ValueError, match="burn_in = -1"):
        heat_bath(drawn, problem, 10, 0, burn_in=-1)
    for ladder in ([0.1], [0.2, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match=r"temperatures = .*: give at least two, ascending"):
            parallel_tempering(drawn, problem, ladder, 10, 0)
    with pytest.raises(ValueError, match=r"temperature = 0\.0: give a finite number > 0"):
        parallel_tempering(drawn, problem, [0.0, 0.1], 10, 0)


@pytest.mark.parametrize("method", ["heat_bath", "anneal", "parallel_tempering"])
def test_nan_in_the_data_is_refused(method):
    problem = TeacherStudent(uniform(1, 1.0), 1.5, temperature=0.3)
    drawn = sample(problem, 6, seed=0)
    drawn.X[2, 3] = np.nan
    calls = {
        "heat_bath": lambda: heat_bath(drawn, problem, 10, 0),
        "anneal": lambda: anneal(drawn, problem, 10, 0),
        "parallel_tempering": lambda: parallel_tempering(drawn, problem, [0.1, 0.2], 10, 0),
    }
    with pytest.raises(ValueError, match=r"instance\.X holds NaN or infinity"):
        calls[method]()
