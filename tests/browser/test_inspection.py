"""The inspection finds what it is there to find: every fault below is made on purpose."""

import pytest
from building import build_one_page
from inspection import broken_links, faults_seen, pages

BROKEN = r"""
# A page with every fault

$\undefinedmacro{x}$ and, escaped by mistake, \$\$ x \$\$ or {eq}\`x\`.

<img src="missing.png"> <img src="http://127.0.0.1:9/remote.png">
<script>console.warn("a warning"); throw new Error("a script error")</script>
<div style="width: 3000px">wide</div>
<a href="missing.html">nowhere</a> <a href="#nowhere">no such place</a>
"""


@pytest.fixture(scope="module")
def broken_book(tmp_path_factory):
    return build_one_page(tmp_path_factory.mktemp("broken"), BROKEN)


@pytest.fixture(scope="module")
def faults(broken_book, chromium):
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    found = faults_seen(context, broken_book / "book" / "page.html")
    context.close()
    return " | ".join(found)


@pytest.mark.parametrize(
    "fault",
    [
        r"wrong TeX: ",
        "raw markup: and, escaped by mistake",
        "picture did not load: file:",
        "request failed: file:",
        "request to the network: http://127.0.0.1:9/remote.png",
        "a warning",
        "script error: a script error",
        " wide in a window of 1280",
    ],
)
def test_fault_in_a_page_is_seen(faults, fault):
    assert fault in faults


def test_broken_links_are_listed(broken_book):
    assert broken_links(pages(broken_book))[-3:] == [
        "page.html: no file missing.png",
        "page.html: no file missing.html",
        "page.html: no anchor #nowhere",
    ]
