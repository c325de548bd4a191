"""Every guard accepts a sound notebook and refuses one that breaks it."""

import copy

import guards
import nbformat.v4 as nbf
import pytest


def sound_notebook():
    cells = [
        nbf.new_markdown_cell("# A chapter\n\n## What does not hold\n\nMuch."),
        nbf.new_code_cell(
            "print(1.25)", execution_count=1, outputs=[nbf.new_output("stream", text="1.25\n")]
        ),
        nbf.new_code_cell(
            "plt.show()",
            execution_count=2,
            metadata={"tags": ["hide-input"]},
            outputs=[
                nbf.new_output(
                    "display_data", data={"image/svg+xml": '<svg width="388.8pt" height="252pt"/>'}
                )
            ],
        ),
        nbf.new_markdown_cell(
            "## Exercises\n\n1. Do it.\n\n```{admonition} Solution 1\n:class: dropdown\nDone.\n```"
        ),
    ]
    return nbf.new_notebook(cells=cells, metadata=copy.deepcopy(guards.NOTEBOOK_METADATA))


def html(text):
    return [nbf.new_output("display_data", data={"text/html": text})]


def never_executed(notebook):
    notebook.cells[2].execution_count = None


def executed_twice(notebook):
    notebook.cells[2].execution_count = 3


def stored_warning(notebook):
    notebook.cells[1].outputs = [nbf.new_output("stream", name="stderr", text="UserWarning: ...")]


def stored_error(notebook):
    notebook.cells[1].outputs = [nbf.new_output("error", ename="ValueError", evalue="bits = 40")]


def python_version(notebook):
    notebook.metadata.language_info["version"] = "3.11.7"


def timing(notebook):
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}


def bitmap(notebook):
    notebook.cells[2].outputs = [nbf.new_output("display_data", data={"image/png": "iVBORw0KGgo="})]


def address(notebook):
    notebook.cells[1].outputs = html("&lt;generator object at 0x7f3a5c2b1d40&gt;")


def skipped_by_comment(notebook):
    notebook.cells[1].source = "# NBVAL_SKIP\nprint(1.25)"


def skipped_by_tag(notebook):
    notebook.cells[1].metadata["tags"] = ["nbval-skip"]


def remote_script(notebook):
    notebook.cells[1].outputs = html('<script src="https://cdn.plot.ly/plotly.min.js"></script>')


def remote_style(notebook):
    notebook.cells[1].outputs = html('<link rel="stylesheet" href="//fonts.example.org/a.css">')


def path_in_source(notebook):
    notebook.cells[1].source = 'open("/home/someone/data.csv")'


def path_in_output(notebook):
    notebook.cells[1].outputs = [nbf.new_output("stream", text="saved to /tmp/figure.svg\n")]


def wide_figure(notebook):
    notebook.cells[2].outputs[0].data["image/svg+xml"] = '<svg width="720pt" height="252pt"/>'


def no_limits(notebook):
    notebook.cells[0].source = "# A chapter"


def no_exercises(notebook):
    notebook.cells[3].source = notebook.cells[3].source.replace("## Exercises", "")


def unfolded_solution(notebook):
    notebook.cells[3].source = notebook.cells[3].source.replace("dropdown", "tip")


BROKEN = [
    (guards.executed, never_executed),
    (guards.executed, executed_twice),
    (guards.quiet, stored_warning),
    (guards.quiet, stored_error),
    (guards.clean_metadata, python_version),
    (guards.clean_metadata, timing),
    (guards.compared, bitmap),
    (guards.compared, address),
    (guards.compared, skipped_by_comment),
    (guards.compared, skipped_by_tag),
    (guards.offline, remote_script),
    (guards.offline, remote_style),
    (guards.no_machine_paths, path_in_source),
    (guards.no_machine_paths, path_in_output),
    (guards.narrow_figures, wide_figure),
    (guards.complete, no_limits),
    (guards.complete, no_exercises),
    (guards.complete, unfolded_solution),
]


def test_sound_notebook_passes():
    assert [fault for guard in guards.EVERY_CHAPTER for fault in guard(sound_notebook())] == []


@pytest.mark.parametrize(("guard", "damage"), BROKEN, ids=lambda function: function.__name__)
def test_broken_notebook_is_refused_by_its_guard_alone(guard, damage):
    notebook = sound_notebook()
    damage(notebook)
    refusing = [other for other in guards.EVERY_CHAPTER if list(other(notebook))]
    assert refusing == [guard]


def test_every_guard_is_shown_to_refuse():
    assert {guard for guard, _ in BROKEN} == set(guards.EVERY_CHAPTER)


@pytest.fixture
def small_book(tmp_path):
    (tmp_path / "book" / "theory").mkdir(parents=True)
    (tmp_path / "book" / "intro.md").touch()
    (tmp_path / "book" / "theory" / "quantizers.ipynb").touch()
    contents = {"root": "book/intro", "parts": [{"chapters": [{"file": "book/theory/quantizers"}]}]}
    return contents, tmp_path


def test_complete_contents_pass(small_book):
    assert list(guards.listed(*small_book)) == []


def test_unlisted_notebook_is_refused(small_book):
    contents, root = small_book
    (root / "book" / "theory" / "forgotten.ipynb").touch()
    assert list(guards.listed(contents, root)) == ["book/theory/forgotten is missing from _toc.yml"]


def test_entry_without_a_file_is_refused(small_book):
    contents, root = small_book
    (root / "book" / "intro.md").unlink()
    assert list(guards.listed(contents, root)) == [
        "_toc.yml lists book/intro, which does not exist"
    ]
