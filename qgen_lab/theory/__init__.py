"""Typical-case theory of quantized linear models: replica equations and what they predict."""

from qgen_lab.theory.decimation import Decimation, decimate
from qgen_lab.theory.descent import Descent, largest_stable_rate, straight_through_descent
from qgen_lab.theory.discrete_least_squares import (
    coordinate_descent,
    procedures,
    ridge_weights,
    round_compensated,
    round_ridge,
)
from qgen_lab.theory.extrapolation import (
    Extrapolation,
    centred_moments,
    controlled_mean,
    extrapolate,
)
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
    motion_at_temperature,
    state_evolution,
)
from qgen_lab.theory.monte_carlo import (
    MonteCarloAverages,
    TemperedAverages,
    anneal,
    heat_bath,
    parallel_tempering,
)
from qgen_lab.theory.one_pass import (
    OnePassLimit,
    OnePassPath,
    one_pass,
    one_pass_descent,
    one_pass_path,
)
from qgen_lab.theory.one_step_rsb import OneStepRSBSolution, solve_1rsb
from qgen_lab.theory.optimal_width import OptimalWidth, optimal_width
from qgen_lab.theory.phase_diagram import Boundary, PhaseDiagram, phase_diagram
from qgen_lab.theory.problem import Instance, TeacherStudent, sample
from qgen_lab.theory.recommendation import WidthRecommendation, deployments, recommend_width
from qgen_lab.theory.ridge import RidgeSolution, ridge_solution
from qgen_lab.theory.stability import (
    at_temperature,
    replicon,
    small_temperature_law,
    stationary_motion,
    zero_entropy_temperature,
)
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
    "Boundary",
    "Configuration",
    "Decimation",
    "Descent",
    "Enumeration",
    "Extrapolation",
    "GibbsAverages",
    "Instance",
    "MonteCarloAverages",
    "OnePassLimit",
    "OnePassPath",
    "OneStepRSBSolution",
    "OptimalWidth",
    "PhaseDiagram",
    "RSSolution",
    "RidgeSolution",
    "StraightThroughLimit",
    "TeacherStudent",
    "TemperedAverages",
    "Trajectory",
    "WidthRecommendation",
    "amp",
    "amp_batch",
    "anneal",
    "at_temperature",
    "average_weights",
    "centred_moments",
    "configuration",
    "controlled_mean",
    "coordinate_descent",
    "decimate",
    "deployments",
    "enumerate_states",
    "extrapolate",
    "heat_bath",
    "interpolation_threshold",
    "largest_stable_rate",
    "motion_at_temperature",
    "one_pass",
    "one_pass_descent",
    "one_pass_path",
    "optimal_width",
    "parallel_tempering",
    "phase_diagram",
    "procedures",
    "recommend_width",
    "replicon",
    "ridge_solution",
    "ridge_weights",
    "round_compensated",
    "round_ridge",
    "sample",
    "small_temperature_law",
    "solve_1rsb",
    "solve_rs",
    "state_evolution",
    "stationary_motion",
    "straight_through",
    "straight_through_descent",
    "zero_entropy_temperature",
]
