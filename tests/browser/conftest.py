"""The book, built once from clean with warnings as errors, and the system's Chromium to open it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


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


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The whole book as a local build makes it."""
    return build(ROOT, tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, or the one that QGEN_BROWSER names."""
    program = os.environ.get("QGEN_BROWSER") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if program is None:
        pytest.skip(f"no browser: install one of {BROWSERS}, or name one in QGEN_BROWSER")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
