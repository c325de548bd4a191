import itertools
import json
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from qgen_lab import plotting

BITS = [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
LIGHT, DARK = np.ones(3), np.full(3, 18 / 255)  # the book's two backgrounds

# Machado, Oliveira and Fernandes 2009, Table 1, severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def rgb(bits):
    return np.array(matplotlib.colors.to_rgb(plotting.color(bits)))


def linear(color):
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """Contrast ratio of the web content accessibility guidelines."""
    low, high = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def in_the_dark(color):
    """What custom.css makes of a colour: invert(1), hue-rotate(180deg), screen over the page."""
    luma = np.array([0.213, 0.715, 0.072])
    turned = np.clip(2 * luma @ (1 - color) - (1 - color), 0, 1)
    return 1 - (1 - turned) * (1 - DARK)


def oklab(color, vision):
    """Perceived colour, times 100, to someone with this vision."""
    light = np.clip(np.asarray(VISIONS[vision]) @ linear(color), 0, 1)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return 100 * opponents @ np.cbrt(cones @ light)


@pytest.mark.parametrize("bits", BITS)
def test_colours_stand_out_on_both_backgrounds(bits):
    assert contrast(rgb(bits), LIGHT) >= 3
    assert contrast(in_the_dark(rgb(bits)), DARK) >= 3


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("shown", [lambda c: c, in_the_dark], ids=["light", "dark"])
def test_colours_stay_apart_for_every_vision(vision, shown):
    seen = [oklab(shown(rgb(bits)), vision) for bits in BITS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 6


def test_markers_tell_bit_widths_apart_in_grey():
    assert len({plotting.marker(bits) for bits in BITS}) == len(BITS)


def test_labels():
    assert [plotting.label(b) for b in (2, 16, 32)] == ["Int2", "Int16", "FP32"]


@pytest.mark.parametrize("bits", [0, 12, 1.5, "4"])
@pytest.mark.parametrize("look", [plotting.color, plotting.marker])
def test_unknown_bits_are_named_with_those_that_are_known(look, bits):
    with pytest.raises(ValueError, match=rf"bits = {bits!r} has no look here: use one of \[1, 2"):
        look(bits)


def test_the_same_figure_is_the_same_svg(tmp_path):
    texts = []
    with matplotlib.rc_context():
        plotting.use_style()
        for name in ("a.svg", "b.svg"):
            figure, axes = plt.subplots()
            axes.plot([1, 3, 2], marker="o", clip_on=True)
            figure.savefig(tmp_path / name, metadata={"Date": None, "Creator": None})
            plt.close(figure)
            texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


# --- interactive_lines -----------------------------------------------------------------------

X = np.linspace(0.1, 2.0, 7)
SLIDERS = {"width": [0.5, 1.0, 1.5], "rule": ["nearest", "stochastic"]}
VALUES = np.random.default_rng(0).normal(size=(3, 2, 7))


def draw(curves=None, x=X, sliders=SLIDERS, **options):
    curves = {"Int2": VALUES} if curves is None else curves
    return plotting.interactive_lines(x, curves, sliders, xlabel="x", ylabel="y", **options).data


def stored(html):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html).group(1))


def table(html):
    cells = re.findall(r"<td>(.*?)</td>", html)
    return np.array(cells, dtype=float).reshape(len(X), -1)


def test_same_table_gives_same_text_and_another_table_another_name():
    assert draw() == draw()
    name = re.compile(r'data-lines="(\w+)"')
    assert name.search(draw()).group(1) != name.search(draw({"Int2": VALUES + 1})).group(1)


def test_data_are_stored_in_the_sliders_order_with_four_digits():
    data = stored(draw())
    np.testing.assert_allclose(np.reshape(data["curves"][0], VALUES.shape), VALUES, rtol=5e-4)
    assert data["sliders"] == [["0.5", "1", "1.5"], ["nearest", "stochastic"]]


def test_table_shows_the_starting_point():
    np.testing.assert_allclose(table(draw())[:, 1], VALUES[1, 1], rtol=5e-4)
    start = {"width": 1.5, "rule": "nearest"}
    np.testing.assert_allclose(table(draw(start=start))[:, 1], VALUES[2, 0], rtol=5e-4)


