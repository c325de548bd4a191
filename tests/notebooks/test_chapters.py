"""The stored chapters keep every guard."""

from pathlib import Path

import guards
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(
    path for path in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)


def test_there_are_chapters():
    assert NOTEBOOKS


def test_table_of_contents_and_notebooks_agree():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert list(guards.listed(contents, ROOT)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_every_guard(path):
    notebook = nbformat.read(path, as_version=4)
    kept = guards.EVERY_NOTEBOOK if path.stem == "intro" else guards.EVERY_CHAPTER
    assert [fault for guard in kept for fault in guard(notebook)] == []
