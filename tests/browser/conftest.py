"""The book, built once, and the system's Chromium to open it."""

import os
import shutil

import pytest
from building import ROOT, build

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


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
