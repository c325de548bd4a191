import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t

from qgen_lab.codebooks import Codebook, families, lsq_grid, uniform
from qgen_lab.theory import (
    TeacherStudent,
    deployments,
    optimal_width,
    recommend_width,
    ridge_solution,
    sample,
    solve_rs,
    straight_through,
)
from qgen_lab.theory.recommendation import (
    Deployment,
    _error_at_freezing,
    _largest_of,
    _lsq_width,
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
    assert repr(single).startswith(
        "WidthRecommendation(bits=2, deployed='ground state', width=1.267 (1.07"
    )


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


# --- what is deployed ---------------------------------------------------------------------------

# Best width (to 2%) and its error (the last digit may be off by one), found by other code: of the
# last iterate and the rounded average without a ridge, of the rounded average and the rounded ridge
# solution with the tuned one.
DEPLOYED = ("last iterate", "rounded average", "rounded average", "rounded ridge")
FIGURES = {
    # alpha, noise, bits
    (2.0, 0.1, 1): [(0.65, 0.5479), (0.77, 0.4847), (0.78, 0.4841), (0.76, 0.4171)],
    (2.0, 0.1, 2): [(1.31, 0.2808), (1.55, 0.2241), (1.57, 0.2145), (1.43, 0.1932)],
    (2.0, 0.1, 3): [(1.87, 0.1598), (2.04, 0.1359), (2.11, 0.1236), (1.96, 0.1187)],
    (2.0, 0.1, 4): [(2.29, 0.1180), (2.42, 0.1100), (2.55, 0.0961), (2.40, 0.0950)],
    (1.0, 0.1, 2): [(1.04, 0.4792), (1.09, 0.4602), (1.48, 0.3841), (1.28, 0.3569)],
    (4.0, 0.1, 2): [(1.30, 0.2184), (1.54, 0.1589), (1.53, 0.1577), (1.47, 0.1470)],
    (2.0, 0.5, 2): [(1.05, 0.4422), (1.14, 0.4207), (1.33, 0.3755), (1.27, 0.3663)],
}


@pytest.mark.parametrize(("alpha", "noise", "bits"), list(FIGURES)[: 1 if FEW else None])
def test_the_best_width_depends_on_what_is_deployed(alpha, noise, bits):
    ridges = (0.0, 0.0, noise, noise)
    for name, ridge, figures in zip(DEPLOYED, ridges, FIGURES[alpha, noise, bits], strict=True):
        width, error = figures
        near = width * np.linspace(0.98, 1.02, 9)
        problems = [TeacherStudent(uniform(bits, w), alpha, noise, ridge) for w in near]
        assert deployments[name].errors(problems).min() == pytest.approx(error, abs=1.5e-4)
        if alpha == 1 and ridge == 0:
            continue  # full-precision weights diverge: no recommendation in their units
        rec = recommend_width(bits, alpha, noise, ridge, deployed=name)
        assert rec.width_per_signal_std == pytest.approx(width, rel=0.02)
        assert rec.gen_error == pytest.approx(error, abs=1.5e-4)
        assert rec.trusted
        assert np.isnan(rec.gen_error_at_freezing)


@pytest.mark.parametrize("deployed", ["rounded ridge"] if FEW else DEPLOYED[1:])
def test_nothing_better_in_a_dense_scan(deployed):
    rec = recommend_width(3, 1.5, 0.3, 0.1, deployed=deployed, codebook="power of two")
    widths = rec.width_per_signal_std * np.geomspace(0.2, 5, 401)
    problems = [TeacherStudent(families["power of two"](3, w), 1.5, 0.3, 0.1) for w in widths]
    errors = deployments[deployed].errors(problems)
    assert rec.gen_error <= errors.min() * (1 + 1e-9)
    assert rec.width_per_signal_std == pytest.approx(widths[errors.argmin()], rel=0.009)


@pytest.mark.parametrize(
    ("alpha", "ridge", "rho"), [(2.0, 0.0, 1.0), (0.5, 0.0, 1.0), (1.5, 0.7, 2.0)]
)
def test_rounded_ridge_by_direct_integration(alpha, ridge, rho):
    codebook = families["Lloyd-Max"](2, 1.2)
    twin = ridge_solution(alpha, 0.2, ridge, rho)
    std = np.sqrt(twin.self_overlap)
    w = np.linspace(-9 * std, 9 * std, 400_001)
    density = norm.pdf(w, scale=std) * (w[1] - w[0])
    mean = twin.overlap / twin.self_overlap * w  # of the teacher's weight, given the trained one
    variance = rho - twin.overlap**2 / twin.self_overlap
    slow = variance + np.sum(density * (mean - codebook.quantize(w)) ** 2)
    problem = TeacherStudent(codebook, alpha, 0.2, ridge, signal_variance=rho)
    assert deployments["rounded ridge"].errors([problem]) == pytest.approx(slow, rel=1e-5)


SIMULATED = [  # bits, width, alpha, noise, ridge
    (1, 0.76, 2.0, 0.1, 0.1),
    (2, 1.3, 2.0, 0.1, 0.0),
    (2, 2.5, 0.5, 0.3, 0.0),  # the fit of least norm
    (3, 1.5, 1.0, 0.5, 0.5),
    (2, 0.8, 1.5, 0.1, 2.0),
]


@pytest.mark.parametrize(("bits", "width", "alpha", "noise", "ridge"), SIMULATED)
def test_rounded_ridge_on_instances(bits, width, alpha, noise, ridge):
    problem = TeacherStudent(uniform(bits, width), alpha, noise, ridge)
    n, errors = 400, []
    for seed in range(12):
        instance = sample(problem, n, seed)
        X = np.vstack([instance.X, np.sqrt(ridge) * np.eye(n)])
        y = np.append(instance.y, np.zeros(n))
        trained = np.linalg.lstsq(X, y)[0]
        errors.append(instance.gen_error(problem.codebook.quantize(trained)))
    error = np.std(errors, ddof=1) / np.sqrt(len(errors))
    # Five comparisons: a false alarm below 1e-3 in all. A bias of order 1 / n is allowed for.
    bound = t.isf(1e-3 / 10, len(errors) - 1) * error + 1 / n
    assert abs(np.mean(errors) - deployments["rounded ridge"].errors([problem])[0]) < bound


def test_without_a_spread_rounded_ridge_gives_the_outer_levels():
    problem = TeacherStudent(uniform(2, 1.5), 1.0)  # full-precision weights diverge
    assert deployments["rounded ridge"].errors([problem]) == pytest.approx(1 + 1.5**2)


@pytest.mark.parametrize("family", ["Lloyd-Max"] if FEW else families)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_tuned_ridge_wants_the_width_that_rounds_its_weights_best(family, noise):
    rec = recommend_width(3, 1.5, noise, noise, codebook=family, deployed="rounded ridge")
    assert rec.width == pytest.approx(rec.mse_width, rel=1e-5)
    assert rec.gen_error == pytest.approx(rec.mse_gen_error, rel=1e-9)


@settings(max_examples=5 if FEW else 60)
@given(
    bits=st.integers(1, 4),
    width=st.floats(0.2, 4.0),
    alpha=st.floats(0.2, 6.0),
    noise=st.floats(0.01, 2.0),
    ridge=st.floats(0.0, 2.0),
    family=st.sampled_from(["uniform", "power of two", "Lloyd-Max"]),
)
def test_nothing_on_the_codebook_beats_the_tuned_ridge_rounded(
    bits, width, alpha, noise, ridge, family
):
    problem = TeacherStudent(families[family](bits, width), alpha, noise, ridge)
    tuned = TeacherStudent(problem.codebook, alpha, noise, noise)
    bound = deployments["rounded ridge"].errors([tuned])
    for name in DEPLOYED[1:]:
        error = deployments[name].errors([problem])
        assert np.isnan(error) or error >= bound - 1e-9


def test_below_the_threshold_of_the_box_wide_widths_are_left_out():
    rec = recommend_width(2, 0.5, deployed="rounded average")
    assert rec.caveats == (
        "some widths are left out: below the box's interpolation threshold the average is not"
        " unique",
    )
    assert np.isnan(rec.min_max_gen_error)
    narrow = straight_through(TeacherStudent(uniform(2, rec.width_per_signal_std), 0.5))
    assert narrow.phase == "stable"
    assert narrow.rounded_gen_error == rec.gen_error
    assert recommend_width(2, 0.5, deployed="rounded ridge").trusted


def test_what_is_deployed_is_looked_up(monkeypatch):
    def wider(problems):
        return np.array([abs(np.ptp(p.codebook.levels) / 2 - 3.0) + 0.1 for p in problems])

    monkeypatch.setitem(deployments, "something else", Deployment(wider))
    rec = recommend_width((1, 2), 2.0, deployed="something else")
    np.testing.assert_allclose(rec.width_per_signal_std, 3.0, rtol=1e-5)
    assert list(rec.to_frame()["deployed"]) == ["something else"] * 2
    with pytest.raises(ValueError, match=r"deployed = 'last': give one of .*'something else'"):
        recommend_width(2, 2.0, deployed="last")


# --- caveats ------------------------------------------------------------------------------------


def caveat(**setting):
    return "; ".join(recommend_width(**{"alpha": 2.0, "bits": 1} | setting).caveats)


def test_caveats():
    assert "below the interpolation threshold" in caveat(bits=3, alpha=0.5)
    assert "another width" in caveat(bits=2, alpha=0.5, noise_variance=0.03)
    assert "hardly anything is learned" in caveat(alpha=0.1, noise_variance=2.0)
    rec = recommend_width((2, 3), 0.5)
    np.testing.assert_array_equal(rec.trusted, [True, False])
    assert np.isnan(rec.gen_error_at_freezing[1])


def test_caveats_of_the_weights():
    rng = np.random.default_rng(0)
    for weights, said in (
        (rng.normal(0.5, 1.0, 1000), "mean is not small"),
        (rng.standard_t(3, 10_000), "kurtosis"),
    ):
        assert said in caveat(weights=weights, deployed="rounded ridge")
    assert caveat(weights=rng.normal(size=200), deployed="rounded ridge") == ""


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
    for codebook, alpha, ridge, error in broken[: 3 if FEW else None]:
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
