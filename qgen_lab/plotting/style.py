"""One look for every figure of the book: one colour and one marker per bit width, everywhere.

Colours keep a contrast of at least 3 on white, and on the book's dark background, where figures
are inverted and their hue turned back. Under simulated colour blindness they stay apart, and the
markers tell them apart in grey.
"""

import matplotlib.pyplot as plt

FULL_PRECISION = 32

COLORS = {
    1: "#D765C3",
    2: "#DD2913",
    3: "#AE8E41",
    4: "#248100",
    5: "#64855C",
    6: "#739D7D",
    7: "#115955",
    8: "#478CFE",
    16: "#7B2DAB",
    FULL_PRECISION: "#202224",
}
_MARKERS = dict(zip(COLORS, "vo^s<>pDPX", strict=True))


def _known(table: dict, bits: int):
    if bits not in table:
        raise ValueError(f"bits = {bits!r} has no look here: use one of {sorted(table)}")
    return table[bits]


def color(bits: int) -> str:
    """Colour of a bit width (32 means full precision), the same in every figure.

    Raises
    ------
    ValueError
        If no colour belongs to `bits`; 1 to 8, 16 and 32 have one.
    """
    return _known(COLORS, bits)


def marker(bits: int) -> str:
    """Marker of a bit width, so that figures are readable in grey.

    Raises
    ------
    ValueError
        If no marker belongs to `bits`; 1 to 8, 16 and 32 have one.
    """
    return _known(_MARKERS, bits)


def label(bits: int) -> str:
    """Name of a bit width in legends: `Int4`, or `FP32` for full precision."""
    return "FP32" if bits == FULL_PRECISION else f"Int{bits}"


def use_style() -> None:
    """Set the book's figure style, and deterministic SVG output inside a notebook.

    The default size is that of a phone's page: text stays readable at 400 pixels. A figure of
    two panels is better stacked, ``plt.subplots(2, 1, figsize=(5.4, 6.2))``, than wide.
    """
    plt.rcParams.update(
        {
            "figure.figsize": (5.4, 3.5),
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "legend.fontsize": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "lines.markersize": 5.5,
            "errorbar.capsize": 2.5,
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
