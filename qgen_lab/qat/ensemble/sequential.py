"""One model after another, by `fit`: supports whatever `fit` supports."""

import ctypes
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qgen_lab.qat.batches import device_of
from qgen_lab.qat.divergence import Diverged
from qgen_lab.qat.ensemble.protocol import Cohort, Member, Outcome
from qgen_lab.qat.evaluation import Loss, Metrics
from qgen_lab.qat.training import fit


class Sequential:
    """The reference: every other engine gives what this one gives.

    More than one worker are processes of their own, one thread each. They build the models anew,
    so `build`, data, loss and metrics must be picklable, and a script needs the usual
    ``if __name__ == "__main__"``.
    """

    name = "sequential"

    def refuses(self, cohort: Cohort) -> str | None:
        """Only what worker processes cannot be sent."""
        if cohort.workers > 1:
            try:
                _packed(cohort)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                return f"its worker processes need what can be pickled: {error}"
        return None

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Call `fit` for each member."""
        outcomes = []
        epochs = cohort.members[0].recipe.epochs
        for outcome in (_in_turn if cohort.workers == 1 else _in_processes)(cohort):
            outcomes.append(outcome)
            bar.set_description(f"model {len(outcomes)}/{len(cohort)}")
            bar.update(epochs)
        return outcomes


def _in_turn(cohort: Cohort) -> Iterator[Outcome]:
    for model, member in zip(cohort.models, cohort.members, strict=True):
        yield _fit_one(model, member, cohort.data, cohort.loss, cohort.metrics)


def _fit_one(
    model: nn.Module, member: Member, data: Any, loss: Loss, metrics: Metrics | None
) -> Outcome:
    try:
        history = fit(model, data, member.recipe, loss, metrics, seed=member.seed, progress=False)
        return Outcome(history)
    except Diverged as problem:
        model.eval()
        return Outcome(problem.history, problem)


def _in_processes(cohort: Cohort) -> Iterator[Outcome]:
    pool = ProcessPoolExecutor(
        cohort.workers, get_context("spawn"), initializer=_start, initargs=(_packed(cohort),)
    )
    with pool:
        for model, answer in zip(cohort.models, pool.map(_answer, cohort.members), strict=True):
            state, outcome = pickle.loads(answer)
            model.load_state_dict(state)
            model.eval()
            yield outcome


def _packed(cohort: Cohort) -> bytes:
    device = device_of(cohort.models[0])
    return pickle.dumps((cohort.build, device, cohort.data, cohort.loss, cohort.metrics))


_given: tuple = ()  # what a worker process was started with


def _start(packed: bytes) -> None:
    """Prepare a worker process."""
    global _given
    torch.set_num_threads(1)
    if sys.platform == "linux":
        _keep_memory()
    _given = pickle.loads(packed)


def _keep_memory() -> None:
    """Let glibc keep what is freed: a fresh page for every activation costs a fifth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _answer(member: Member) -> bytes:
    """Train one member in a worker process."""
    build, device, data, loss, metrics = _given
    model = member.build(build).to(device)
    outcome = _fit_one(model, member, data, loss, metrics)
    return pickle.dumps((model.state_dict(), outcome))
