"""The sliders' figure in a bare page, as a file or Jupyter shows it."""

import numpy as np
import pytest

from qgen_lab import plotting

WIDTHS = [0.5, 1.0, 2.0]
X = np.linspace(0.0, 1.0, 5)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Two sliders; one value is missing; the curve is alpha * x + width."""
    values = np.array([[alpha * X + width for alpha in (1.0, 3.0)] for width in WIDTHS])
    values[0, 0, 2] = np.nan
    figure = plotting.interactive_lines(
        X, {"line": values}, {"width": WIDTHS, "alpha": [1, 3]}, xlabel="x", ylabel="y",
        start={"width": 0.5, "alpha": 1},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("figure") / "figure.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{figure.data}</body>", "utf-8")
    return path.as_uri()


def curve(page):
    return page.locator("svg.qgen-curves path").get_attribute("d")


def numbers(page):
    return page.locator("tbody td:last-child").all_text_contents()


def test_script_draws_what_python_drew(chromium, address):
    without = chromium.new_context(java_script_enabled=False).new_page()
    without.goto(address)
    scripted = chromium.new_page()
    scripted.goto(address)
    assert curve(scripted) == curve(without)
    assert numbers(scripted) == numbers(without)
    assert curve(scripted).count("M") == 2  # the missing value leaves a gap
    without.context.close()
    scripted.close()


def test_keys_move_curve_table_and_reading(chromium, address):
    page = chromium.new_page()
    page.goto(address)
    before = curve(page)
    width, alpha = page.get_by_role("slider").all()
    width.press("ArrowRight")
    assert numbers(page) == ["1", "1.25", "1.5", "1.75", "2"]
    alpha.press("End")
    assert numbers(page) == ["1", "1.75", "2.5", "3.25", "4"]
    assert width.get_attribute("aria-valuetext") == "1"
    assert page.locator("output").all_text_contents() == ["1", "3"]
    assert curve(page) != before
    page.close()


def test_sliders_have_names(chromium, address):
    page = chromium.new_page()
    page.goto(address)
    assert page.get_by_label("width").count() == page.get_by_label("alpha").count() == 1
    page.close()


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Two curves, a marker along x, words at the marker, and a doubtful piece of one setting."""
    values = np.array([alpha * X + 1 for alpha in (1.0, 3.0)])
    values[0, 3] = np.nan
    doubtful = np.array([[False, False, True, False, False], [False] * 5])
    words = np.where(values > 1.6, "large", "small")
    figure = plotting.interactive_lines(
        X, {"line": values, "twice": 2 * values}, {"alpha": [1, 3]}, xlabel="x", ylabel="y",
        start={"alpha": 1, "place": 0.25}, along="place", readings={"size": words},
        doubtful=doubtful,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("marked") / "figure.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{figure.data}</body>", "utf-8")
    return path.as_uri()


def drawing(page):
    return page.locator("svg.qgen-curves").inner_html()


def said(page):
    return page.locator(".qgen-readings dd").all_text_contents()


def test_script_marks_what_python_marked(chromium, marked):
    without = chromium.new_context(java_script_enabled=False).new_page()
    without.goto(marked)
    scripted = chromium.new_page()
    scripted.goto(marked)
    assert drawing(scripted) == drawing(without)
    assert said(scripted) == said(without) == ["1.25", "2.5", "small"]
    without.context.close()
    scripted.close()


def test_marker_moves_without_its_curves(chromium, marked):
    page = chromium.new_page()
    page.goto(marked)
    paths = [path.get_attribute("d") for path in page.locator(".qgen-curves path").all()]
    page.get_by_label("place").press("End")
    assert said(page) == ["2", "4", "large"]
    assert page.locator("circle").first.get_attribute("cx") == "410.0"
    assert page.locator("output").all_text_contents() == ["1", "1"]
    assert [path.get_attribute("d") for path in page.locator(".qgen-curves path").all()] == paths
    page.get_by_label("place").press("ArrowLeft")  # no value there
    assert said(page) == ["–", "–", "small"]
    page.get_by_label("alpha").press("ArrowRight")
    assert said(page) == ["3.25", "6.5", "large"]
    moved = [path.get_attribute("d") for path in page.locator(".qgen-curves path").all()]
    assert moved[1] == moved[3] == ""  # nothing is doubtful at this setting
    assert paths[1] != ""
    page.close()
