"""Figures that a reader turns: curves over a precomputed table, with sliders, in plain SVG."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from qgen_lab.plotting.style import COLORS

if TYPE_CHECKING:
    from IPython.display import HTML

# The figure is complete without the script, which only redraws when a slider moves.
_SCRIPT = """
for (const figure of document.querySelectorAll('[data-lines="KEY"]')) {
  const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const all = (selector) => [...figure.querySelectorAll(selector)];
  const inputs = all("input"), rows = all("tbody tr"), said = all(".qgen-readings dd");
  const thick = all(".qgen-sure"), thin = all(".qgen-doubtful");
  const dots = all(".qgen-curves circle"), hair = all(".qgen-curves line");
  const place = ([low, high, log], size) => (v) =>
    (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low)) * size;
  const px = place(data.xaxis, data.size[0]), py = place(data.yaxis, -data.size[1]);
  const height = (y) => data.size[1] + py(y ?? NaN);
  const n = data.x.length;
  const draw = () => {
    let at = 0;
    inputs.forEach((input, i) => {
      const value = data.sliders[i][input.value];
      input.setAttribute("aria-valuetext", value);
      input.nextElementSibling.textContent = value;
      at = at * data.sliders[i].length + Number(input.value);
    });
    // A slider along x comes last, so that `at` is a point; without one it is a whole curve.
    const mark = data.along ? at % n : 0, from = data.along ? at - mark : at * n;
    const sure = data.x.map((_, i) => !data.doubtful?.[from + i]);
    const touched = sure.map((_, i) => [i - 1, i, i + 1].some((k) => sure[k] === false));
    data.curves.forEach((curve, j) => {
      const path = (keep) => {
        let pen = "M", d = "";
        data.x.forEach((x, i) => {
          const v = height(curve[from + i]);
          if (!Number.isFinite(v) || !keep[i]) { pen = "M"; return; }
          d += `${pen}${px(x).toFixed(1)} ${v.toFixed(1)}`;
          pen = "L";
        });
        return d;
      };
      thick[j].setAttribute("d", path(sure));
      thin[j]?.setAttribute("d", path(touched));
      data.x.forEach((_, i) => { rows[i].children[j + 1].textContent = curve[from + i] ?? "–"; });
    });
    if (!data.along) return;
    const across = px(data.x[mark]).toFixed(1);
    dots.forEach((dot, j) => {
      const v = height(data.curves[j][at]);
      dot.setAttribute("cx", across);
      dot.setAttribute("cy", Number.isFinite(v) ? v.toFixed(1) : "-99");
    });
    for (const end of ["x1", "x2"]) hair[0].setAttribute(end, across);
    said.forEach((place, j) => {
      const { values, words } = data.readings[j - data.curves.length] ?? { values: data.curves[j] };
      place.textContent = (words ? words[values[at]] : values[at]) ?? "–";
    });
  };
  inputs.forEach((input) => { input.oninput = draw; });
  draw();
}
"""

_CSS = """
.qgen-lines { margin: 0; max-width: 36rem; color: inherit; }
.qgen-lines .qgen-sliders { display: grid; column-gap: .75rem; align-items: center;
  grid-template-columns: fit-content(45%) 1fr minmax(3rem, max-content); }
