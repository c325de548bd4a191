"""The model: a linear teacher, and a linear student whose weights lie on a codebook."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qgen_lab.codebooks import Codebook


@dataclass(frozen=True)
class TeacherStudent:
    """A linear teacher, and a linear student with weights on a codebook.

    `X` is M x N with independent N(0, 1/N) entries and M = alpha N; the teacher's weights are
    N(0, signal_variance); `y = X teacher + noise`.

    Parameters
    ----------
    codebook : Codebook
        The levels that the student's weights may take.
    alpha : float
        Training samples per weight, above 0.
    noise_variance : float
        Variance of the label noise, at least 0.
    ridge : float
        Strength of the penalty `ridge |w|^2 / 2`, at least 0.
    temperature : float
        Temperature of the Gibbs measure, at least 0; 0 is the ground state.
    signal_variance : float
        Variance of the teacher's weights, above 0.

    Raises
    ------
    TypeError
        If `codebook` is not a `Codebook`, or a number is not a real number.
    ValueError
        If a number is outside its range or not finite.
    """

    codebook: Codebook
    alpha: float
    noise_variance: float = 0.1
    ridge: float = 0.0
    temperature: float = 0.0
    signal_variance: float = 1.0

    def __post_init__(self):
        if not isinstance(self.codebook, Codebook):
            raise TypeError(
                f"codebook is a {type(self.codebook).__name__}: give a Codebook, such as"
                " uniform(bits, width)"
            )
        for name in ("alpha", "signal_variance"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name), positive=True))
        for name in ("noise_variance", "ridge", "temperature"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name)))


def checked_number(name: str, value: float, positive: bool = False) -> float:
    """`value` as a float; raises unless it is finite and at least (`positive`: above) zero."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} = {value!r} is not a real number") from None
    if not np.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} = {value!r}: give a finite number {'>' if positive else '>='} 0")
    return number


@dataclass(frozen=True)
class Instance:
    """One draw of a problem.

    `X` (M, N), `y` (M,), the teacher's weights (N,), and N times the covariance of the inputs
    (N, N), None where that is the unit matrix.
    """

    X: NDArray[np.float64]
    y: NDArray[np.float64]
    teacher: NDArray[np.float64]
    covariance: NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        return f"Instance({self.X.shape[0]} samples, {self.X.shape[1]} weights)"

    def gen_error(self, weights: NDArray) -> NDArray[np.float64] | float:
        """Generalization error of weights (..., N), without label noise: shape (...).

        `(w - teacher)' covariance (w - teacher) / N`, the mean squared error on a fresh sample.
        """
        error = np.asarray(weights) - self.teacher
        moved = error if self.covariance is None else error @ self.covariance
        return (error * moved).mean(axis=-1)


def sample(
    problem: TeacherStudent,
    n: int,
    seed: int | np.random.Generator,
    covariance_exponent: float = 0.0,
) -> Instance:
    """Draw inputs, teacher and labels.

    Parameters
    ----------
    problem : TeacherStudent
        The problem; codebook, ridge and temperature play no part.
    n : int
        Number of weights N; the number of samples is `alpha * n`, rounded, at least 1.
    seed : int or numpy.random.Generator
        Seed, or a generator to draw from.
    covariance_exponent : float
        Inputs are correlated: the eigenvalues of their covariance fall like
        `k ** -covariance_exponent`, k = 1 ... N, with mean 1 / N, in a random basis. At least 0; at
        0, the model of the theory, entries are independent.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a positive whole number, or `covariance_exponent` not a finite one >= 0.
    """
    if n != int(n) or n < 1:
        raise ValueError(f"n = {n!r}: give a whole number of weights, at least 1")
    n, exponent = int(n), checked_number("covariance_exponent", covariance_exponent)
    rng = np.random.default_rng(seed)
    samples = max(round(problem.alpha * n), 1)
    X = rng.standard_normal((samples, n)) / np.sqrt(n)
    teacher = rng.normal(0.0, np.sqrt(problem.signal_variance), n)
    noise = rng.normal(0.0, np.sqrt(problem.noise_variance), samples)
    if exponent == 0:
        return Instance(X, X @ teacher + noise, teacher)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    eigenvalues = np.arange(1.0, n + 1) ** -exponent
    eigenvalues /= eigenvalues.mean()
    X = X * np.sqrt(eigenvalues) @ basis.T
    return Instance(X, X @ teacher + noise, teacher, basis * eigenvalues @ basis.T)
