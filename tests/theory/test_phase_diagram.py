from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numba import config

from qgen_lab.codebooks import families, uniform
from qgen_lab.theory import TeacherStudent, solve_rs
from qgen_lab.theory.phase_diagram import PhaseDiagram, phase_diagram
from qgen_lab.theory.stability import at_temperature, zero_entropy_temperature

SIZE = 6 if config.DISABLE_JIT else 24

# Widths above which replica symmetry is unstable for 1 to 4 bits; from an independent code.
KNOWN_WIDTHS = {
    (1.5, 0.01): [0.2990, 0.6630, 1.4014, 3.1586],
    (1.5, 0.05): [0.5282, 1.3401, 3.2978, 7.0752],
    (3.0, 0.01): [0.2828, 0.6070, 1.1526, 2.2656],
    (3.0, 0.05): [0.4894, 1.1107, 2.3597, 5.0311],
}


def field_at(diagram, points, field):
    return getattr(solve_rs([diagram.problem(*each) for each in points]), field)


# --- the grid -----------------------------------------------------------------------------------


def test_the_grid_holds_the_solution_of_each_point():
    diagram = phase_diagram(2, [0.5, 1.0, 2.0], 1.5, [0.01, 0.1], noise_variance=0.2, ridge=0.05)
    assert diagram["gen_error"].shape == (3, 2)
    assert set(diagram["phase"].ravel()) == {"stable", "unstable"}
    problem = TeacherStudent(uniform(2, 2.0), 1.5, 0.2, 0.05, 0.1)
    assert diagram["gen_error"][2, 1] == pytest.approx(solve_rs(problem).gen_error, rel=1e-12)
    assert diagram.problem(2.0, 0.1) == problem
    frame = diagram.to_frame()
    row = frame[(frame.width == 2.0) & (frame.temperature == 0.1)]
    assert row.gen_error.item() == diagram["gen_error"][2, 1]
    assert repr(diagram) == "PhaseDiagram(3 width x 2 temperature, 6 of 6 converged)"


def test_below_the_threshold_the_phase_has_a_name():
    diagram = phase_diagram(2, [1.0, 2.0], [0.3, 2.0], 1.0)
    ground = phase_diagram(2, [1.0, 2.0], [0.3, 2.0])
    assert (ground["phase"][:, 0] == "interpolating").all()
    assert (ground["phase"][:, 1] == "unstable").all()
    assert (diagram["phase"] == "stable").all()


# --- boundaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["replicon", "entropy"])
@pytest.mark.parametrize(
    "swept",
    [
        {"width": np.geomspace(0.2, 5, SIZE), "alpha": np.linspace(0.5, 3, SIZE)},
        {"width": np.geomspace(0.2, 5, SIZE), "temperature": np.geomspace(2e-3, 1, SIZE)},
        {"alpha": np.linspace(0.5, 3, SIZE), "temperature": np.geomspace(2e-3, 1, SIZE)},
        {"temperature": np.geomspace(2e-3, 1, SIZE), "ridge": np.linspace(0, 2, SIZE)},
    ],
)
def test_on_the_boundary_the_field_is_zero(criterion, swept):
    settings = {"bits": 2, "width": 2.0, "alpha": 1.2, "temperature": 0.05} | swept
    diagram = phase_diagram(**settings)
    boundary = diagram.boundary(criterion)
    assert len(boundary.points) >= SIZE / 3
    assert not boundary.jump.any()
    assert np.abs(field_at(diagram, boundary.points, criterion)).max() < 1e-8
    # Each point lies on an edge of the grid, and neighbours on a line share a cell.
    steps = [np.searchsorted(v, boundary.points[:, k]) for k, v in enumerate(diagram.axes.values())]
    on_grid = [np.isin(boundary.points[:, k], v) for k, v in enumerate(diagram.axes.values())]
    assert (on_grid[0] | on_grid[1]).all()
    for i, j in pairwise(range(len(boundary.line))):
        if boundary.line[i] == boundary.line[j]:
            assert all(abs(int(s[i]) - int(s[j])) <= 1 for s in steps)


def test_the_boundary_is_where_cooling_crosses_zero():
    diagram = phase_diagram(2, np.geomspace(0.3, 3, 4), 1.5, np.geomspace(5e-4, 1, SIZE))
    for criterion, find in (("replicon", at_temperature), ("entropy", zero_entropy_temperature)):
        points = diagram.boundary(criterion).points
        on_grid = points[np.isin(points[:, 0], diagram.axes["width"])]
        assert len(on_grid) == 4
        expected = find([diagram.problem(w, 1.0) for w in on_grid[:, 0]])
        np.testing.assert_allclose(on_grid[:, 1], expected, rtol=1e-9)


@pytest.mark.parametrize(("alpha", "temperature"), list(KNOWN_WIDTHS))
def test_known_widths_of_the_instability(alpha, temperature):
    widths = np.geomspace(0.1, 10, 24)
    diagram = phase_diagram([1, 2, 3, 4], widths, alpha, temperature)
    boundary = diagram.boundary()
    np.testing.assert_array_equal(boundary.points[:, 0], [1, 2, 3, 4])
    np.testing.assert_allclose(
        boundary.points[:, 1], KNOWN_WIDTHS[alpha, temperature], atol=5.1e-5, rtol=0
    )
    assert repr(boundary) == (
        "Boundary('replicon' over bits x width: 4 points on 1 lines, 0 by a jump)"
    )


