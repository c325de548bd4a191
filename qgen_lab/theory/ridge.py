"""Ridge regression in the same model: what a fine codebook over a wide range comes to."""

from dataclasses import dataclass

import numpy as np

from qgen_lab.theory.problem import checked_number


@dataclass(frozen=True)
class RidgeSolution:
    """Ridge regression in the same model: fields as in `RSSolution`, at temperature 0."""

    overlap: float
    self_overlap: float
    susceptibility: float
    gen_error: float
    train_error: float


def ridge_solution(
    alpha: float, noise_variance: float, ridge: float, signal_variance: float = 1.0
) -> RidgeSolution:
    """Unquantized ridge regression on the same data, in closed form.

    What a codebook of many levels over a wide range comes to. Without a ridge and with fewer
    samples than weights it is the solution of least norm, with an infinite susceptibility; at
    `alpha = 1` without a ridge the error diverges.

    Parameters
    ----------
    alpha, noise_variance, ridge, signal_variance : float
        As in `TeacherStudent`.

    Raises
    ------
    TypeError, ValueError
        As `TeacherStudent`.
    """
    alpha = checked_number("alpha", alpha, positive=True)
    rho = checked_number("signal_variance", signal_variance, positive=True)
    noise_variance = checked_number("noise_variance", noise_variance)
    ridge = checked_number("ridge", ridge)
    # slope = a / (a + ridge) and a = alpha - slope: a quadratic, written without cancellation.
    root = np.sqrt((alpha - 1) ** 2 + 2 * ridge * (alpha + 1) + ridge**2)
    slope = 2 * alpha / (1 + alpha + ridge + root)
    excess = alpha - 1 - ridge
    stiffness = (excess + root) / 2 if excess > 0 else 2 * alpha * ridge / (root - excess or 1.0)
    distance = 1 - slope**2 / alpha
    if distance <= 0:
        return RidgeSolution(rho * slope, np.inf, np.inf, np.inf, 0.0)
    effective = (noise_variance + (1 - slope) ** 2 * rho) / distance
    mean_square = slope**2 * (rho + effective / alpha)
    return RidgeSolution(
        overlap=float(rho * slope),
        self_overlap=float(mean_square),
        susceptibility=float(slope / stiffness) if stiffness > 0 else np.inf,
        gen_error=float(rho - 2 * rho * slope + mean_square),
        train_error=float(effective * (stiffness / alpha) ** 2),
    )
