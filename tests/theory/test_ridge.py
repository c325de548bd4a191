import numpy as np
import pytest
from scipy.linalg import cho_factor, cho_solve

from qgen_lab.codebooks import uniform
from qgen_lab.theory import TeacherStudent, ridge_solution, sample

PROBLEMS = [(2.0, 0.1, 0.1, 1.0), (0.5, 0.5, 0.2, 1.0), (1.0, 0.1, 0.3, 2.0), (1.6, 0.4, 0.0, 1.0)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_ridge_regression_of_two_thousand_weights(problem):
    alpha, noise_variance, ridge, signal_variance = problem
    n = 2000
    drawn = sample(
        TeacherStudent(uniform(1, 1.0), alpha, noise_variance, ridge, 0.0, signal_variance), n, 7
    )
    gram = drawn.X.T @ drawn.X
    gram[np.diag_indices(n)] += ridge
    factor = cho_factor(gram, overwrite_a=True, check_finite=False)
    w = cho_solve(factor, drawn.X.T @ drawn.y)
    theory = ridge_solution(*problem)
    # One instance: the figures scatter by about 2 / sqrt(n) of themselves.
    measured = {
        "overlap": w @ drawn.teacher / n,
        "self_overlap": w @ w / n,
        "gen_error": np.mean((w - drawn.teacher) ** 2),
        "train_error": np.mean((drawn.y - drawn.X @ w) ** 2),
    }
    for name, value in measured.items():
        assert value == pytest.approx(getattr(theory, name), rel=0.15), name


def test_least_norm_without_a_ridge():
    alpha, n = 0.5, 600
    drawn = sample(TeacherStudent(uniform(1, 1.0), alpha, 0.2), n, seed=11)
    w = np.linalg.lstsq(drawn.X, drawn.y)[0]
    theory = ridge_solution(alpha, 0.2, 0.0)
    assert theory.train_error == 0
    assert theory.susceptibility == np.inf
    assert w @ w / n == pytest.approx(theory.self_overlap, rel=0.2)
    assert np.mean((w - drawn.teacher) ** 2) == pytest.approx(theory.gen_error, rel=0.2)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.1, 5.0])
def test_a_vanishing_ridge_is_a_limit(alpha):
    limit, small = ridge_solution(alpha, 0.1, 0.0), ridge_solution(alpha, 0.1, 1e-9)
    for name in ("overlap", "self_overlap", "gen_error", "train_error"):
        assert getattr(small, name) == pytest.approx(getattr(limit, name), rel=1e-6, abs=1e-9)


def test_as_many_samples_as_weights_without_a_ridge_diverges():
    assert ridge_solution(1.0, 0.1, 0.0).gen_error == np.inf
    assert ridge_solution(1.0, 0.1, 1e-8).gen_error > 100


def test_the_self_consistent_equations_hold():
    alpha, noise_variance, ridge, rho = 0.7, 0.3, 0.2, 1.5
    solution = ridge_solution(alpha, noise_variance, ridge, rho)
    stiffness = alpha / (1 + solution.susceptibility)
    slope = stiffness / (stiffness + ridge)
    error = noise_variance + rho - 2 * solution.overlap + solution.self_overlap
    assert solution.susceptibility == pytest.approx(1 / (stiffness + ridge), rel=1e-12)
    assert solution.overlap == pytest.approx(rho * slope, rel=1e-12)
    assert solution.self_overlap == pytest.approx(slope**2 * (rho + error / alpha), rel=1e-12)
    assert solution.train_error == pytest.approx(
        error / (1 + solution.susceptibility) ** 2, rel=1e-12
    )
