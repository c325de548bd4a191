"""Instances of finite size: exact Gibbs averages, by visiting every weight vector of the codebook.

Nothing here knows of the replica equations: this is what they can be checked against.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import numba
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from qgen_lab.theory.problem import Instance, TeacherStudent, checked_number


@dataclass(frozen=True)
class GibbsAverages:
    """Averages over the Gibbs measure of one instance, per weight unless said.

    Numbers for one temperature, arrays of shape (T,) for several. `<.>` is the Gibbs mean, `w0`
    the teacher, `n` the number of weights.

    Attributes
    ----------
    temperature : float or ndarray
        Temperature of the measure.
    energy : float or ndarray
        `<H> / n`, with `H(w) = |y - X w|^2 / 2 + ridge |w|^2 / 2`.
    overlap, replica_overlap, self_overlap : float or ndarray
        `w0 . <w> / n`, `|<w>|^2 / n` and `<|w|^2> / n`.
    gen_error, gen_error_mean : float or ndarray
        `<|w - w0|^2> / n` and `|<w> - w0|^2 / n`: the generalization error of a weight vector drawn
        from the measure and of its mean, without label noise, where inputs are not correlated.
    train_error : float or ndarray
        `<|y - X w|^2>` per sample.
    """

    temperature: float
    energy: float
    overlap: float
    replica_overlap: float
    self_overlap: float
    gen_error: float
    gen_error_mean: float
    train_error: float

    def to_frame(self) -> pd.DataFrame:
        """One row a temperature, one column an average."""
        names = [f.name for f in fields(self) if f.type is float]
        return pd.DataFrame({name: np.atleast_1d(getattr(self, name)) for name in names})

    def __repr__(self) -> str:
        name = type(self).__name__
        if np.ndim(self.temperature):
            return f"{name}({len(self.temperature)} temperatures)"
        return (
            f"{name}(temperature={self.temperature:.6g}, energy={self.energy:.6g},"
            f" gen_error={self.gen_error:.6g}, train_error={self.train_error:.6g})"
        )


@dataclass(frozen=True)
class Configuration:
    """One weight vector of an instance; the figures as in `GibbsAverages`.

    Here `gen_error` holds for correlated inputs too.

    Attributes
    ----------
    weights : ndarray, shape (n,)
        The weights.
    energy, overlap, self_overlap, gen_error, train_error : float
        Of these weights.
    """

    weights: NDArray[np.float64]
    energy: float
    overlap: float
    self_overlap: float
    gen_error: float
    train_error: float

    def __repr__(self) -> str:
        return (
            f"Configuration({self.weights.size} weights, energy={self.energy:.6g},"
            f" gen_error={self.gen_error:.6g}, train_error={self.train_error:.6g})"
        )


@dataclass(frozen=True, repr=False)
class Enumeration(GibbsAverages):
    """Exact Gibbs averages, with what only a sum over all states gives.

    Attributes
    ----------
    free_energy, entropy : float or ndarray
        `-T ln Z / n` and `(<H> / T + ln Z) / n` (in nats); at temperature 0 the lowest energy
        and 0.
    ground_state : Configuration
        The weight vector of lowest energy.
    """

    free_energy: float
    entropy: float
    ground_state: Configuration


def enumerate_states(
    instance: Instance,
    problem: TeacherStudent,
    temperatures: float | Sequence[float] | None = None,
    max_states: int = 2**22,
) -> Enumeration:
    """Gibbs averages and the ground state of one instance, exactly.

    Parameters
    ----------
    instance : Instance
        The data, of n weights.
    problem : TeacherStudent
        Gives the codebook of K levels, the ridge and, without `temperatures`, the temperature.
    temperatures : float or sequence of float, optional
        Temperatures of the averages, all in one pass; 0 stands for the ground state.
    max_states : int
        Most states `K**n` to visit.

    Returns
    -------
    Enumeration
        Of numbers for one temperature, of arrays for a sequence.

    Raises
    ------
    ValueError
        If there are more states than `max_states` (the message says how long they would take), if
        the instance's shapes do not match or it holds NaN, or if a temperature is negative.
    TypeError
        If a temperature is not a real number.

    Notes
    -----
    Memory does not grow with the number of states. Neighbours in the reflected Gray code differ by
    one level of one weight (Knuth, The Art of Computer Programming, Algorithm 7.2.1.1H), so a state
    costs n operations and one exponential a temperature. The interpreter's lock is released
    meanwhile: threads can enumerate several instances at once.
    """
    gram, pull, offset = quadratic_form(instance, problem)
    several = temperatures is not None and np.ndim(temperatures) > 0
    chosen = problem.temperature if temperatures is None else temperatures
    ladder = np.array([checked_number("temperature", t) for t in (chosen if several else [chosen])])
    levels, n = problem.codebook.levels, pull.size
    # The least positive temperature singles out the ground state, to the last digit.
    warmth = np.maximum(ladder, _LEAST_TEMPERATURE)
    _check_number_of_states(gram, pull, offset, levels, warmth, max_states)

    lowest, codes, total, heat, collected = _walk(
        gram, pull, offset, levels, warmth, levels.size**n
    )
    energy, marginals = heat / total, collected / total[:, None, None]
    mean = marginals @ levels
    figures = {
        "temperature": ladder,
        "free_energy": (lowest - warmth * np.log(total)) / n,
        "entropy": (np.log(total) + (energy - lowest) / warmth) / n,
    }
    figures |= gibbs_figures(
        instance,
        problem,
        energy=energy / n,
        mean=mean,
        self_overlap=np.mean(marginals @ levels**2, axis=-1),
        replica_overlap=np.mean(mean**2, axis=-1),
    )
    if not several:
        figures = {name: float(values[0]) for name, values in figures.items()}
    return Enumeration(**figures, ground_state=configuration(instance, problem, levels[codes]))


_LEAST_TEMPERATURE = 1e-200


def configuration(instance: Instance, problem: TeacherStudent, weights: ArrayLike) -> Configuration:
    """Energy and errors of one weight vector, on the codebook or not.

    Parameters
    ----------
    instance : Instance
        The data.
    problem : TeacherStudent
        Gives the ridge.
    weights : array_like, shape (n,)
        The weights.

    Raises
    ------
    ValueError
        If `weights` does not have one entry for each of the instance's weights.
    """
    weights = np.array(weights, dtype=np.float64)
    if weights.shape != instance.teacher.shape:
        raise ValueError(
            f"weights has shape {weights.shape}: give one for each of the instance's"
            f" {instance.teacher.size} weights"
        )
    squares = np.sum((instance.y - instance.X @ weights) ** 2)
    return Configuration(
        weights=weights,
        energy=float((squares + problem.ridge * weights @ weights) / 2 / weights.size),
        overlap=float(np.mean(instance.teacher * weights)),
        self_overlap=float(np.mean(weights**2)),
        gen_error=float(instance.gen_error(weights)),
        train_error=float(squares / instance.y.size),
    )


def quadratic_form(
    instance: Instance, problem: TeacherStudent
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """`gram`, `pull`, `offset` of the energy `H(w) = w . gram w / 2 - pull . w + offset`.

    Raises
    ------
    ValueError
        If the instance's shapes do not match, or it holds NaN or infinity.
    """
    X, y, teacher = (np.asarray(a, np.float64) for a in (instance.X, instance.y, instance.teacher))
    if X.ndim != 2 or y.shape != X.shape[:1] or teacher.shape != X.shape[1:] or not X.size:
        raise ValueError(
            f"instance has X of shape {X.shape}, y of shape {y.shape} and a teacher of shape"
            f" {teacher.shape}: give (M, N), (M,) and (N,), M and N at least 1"
        )
    for name, array in (("X", X), ("y", y), ("teacher", teacher)):
        if not np.isfinite(array).all():
            raise ValueError(f"instance.{name} holds NaN or infinity: give finite numbers")
    gram = X.T @ X
    gram[np.diag_indices_from(gram)] += problem.ridge
    return gram, X.T @ y, float(y @ y / 2)


def gibbs_figures(
    instance: Instance,
    problem: TeacherStudent,
    energy: NDArray,
    mean: NDArray,
    self_overlap: NDArray,
    replica_overlap: NDArray,
) -> dict[str, NDArray]:
    """The figures of `GibbsAverages` from four averages: the mean weights (..., n), the rest (...).

    `replica_overlap` is given, because sampled mean weights have a square that is too large.
    """
    n, samples = mean.shape[-1], instance.y.size
    overlap = mean @ instance.teacher / n
    distance = np.mean(instance.teacher**2) - 2 * overlap
    return {
        "energy": energy,
        "overlap": overlap,
        "replica_overlap": replica_overlap,
        "self_overlap": self_overlap,
        "gen_error": distance + self_overlap,
        "gen_error_mean": distance + replica_overlap,
        "train_error": n * (2 * energy - problem.ridge * self_overlap) / samples,
    }


def _check_number_of_states(gram, pull, offset, levels, temperatures, max_states: int) -> None:
    n, n_levels = pull.size, levels.size
    if n_levels**n <= max_states:
        return
    _walk(gram, pull, offset, levels, temperatures, 1)  # compiles
    start = perf_counter()
    _walk(gram, pull, offset, levels, temperatures, _REFRESH)
    seconds_a_state = (perf_counter() - start) / _REFRESH
    raise ValueError(
        f"{n} weights on {n_levels} levels have {n_levels}^{n} states, more than max_states ="
        f" {max_states}: they would take about"
        f" {_duration(np.log10(seconds_a_state) + n * np.log10(n_levels))} here; use fewer weights,"
        " or give a larger max_states"
    )


def _duration(log_seconds: float) -> str:
    """Seconds of this decimal logarithm, in a unit that a reader can picture."""
    if log_seconds > 12:
        return f"10^{log_seconds - 7.5:.0f} years"
    seconds = 10**log_seconds
    for unit, length in (("years", 3.156e7), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} seconds"


_REFRESH = 4096  # steps after which rounding errors of the energy are wiped out


@numba.njit(cache=True, nogil=True)
def _walk(gram, pull, offset, levels, temperatures, count):
    """Sums over the first `count` weight vectors in the order of the reflected Gray code.

    Returns the lowest energy; the indices of its levels, (n,); and for every temperature the sums
    of `exp(-(H - lowest) / T)`, of H times that, and of that with weight i on level k, (T, n, K).
    """
    n, n_levels, n_temperatures = pull.size, levels.size, temperatures.size
    codes, direction, focus = np.zeros(n, np.int64), np.ones(n, np.int64), np.arange(n + 1)
    gradient = np.empty(n)
    energy, lowest, best = 0.0, np.inf, np.zeros(n, np.int64)
    total, heat = np.zeros(n_temperatures), np.zeros(n_temperatures)
    # What weight i collects on a level is booked when it leaves: `since` is the total on arrival.
    since = np.zeros((n_temperatures, n))
    collected = np.zeros((n_temperatures, n, n_levels))
    for step in range(count):
        if step % _REFRESH == 0:
            energy = offset
            for i in range(n):
                gradient[i] = -pull[i]
                for j in range(n):
                    gradient[i] += gram[i, j] * levels[codes[j]]
                energy += (gradient[i] - pull[i]) * levels[codes[i]] / 2
        if energy < lowest:
            for t in range(n_temperatures):
                smaller = np.exp((energy - lowest) / temperatures[t])
                total[t] *= smaller
                heat[t] *= smaller
                for i in range(n):
                    since[t, i] *= smaller
                    for k in range(n_levels):
                        collected[t, i, k] *= smaller
            lowest = energy
            for i in range(n):
                best[i] = codes[i]
        for t in range(n_temperatures):
            factor = np.exp((lowest - energy) / temperatures[t])
            total[t] += factor
            heat[t] += factor * energy

        i = focus[0]
        focus[0] = 0
        if i == n:
            break
        old, new = codes[i], codes[i] + direction[i]
        for t in range(n_temperatures):
            collected[t, i, old] += total[t] - since[t, i]
            since[t, i] = total[t]
        change = levels[new] - levels[old]
        energy += change * (gradient[i] + change * gram[i, i] / 2)
        for j in range(n):
            gradient[j] += change * gram[i, j]
        codes[i] = new
        if new == 0 or new == n_levels - 1:
            direction[i] = -direction[i]
            focus[i] = focus[i + 1]
            focus[i + 1] = i + 1
    for t in range(n_temperatures):
        for i in range(n):
            collected[t, i, codes[i]] += total[t] - since[t, i]
    return lowest, best, total, heat, collected
