"""What every stored chapter must keep. A guard yields one sentence for each fault it finds."""

import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = {"tags", "mystnb"}
WIDEST_FIGURE = 480  # points: wider ones cannot be read on a phone


def _code_cells(notebook: NotebookNode):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def _outputs(notebook: NotebookNode):
    return [output for cell in _code_cells(notebook) for output in cell.outputs]


def _texts(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Every stored text with its kind: a stream's name or a MIME type."""
    for output in _outputs(notebook):
        if output.output_type == "stream":
            yield output.name, output.text
        for kind, text in output.get("data", {}).items():
            yield kind, text if isinstance(text, str) else str(text)


def executed(notebook: NotebookNode) -> Iterator[str]:
    """Counts are 1 to n: every cell ran once, in order (nbval compares no cell without a count)."""
    counts = [cell.execution_count for cell in _code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}: run `make refresh`"


def quiet(notebook: NotebookNode) -> Iterator[str]:
    """No warning and no error is stored."""
    for output in _outputs(notebook):
        if output.output_type == "error":
            yield f"a stored error: {output.ename}: {output.evalue}"
        elif output.get("name") == "stderr":
            yield f"a stored warning: {output.text[:200]}"


def clean_metadata(notebook: NotebookNode) -> Iterator[str]:
    """Nothing stored says when, where or by which version a chapter ran."""
    if notebook.metadata != NOTEBOOK_METADATA:
        yield f"notebook metadata {dict(notebook.metadata)}: run `make refresh`"
    for cell in notebook.cells:
        extra = set(cell.metadata) - CELL_METADATA
        if extra:
            yield f"cell {cell.id} carries metadata {sorted(extra)}"


def compared(notebook: NotebookNode) -> Iterator[str]:
    """No output escapes comparison: pictures are SVG, no address and no skipped cell."""
    for kind, text in _texts(notebook):
        if kind in ("image/png", "image/jpeg"):
            yield f"a stored {kind}, which nbval does not compare: call plotting.use_style() first"
        elif kind != "image/svg+xml" and re.search(r"\b0x[0-9a-f]{6,}", text):
            yield f"a memory address in an output: {text[:80]}"
    for cell in _code_cells(notebook):
        if "NBVAL_SKIP" in cell.source or "nbval-skip" in cell.metadata.get("tags", []):
            yield f"cell {cell.id} is never executed by nbval"


def offline(notebook: NotebookNode) -> Iterator[str]:
    """Outputs load nothing from the network."""
    remote = re.compile(
        r"""(?:\bsrc|\bhref)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?(?:https?:)?//"""
    )
    for kind, text in _texts(notebook):
        if kind == "text/html" and (found := remote.search(text)):
            yield f"an output loads a remote file: {text[found.start() :][:80]}"


def no_machine_paths(notebook: NotebookNode) -> Iterator[str]:
    """Neither sources nor outputs name a folder of one machine."""
    path = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|var)/\w+|\b[A-Z]:\\\w+")
    texts = [cell.source for cell in notebook.cells] + [text for _, text in _texts(notebook)]
    for text in texts:
        if found := path.search(text):
            yield f"a path of one machine: {found.group()}"


def narrow_figures(notebook: NotebookNode) -> Iterator[str]:
    """Figures are narrow enough to be read on a phone: panels are stacked."""
    for kind, text in _texts(notebook):
        width = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', text) if "svg" in kind else None
        if width and float(width.group(1)) > WIDEST_FIGURE:
            yield f"a figure is {width.group(1)} points wide, {WIDEST_FIGURE} are allowed"


def complete(notebook: NotebookNode) -> Iterator[str]:
    """A chapter says what does not hold, and its exercises have folded solutions."""
    headings = re.findall(r"^#+\s+(.*)$", _prose(notebook), re.MULTILINE)
    for needed in ("What does not hold", "Exercises"):
        if not any(needed.lower() in heading.lower() for heading in headings):
            yield f"no heading {needed!r}"
    if not re.search(
        r"\{admonition\}[^\n]*Solution[^\n]*\n:class:[^\n]*dropdown", _prose(notebook)
    ):
        yield "no folded solution"


EVERY_NOTEBOOK = [
    executed,
    quiet,
    clean_metadata,
    compared,
    offline,
    no_machine_paths,
    narrow_figures,
]
EVERY_CHAPTER = [*EVERY_NOTEBOOK, complete]


def listed(contents: dict, root: Path) -> Iterator[str]:
    """The table of contents and the notebooks under `book/` name the same files."""
    entries = set(_files(contents))
    for entry in sorted(entries):
        if not any((root / entry).with_suffix(end).is_file() for end in (".ipynb", ".md")):
            yield f"_toc.yml lists {entry}, which does not exist"
    for path in sorted((root / "book").rglob("*.ipynb")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name not in entries and ".ipynb_checkpoints" not in path.parts:
            yield f"{name} is missing from _toc.yml"


def _files(entry) -> Iterator[str]:
    if isinstance(entry, list):
        for item in entry:
            yield from _files(item)
    elif isinstance(entry, dict):
        for key, value in entry.items():
            if key in ("root", "file"):
                yield value
            else:
                yield from _files(value)
