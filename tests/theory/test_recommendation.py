import numba
import numpy as np
import pytest

from qgen_lab.codebooks import Codebook, families, lsq_grid, uniform
from qgen_lab.theory import (
    TeacherStudent,
    optimal_width,
    recommend_width,
    ridge_solution,
    solve_rs,
)
from qgen_lab.theory.recommendation import (
    _error_at_freezing,
    _largest_of,
    _lsq_width,
    deployments,
)

FEW = numba.config.DISABLE_JIT  # smaller sizes where every solution is slow
MSE_WIDTHS = {1: 0.7979, 2: 1.4935, 3: 2.0511, 4: 2.5140}  # of a unit Gaussian


# --- units and the usual choices ----------------------------------------------------------------


def test_units_of_the_trained_weights():
    rec = recommend_width(2, alpha=2.0, noise_variance=0.3, ridge=0.1, weights=0.05)
    twin = ridge_solution(2.0, 0.3, 0.1)
    best = optimal_width(2, 2.0, 0.3, 0.1)
    signal_std = 0.05 / np.sqrt(twin.self_overlap)
    assert rec.width == pytest.approx(best.width * signal_std, rel=1e-6)
    assert rec.width_per_signal_std == pytest.approx(best.width, rel=1e-6)
    assert rec.width_per_weight_std == pytest.approx(rec.width / 0.05, rel=1e-12)
    assert rec.step_size == pytest.approx(2 * rec.width / 3, rel=1e-12)
    assert rec.gen_error == pytest.approx(best.gen_error, rel=1e-9)
    assert rec.full_precision_gen_error == twin.gen_error
    assert (rec.band_lower, rec.band_upper) == pytest.approx(
        [end * signal_std for end in best.band], rel=1e-5
    )


def test_the_theorys_own_units():
    # What the recommendation means: full-precision weights of this spread were trained in a world
    # whose signal has this variance, and there the width is the best one.
    weights_std, alpha, noise, ridge = 0.3, 1.5, 0.2, 0.05
    rec = recommend_width(2, alpha, noise, ridge, weights=weights_std)
    rho = (rec.width / rec.width_per_signal_std) ** 2
    assert ridge_solution(alpha, noise * rho, ridge, rho).self_overlap == pytest.approx(
        weights_std**2, rel=1e-9
    )
    best = optimal_width(2, alpha, noise * rho, ridge, signal_variance=rho)
    assert best.width == pytest.approx(rec.width, rel=1e-5)
    assert best.gen_error / rho == pytest.approx(rec.gen_error, rel=1e-6)


@pytest.mark.parametrize("bits", [1] if FEW else [1, 2, 4])
def test_the_usual_choices_cost_what_the_theory_says(bits):
    rec = recommend_width(bits, 2.0, weights=0.1, n_weights=5000)
    unit = rec.width / rec.width_per_signal_std
    assert rec.mse_width == pytest.approx(0.1 * MSE_WIDTHS[bits], abs=1e-5)
    assert rec.min_max_width == pytest.approx(0.1 * _largest_of(5000), rel=1e-12)
    for name in ("mse", "min_max", "lsq"):
        width = getattr(rec, f"{name}_width")
        error = solve_rs(TeacherStudent(uniform(bits, width / unit), 2.0)).gen_error
        assert getattr(rec, f"{name}_gen_error") == pytest.approx(error, rel=1e-9)
        assert error >= rec.gen_error


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_lsq_width_is_half_the_distance_of_its_outermost_levels(bits):
    positive = max(2 ** (bits - 1) - 1, 1)
    step = 0.37 if bits == 1 else 2 * 0.37 / np.sqrt(positive)
    assert _lsq_width(bits, 0.37) == pytest.approx(np.ptp(lsq_grid(bits, step).levels) / 2)


def test_the_largest_of_gaussian_weights():
    drawn = np.abs(np.random.default_rng(0).normal(size=(20_000, 50))).max(axis=1)
    error = drawn.std() / np.sqrt(drawn.size)
    assert abs(_largest_of(50) - drawn.mean()) < 4 * error
    assert _largest_of(1) == pytest.approx(np.sqrt(2 / np.pi), rel=1e-9)


def test_weights_of_a_layer():
    w = np.random.default_rng(0).normal(0, 0.02, size=(64, 100))
    rec = recommend_width(2, 4.0, weights=w)
    std = np.sqrt(np.mean(w**2))
    assert rec.width == pytest.approx(recommend_width(2, 4.0).width * std, rel=1e-9)
    assert rec.min_max_width == np.abs(w).max()
    assert rec.lsq_width == pytest.approx(2 * np.abs(w).mean() * 1.5, rel=1e-12)
    assert rec.trusted
    assert rec.caveats == ()


