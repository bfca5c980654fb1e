"""The page in a real browser: nothing overlaps, is cut off, sticks out, is fetched or hard to read,
in both widths and schemes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ffm_secure.records import RunSummary
from ffm_secure.report.details import render_audit_html, render_details_html, render_internal_html
from ffm_secure.report.page import render_html
from ffm_secure.report.release import released, released_audit

from . import samples
from .browser import Browser, find_browser, pages

MOST_PAGES = 4  # of A4, which is what an officer prints

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


def public(summary: RunSummary) -> str:
    return render_html(released(summary))


def details(summary: RunSummary) -> str:
    return render_details_html(released(summary))


DRAWN = {"report": public, "details": details, "internal": render_internal_html}


def stored(tmp_path: Path, text: str, name: str = "report.html") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("page", DRAWN)
@pytest.mark.parametrize("name", [name for name in samples.ALL if name != "thousand"])
def test_the_layout_has_no_fault(name: str, page: str, browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, DRAWN[page](samples.ALL[name]()))
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(path, width=width, dark=dark)
            assert browser.faults(unfold=False) == [], (width, dark, "folded")
            assert browser.faults() == [], (width, dark, "unfolded")


def test_a_thousand_rounds_and_clients_have_no_fault(browser: Browser, tmp_path: Path) -> None:
    for draw in DRAWN.values():
        path = stored(tmp_path, draw(samples.thousand()))
        for width in WIDTHS:
            browser.open(path, width=width)
            assert browser.faults(unfold=False) == []


def test_the_audit_of_one_update_has_no_fault(browser: Browser, tmp_path: Path) -> None:
    audit = samples.pictured().audit
    assert audit is not None
    notes = ("the update names its tensors with 'module.' in front: read without it",)
    for internal, shown in ((True, audit), (False, released_audit(audit))):
        path = stored(tmp_path, render_audit_html(shown, "seen", notes, internal=internal))
        for width in WIDTHS:
            for dark in (False, True):
                browser.open(path, width=width, dark=dark)
                assert browser.faults() == [], (internal, width, dark)


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
    faults = []
    for draw in DRAWN.values():
        path = stored(tmp_path, draw(summary).replace("</style>", rule + "</style>"))
        browser.open(path, width=390)
        faults += browser.faults()
    assert any(expected in fault for fault in faults), faults[:5]


def test_light_and_dark_differ_and_pictures_have_the_right_width(browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, public(samples.aborted_with_audit()))
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
        tmp_path, public(samples.every_text(samples.aborted_with_audit(), lambda text: text + hostile))
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


@pytest.mark.parametrize("name", [name for name in samples.ALL if name != "long_words"])
def test_the_page_prints_on_few_sheets(name: str, browser: Browser, tmp_path: Path) -> None:
    path = stored(tmp_path, public(samples.ALL[name]()))
    browser.open(path, width=1280, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert 1 <= pages(tmp_path / "report.pdf") <= MOST_PAGES


def test_the_count_of_sheets_counts(browser: Browser, tmp_path: Path) -> None:
    sheets = "<p style='break-after:page'>sheet</p>" * 6
    browser.open(stored(tmp_path, sheets), width=1280, media="print")
    browser.pdf(tmp_path / "six.pdf")
    assert pages(tmp_path / "six.pdf") in (6, 7)
