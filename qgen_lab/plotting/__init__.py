"""One look for every figure of the book: its style, and figures that a reader turns."""

from qgen_lab.plotting.interactive import interactive_lines
from qgen_lab.plotting.style import color, label, marker, use_style

__all__ = ["color", "interactive_lines", "label", "marker", "use_style"]
