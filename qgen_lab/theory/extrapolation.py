"""From finite instances to the limit of many weights: averages over draws, and fits in 1/n."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qgen_lab.theory.problem import Instance, TeacherStudent


def centred_moments(instance: Instance, problem: TeacherStudent) -> NDArray[np.float64]:
    """Moments of the data of one instance, less their exact means over instances of its shape.

    Control variates: an average over instances scatters because these nine numbers do, and of
    their scatter the mean is known. With `G = X'X`, teacher `w0` and noise `e = y - X w0` they are
    `w0.w0`, `w0.G w0`, `w0.G^2 w0`, `tr G`, `tr G^2`, `w0.X'e`, `w0.G X'e`, `e.e` and `|X'e|^2`.

    Parameters
    ----------
    instance : Instance
        A draw of `problem`, inputs not correlated.
    problem : TeacherStudent
        Gives the variances of signal and noise.

    Returns
    -------
    ndarray, shape (9,)
        Each of mean zero, divided by the number of weights (`e.e` by the number of samples).
    """
    X, teacher = instance.X, instance.teacher
    samples, n = X.shape
    rho, noise_variance, alpha = problem.signal_variance, problem.noise_variance, samples / n
    noise = instance.y - X @ teacher
    gram, back = X.T @ X, X.T @ noise
    moved = gram @ teacher
    second = alpha**2 + alpha + alpha / n  # of the eigenvalues of G
    return np.array(
        [
            teacher @ teacher / n - rho,
            teacher @ moved / n - rho * alpha,
            moved @ moved / n - rho * second,
            np.trace(gram) / n - alpha,
            np.sum(gram**2) / n - second,
            teacher @ back / n,
            moved @ back / n,
            noise @ noise / samples - noise_variance,
            back @ back / n - noise_variance * alpha,
        ]
    )


def controlled_mean(values: ArrayLike, controls: ArrayLike) -> tuple[NDArray, NDArray]:
    """Mean of samples and its standard error, with control variates.

    The samples are regressed on the controls; the mean is the value of the line where all controls
    have their mean, zero. The bias is of the order of one over the number of samples.

    Parameters
    ----------
    values : array_like, shape (S, ...)
        One entry for each of S independent samples.
    controls : array_like, shape (S, C)
        Of each sample, with exact mean zero; fewer than S - 1.

    Returns
    -------
    mean, standard_error : ndarray, shape (...)
        The error allows for a scatter that differs from sample to sample.

    Raises
    ------
    ValueError
        If there are not more samples than controls and a constant.
    """
    values, controls = np.asarray(values, np.float64), np.asarray(controls, np.float64)
    count, unknowns = len(values), controls.shape[1] + 1
    if count <= unknowns:
        raise ValueError(f"{count} samples for {unknowns - 1} controls: give more than {unknowns}")
    design = np.column_stack([np.ones(count), controls])
    inverse = np.linalg.pinv(design)
    flat = values.reshape(count, -1)
    coefficients = inverse @ flat
    residuals = flat - design @ coefficients
    variance = inverse[0] ** 2 @ residuals**2 * count / (count - unknowns)
    return coefficients[0].reshape(values.shape[1:]), np.sqrt(variance).reshape(values.shape[1:])


@dataclass(frozen=True)
class Extrapolation:
    """Value of a fit in 1/n at 1/n = 0.

    Attributes
    ----------
    value, standard_error : float
        Where infinitely many weights are, if the polynomial is right.
    chi_squared : float
        Sum of squared deviations from the fit in standard errors.
    degrees_of_freedom : int
        Sizes less coefficients: what `chi_squared` should be about.
    """

    value: float
    standard_error: float
    chi_squared: float
    degrees_of_freedom: int
    coefficients: NDArray[np.float64]

    def __call__(self, inverse_size: ArrayLike) -> NDArray[np.float64]:
        """The fitted polynomial at 1/n."""
        return np.polynomial.polynomial.polyval(inverse_size, self.coefficients)

    def __repr__(self) -> str:
        return (
            f"Extrapolation(value={self.value:.6g}, standard_error={self.standard_error:.2g},"
            f" chi_squared={self.chi_squared:.3g}, degrees_of_freedom={self.degrees_of_freedom})"
        )


def extrapolate(
    sizes: ArrayLike, values: ArrayLike, standard_errors: ArrayLike, degree: int = 2
) -> Extrapolation:
    """Fit a polynomial in 1/n by weighted least squares, and read it at 1/n = 0.

    Parameters
    ----------
    sizes, values, standard_errors : array_like, shape (S,)
        Numbers of weights n, averages at these sizes, and their standard errors, above 0. Let
        `alpha n` be whole at every size: rounding it puts a scatter of order 1/n on top of the law.
    degree : int
        Of the polynomial. Corrections are large: straight lines are biased.

    Returns
    -------
    Extrapolation

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer sizes than coefficients, or a size or an error is not
        positive.
    """
    n, values, errors = (np.asarray(a, np.float64) for a in (sizes, values, standard_errors))
    if n.ndim != 1 or not n.shape == values.shape == errors.shape or n.size < degree + 1:
        raise ValueError(
            f"sizes, values and standard_errors have shapes {n.shape}, {values.shape} and"
            f" {errors.shape}: give equally many of each, at least {degree + 1}"
        )
    if not ((n > 0).all() and (errors > 0).all()):
        raise ValueError("sizes and standard_errors: give positive numbers")
    design = np.vander(1 / n, degree + 1, increasing=True) / errors[:, None]
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ (values / errors)
    return Extrapolation(
        value=float(coefficients[0]),
        standard_error=float(np.linalg.norm(inverse[0])),
        chi_squared=float(np.sum((values / errors - design @ coefficients) ** 2)),
        degrees_of_freedom=n.size - degree - 1,
        coefficients=coefficients,
    )
