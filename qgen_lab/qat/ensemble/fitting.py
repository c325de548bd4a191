"""The one call: build the members, choose an engine, train."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batches import Batches
from qgen_lab.qat.ensemble.batched import Batched
from qgen_lab.qat.ensemble.jitted import Jitted
from qgen_lab.qat.ensemble.protocol import Cohort, Engine, Ensemble, Member
from qgen_lab.qat.ensemble.sequential import Sequential
from qgen_lab.qat.evaluation import Loss, Metrics

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Sequential(), Batched(), Jitted())}
"""Engines by name. Add one's own here and `fit_ensemble` finds it."""


def fit_ensemble(
    build: Callable[[int], nn.Module],
    members: Iterable[Member],
    data: Splits | Dataset | tuple[Tensor, Tensor] | Batches,
    loss: Loss = cross_entropy,
    metrics: Metrics | None = None,
    engine: str = "auto",
    *,
    device: torch.device | str | None = None,
    workers: int = 1,
    progress: bool | None = None,
) -> Ensemble:
    """Train many models of one architecture, each as one call of `fit` would.

    Member `m` starts as ``quantize_weights(build(m.seed), m.bits, ...)`` and ends as
    ``fit(model, data, m.recipe, loss, metrics, seed=m.seed)`` leaves it, whatever the engine: the
    same order of the samples, the same arithmetic up to rounding. In float32 a rounded sum can
    flip a code after some steps, and two engines then part ways, as two machines do.

    Parameters
    ----------
    build : callable
        ``build(seed)`` gives the model with the initial weights of that seed.
    members : iterable of Member
        What to train. All recipes need the same `epochs` and `batch_size`.
    data, loss, metrics
        As for `fit`; shared by all members.
    engine : str
        "sequential", "batched", another name in `ENGINES`, or "auto": those that support the
        members train a few of them for a few steps, and the fastest is taken.
    device : torch.device or str, optional
        Where to train; by default where `build` puts the models.
    workers : int
        How many models or groups are trained side by side: threads, and for the engine "sequential"
        processes. Keep the number of threads of each low (``OMP_NUM_THREADS=1``).
    progress : bool, optional
        Show a progress bar. By default only on a terminal.

    Returns
    -------
    Ensemble
        The engine that was used is named in it.

    Raises
    ------
    ValueError
        If there is no member, the members do not fit together, or the engine is unknown or does
        not support them; the message says why.
    TypeError
        If an argument is of a wrong kind.

    Notes
    -----
    A member whose loss ceases to be finite is marked and goes no further; the others are not
    touched by it.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import Member, Recipe, fit_ensemble, nin
    >>> members = [Member(Recipe(epochs=1), bits, seed=1) for bits in (None, 4, 2)]
    >>> def build(seed):
    ...     return nin(1, 8, in_channels=1, base_width=1, seed=seed)
    >>> ensemble = fit_ensemble(build, members, load_dataset("digits"), engine="batched")
    >>> len(ensemble.models)
    3
    """
    members = list(members)
    _check(members, workers)
    models = [member.build(build) for member in members]
    if device is not None:
        models = [model.to(device) for model in models]
    cohort = Cohort(build, models, members, data, loss, metrics, workers)
    chosen, measured = _choose(cohort, engine)
    with _bar(cohort, progress) as bar:
        start = time.perf_counter()
        outcomes = chosen.fit(cohort, bar)
        seconds = time.perf_counter() - start
    histories = [outcome.history for outcome in outcomes]
    diverged = [outcome.diverged for outcome in outcomes]
    return Ensemble(members, models, histories, diverged, chosen.name, measured, seconds)


def _check(members: list[Member], workers: int) -> None:
    if not members:
        raise ValueError("members is empty: give at least one Member")
    for member in members:
        if not isinstance(member, Member):
            raise TypeError(f"members must hold Member objects, got {member!r}")
    for name in ("epochs", "batch_size"):
        values = sorted({getattr(member.recipe, name) for member in members})
        if len(values) > 1:
            raise ValueError(f"members must share recipe.{name}, got {values}: make one call each")
    if not isinstance(workers, Integral) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers must be a positive integer, got {workers!r}")


def _choose(cohort: Cohort, name: str) -> tuple[Engine, dict[str, float]]:
    """The engine to use, and what was measured to find it."""
    if name != "auto":
        if name not in ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {sorted(ENGINES)}, got {name!r}")
        reason = ENGINES[name].refuses(cohort)
        if reason is not None:
            raise ValueError(f"engine {name!r} does not support these members: {reason}")
        return ENGINES[name], {}
    able = [engine for engine in ENGINES.values() if engine.refuses(cohort) is None]
    if not able:
        reasons = {name: engine.refuses(cohort) for name, engine in ENGINES.items()}
        raise ValueError(f"no engine supports these members: {reasons}")
    if len(able) == 1:
        return able[0], {}
    measured = {}
    count = 1
    for engine in able:
        measured[engine.name] = seconds = _seconds_per_step(engine, cohort, count)
        count = max(2, min(32, round(_TRIAL_SECONDS / (seconds * _TRIAL_STEPS))))
    return ENGINES[min(measured, key=measured.get)], measured


_TRIAL_SECONDS, _TRIAL_STEPS = 0.5, 3


def _seconds_per_step(engine: Engine, cohort: Cohort, count: int) -> float:
    """Wall time per step and model of a short training of copies, after a first to warm up."""
    batch_size = cohort.members[0].recipe.batch_size
    indices = list(range(0, len(cohort), math.ceil(len(cohort) / count)))
    data = _first_samples(cohort.data, _TRIAL_STEPS * batch_size)
    times = []
    for _ in range(2):
        trial = replace(
            cohort.take(indices),
            models=[copy.deepcopy(cohort.models[i]) for i in indices],
            members=[_shortened(cohort.members[i]) for i in indices],
            data=data,
            workers=1,
        )
        start = time.perf_counter()
        engine.fit(trial, tqdm(disable=True))
        times.append(time.perf_counter() - start)
    return times[-1] / (_TRIAL_STEPS * len(indices))


def _shortened(member: Member) -> Member:
    return replace(member, recipe=replace(member.recipe, epochs=1))


def _first_samples(data: Any, size: int) -> Any:
    """A short piece of the training data, or the data themselves if they cannot be cut."""
    data = data.train if isinstance(data, Splits) else data
    if isinstance(data, Dataset):
        return data.take(slice(0, size))
    if isinstance(data, tuple):
        return tuple(part[:size] for part in data)
    return data


def _bar(cohort: Cohort, progress: bool | None) -> tqdm:
    """A bar over the epochs of all members; tqdm hides it by itself where there is no terminal."""
    return tqdm(
        total=len(cohort) * cohort.members[0].recipe.epochs,
        disable=None if progress is None else not progress,
        unit="epoch",
    )