.qgen-lines label { display: contents; }
.qgen-lines input { width: 100%; min-width: 0; height: 1.6rem; accent-color: #478CFE; }
.qgen-lines output { font-variant-numeric: tabular-nums; }
.qgen-lines svg { overflow: visible; }
.qgen-lines > svg { width: 100%; height: auto; display: block; margin-top: .5rem; }
.qgen-lines svg.qgen-curves { overflow: hidden; }
.qgen-lines .qgen-legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.qgen-lines .qgen-readings { display: grid; grid-template-columns: max-content 1fr;
  column-gap: 1.2rem; margin: .5rem 0; }
.qgen-lines .qgen-readings :is(dt, dd) { margin: 0; font-weight: inherit; }
.qgen-lines .qgen-readings dd { font-variant-numeric: tabular-nums; }
.qgen-lines .qgen-table { overflow: auto; max-height: 20rem; }
.qgen-lines td, .qgen-lines th { text-align: right; padding: .1rem .8rem;
  font-variant-numeric: tabular-nums; }
html[data-theme="dark"] .qgen-hue, [data-jp-theme-light="false"] .qgen-hue {
  filter: invert(1) hue-rotate(180deg); }
"""

_SIZE = (410, 250)  # plot area; the drawing adds room for ticks and labels
_DASHES = ("none", "8 4", "2 3", "10 3 2 3", "5 2", "1 4")


def _rounded(values: np.ndarray) -> list:
    """Values with four digits, enough for a screen and the same on every processor; NaN is None."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values.ravel()]


def _limits(values: np.ndarray, scale: str, margin: float) -> tuple[float, float]:
    finite = values[np.isfinite(values) & ((values > 0) | (scale == "linear"))]
    if finite.size == 0:
        raise ValueError(f"nothing to draw on a {scale} axis: no value is finite and allowed there")
    low, high = (np.log(finite) if scale == "log" else finite)[[finite.argmin(), finite.argmax()]]
    pad = margin * (high - low) or (0.5 if margin else 0.0)
    low, high = low - pad, high + pad
    return tuple(
        float(f"{v:.4g}") for v in (np.exp([low, high]) if scale == "log" else (low, high))
    )


class _Axis:
    """Maps values to pixels, and knows its ticks."""

    def __init__(self, limits, scale, size):
        if scale not in ("linear", "log"):
            raise ValueError(f"scale = {scale!r}: use 'linear' or 'log'")
        self.low, self.high = limits
        self.log, self.size = scale == "log", size

    def __call__(self, value):
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.log:
                return np.log(value / self.low) / np.log(self.high / self.low) * self.size
            return (value - self.low) / (self.high - self.low) * self.size

    @property
    def ticks(self):
        few_decades = self.log and self.high < 300 * self.low
        locator = (
            LogLocator(subs=(1, 2, 5) if few_decades else (1,)) if self.log else MaxNLocator(5)
        )
        ticks = locator.tick_values(self.low, self.high)
        return [t for t in ticks if -0.5 <= self(t) <= self.size + 0.5] or [self.low, self.high]


def _frame(xaxis: _Axis, yaxis: _Axis, xlabel: str, ylabel: str) -> str:
    width, height = _SIZE
    parts = [f'<path d="M0 0V{height}H{width}" fill="none" stroke="currentColor"/>']
    for t in xaxis.ticks:
        parts.append(
            f'<text x="{xaxis(t):.1f}" y="{height + 19}" text-anchor="middle">{t:g}</text>'
        )
    for t in yaxis.ticks:
        y = height - yaxis(t)
        parts.append(f'<text x="-8" y="{y + 5:.1f}" text-anchor="end">{t:g}</text>')
        parts.append(f'<path d="M0 {y:.1f}H{width}" stroke="currentColor" opacity="0.15"/>')
    parts.append(
        f'<text x="{width / 2}" y="{height + 41}" text-anchor="middle">{escape(xlabel)}</text>'
        f'<text x="-50" y="-14">{escape(ylabel)}</text>'
    )
    return "".join(parts)


def _path(xaxis: _Axis, yaxis: _Axis, x: Sequence[float], y: np.ndarray, keep: np.ndarray) -> str:
    pen, path = "M", ""
    for horizontal, vertical, kept in zip(xaxis(np.array(x)), yaxis(y), keep, strict=True):
        if not (kept and np.isfinite(vertical)):
            pen = "M"
            continue
        path += f"{pen}{horizontal:.1f} {_SIZE[1] - vertical:.1f}"
        pen = "L"
    return path


def _strokes(xaxis: _Axis, yaxis: _Axis, x, shown, doubtful, colors) -> str:
    """Every curve: thick where it is sure, and thin on all pieces that touch a doubtful point."""
    strokes = []
    for y, stroke, dash in zip(shown, colors, _DASHES * 2, strict=False):
        look = f'fill="none" stroke="{stroke}" stroke-dasharray="{dash}"'
        y, pieces = np.array(y, dtype=float), [("sure", 2.5, np.full(len(x), True))]
        if doubtful is not None:
            touched = np.convolve(doubtful, np.ones(3), "same") > 0
            pieces = [("sure", 2.5, ~doubtful), ("doubtful", 1, touched)]
        for name, thickness, keep in pieces:
            d = _path(xaxis, yaxis, x, y, keep)
            strokes.append(f'<path class="qgen-{name}" d="{d}" {look} stroke-width="{thickness}"/>')
    return "".join(strokes)


def _markers(xaxis: _Axis, yaxis: _Axis, x: float, shown: Sequence, colors: Sequence[str]) -> str:
    """A dot on each curve where the slider along x stands, and a hairline through them."""
    across = f"{xaxis(x):.1f}"
    dots = []
    for y, color in zip(shown, colors, strict=False):
        up = _SIZE[1] - yaxis(np.nan if y is None else y)
        up = f"{up:.1f}" if np.isfinite(up) else "-99"
        dots.append(f'<circle cx="{across}" cy="{up}" r="5" fill="{color}"/>')
    hair = f'<line x1="{across}" x2="{across}" y1="0" y2="{_SIZE[1]}" stroke="gray"/>'
    return hair + "".join(dots)


def _name(value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def interactive_lines(
    x: Sequence[float],
    curves: Mapping[str, np.ndarray],
    sliders: Mapping[str, Sequence],
    *,
    xlabel: str,
    ylabel: str,
    colors: Sequence[str] | None = None,
    start: Mapping[str, float] | None = None,
    xscale: str = "linear",
    yscale: str = "linear",
    ylim: tuple[float, float] | None = None,
    along: str | None = None,
    readings: Mapping[str, np.ndarray] | None = None,
    doubtful: np.ndarray | None = None,
) -> "HTML":
    """Curves over a precomputed table, which the reader turns with sliders.

    Plain SVG and one short script: it works from a file, without a network, in Jupyter and in the
    book; without scripts the first setting stays on show. A table of the curves shown folds out
    below it.

    Parameters
    ----------
    x : sequence of float, length n
        Where the curves are given.
    curves : mapping of str to array, shape (len(first slider), len(second slider), ..., n)
        Values by the name in the legend. NaN leaves a gap.
    sliders : mapping of str to sequence
        Values (numbers or strings) by the name shown beside the slider, in the curves' axis order.
    xlabel, ylabel : str
        Plain text, with units where there are some.
    colors : sequence of str, optional
        One colour a curve, for example ``[color(2), color(4)]``; by default those of 1, 2, 3, ...
        bits.
    start : mapping of str to float or str, optional
        Where a slider stands at first: one of its values; by default in its middle.
    xscale, yscale : {"linear", "log"}
        Scales of the axes.
    ylim : tuple of float, optional
        Range of the vertical axis; by default the range of all curves at all settings, so that the
        axis stands still while the curves move.
    along : str, optional
        Name of one more slider, which moves a marker along `x`. What the curves say at the marker
        is written out below the figure.
    readings : mapping of str to array, optional
        Numbers or words, of the shape of a curve, that are written out beside the curves' values;
        needs `along`.
    doubtful : array of bool, optional
        Of the shape of a curve: where it is true the curves are thin.

    Returns
    -------
    IPython.display.HTML
        Deterministic: the same table gives the same text.

    Raises
    ------
    ValueError
        If the shape of a curve, a reading or `doubtful` does not fit the sliders and `x`, if there
        is no slider or no curve, if `start` names no slider or none of its values, if there are
        fewer colours than curves, if there are readings without a marker, or if `along` is the name
        of another slider.

    Examples
    --------
    >>> x, width = np.linspace(-2, 2, 81), [0.5, 1.0, 2.0]
    >>> figure = interactive_lines(
    ...     x, {"clipped": np.array([np.clip(x, -w, w) for w in width])}, {"width": width},
    ...     xlabel="weight", ylabel="clipped weight")
    """
    from IPython.display import HTML

    x = np.asarray(x, dtype=float)
    curves = {name: np.asarray(values, dtype=float) for name, values in curves.items()}
    readings = {name: np.asarray(values) for name, values in (readings or {}).items()}
    if not curves or not sliders:
        raise ValueError(f"{len(curves)} curves, {len(sliders)} sliders: give at least one of each")
    if readings and along is None:
        raise ValueError(f"readings {list(readings)} are taken at a marker: name a slider in along")
    if along in sliders:
        raise ValueError(f"along = {along!r} is a slider already: give it a name of its own")
    shape = (*map(len, sliders.values()), len(x))
    gated = {} if doubtful is None else {"doubtful": np.asarray(doubtful, dtype=bool)}
    for name, values in [*curves.items(), *readings.items(), *gated.items()]:
        if values.shape != shape:
            raise ValueError(f"{name!r} has shape {values.shape}: sliders and x need {shape}")
    colors = list(colors) if colors is not None else list(COLORS.values())
    if len(colors) < len(curves):
        raise ValueError(f"{len(curves)} curves but {len(colors)} colors: give one a curve")

    everything = np.concatenate([values.ravel() for values in curves.values()])
    xaxis = _Axis(_limits(x, xscale, 0.0), xscale, _SIZE[0])
    yaxis = _Axis(ylim or _limits(everything, yscale, 0.04), yscale, _SIZE[1])
    stops = dict(sliders) | ({along: x} if along else {})
    first = _first(stops, start or {})
    here = tuple(first[name] for name in sliders)

    data = {
        "x": _rounded(x),
        "curves": [_rounded(values) for values in curves.values()],
        "readings": [_reading(values) for values in readings.values()],
        "sliders": [[_name(v) for v in values] for values in stops.values()],
        "along": along is not None,
        "xaxis": [xaxis.low, xaxis.high, xaxis.log],
        "yaxis": [yaxis.low, yaxis.high, yaxis.log],
        "size": _SIZE,
    } | {name: values.astype(int).ravel().tolist() for name, values in gated.items()}
    table = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    key = hashlib.sha256(table.encode()).hexdigest()[:12]
    shown = [_rounded(values[here]) for values in curves.values()]
    thin = gated["doubtful"][here] if gated else None
    drawn, said = _strokes(xaxis, yaxis, data["x"], shown, thin, colors), ""
    if along:
        mark = first[along]
        at_mark = [y[mark] for y in shown]
        drawn += _markers(xaxis, yaxis, data["x"][mark], at_mark, colors)
        said = _read_out(dict(zip(curves, at_mark, strict=True)), readings, (*here, mark))
    return HTML(
        f'<figure class="qgen-lines" data-lines="{key}"><style>{_CSS}</style>'
        + '<div class="qgen-sliders">'
        + "".join(_slider(name, values, first[name]) for name, values in stops.items())
        + "</div>"
        + f'<svg viewBox="-58 -32 {_SIZE[0] + 70} {_SIZE[1] + 80}" font-size="14" '
        f'fill="currentColor" role="img" aria-label="{escape(ylabel)} against {escape(xlabel)}">'
        + _frame(xaxis, yaxis, xlabel, ylabel)
        + f'<svg class="qgen-curves qgen-hue" width="{_SIZE[0]}" height="{_SIZE[1]}">{drawn}'
        + "</svg></svg>"
        + _legend(curves, colors, thin is not None)
        + said
        + _table(xlabel, data["x"], dict(zip(curves, shown, strict=True)))
        + f'<script type="application/json">{table}</script>'
        + f"<script>{_SCRIPT.replace('KEY', key)}</script></figure>"
    )


def _first(sliders: Mapping[str, Sequence], start: Mapping) -> dict[str, int]:
    first = {name: len(values) // 2 for name, values in sliders.items()}
    for name, value in start.items():
        if name not in sliders:
            raise ValueError(f"start names {name!r}: the sliders are {list(sliders)}")
        shown = [_name(v) for v in sliders[name]]
        if _name(value) not in shown:
            raise ValueError(f"start[{name!r}] = {value!r}: the slider has {shown}")
        first[name] = shown.index(_name(value))
    return first


def _slider(name: str, values: Sequence, at: int) -> str:
    value = escape(_name(values[at]))
    return (
        f"<label><span>{escape(name)}</span>"
        f'<input type="range" min="0" max="{len(values) - 1}" value="{at}" '
        f'aria-valuetext="{value}">'
        f"<output>{value}</output></label>"
    )


def _reading(values: np.ndarray) -> dict:
    """Numbers as they are, words by their number in a list."""
    if values.dtype.kind != "U":
        return {"values": _rounded(values)}
    words, index = np.unique(values, return_inverse=True)
    return {"values": index.ravel().tolist(), "words": words.tolist()}


def _read_out(at_mark: Mapping[str, float | None], readings: Mapping, at: tuple[int, ...]) -> str:
    said = dict(at_mark)
    for name, values in readings.items():
        said[name] = str(values[at]) if values.dtype.kind == "U" else _rounded(values[at])[0]
    pairs = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_cell(value))}</dd>" for name, value in said.items()
    )
    return f'<dl class="qgen-readings" aria-live="polite">{pairs}</dl>'


def _cell(value: float | str | None) -> str:
    return "–" if value is None else _name(value)


def _legend(curves: Mapping[str, np.ndarray], colors: Sequence[str], thin: bool) -> str:
    entries = "".join(
        f'<span><svg class="qgen-hue" width="30" height="10"><path d="M0 5H30" stroke="{stroke}" '
        f'stroke-width="2.5" stroke-dasharray="{dash}"/></svg> {escape(name)}</span>'
        for name, stroke, dash in zip(curves, colors, _DASHES * 2, strict=False)
    )
    note = "<span>thin: doubtful</span>" if thin else ""
    return f'<div class="qgen-legend">{entries}{note}</div>'


def _table(xlabel: str, x: list, shown: Mapping[str, list]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in (xlabel, *shown))
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row) + "</tr>"
        for row in zip(x, *shown.values(), strict=True)
    )
    return (
        "<details><summary>The numbers shown</summary><div class='qgen-table'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