def test_bits_as_the_second_axis_of_a_re_entrant_boundary():
    diagram = phase_diagram([1, 2], np.geomspace(0.2, 5, 8), 0.6, 0.005)
    boundary = diagram.boundary()
    # Unstable between two widths: the first changes of sign make a line, the second another.
    assert list(boundary.points[:, 0]) == [1, 2, 1, 2]
    assert list(boundary.line) == [0, 0, 1, 1]
    first, second = boundary.lines()
    assert (first[1] < second[1]).all()
    assert np.abs(field_at(diagram, boundary.points, "replicon")).max() < 1e-8
    swapped = phase_diagram([1, 2], 2.0, 1.5, np.geomspace(1e-3, 3, SIZE)).boundary()
    expected = at_temperature([TeacherStudent(uniform(b, 2.0), 1.5) for b in (1, 2)])
    np.testing.assert_allclose(swapped.points[:, 1], expected, rtol=1e-9)


def test_where_the_sign_is_the_same_everywhere_there_is_no_boundary():
    hot = phase_diagram(2, [0.5, 1.0, 2.0], [0.5, 1.0], 5.0)
    zero = phase_diagram([1, 2], [0.5, 1.0, 2.0], 1.5)  # unstable everywhere at temperature 0
    for diagram in (hot, zero):
        for criterion in ("replicon", "entropy"):
            boundary = diagram.boundary(criterion)
            assert boundary.points.shape == (0, 2)
            assert list(boundary.lines()) == []
            assert boundary.to_frame().empty


def test_a_change_of_sign_by_a_jump_is_named():
    # One bit at temperature 0: the replicon is minus infinity above the threshold, finite below.
    diagram = phase_diagram(1, [1.0, 1.5, 2.0], [0.2, 0.5, 0.9])
    boundary = diagram.boundary()
    assert len(boundary.points) > 0
    assert boundary.jump.all()
    assert boundary.to_frame().jump.all()
    width, alpha = boundary.points.T
    closed = alpha * (width**2 + 0.1 + 1 - alpha) / (2 / np.pi * width**2)
    np.testing.assert_allclose(closed, 1, rtol=1e-9)  # the interpolation threshold of one bit


def test_a_point_that_did_not_converge_breaks_the_line():
    diagram = phase_diagram(2, np.geomspace(0.3, 3, 6), 1.5, np.geomspace(1e-3, 1, 6))
    whole = diagram.boundary()
    converged = diagram.solution.converged.copy()
    step = np.searchsorted(diagram.axes["temperature"], whole.points[len(whole.points) // 2, 1])
    converged.reshape(6, 6)[3, step] = False
    broken = PhaseDiagram(
        diagram.axes, diagram.fixed, replace(diagram.solution, converged=converged)
    ).boundary()
    assert len(broken.points) < len(whole.points)
    assert {tuple(p) for p in broken.points} < {tuple(p) for p in whole.points}


def test_any_family_of_codebooks():
    chosen = ["Lloyd-Max"] if config.DISABLE_JIT else families
    for codebook in (families[name] for name in chosen):
        diagram = phase_diagram(
            2, np.geomspace(0.3, 3, 4), 1.5, np.geomspace(1e-3, 1, 4), codebook=codebook
        )
        boundary = diagram.boundary()
        assert len(boundary.points) > 3
        assert np.abs(field_at(diagram, boundary.points, "replicon")).max() < 1e-8


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none given as arrays: give exactly two arrays"),
        ({"width": [1.0, 2.0]}, "width given as arrays: give exactly two"),
        (
            {"width": [1.0, 2.0], "alpha": [1.0, 2.0], "ridge": [0.0, 1.0]},
            "width, alpha, ridge given as arrays",
        ),
        ({"width": [2.0, 1.0], "alpha": [1.0, 2.0]}, "width has shape .2,.: give two or more asc"),
        ({"width": [1.0], "alpha": [1.0, 2.0]}, "width has shape .1,.: give two or more ascending"),
        ({"temperature": [0.0, 1.0], "alpha": [1.0, 2.0]}, "temperatures above 0"),
        ({"width": [1.0, 2.0], "alpha": [-1.0, 2.0]}, "alpha = -1.0: give a finite number > 0"),
        ({"width": [1.0, np.nan], "alpha": [1.0, 2.0]}, "width has shape .2,.: give two or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    settings = {"bits": 2, "width": 1.0, "alpha": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        phase_diagram(**settings)


def test_an_unknown_criterion_is_named():
    diagram = phase_diagram(2, [0.5, 1.0], [0.5, 1.0], 5.0)
    with pytest.raises(ValueError, match="criterion = 'error': give 'replicon' or 'entropy'"):
        diagram.boundary("error")


def test_bits_that_are_not_whole_are_refused():
    with pytest.raises((TypeError, ValueError), match="bits"):
        phase_diagram([1, 1.5], [0.5, 1.0], 1.0, 1.0)
