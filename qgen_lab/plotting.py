"""One look for every figure of the book: one colour and one marker per bit width, everywhere."""

import matplotlib.pyplot as plt

FULL_PRECISION = 32

# Okabe and Ito's colour-blind-safe set; few bits warm, many bits cold, full precision grey.
_COLORS = {
    1: "#CC79A7",
    2: "#D55E00",
    3: "#E69F00",
    4: "#009E73",
    8: "#0072B2",
    16: "#56B4E9",
    FULL_PRECISION: "#7F7F7F",
}
_MARKERS = {1: "v", 2: "o", 3: "^", 4: "s", 8: "D", 16: "P", FULL_PRECISION: "X"}


def _known(table: dict, bits: int):
    if bits not in table:
        raise ValueError(f"bits = {bits!r} has no colour here: use one of {sorted(table)}")
    return table[bits]


def color(bits: int) -> str:
    """Colour of a bit width (32 means full precision), the same in every figure."""
    return _known(_COLORS, bits)


def marker(bits: int) -> str:
    """Marker of a bit width, so that figures are readable in grey."""
    return _known(_MARKERS, bits)


def label(bits: int) -> str:
    """Name of a bit width in legends: `Int4`, or `FP32` for full precision."""
    return "FP32" if bits == FULL_PRECISION else f"Int{bits}"


def use_style() -> None:
    """Set the book's figure style, and deterministic SVG output inside a notebook."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.8),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "qgen-lab",
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