def test_bits_as_a_sequence_give_a_frame():
    rec = recommend_width((1, 2), 2.0)
    frame = rec.to_frame()
    assert list(frame["bits"]) == [1, 2]
    assert repr(rec) == "WidthRecommendation(2 rows, 2 trusted)"
    assert rec.trusted.all()
    single = recommend_width(2, 2.0)
    assert single.trusted is True
    assert single.to_frame().iloc[0].to_dict() == frame.iloc[1].to_dict()
    assert repr(single).startswith("WidthRecommendation(bits=2, width=1.267 (1.07")


def test_a_users_own_family():
    def two_groups(bits, width):
        half = np.linspace(0.6, 1.0, 2 ** (bits - 1))
        return Codebook(width * np.concatenate([-half[::-1], half]))

    rec = recommend_width(2, 2.0, codebook=two_groups)
    best = optimal_width(2, 2.0, codebook=two_groups)
    assert rec.width_per_signal_std == pytest.approx(best.width, rel=1e-6)
    assert np.isnan(rec.step_size)
    assert rec.gen_error > recommend_width(2, 2.0).gen_error


@pytest.mark.parametrize("name", ["Lloyd-Max"] if FEW else families)
def test_every_family_can_be_recommended(name):
    rec = recommend_width(2, 2.0, codebook=name)
    assert rec.band_lower < rec.width < rec.band_upper
    assert rec.gen_error <= min(rec.mse_gen_error, rec.min_max_gen_error, rec.lsq_gen_error)
    assert rec.gen_error == optimal_width(2, 2.0, codebook=families[name]).gen_error


def test_what_is_deployed_is_looked_up(monkeypatch):
    def wider(problems):
        return np.array([abs(np.ptp(p.codebook.levels) / 2 - 3.0) + 0.1 for p in problems])

    monkeypatch.setitem(deployments, "something else", wider)
    rec = recommend_width(2, 2.0, deployed="something else")
    assert rec.width_per_signal_std == pytest.approx(3.0, rel=1e-5)
    assert np.isnan(rec.gen_error_at_freezing)
    with pytest.raises(ValueError, match=r"deployed = 'last'.*'ground state', 'something else'"):
        recommend_width(2, 2.0, deployed="last")


def caveat(**setting):
    return "; ".join(recommend_width(**{"alpha": 2.0, "bits": 1} | setting).caveats)


def test_caveats():
    rng = np.random.default_rng(0)
    assert "below the interpolation threshold" in caveat(bits=3, alpha=0.5)
    assert "another width" in caveat(bits=2, alpha=0.5, noise_variance=0.03)
    assert "hardly anything is learned" in caveat(alpha=0.1, noise_variance=2.0)
    assert "mean is not small" in caveat(weights=rng.normal(0.5, 1.0, 1000))
    assert "kurtosis" in caveat(weights=rng.standard_t(3, 10_000))
    assert caveat(weights=rng.normal(size=200)) == ""
    rec = recommend_width((2, 3), 0.5)
    np.testing.assert_array_equal(rec.trusted, [True, False])
    assert np.isnan(rec.gen_error_at_freezing[1])


def test_where_replica_symmetry_is_far_off_at_temperature_zero():
    rec = recommend_width(3, 1.2, noise_variance=0.0)
    assert rec.gen_error > 1.1 * rec.gen_error_at_freezing
    assert any("replica symmetry is unstable here" in each for each in rec.caveats)


def test_replica_symmetry_where_it_last_holds_comes_close_to_one_step_of_breaking():
    # Errors of ground states with one step of replica symmetry breaking, of the same problems.
    broken = [
        (uniform(1, 1.0), 1.5, 0.0, 0.6789),
        (uniform(1, 1.0), 0.5, 0.0, 1.1192),
        (uniform(2, 2.0), 2.0, 0.0, 0.3256),
        (uniform(3, 2.0), 2.0, 0.0, 0.1491),
        (uniform(3, 2.0), 0.8, 0.0, 1.0188),
        (uniform(2, 1.5), 1.5, 0.05, 0.3119),
        (uniform(2, 2.0), 1.0, 0.0, 0.8801),
        (uniform(1, 1.0), 8.0, 0.0, 0.4548),
    ]
    for codebook, alpha, ridge, error in broken:
        problem = TeacherStudent(codebook, alpha, 0.1, ridge)
        if solve_rs(problem).phase != "interpolating":
            assert _error_at_freezing(problem) == pytest.approx(error, rel=6e-3)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, np.nan], 0.0, -1.0])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        recommend_width(2, 2.0, weights=weights)


def test_bad_numbers_of_a_recommendation():
    with pytest.raises(ValueError, match="n_weights = 0: give a whole number, at least 1"):
        recommend_width(2, 2.0, n_weights=0)
    with pytest.raises(ValueError, match="alpha = 1 with ridge = 0"):
        recommend_width(2, 1.0)
