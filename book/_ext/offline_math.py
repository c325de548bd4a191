"""Equations without a network: one MathJax file, copied from `sphinx-mathjax-offline`."""

import importlib.util
from pathlib import Path

from sphinx.util.fileutil import copy_asset

FILE = "tex-svg-full.js"  # the full file: the plain one loads its extensions, which file:// forbids


def _source() -> Path:
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise ImportError("equations need MathJax: pip install sphinx-mathjax-offline")
    return Path(spec.origin).parent / "static" / "mathjax" / FILE


def _use_local_file(app, config):
    config.mathjax_path = f"mathjax/{FILE}"


def _copy_file(app, error):
    if error is None and app.builder.format == "html":
        copy_asset(str(_source()), str(Path(app.outdir) / "_static" / "mathjax"))


def setup(app):
    """Point Sphinx to the local file and bring it along."""
    app.connect("config-inited", _use_local_file)
    app.connect("build-finished", _copy_file)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
