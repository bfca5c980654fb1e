"""The page in a real browser: nothing overlaps, is cut off, sticks out, is fetched or hard to read,
in both widths and schemes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ffm_secure.report.document import render_html

from . import samples
from .browser import Browser, find_browser

pytestmark = pytest.mark.browser
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip(
            "no Chromium was found: install it (Debian: apt-get install chromium) to check the page's layout"
        )
    with Browser(program) as running:
        yield running


def stored(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name in samples.ALL if name != "thousand"])
def test_the_layout_has_no_fault(name: str, browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, render_html(samples.ALL[name]()))
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(path, width=width, dark=dark)
            assert browser.faults(unfold=False) == [], (width, dark, "folded")
            assert browser.faults() == [], (width, dark, "unfolded")


def test_a_thousand_rounds_and_clients_have_no_fault(browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, render_html(samples.thousand()))
    for width in WIDTHS:
        browser.open(path, width=width)
        assert browser.faults(unfold=False) == []


@pytest.mark.parametrize(
    "rule, expected",
    [
        (".card{width:900px}", "sticks out"),
        ("h1{white-space:nowrap;overflow:hidden}", "wider than its box"),
        (".facts dd{height:8px;overflow:hidden}", "cut off"),
        ("figcaption{margin-block-start:-40px}", "texts overlap"),
        (".chart text{font-size:34px}", "text leaves its frame"),
        (".chart .label:last-child{transform:translateY(-14px)}", "texts overlap"),
        (".under{color:#bbb}", "contrast"),
        (".chart text{font-size:7px}", "too small"),
        (".stack,.facts{inline-size:130px}", "short word broken"),
    ],
)
def test_a_planted_fault_is_caught(rule: str, expected: str, browser: Browser, tmp_path: Path) -> None:
    summary = samples.private(
        name="a name that is rather long, as the names of studies in hospitals often are"
    )
    path = stored(tmp_path, render_html(summary).replace("</style>", rule + "</style>"))
    browser.open(path, width=390)
    assert any(expected in fault for fault in browser.faults()), browser.faults()[:5]


def test_light_and_dark_differ_and_pictures_have_the_right_width(browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, render_html(samples.aborted_with_audit()))
    pictures = {}
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(path, width=width, dark=dark)
            picture = tmp_path / f"{width}-{dark}.png"
            browser.screenshot(picture)
            content = picture.read_bytes()
            assert int.from_bytes(content[16:20]) == width
            pictures[width, dark] = content
    assert len(set(pictures.values())) == 4


def test_only_the_file_itself_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    hostile = '<img src="http://127.0.0.1:9/x"><script>document.title="owned"</script>'
    path = stored(
        tmp_path, render_html(samples.every_text(samples.aborted_with_audit(), lambda text: text + hostile))
    )
    browser.open(path, width=1280)
    assert browser.evaluate("document.title").startswith("unreliable-network")
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert browser.requests() == [path.as_uri()]
    # The policy of the page holds even for markup that got in some other way.
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/y>')")
    assert browser.evaluate("new Promise(done => setTimeout(() => done(1), 300))") == 1
    assert not [
        event
        for event in browser.events
        if event.get("method") == "Network.responseReceived" and "127.0.0.1" in str(event)
    ]


def test_the_page_prints(browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, render_html(samples.private()))
    browser.open(path, width=1280, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
