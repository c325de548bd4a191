"""`make test` really fails when a stored number or a library function changes.

A small notebook is stored by `book/refresh.py`, then checked with the Makefile's own nbval line.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import pytest

ROOT = Path(__file__).parents[2]
CELLS = [
    "import matplotlib.pyplot as plt\n"
    "from qgen_lab import codebooks, plotting\n\n"
    "plotting.use_style()",
    "codebooks.uniform(2, 0.9).levels.round(4)",
    "_ = plt.plot(codebooks.uniform(3, 2.0).levels)\nplt.show()",
]
BREAK = "\nuniform = (lambda sound: lambda bits, width: sound(bits, {factor} * width))(uniform)\n"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "chapter.ipynb"
    nbformat.write(
        nbf.new_notebook(
            cells=[nbf.new_code_cell(source, id=f"c{i}") for i, source in enumerate(CELLS)]
        ),
        path,
    )
    refresh(path)
    shutil.copy(ROOT / "book" / "conftest.py", path.parent)
    return path


def refresh(path):
    subprocess.run(
        [sys.executable, ROOT / "book" / "refresh.py", path], check=True, capture_output=True
    )


def nbval(path, library=None):
    """Run the Makefile's nbval line on `path`, with another copy of the library if one is given."""
    line = re.search(r"-m (pytest --nbval .*) book$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(library or "")}
    return subprocess.run(
        [sys.executable, "-m", *line.group(1).split(), "-c", ROOT / "pyproject.toml", path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def broken_library(folder, factor):
    shutil.copytree(
        ROOT / "qgen_lab", folder / "qgen_lab", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (folder / "qgen_lab" / "codebooks.py").open("a") as module:
        module.write(BREAK.format(factor=factor))
    return folder


def test_unchanged_notebook_passes(stored):
    result = nbval(stored)
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


def test_refreshing_again_changes_nothing(stored):
    before = stored.read_bytes()
    refresh(stored)
    assert stored.read_bytes() == before


def test_one_changed_digit_fails(stored, tmp_path):
    changed = tmp_path / stored.name
    text = stored.read_text()
    assert text.count("-0.9") == 1
    changed.write_text(text.replace("-0.9", "-0.8"))
    result = nbval(changed)
    assert result.returncode == 1
    assert "mismatch 'text/plain'" in result.stdout


def test_broken_library_function_fails(stored, tmp_path):
    result = nbval(stored, library=broken_library(tmp_path, factor=1.01))
    assert result.returncode == 1
    assert "2 failed" in result.stdout  # the printed levels, and the figure


def test_last_bit_of_another_processor_passes(stored, tmp_path):
    result = nbval(stored, library=broken_library(tmp_path, factor=1 + 1e-12))
    assert result.returncode == 0, result.stdout
