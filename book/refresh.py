"""Re-execute chapters in place: `python book/refresh.py [chapter.ipynb ...]`, by default all."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parent
COVER = BOOK / "_static" / "first-answer.svg"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def refresh(path: Path) -> None:
    """Run every cell and store its outputs; nothing stored depends on when or where."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if svg := output.get("data", {}).get("image/svg+xml"):
                # On one line: a notebook spends a dozen bytes on each line of a figure.
                output.data["image/svg+xml"] = " ".join(svg.split())
    notebook.metadata = METADATA
    nbformat.write(notebook, path)


def stored_figure(path: Path, name: str) -> str:
    """SVG of the figure that a chapter names `name`."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            (svg,) = (o.data["image/svg+xml"] for o in cell.outputs if "data" in o)
            return svg
    raise ValueError(f"{path} has no figure named {name!r}")


if __name__ == "__main__":
    chapters = [Path(name) for name in sys.argv[1:]] or sorted(BOOK.rglob("*.ipynb"))
    for chapter in chapters:
        print(chapter, flush=True)
        refresh(chapter)
    # The README shows a picture of the book, not a copy that could grow old.
    COVER.write_text(stored_figure(BOOK / "intro.ipynb", "fig-first-answer"))
