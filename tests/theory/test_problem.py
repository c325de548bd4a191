import numpy as np
import pytest

from qgen_lab.codebooks import uniform
from qgen_lab.theory import TeacherStudent, ridge_solution, sample

CODEBOOK = uniform(2, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("alpha", 0.0, "> 0"),
        ("alpha", -1.0, "> 0"),
        ("alpha", np.nan, "> 0"),
        ("alpha", np.inf, "> 0"),
        ("signal_variance", 0.0, "> 0"),
        ("noise_variance", -0.1, ">= 0"),
        ("noise_variance", np.nan, ">= 0"),
        ("ridge", -1e-9, ">= 0"),
        ("temperature", -0.1, ">= 0"),
        ("temperature", np.nan, ">= 0"),
        ("temperature", np.inf, ">= 0"),
    ],
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^{name} = {value!r}: give a finite number {allowed}"):
        TeacherStudent(CODEBOOK, **{"alpha": 1.0, name: value})


@pytest.mark.parametrize("value", ["much", None, [1.0, 2.0]])
def test_what_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match=r"alpha = .* is not a real number"):
        TeacherStudent(CODEBOOK, value)


def test_levels_alone_are_not_a_codebook():
    with pytest.raises(TypeError, match="codebook is a list: give a Codebook"):
        TeacherStudent([-1.0, 1.0], 1.0)


def test_problems_with_equal_values_are_equal():
    assert TeacherStudent(uniform(2, 1.0), 1) == TeacherStudent(CODEBOOK, 1.0)
    assert len({TeacherStudent(uniform(2, 1.0), 1), TeacherStudent(CODEBOOK, 1.0)}) == 1


def test_a_sample_has_the_stated_law():
    problem = TeacherStudent(CODEBOOK, 1.5, noise_variance=0.3, signal_variance=2.0)
    drawn = sample(problem, 800, seed=3)
    noise = drawn.y - drawn.X @ drawn.teacher
    assert drawn.X.shape == (1200, 800)
    assert drawn.y.shape == (1200,)
    # Six standard errors of a sample variance of n Gaussians: 6 sqrt(2 / n).
    assert drawn.X.var() * 800 == pytest.approx(1, abs=6 * np.sqrt(2 / drawn.X.size))
    assert drawn.teacher.var() == pytest.approx(2, rel=6 * np.sqrt(2 / 800))
    assert noise.var() == pytest.approx(0.3, rel=6 * np.sqrt(2 / 1200))
    assert repr(drawn) == "Instance(1200 samples, 800 weights)"


def test_a_seed_repeats_a_sample_and_a_generator_moves_on():
    problem = TeacherStudent(CODEBOOK, 0.5)
    first, again = sample(problem, 10, seed=1), sample(problem, 10, seed=1)
    assert (first.X == again.X).all()
    assert (first.y == again.y).all()
    rng = np.random.default_rng(1)
    assert (sample(problem, 10, rng).X == first.X).all()
    assert (sample(problem, 10, rng).X != first.X).any()


def test_correlated_inputs_have_the_stated_spectrum():
    problem = TeacherStudent(CODEBOOK, 30.0)
    plain, drawn = sample(problem, 40, 3), sample(problem, 40, 3, covariance_exponent=1.5)
    eigenvalues = np.linalg.eigvalsh(drawn.covariance)[::-1]
    assert eigenvalues.mean() == pytest.approx(1)
    assert eigenvalues / eigenvalues[0] == pytest.approx(np.arange(1.0, 41) ** -1.5)
    # Whitened, the 48,000 entries are independent: 6 standard errors of a variance of 1200.
    root = np.linalg.inv(np.linalg.cholesky(drawn.covariance))
    empirical = root @ drawn.X.T @ drawn.X @ root.T / 30
    assert np.abs(empirical - np.eye(40)).max() < 6 * np.sqrt(2 / 1200)
    assert (drawn.teacher == plain.teacher).all()
    noise = drawn.y - drawn.X @ drawn.teacher
    assert noise == pytest.approx(plain.y - plain.X @ plain.teacher)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_the_error_is_that_on_fresh_samples(exponent):
    problem = TeacherStudent(CODEBOOK, 2.0)
    drawn = sample(problem, 50, 1, covariance_exponent=exponent)
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((3, 50))
    covariance = np.eye(50) if drawn.covariance is None else drawn.covariance
    fresh = rng.multivariate_normal(np.zeros(50), covariance / 50, 40_000)
    errors = np.square(fresh @ (weights - drawn.teacher).T)
    # Five standard errors; the mean of 40,000 squares is Gaussian.
    bound = 5 * errors.std(axis=0) / np.sqrt(len(errors))
    assert (np.abs(drawn.gen_error(weights) - errors.mean(axis=0)) < bound).all()
    assert drawn.gen_error(weights[1]) == pytest.approx(drawn.gen_error(weights)[1], rel=1e-12)


def test_the_exponent_of_the_covariance_is_checked():
    with pytest.raises(ValueError, match="covariance_exponent = -1: give a finite number >= 0"):
        sample(TeacherStudent(CODEBOOK, 1.0), 5, 0, covariance_exponent=-1)


def test_there_is_always_a_training_sample():
    assert sample(TeacherStudent(CODEBOOK, 0.01), 5, seed=0).y.shape == (1,)


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_the_number_of_weights_is_checked(n):
    with pytest.raises(ValueError, match=f"n = {n}: give a whole number"):
        sample(TeacherStudent(CODEBOOK, 1.0), n, seed=0)


def test_ridge_solution_checks_its_arguments():
    with pytest.raises(ValueError, match="alpha = 0: give a finite number > 0"):
        ridge_solution(0, 0.1, 0.1)
    with pytest.raises(ValueError, match="ridge = -1: give a finite number >= 0"):
        ridge_solution(1.0, 0.1, -1)
