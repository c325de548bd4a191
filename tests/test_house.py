"""The house keeps its own rules: one-way imports, an instant import, one place for versions."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from importlinter.cli import lint_imports
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    pin.name.lower().replace("_", "-"): pin
    for pin in map(Requirement, (ROOT / "requirements.lock").read_text().split("\n")[:-1])
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_imports_go_one_way(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == os.EX_OK


def test_import_needs_neither_torch_nor_numba():
    heavy = run_python(
        "import sys, qgen_lab; print([m for m in ('torch', 'numba', 'numpy') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_rooms_open_on_first_use():
    rooms = "codebooks data experiments flatness plotting qat theory"
    code = f"import qgen_lab; print(all(getattr(qgen_lab, r) for r in '{rooms}'.split()))"
    assert run_python(code).strip() == "True"


def test_unknown_room_is_an_attribute_error():
    import qgen_lab

    with pytest.raises(AttributeError, match="no attribute 'attic'"):
        _ = qgen_lab.attic


def test_version_is_the_same_everywhere():
    import qgen_lab

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert qgen_lab.__version__ == PROJECT["version"] == citation["version"]
    assert f"## {PROJECT['version']}" in changelog


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in sum(extras, start=PROJECT["dependencies"])]


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_lock_pins_what_the_project_declares(requirement):
    pin = LOCK[requirement.name.lower()]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


@pytest.mark.parametrize("name", ["numpy", "scipy", "numba", "torch", "torchvision", "sphinx"])
def test_installed_versions_are_the_locked_ones(name):
    assert LOCK[name].specifier.contains(version(name).split("+")[0])


def test_conda_environment_is_in_step():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, nested = environment["dependencies"]
    assert pip == "pip"
    assert Requirement(f"python=={python.split('=')[1]}.*").specifier.contains("3.11.0")
    assert PROJECT["requires-python"] == ">=3.11"
    makefile = (ROOT / "Makefile").read_text()
    install = re.search(r"(--constraint \S+) (--editable) '(\S+)'", makefile)
    assert nested["pip"] == [install[1], f"{install[2]} {install[3]}"]


def test_ci_runs_the_readme_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("\nmake test")


def test_readme_picture_is_the_books_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    from refresh import COVER, stored_figure

    assert str(COVER.relative_to(ROOT)) in (ROOT / "README.md").read_text()
    assert COVER.read_text() == stored_figure(ROOT / "book/intro.ipynb", "fig-first-answer")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def test_nothing_large_is_tracked():
    sizes = {str(f.relative_to(ROOT)): f.stat().st_size for f in tracked_files()}
    assert [name for name, size in sizes.items() if size > 2**20] == []
    assert sum(sizes.values()) < 20 * 2**20
