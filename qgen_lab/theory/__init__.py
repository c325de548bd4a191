"""Typical-case theory of quantized linear models: replica equations and what they predict."""

from qgen_lab.theory.typical_case import (
    Instance,
    RidgeSolution,
    RSSolution,
    TeacherStudent,
    interpolation_threshold,
    ridge_solution,
    sample,
    solve_rs,
)

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
