"""Every page of the built book, opened from `file://`: whole, quiet, and right on a phone."""

import os
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

SCREENSHOTS = os.environ.get("QGEN_SCREENSHOTS")

# What one can see only after the page has run: each string is one fault.
FAULTS_IN_PAGE = r"""async () => {
  const faults = [], all = (selector) => [...document.querySelectorAll(selector)];
  if (window.MathJax) await MathJax.startup.promise;
  await Promise.all(all("img").map((image) => image.decode().catch(() => {})));
  for (const formula of all("span.math, div.math"))
    if (!formula.querySelector("mjx-container")) faults.push("not typeset: " + formula.textContent);
  for (const error of all('[data-mml-node="merror"], mjx-container [fill="red"]'))
    faults.push("wrong TeX: " + (error.dataset.latex ?? error.textContent));
  for (const image of all("img"))
    if (!image.naturalWidth) faults.push("picture did not load: " + image.src);
  const words = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (words.nextNode())
    if (/\$\$|\\\(|\{(eq|cite|ref|glue)[:}]/.test(words.currentNode.data) &&
        !words.currentNode.parentElement.closest("pre, code, script, style"))
      faults.push("raw markup: " + words.currentNode.data.trim().slice(0, 80));
  const width = document.documentElement.scrollWidth;
  if (width > window.innerWidth) faults.push(`page is ${width} wide in a window of ${innerWidth}`);
  return faults;
}"""


def pages(book: Path) -> list[Path]:
    return sorted(page for page in book.rglob("*.html") if "_static" not in page.parts)


@pytest.fixture(scope="module")
def parsed(book):
    """Every page's HTML by its path."""
    return {page: BeautifulSoup(page.read_text(), "html.parser") for page in pages(book)}


@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_is_whole_and_quiet_in_light_and_dark(book, chromium, width):
    context = chromium.new_context(viewport={"width": width, "height": 900})
    faults = {}
    for path in pages(book):
        if "http-equiv" in path.read_text():
            continue  # sends the reader on to the first page, see below
        name = path.relative_to(book).with_suffix("").as_posix()
        if found := visit(context, path, f"{name.replace('/', '-')}-{width}"):
            faults[name] = found
    context.close()
    assert faults == {}


def visit(context, path, name):
    """Open one page in its own tab and list what is wrong with it, in either theme."""
    faults = []
    page = context.new_page()
    page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"request failed: {request.url}"))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:", "blob:"))
            or faults.append(f"request to the network: {request.url}")
        ),
    )
    page.goto(path.as_uri())
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        faults += page.evaluate(FAULTS_IN_PAGE)
        if SCREENSHOTS:
            page.screenshot(path=Path(SCREENSHOTS, f"{name}-{theme}.png"), full_page=True)
    page.close()
    return faults


def test_index_leads_to_the_first_page(book, chromium):
    page = chromium.new_page()
    page.goto((book / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    assert "qgen-lab" in page.title()
    page.close()


def test_every_link_within_the_book_resolves(book, parsed):
    anchors = {
        page: {tag.get(key) for tag in html.find_all(True) for key in ("id", "name")}
        for page, html in parsed.items()
    }
    broken = []
    for page, html in parsed.items():
        for tag in html.find_all(["a", "img", "link", "script"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.exists():
                broken.append((page.relative_to(book), f"no file {address.geturl()}"))
            elif address.fragment and unquote(address.fragment) not in anchors.get(target, ()):
                broken.append((page.relative_to(book), f"no anchor {address.geturl()}"))
    assert broken == []


def test_anchors_are_unique(parsed):
    repeated = {
        str(page): [
            name for name, n in Counter(t["id"] for t in html.find_all(id=True)).items() if n > 1
        ]
        for page, html in parsed.items()
    }
    assert {page: names for page, names in repeated.items() if names} == {}


def test_citations_lead_to_the_bibliography(book, parsed):
    cited = {
        link["href"].partition("#")[2]
        for page, html in parsed.items()
        for link in html.select('main a[href*="references.html#"]')
    }
    listed = {tag["id"] for tag in parsed[book / "book" / "references.html"].select("main [id]")}
    assert cited
    assert cited <= listed


def test_local_build_links_to_no_repository(parsed):
    for html in parsed.values():
        for link in html.select("header a[href^=http], .header-article-items a[href^=http]"):
            raise AssertionError(f"a local build cannot know {link['href']}")


@pytest.mark.parametrize("words", ["quantization", "generalization error", "interactive_lines"])
def test_search_finds_pages(book, chromium, words):
    page = chromium.new_page()
    page.goto((book / "search.html").as_uri() + f"?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    page.close()
    assert all(Path(unquote(urlsplit(address).path)).exists() for address in found)


def test_sliders_of_the_book_move_their_curves(book, parsed, chromium):
    with_sliders = [page for page, html in parsed.items() if html.select("figure.qgen-lines")]
    assert with_sliders, "no chapter has an interactive figure"
    page = chromium.new_page()
    for path in with_sliders:
        page.goto(path.as_uri())
        for figure in page.locator("figure.qgen-lines").all():
            shown = figure.locator("tbody")
            for slider in figure.locator("input[type=range]").all():
                before = shown.inner_html()
                at_end = slider.input_value() == slider.get_attribute("max")
                slider.press("ArrowLeft" if at_end else "ArrowRight")
                assert shown.inner_html() != before, f"a slider on {path.name} moves nothing"
    page.close()
