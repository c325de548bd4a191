"""Monte Carlo on one instance: Gibbs averages, low energies, overlaps of independent replicas.

Every move redraws one weight from its law given all the others (heat bath). The gradient of the
energy is kept up to date: looking at a weight is free, changing it costs one row of the Gram
matrix. With the residual `y - X w` in its place every look would cost M operations, which is more
unless there are far fewer samples than weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from qgen_lab.theory.finite_size import (
    Configuration,
    GibbsAverages,
    configuration,
    gibbs_figures,
    quadratic_form,
)
from qgen_lab.theory.problem import Instance, TeacherStudent, checked_number


@dataclass(frozen=True, repr=False)
class MonteCarloAverages(GibbsAverages):
    """Sampled Gibbs averages.

    Attributes
    ----------
    standard_error : GibbsAverages
        Standard error of each average, from the scatter of independent chains (jackknife). It
        knows of slow chains, but not of what all chains miss.
    """

    standard_error: GibbsAverages


@dataclass(frozen=True, repr=False)
class TemperedAverages(MonteCarloAverages):
    """Sampled Gibbs averages at several temperatures, with the overlaps of independent replicas.

    Attributes
    ----------
    overlap_samples : ndarray, shape (sweeps, T, pairs)
        `w_a . w_b / n` of every pair of replicas after every sweep: samples of P(q).
    swap_rate : ndarray, shape (T - 1,)
        Share of accepted swaps between neighbouring temperatures.
    """

    overlap_samples: NDArray[np.float64]
    swap_rate: NDArray[np.float64]


def heat_bath(
    instance: Instance,
    problem: TeacherStudent,
    sweeps: int,
    seed: int | np.random.Generator,
    chains: int = 8,
    burn_in: int | None = None,
) -> MonteCarloAverages:
    """Gibbs averages of one instance at the problem's temperature, by independent cooled chains.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook, the ridge and the temperature, above 0.
    sweeps : int
        Measured sweeps of each chain; a sweep redraws every weight once.
    seed : int or numpy.random.Generator
        Seed, or a generator to draw from.
    chains : int
        Independent chains, at least 3; `replica_overlap` compares them in pairs.
    burn_in : int, optional
        Sweeps before the measured ones, in which the temperature falls geometrically from one at
        which the weights move freely; half of `sweeps` unless given.

    Raises
    ------
    ValueError
        If the temperature is 0, a count is too small, or the instance is not sound (as in
        `enumerate_states`).
    """
    if problem.temperature == 0:
        raise ValueError(
            "temperature = 0: give a temperature above 0, or use anneal for the ground state"
        )
    sweeps, burn_in = _checked_sweeps(sweeps, burn_in)
    state = _Chains(instance, problem, _whole("chains", chains, 3), seed)
    for temperature in _cooling(state.mobile_temperature, problem.temperature, burn_in):
        state.sweep(temperature)
    sums = _Sums()
    for _ in range(sweeps):
        state.sweep(problem.temperature)
        sums.add(state.energy[:, None], state.w[:, None, :])
    figures, errors = sums.jackknife(instance, problem, np.array([problem.temperature]))
    value, error = ({k: float(v[0]) for k, v in each.items()} for each in (figures, errors))
    return MonteCarloAverages(**value, standard_error=GibbsAverages(**error))


def anneal(
    instance: Instance,
    problem: TeacherStudent,
    sweeps: int,
    seed: int | np.random.Generator,
    restarts: int = 1,
) -> Configuration:
    """Weights of low energy: simulated annealing, then descent.

    The temperature falls geometrically from one at which a weight moves freely over the codebook
    to a thousandth of what a step to the next level costs. At the end each weight goes to its
    best level given the others until none moves, so no change of a single weight helps.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook and the ridge; the temperature plays no part.
    sweeps : int
        Length of the cooling; a sweep redraws every weight once.
    seed : int or numpy.random.Generator
        Seed, or a generator to draw from.
    restarts : int
        Independent runs, of which the best is returned.

    Raises
    ------
    ValueError
        If a count is below 1, or the instance is not sound (as in `enumerate_states`).
    """
    sweeps = _whole("sweeps", sweeps, 1)
    state = _Chains(instance, problem, _whole("restarts", restarts, 1), seed)
    finest = np.min(problem.codebook.spacing) / np.ptp(problem.codebook.levels)
    hot = state.mobile_temperature
    for temperature in _cooling(hot, 1e-3 * finest**2 * hot, sweeps):
        state.sweep(temperature)
    while state.sweep(0.0):
        pass
    return configuration(instance, problem, state.w[np.argmin(state.energy)])


def parallel_tempering(
    instance: Instance,
    problem: TeacherStudent,
    temperatures: Sequence[float],
    sweeps: int,
    seed: int | np.random.Generator,
    replicas: int = 4,
    burn_in: int | None = None,
) -> TemperedAverages:
    """Gibbs averages at several temperatures at once, and the overlaps of independent replicas.

    A replica is a ladder of chains, one at each temperature; after every sweep neighbours may
    swap. Different replicas never meet, so their overlaps are samples of P(q).

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the codebook and the ridge; its temperature plays no part.
    temperatures : sequence of float
        At least two, above 0, ascending; close enough for `swap_rate` to stay well above 0.
    sweeps : int
        Measured sweeps; a sweep redraws every weight of every chain once.
    seed : int or numpy.random.Generator
        Seed, or a generator to draw from.
    replicas : int
        Independent replicas, at least 3.
    burn_in : int, optional
        Sweeps before the measured ones; half of `sweeps` unless given.

    Raises
    ------
    ValueError
        If the temperatures do not ascend from above 0, a count is too small, or the instance is
        not sound (as in `enumerate_states`).

    Notes
    -----
    Hukushima and Nemoto, Exchange Monte Carlo method and application to spin glass simulations,
    1996.
    """
    ladder = np.array([checked_number("temperature", t, positive=True) for t in temperatures])
    if ladder.size < 2 or not (np.diff(ladder) > 0).all():
        raise ValueError(f"temperatures = {ladder.tolist()}: give at least two, ascending")
    sweeps, burn_in = _checked_sweeps(sweeps, burn_in)
    replicas = _whole("replicas", replicas, 3)
    state = _Chains(instance, problem, replicas * ladder.size, seed)
    place = np.arange(replicas * ladder.size).reshape(replicas, ladder.size)  # of a chain
    of_chain = np.tile(ladder, replicas)
    first, second = np.triu_indices(replicas, 1)
    sums, accepted, overlaps = _Sums(), np.zeros(ladder.size - 1), []
    for step in range(-burn_in, sweeps):
        state.sweep(of_chain)
        swapped = _swap(place, state.energy, ladder, step % 2, state.rng)
        of_chain[place] = ladder
        if step >= 0:
            w = state.w[place]
            sums.add(state.energy[place], w)
            accepted += swapped
            overlaps.append(np.mean(w[first] * w[second], axis=-1).T)
    figures, errors = sums.jackknife(instance, problem, ladder)
    tried = np.array([(sweeps + 1) // 2, sweeps // 2])[np.arange(ladder.size - 1) % 2] * replicas
    return TemperedAverages(
        **figures,
        standard_error=GibbsAverages(**errors),
        overlap_samples=np.array(overlaps),
        swap_rate=accepted / np.maximum(tried, 1),
    )


class _Chains:
    """Weight vectors of one instance, side by side, each with the gradient of its energy."""

    def __init__(self, instance, problem, chains: int, seed: int | np.random.Generator):
        self.rng = np.random.default_rng(seed)
        self.gram, self.pull, self.offset = quadratic_form(instance, problem)
        self.levels = problem.codebook.levels
        self.w = self.rng.choice(self.levels, (chains, self.pull.size))
        self.gradient = self.w @ self.gram - self.pull

    @property
    def energy(self) -> NDArray[np.float64]:
        """H of every chain."""
        return self.offset + np.sum(self.w * (self.gradient - self.pull), axis=1) / 2

    @property
    def mobile_temperature(self) -> float:
        """What it costs one weight to cross the codebook, the others left out."""
        return float(np.mean(np.diag(self.gram)) * np.ptp(self.levels) ** 2 / 2) or 1.0

    def sweep(self, temperatures: float | NDArray) -> int:
        """Redraw every weight of every chain once; the number of weights that changed."""
        each = np.broadcast_to(np.asarray(temperatures, np.float64), len(self.w))
        return _sweep(self.gram, self.gradient, self.w, self.levels, each, self.rng)


@numba.njit(cache=True, nogil=True)
def _sweep(gram, gradient, w, levels, temperatures, rng):
    """Redraw each weight in turn from its law given the others; the best level at temperature 0.

    `w` and `gradient`, (C, n), are changed in place. Returns the number of weights that changed.
    """
    cost, cumulative = np.empty(levels.size), np.empty(levels.size)
    changed = 0
    for c in range(w.shape[0]):
        for i in range(w.shape[1]):
            curvature = gram[i, i]
            force = curvature * w[c, i] - gradient[c, i]
            best = 0
            for k in range(levels.size):
                cost[k] = (curvature * levels[k] / 2 - force) * levels[k]
                if cost[k] < cost[best]:
                    best = k
            drawn = best
            if temperatures[c] > 0:
                total = 0.0
                for k in range(levels.size):
                    total += np.exp((cost[best] - cost[k]) / temperatures[c])
                    cumulative[k] = total
                point = rng.random() * total
                drawn = 0
                while drawn < levels.size - 1 and cumulative[drawn] <= point:
                    drawn += 1
            change = levels[drawn] - w[c, i]
            if change != 0:
                changed += 1
                w[c, i] = levels[drawn]
                for j in range(w.shape[1]):
                    gradient[c, j] += change * gram[i, j]
    return changed


def _swap(place, energy, ladder, parity: int, rng) -> NDArray[np.float64]:
    """Swap neighbouring temperatures of every replica, in place, with the probability that is due.

    `place[r, t]` is the chain of replica r at temperature t; pairs start at `parity`, every second.
    Returns how many replicas swapped each pair, shape (T - 1,).
    """
    lower = np.arange(parity, ladder.size - 1, 2)
    here, there = place[:, lower], place[:, lower + 1]
    gain = (1 / ladder[lower] - 1 / ladder[lower + 1]) * (energy[here] - energy[there])
    swap = np.log1p(-rng.random(gain.shape)) < gain
    place[:, lower], place[:, lower + 1] = np.where(swap, there, here), np.where(swap, here, there)
    swapped = np.zeros(ladder.size - 1)
    swapped[lower] = swap.sum(axis=0)
    return swapped


class _Sums:
    """Time averages of independent replicas, and from them Gibbs averages with errors."""

    def __init__(self):
        self.count = 0
        self.energy = self.weights = self.squares = 0.0

    def add(self, energy: NDArray, w: NDArray) -> None:
        """Energies (R, T) and weights (R, T, n) after one more sweep."""
        self.count += 1
        self.energy = self.energy + energy
        self.weights = self.weights + w
        self.squares = self.squares + np.mean(w**2, axis=-1)

    def jackknife(self, instance, problem, ladder) -> tuple[dict, dict]:
        """Figures of `GibbsAverages` and their standard errors, arrays of shape (T,)."""
        replicas, _, n = self.weights.shape
        energy, mean, squares = (
            total / self.count for total in (self.energy / n, self.weights, self.squares)
        )

        def estimate(kept: NDArray) -> dict[str, NDArray]:
            total = mean[kept].sum(axis=0)
            # Pairs of different replicas: their noise is independent, so no square of it is left.
            pairs = np.mean(total**2 - np.sum(mean[kept] ** 2, axis=0), axis=-1)
            return gibbs_figures(
                instance,
                problem,
                energy=energy[kept].mean(axis=0),
                mean=total / kept.size,
                self_overlap=squares[kept].mean(axis=0),
                replica_overlap=pairs / (kept.size * (kept.size - 1)),
            )

        everyone = np.arange(replicas)
        without = [estimate(np.delete(everyone, r)) for r in everyone]
        figures = estimate(everyone)
        errors = {
            name: np.sqrt((replicas - 1) * np.var([each[name] for each in without], axis=0))
            for name in figures
        }
        return figures | {"temperature": ladder}, errors | {"temperature": ladder}


def _cooling(hot: float, cold: float, sweeps: int) -> NDArray[np.float64]:
    return np.geomspace(max(hot, cold), cold, sweeps)


def _checked_sweeps(sweeps: int, burn_in: int | None) -> tuple[int, int]:
    sweeps = _whole("sweeps", sweeps, 1)
    return sweeps, sweeps // 2 if burn_in is None else _whole("burn_in", burn_in, 0)


def _whole(name: str, value: int, least: int) -> int:
    if value != int(value) or value < least:
        raise ValueError(f"{name} = {value!r}: give a whole number, at least {least}")
    return int(value)
