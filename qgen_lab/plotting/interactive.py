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
for (const figure of document.querySelectorAll('[data-lines="%s"]')) {
  const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const inputs = [...figure.querySelectorAll("input")];
  const paths = figure.querySelectorAll("svg.qgen-curves path");
  const rows = figure.querySelectorAll("tbody tr");
  const place = ([low, high, log], size) => (v) =>
    (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low)) * size;
  const px = place(data.xaxis, data.size[0]), py = place(data.yaxis, -data.size[1]);
  const draw = () => {
    let at = 0;
    inputs.forEach((input, i) => {
      const value = data.sliders[i][input.value];
      input.setAttribute("aria-valuetext", value);
      input.nextElementSibling.textContent = value;
      at = at * data.sliders[i].length + Number(input.value);
    });
    data.curves.forEach((curve, j) => {
      let pen = "M", d = "";
      data.x.forEach((x, i) => {
        const y = curve[at * data.x.length + i];
        rows[i].children[j + 1].textContent = y ?? "–";
        const v = py(y ?? NaN);
        if (!Number.isFinite(v)) { pen = "M"; return; }
        d += `${pen}${px(x).toFixed(1)} ${(data.size[1] + v).toFixed(1)}`;
        pen = "L";
      });
      paths[j].setAttribute("d", d);
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


def _path(xaxis: _Axis, yaxis: _Axis, x: Sequence[float], y: Sequence[float | None]) -> str:
    pen, path = "M", ""
    for horizontal, vertical in zip(
        xaxis(np.array(x)), yaxis(np.array(y, dtype=float)), strict=True
    ):
        if not np.isfinite(vertical):
            pen = "M"
            continue
        path += f"{pen}{horizontal:.1f} {_SIZE[1] - vertical:.1f}"
        pen = "L"
    return path


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

    Returns
    -------
    IPython.display.HTML
        Deterministic: the same table gives the same text.

    Raises
    ------
    ValueError
        If a curve's shape does not fit the sliders and `x`, if there is no slider or no curve, if
        `start` names no slider or none of its values, or if there are fewer colours than curves.

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
    if not curves or not sliders:
        raise ValueError(f"{len(curves)} curves, {len(sliders)} sliders: give at least one of each")
    shape = (*map(len, sliders.values()), len(x))
    for name, values in curves.items():
        if values.shape != shape:
            raise ValueError(f"curve {name!r} has shape {values.shape}: sliders and x need {shape}")
    colors = list(colors) if colors is not None else list(COLORS.values())
    if len(colors) < len(curves):
        raise ValueError(f"{len(curves)} curves but {len(colors)} colors: give one a curve")

    everything = np.concatenate([values.ravel() for values in curves.values()])
    xaxis = _Axis(_limits(x, xscale, 0.0), xscale, _SIZE[0])
    yaxis = _Axis(ylim or _limits(everything, yscale, 0.04), yscale, _SIZE[1])
    first = _first(sliders, start or {})

    data = {
        "x": _rounded(x),
        "curves": [_rounded(values) for values in curves.values()],
        "sliders": [[_name(v) for v in values] for values in sliders.values()],
        "xaxis": [xaxis.low, xaxis.high, xaxis.log],
        "yaxis": [yaxis.low, yaxis.high, yaxis.log],
        "size": _SIZE,
    }
    table = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    key = hashlib.sha256(table.encode()).hexdigest()[:12]
    shown = [_rounded(values[tuple(first.values())]) for values in curves.values()]
    return HTML(
        f'<figure class="qgen-lines" data-lines="{key}"><style>{_CSS}</style>'
        + '<div class="qgen-sliders">'
        + "".join(_slider(name, values, first[name]) for name, values in sliders.items())
        + "</div>"
        + f'<svg viewBox="-58 -32 {_SIZE[0] + 70} {_SIZE[1] + 80}" font-size="14" '
        f'fill="currentColor" role="img" aria-label="{escape(ylabel)} against {escape(xlabel)}">'
        + _frame(xaxis, yaxis, xlabel, ylabel)
        + f'<svg class="qgen-curves qgen-hue" width="{_SIZE[0]}" height="{_SIZE[1]}">'
        + "".join(
            f'<path d="{_path(xaxis, yaxis, data["x"], y)}" fill="none" stroke="{stroke}" '
            f'stroke-width="2.5" stroke-dasharray="{dash}"/>'
            for y, stroke, dash in zip(shown, colors, _DASHES * 2, strict=False)
        )
        + "</svg></svg>"
        + _legend(curves, colors)
        + _table(xlabel, data["x"], dict(zip(curves, shown, strict=True)))
        + f'<script type="application/json">{table}</script>'
        + f"<script>{_SCRIPT % key}</script></figure>"
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


def _legend(curves: Mapping[str, np.ndarray], colors: Sequence[str]) -> str:
    entries = "".join(
        f'<span><svg class="qgen-hue" width="30" height="10"><path d="M0 5H30" stroke="{stroke}" '
        f'stroke-width="2.5" stroke-dasharray="{dash}"/></svg> {escape(name)}</span>'
        for name, stroke, dash in zip(curves, colors, _DASHES * 2, strict=False)
    )
    return f'<div class="qgen-legend">{entries}</div>'


def _table(xlabel: str, x: list, shown: Mapping[str, list]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in (xlabel, *shown))
    rows = "".join(
        "<tr>" + "".join(f"<td>{'–' if v is None else f'{v:g}'}</td>" for v in row) + "</tr>"
        for row in zip(x, *shown.values(), strict=True)
    )
    return (
        "<details><summary>The numbers shown</summary><div class='qgen-table'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
