"""Edit and launch links name whichever repository builds the book."""

import importlib.util

import pytest
from bs4 import BeautifulSoup
from building import ROOT, build_one_page

spec = importlib.util.spec_from_file_location(
    "repository_links", ROOT / "book" / "_ext" / "repository_links.py"
)
repository_links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(repository_links)


def test_local_build_has_none():
    assert repository_links.links({}) == {"launch_buttons": {}}


def test_a_pull_request_links_to_its_branch_not_to_its_number():
    options = repository_links.links(
        {
            "GITHUB_REPOSITORY": "someone/fork",
            "GITHUB_REF_NAME": "12/merge",
            "GITHUB_HEAD_REF": "topic",
        }
    )
    assert options["repository_branch"] == "topic"


def test_another_server_is_taken_from_the_environment():
    options = repository_links.links(
        {"GITHUB_REPOSITORY": "a/b", "GITHUB_SERVER_URL": "https://git.example.org/"}
    )
    assert options["repository_url"] == "https://git.example.org/a/b"


@pytest.fixture(scope="module")
def one_page(tmp_path_factory):
    """One chapter, built as a fork's workflow builds the book."""
    html = build_one_page(
        tmp_path_factory.mktemp("fork"),
        "# A page",
        GITHUB_REPOSITORY="someone/fork",
        GITHUB_REF_NAME="topic",
    )
    return BeautifulSoup((html / "book" / "page.html").read_bytes(), "html.parser")


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/someone/fork",
        "https://github.com/someone/fork/edit/topic/book/page.ipynb",
        "https://mybinder.org/v2/gh/someone/fork/topic?urlpath=lab/tree/book/page.ipynb",
    ],
)
def test_built_page_links_to_the_fork(one_page, address):
    assert one_page.find("a", href=address)
