"""Build the book, or one chapter with its configuration, from clean and without a warning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import nbformat.v4 as nbf

ROOT = Path(__file__).parents[2]
PYTHON = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def build(source: Path, output: Path, **environment: str) -> Path:
    """Build the book in `source` and return its folder of pages; a warning is an error."""
    local = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "BOOK_"))}
    program = Path(sys.executable).with_name("jupyter-book")
    strict = ["--warningiserror", "--nitpick", "--keep-going", "--quiet"]
    result = subprocess.run(
        [program, "build", source, "--path-output", output, *strict],
        env={**local, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return output / "_build" / "html"


def build_one_page(folder: Path, text: str, **environment: str) -> Path:
    """Build a book of one chapter with our configuration, and return its folder of pages."""
    shutil.copy(ROOT / "_config.yml", folder)
    for part in ("book/_ext", "book/_static"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "book/references.bib", folder / "book")
    chapter = nbf.new_notebook(cells=[nbf.new_markdown_cell(text)], metadata=PYTHON)
    nbformat.write(chapter, folder / "book" / "page.ipynb")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    return build(folder, folder, **environment)
