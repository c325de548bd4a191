"""Typical-case theory of quantized linear models: replica equations and what they predict."""

from qgen_lab.theory.descent import Descent, largest_stable_rate, straight_through_descent
from qgen_lab.theory.finite_size import (
    Configuration,
    Enumeration,
    GibbsAverages,
    configuration,
    enumerate_states,
)
from qgen_lab.theory.message_passing import (
    AMPSolution,
    Trajectory,
    amp,
    amp_batch,
    state_evolution,
)
from qgen_lab.theory.monte_carlo import (
    MonteCarloAverages,
    TemperedAverages,
    anneal,
    heat_bath,
    parallel_tempering,
)
from qgen_lab.theory.problem import Instance, TeacherStudent, sample
from qgen_lab.theory.ridge import RidgeSolution, ridge_solution
from qgen_lab.theory.straight_through import (
    AverageWeights,
    StraightThroughLimit,
    average_weights,
    straight_through,
)
from qgen_lab.theory.typical_case import RSSolution, interpolation_threshold, solve_rs

__all__ = [
    "AMPSolution",
    "AverageWeights",
    "Configuration",
    "Descent",
    "Enumeration",
    "GibbsAverages",
    "Instance",
    "MonteCarloAverages",
    "RSSolution",
    "RidgeSolution",
    "StraightThroughLimit",
    "TeacherStudent",
    "TemperedAverages",
    "Trajectory",
    "amp",
    "amp_batch",
    "anneal",
    "average_weights",
    "configuration",
    "enumerate_states",
    "heat_bath",
    "interpolation_threshold",
    "largest_stable_rate",
    "parallel_tempering",
    "ridge_solution",
    "sample",
    "solve_rs",
    "state_evolution",
    "straight_through",
    "straight_through_descent",
]
