"""Typical-case theory of quantized linear models: replica equations and what they predict."""

from qgen_lab.theory.problem import Instance, TeacherStudent, sample
from qgen_lab.theory.ridge import RidgeSolution, ridge_solution
from qgen_lab.theory.typical_case import RSSolution, interpolation_threshold, solve_rs

__all__ = [
    "Instance",
    "RSSolution",
    "RidgeSolution",
    "TeacherStudent",
    "interpolation_threshold",
    "ridge_solution",
    "sample",
    "solve_rs",
]