def test_path_lies_where_the_axes_say():
    x = np.array([1.0, 10.0, 100.0])
    y = np.array([[0.0, 5.0, 10.0]])
    html = draw({"a": y}, x=x, sliders={"s": [1]}, xscale="log", ylim=(0, 10))
    width, height = plotting.interactive._SIZE
    assert f'd="M0.0 {height:.1f}L{width / 2:.1f} {height / 2:.1f}L{width:.1f} 0.0"' in html


def test_missing_values_leave_a_gap_and_stay_valid_json():
    values = VALUES.copy()
    values[:, :, 3] = [[np.nan, np.inf]] * 3
    html = draw({"Int2": values})
    assert "NaN" not in html.split("<script>")[0]
    assert "Infinity" not in html
    assert html.count("<td>–</td>") == 1


def test_names_cannot_break_the_page():
    html = draw({"</script><b>": VALUES})
    assert "</script><b>" not in html
    assert "&lt;/script&gt;&lt;b&gt;" in html


def test_text_is_stated_for_readers_without_scripts_and_screens():
    html = draw()
    assert 'role="img" aria-label="y against x"' in html
    assert 'type="range" min="0" max="2" value="1" aria-valuetext="1"' in html


WORDS = np.where(VALUES > 0, "above", "below <0>")


def test_marker_stands_on_the_curve_where_its_slider_says():
    html = draw(along="x", start={"x": X[2]}, readings={"sign": WORDS}, ylim=(-3, 3))
    width, height = plotting.interactive._SIZE
    across = (X[2] - X[0]) / (X[-1] - X[0]) * width
    up = height * (1 - (VALUES[1, 1, 2] + 3) / 6)
    assert f'<circle cx="{across:.1f}" cy="{up:.1f}"' in html
    assert html.count('type="range"') == 3
    word = "above" if VALUES[1, 1, 2] > 0 else "below &lt;0&gt;"
    assert f"<dt>Int2</dt><dd>{VALUES[1, 1, 2]:.4g}</dd><dt>sign</dt><dd>{word}</dd>" in html


def test_words_are_stored_once():
    (reading,) = stored(draw(along="x", readings={"sign": WORDS}))["readings"]
    assert reading["words"] == ["above", "below <0>"]
    np.testing.assert_array_equal(np.take(reading["words"], reading["values"]), WORDS.ravel())


def test_doubtful_pieces_are_thin_and_the_rest_thick():
    doubtful = np.zeros(VALUES.shape, bool)
    doubtful[1, 1, 4:6] = True
    html = draw(doubtful=doubtful)
    sure, thin = re.findall(r'class="qgen-(?:sure|doubtful)" d="(.*?)"', html)
    points = re.findall(r"[\d.-]+ [\d.-]+", re.search(r'sure" d="(.*?)"', draw()).group(1))
    at = points.index
    assert [at(p) for p in re.findall(r"[\d.-]+ [\d.-]+", sure)] == [0, 1, 2, 3, 6]
    assert [at(p) for p in re.findall(r"[\d.-]+ [\d.-]+", thin)] == [3, 4, 5, 6]
    assert "thin: doubtful" in html
    assert "thin: doubtful" not in draw()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"readings": {"a": VALUES}}, r"readings \['a'\] are taken at a marker"),
        ({"readings": {"a": VALUES[:2]}, "along": "x"}, r"'a' has shape \(2, 2, 7\)"),
        ({"doubtful": VALUES[0] > 0}, r"'doubtful' has shape \(2, 7\)"),
        ({"along": "rule"}, "along = 'rule' is a slider already"),
        ({"curves": {"a": VALUES[:2]}}, r"'a' has shape \(2, 2, 7\).*\(3, 2, 7\)"),
        ({"curves": {}}, "0 curves, 2 sliders"),
        ({"sliders": {}}, "1 curves, 0 sliders"),
        ({"start": {"bits": 2}}, r"start names 'bits': the sliders are \['width', 'rule'\]"),
        ({"start": {"rule": "up"}}, r"start\['rule'\] = 'up': the slider has \['nearest', 'st"),
        ({"start": {"width": 1.4}}, r"start\['width'\] = 1.4: the slider has"),
        ({"colors": []}, "1 curves but 0 colors"),
        ({"yscale": "sqrt"}, "scale = 'sqrt'"),
        ({"yscale": "log", "curves": {"a": -abs(VALUES)}}, "nothing to draw on a log axis"),
        ({"curves": {"a": VALUES * np.nan}}, "nothing to draw on a linear axis"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        draw(**change)
