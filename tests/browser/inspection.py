"""What can be wrong with a built page; every function lists the faults that it finds."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

# What one can see only after the page has run.
FAULTS_IN_PAGE = r"""async () => {
  const faults = [], all = (selector) => [...document.querySelectorAll(selector)];
  if (window.MathJax) await MathJax.startup.promise;
  await Promise.all(all("img").map((image) => image.decode().catch(() => {})));
  for (const formula of all("span.math, div.math"))
    if (!formula.querySelector("mjx-container")) faults.push("not typeset: " + formula.textContent);
  for (const error of all('[data-mml-node="merror"], mjx-container [fill="red"]'))
    faults.push("wrong TeX: " + (error.dataset.latex ?? error.closest(".math")?.id));
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


def pages(book: Path) -> dict[Path, BeautifulSoup]:
    """Every page of a built book by its path."""
    paths = sorted(path for path in book.rglob("*.html") if "_static" not in path.parts)
    return {path: BeautifulSoup(path.read_bytes(), "html.parser") for path in paths}


def faults_seen(context, path: Path, picture: str | None = None) -> list[str]:
    """Open one page in its own tab, in either theme; save `picture`-<theme>.png if named."""
    faults = []
    tab = context.new_page()
    tab.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
    tab.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    tab.on("requestfailed", lambda request: faults.append(f"request failed: {request.url}"))
    tab.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:", "blob:"))
            or faults.append(f"request to the network: {request.url}")
        ),
    )
    tab.goto(path.as_uri())
    for theme in ("light", "dark"):
        tab.emulate_media(color_scheme=theme)
        tab.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        faults += tab.evaluate(FAULTS_IN_PAGE)
        if picture:
            tab.screenshot(path=f"{picture}-{theme}.png", full_page=True)
    tab.close()
    return faults


def broken_links(parsed: dict[Path, BeautifulSoup]) -> list[str]:
    """Addresses within the book that lead to no file, or to no place in it."""
    anchors = {
        path: {tag.get(key) for tag in html.find_all(True) for key in ("id", "name")}
        for path, html in parsed.items()
    }
    broken = []
    for path, html in parsed.items():
        for tag in html.find_all(["a", "img", "link", "script"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.exists():
                broken.append(f"{path.name}: no file {address.geturl()}")
            elif address.fragment and unquote(address.fragment) not in anchors.get(target, ()):
                broken.append(f"{path.name}: no anchor {address.geturl()}")
    return broken
