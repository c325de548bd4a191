"""Every page of the built book, opened from `file://`: whole, quiet, and right on a phone."""

import importlib
import os
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from inspection import broken_links, faults_seen, pages

SCREENSHOTS = os.environ.get("QGEN_SCREENSHOTS")  # a folder to keep pictures of all pages in


@pytest.fixture(scope="module")
def parsed(book):
    return pages(book)


@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_is_whole_and_quiet_in_light_and_dark(book, parsed, chromium, width):
    context = chromium.new_context(viewport={"width": width, "height": 900})
    faults = {}
    for path, html in parsed.items():
        if html.find("meta", attrs={"http-equiv": "Refresh"}):
            continue  # sends the reader on to the first page, see below
        name = path.relative_to(book).with_suffix("").as_posix()
        picture = SCREENSHOTS and f"{SCREENSHOTS}/{name.replace('/', '-')}-{width}"
        if found := faults_seen(context, path, picture):
            faults[name] = found
    context.close()
    assert faults == {}


def test_index_leads_to_the_first_page(book, chromium):
    page = chromium.new_page()
    page.goto((book / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    assert "qgen-lab" in page.title()
    page.close()


def test_every_link_within_the_book_resolves(parsed):
    assert broken_links(parsed) == []


def test_anchors_are_unique(parsed):
    for path, html in parsed.items():
        names = Counter(tag["id"] for tag in html.find_all(id=True))
        assert [name for name, n in names.items() if n > 1] == [], path.name


@pytest.mark.parametrize("room", ["theory", "data", "qat", "flatness", "plotting"])
def test_every_public_name_is_documented(book, parsed, room):
    module = importlib.import_module(f"qgen_lab.{room}")
    documented = {tag["id"] for tag in parsed[book / f"book/api/{room}.html"].find_all(id=True)}
    assert {f"qgen_lab.{room}.{name}" for name in module.__all__} - documented == set()


def test_citations_lead_to_the_bibliography(book, parsed):
    cited = {
        link["href"].partition("#")[2]
        for html in parsed.values()
        for link in html.select('main a[href*="references.html#"]')
    }
    listed = {tag["id"] for tag in parsed[book / "book" / "references.html"].select("main [id]")}
    assert cited
    assert cited <= listed


def test_local_build_links_to_no_repository(parsed):
    for path, html in parsed.items():
        assert html.select(".header-article-items a[href^=http]") == [], path.name


@pytest.mark.parametrize("words", ["quantization", "generalization error", "interactive_lines"])
def test_search_finds_pages(book, chromium, words):
    page = chromium.new_page()
    page.goto((book / "search.html").as_uri() + f"?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    page.close()
    assert all(Path(unquote(urlsplit(address).path)).exists() for address in found)


def test_sliders_of_the_book_move_their_curves(parsed, chromium):
    with_sliders = [path for path, html in parsed.items() if html.select("figure.qgen-lines")]
    assert with_sliders, "no chapter has an interactive figure"
    page = chromium.new_page()
    for path in with_sliders:
        page.goto(path.as_uri())
        for figure in page.locator("figure.qgen-lines").all():
            shown = figure.locator("tbody, .qgen-readings")
            for slider in figure.locator("input[type=range]").all():
                before = shown.all_text_contents()
                at_end = slider.input_value() == slider.get_attribute("max")
                slider.press("ArrowLeft" if at_end else "ArrowRight")
                assert shown.all_text_contents() != before, f"a slider on {path.name} moves nothing"
    page.close()
