"""Message passing with decimation: weights are fixed a few at a time, the surest first.

Message passing says how likely each level of each weight is, not which levels go together. Fixing
the surest weights and asking again, until none is left, makes one weight vector of it.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qgen_lab.codebooks import Codebook
from qgen_lab.theory.finite_size import Configuration, configuration
from qgen_lab.theory.message_passing import amp
from qgen_lab.theory.problem import Instance, TeacherStudent


@dataclass(frozen=True, repr=False)
class Decimation(Configuration):
    """The weights found, and how well message passing went on the way.

    Attributes
    ----------
    rounds : int
        How often message passing was run.
    settled : int
        How many of these runs converged.
    """

    rounds: int
    settled: int


def decimate(
    instance: Instance,
    problem: TeacherStudent,
    fixed_share: float = 0.05,
    max_iterations: int = 200,
) -> Decimation:
    """Fix the surest weights at their likeliest levels, run message passing again, and so on.

    Parameters
    ----------
    instance : Instance
        The data. Message passing takes the entries of `X` for independent: on correlated inputs
        it does not settle, and the weights are poor.
    problem : TeacherStudent
        Codebook, ridge, and a temperature above 0. At some two times `at_temperature` message
        passing converges on a few hundred weights and is sure of many.
    fixed_share : float
        Share of all weights that are fixed after each run, above 0 and at most 1.
    max_iterations : int
        Most iterations of each run.

    Raises
    ------
    TypeError, ValueError
        As `amp`; if the temperature is 0, or `fixed_share` outside its range.
    """
    if problem.temperature == 0:
        raise ValueError("temperature = 0: no weight is surer than another; give one above 0")
    if not 0 < fixed_share <= 1:
        raise ValueError(f"fixed_share = {fixed_share!r}: give a number above 0, at most 1")
    n = instance.teacher.size
    weights, means = np.empty(n), np.full(n, problem.codebook.levels.mean())
    free = np.arange(n)
    at_once = int(np.ceil(fixed_share * n))
    rounds = settled = 0
    while free.size:
        rest, part, scale = _remaining(instance, problem, weights, free)
        run = amp(rest, part, start=scale * means[free], max_iterations=max_iterations)
        rounds, settled = rounds + 1, settled + run.converged
        means[free] = run.mean / scale
        order = np.argsort(run.variance, kind="stable")
        surest = free[order[:at_once]]
        weights[surest] = problem.codebook.quantize(means[surest])
        free = np.sort(free[order[at_once:]])
    found = configuration(instance, problem, weights)
    return Decimation(**vars(found), rounds=rounds, settled=settled)


def _remaining(
    instance: Instance, problem: TeacherStudent, weights: NDArray, free: NDArray
) -> tuple[Instance, TeacherStudent, float]:
    """What the fixed weights leave to the free ones, as an instance and problem of their own.

    Entries of `X` get the variance of an instance of that size; weights shrink by `scale` for it.
    """
    n = weights.size
    scale = np.sqrt(free.size / n)
    fixed = np.ones(n, bool)
    fixed[free] = False
    labels = instance.y - instance.X[:, fixed] @ weights[fixed]
    rest = Instance(instance.X[:, free] / scale, labels, scale * instance.teacher[free])
    part = replace(
        problem,
        codebook=Codebook(scale * problem.codebook.levels),
        alpha=labels.size / free.size,
        ridge=problem.ridge / scale**2,
    )
    return rest, part, float(scale)
