"""report.html: what it says, that it says the same as report.json,
and that nothing in a run can break out of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from ffm_secure.records import RunSummary
from ffm_secure.report.details import render_details_html, render_internal_html
from ffm_secure.report import outcome
from ffm_secure.report.document import render_html, render_json
from ffm_secure.report.release import released
from ffm_secure.quantities import INFINITE, bound, figure, size, small
from ffm_secure.report.markup import OBSERVERS

from . import samples

VOID = {"meta", "br", "img"}
BESIDE = {"report.html", "details.html"}  # pages in the same folder that a reader may click on
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
HOSTILE = (
    "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> &amp; {{7*7}} "
    "</style></title>--><b>\x00\x1b[31m\ud800\u202etxt"
)


class Page(HTMLParser):
    """Read a page into tags, texts, exact numbers and tables, and insist that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.numbers: list[tuple[str, str, str]] = []  # place, exact, shown
        self.tables: list[tuple[str, list[str], list[list[str]]]] = []  # of, fields, rows
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append((values["data-at"] or "", values["value"] or "", ""))
        if tag == "table":
            self.tables.append((values.get("data-of") or "", [], []))
        if tag == "tr" and "tbody" in self.open:
            self.tables[-1][2].append([])
        if tag == "th" and "thead" in self.open:
            self.tables[-1][1].append(values.get("data-field") or "")
        if tag in ("td", "th") and "tbody" in self.open:
            self.tables[-1][2][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)
        if self.open and self.open[-1] == "data":
            place, exact, shown = self.numbers[-1]
            self.numbers[-1] = (place, exact, shown + data)
        if "tbody" in self.open and self.tables[-1][2] and self.tables[-1][2][-1]:
            self.tables[-1][2][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(summary: RunSummary) -> Page:
    """Return the page that an officer reads."""
    return Page(render_html(released(summary)))


def details(summary: RunSummary) -> Page:
    return Page(render_details_html(released(summary)))


def internal(summary: RunSummary) -> Page:
    return Page(render_internal_html(summary))


def documents(summary: RunSummary) -> list[tuple[str, RunSummary]]:
    """Return every page with the summary that its figures are of."""
    public = released(summary)
    pages = [(render_html(public), public), (render_details_html(public), public)]
    return [*pages, (render_internal_html(summary), summary)]


def everything(summary: RunSummary) -> Page:
    """Return all pages, one after another."""
    return Page("".join(text for text, _ in documents(summary)))


def at(tree: Any, place: str) -> Any:
    for part in place.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def shown_value(text: str) -> float:
    """Read a number back as a person would: units, thousands, words."""
    words = text.replace(",", "").strip()
    if words in (INFINITE, "infinite", "no budget"):
        return math.inf
    if words == "not a number":
        return math.nan
    total = 0.0
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "s": 1, "min": 60, "h": 3600, "": 1}
    for value, unit in re.findall(r"(-?[\d.]+(?:e-?\d+)?)\s*([A-Za-z]*)", words):
        total += float(value) * scale[unit]
    return total


def agree(shown: str, exact: Any) -> bool:
    """Tell whether a shown number is the exact one, rounded to at least two digits."""
    value = {"infinity": math.inf, "-infinity": -math.inf, "nan": math.nan}.get(exact, exact)
    read = shown_value(shown)
    if math.isnan(value):
        return math.isnan(read)
    return read == value or math.isclose(read, value, rel_tol=0.051, abs_tol=1e-12)


@pytest.mark.parametrize("name", samples.ALL)
def test_every_number_is_the_one_of_report_json(name: str) -> None:
    for text, summary in documents(samples.ALL[name]()):
        check_numbers(Page(text), json.loads(render_json(summary)))


def check_numbers(seen: Page, tree: Any) -> None:
    for place, exact, shown in seen.numbers:
        found = at(tree, place)
        assert exact == (found if isinstance(found, str) else repr(found)), place
        assert agree(shown, found), (place, shown, found)
    for of, fields, rows in seen.tables:
        if not of:
            continue
        assert len(rows) == len(tree[of])
        for row, record in zip(rows, tree[of], strict=True):
            for field, cell in zip(fields, row, strict=True):
                value = record[field]
                if field in ("cohort", "survivors"):
                    assert int(cell) == len(value)
                elif field == "dropped":
                    assert all(f"client {key}: " in cell for key in value)
                elif isinstance(value, str) and value not in ("infinity", "nan"):
                    assert " ".join(cell.split()) == " ".join(value.split())
                else:
                    assert agree(cell, value), (of, field, cell, value)


def test_the_check_of_numbers_catches_a_wrong_number() -> None:
    assert not agree("7.81", 8.4)
    assert not agree("0.83", "nan")
    assert not agree("none (infinite)", 7.8)
    assert agree("1 min 20 s", 80.1)


@pytest.mark.parametrize("name", samples.ALL)
def test_every_table_and_epsilon_is_there(name: str) -> None:
    summary = samples.ALL[name]()
    seen = details(summary)
    places = {place for place, _, _ in seen.numbers}
    assert {f"statements.{i}.epsilon" for i in range(len(summary.statements))} <= places
    fields = {field for of, names, _ in seen.tables if of == "rounds" for field in names}
    if summary.rounds:
        wanted = {
            "round",
            "loss",
            "metric",
            "epsilon_spent",
            "bytes_up",
            "bytes_down",
            "seconds",
            "client_seconds",
            "evaluation_seconds",
        }
        assert wanted | {"cohort", "survivors", "dropped", "aborted"} <= fields
    charts = [tag for tag, values in seen.tags if tag == "svg" and not values.get("aria-hidden")]
    folds = [tag for tag, _ in seen.tags if tag == "details"]
    assert not charts or folds


def sections(seen: Page) -> list[str | None]:
    return [values.get("id") or values.get("aria-label") for tag, values in seen.tags if tag == "section"]


def test_sections_come_in_order_after_the_warnings() -> None:
    summary = samples.aborted_with_audit()
    assert sections(page(summary)) == [
        "Warnings",
        "summary",
        "promise",
        "attacks",
        "limits",
        "refused",
        "data",
        "people",
    ]
    beside = "plan utility classes spent statements bounds cost participation attacks"
    assert sections(details(summary)) == ["Warnings", *beside.split(), "configuration", "software", "ledger"]
    assert sections(internal(summary)) == ["Warnings", "audit", "clients"]


@pytest.mark.parametrize("name", ["private", "aborted", "non_private", "contradicted"])
def test_five_fields_stand_beside_every_epsilon(name: str) -> None:
    summary = samples.ALL[name]()
    text = render_details_html(released(summary)) + render_html(released(summary))
    for heading in ("spent", "statements", "bounds", "promise"):
        section = re.search(rf'<section id="{heading}".*?</section>', text, re.S)
        assert section is not None
        seen = Page(section.group()).text
        for statement in summary.statements:
            assert bound(statement.epsilon) in seen
            for field in (
                statement.unit,
                statement.adjacency,
                OBSERVERS[statement.observer],
                statement.accountant,
                small(statement.delta),
                small(statement.slack),
            ):
                assert field in seen, (heading, field)
            for event in statement.mechanism:
                assert event in seen


def test_infinity_is_a_word_with_its_reason_never_zero_or_blank() -> None:
    seen = everything(samples.non_private()).text
    assert seen.count(INFINITE) > 8
    assert "the owner waived protection" in seen
    assert "No mechanism bounds what this observer learns." in seen
    assert "NOT PRIVATE: privacy.unit is none, because the data are public" in seen.replace(": ", ": ")


def test_a_run_without_any_guarantee_is_stamped_even_if_it_forgot() -> None:
    summary = dataclasses.replace(samples.non_private(), stamps=())
    assert "NOT PRIVATE:" in page(summary).text


def test_a_stamped_run_never_claims_that_its_budget_was_kept() -> None:
    stamped = page(samples.aborted_with_audit()).text
    assert "budget was kept" not in stamped
    assert "promises nothing" in stamped
    assert "budget was kept" in page(samples.private()).text


def test_a_lower_bound_above_the_upper_bound_raises_an_alarm() -> None:
    text = page(samples.contradicted()).text
    assert "CONTRADICTION:" in text
    assert "OVER BUDGET:" in text
    assert "CONTRADICTION" not in page(samples.private()).text


@pytest.mark.parametrize(
    "name, words",
    [
        ("private", "Accuracy rose from 0.1308 to 0.8312 in 20 rounds (always guessing the most common class "
                    "scores 0.2251); the privacy budget was kept against every observer; audit: no attack "
                    "recovered more than guessing would."),
        ("fresh", "No round has finished, so nothing was learned yet; no privacy is guaranteed "
                  "against anyone; no attack was run"),
        ("diverged", "After 20 rounds the accuracy is not a number: training diverged"),
        ("perplexity", "Perplexity fell from 402.9 to 45.27 in 20 rounds;"),
        ("aborted", "in 11 of 14 rounds"),
        ("aborted", "other clients and the server, but nothing is guaranteed against a server with "
            "colluding"),
        ("single", "in 1 round "),
    ],
)  # fmt: skip
def test_the_lead_says_what_was_learned_spent_and_exposed(name: str, words: str) -> None:
    assert words in page(samples.ALL[name]()).text


def test_no_gain_over_a_baseline_is_said_first() -> None:
    assert (
        "No gain: the final accuracy is no better than before training."
        in page(samples.private(metric_final=0.12)).text
    )
    assert "no better than always guessing" in page(samples.private(metric_final=0.2)).text
    assert "which is worse than not training" in page(samples.private(metric_final=0.12)).text


def test_client_figures_are_marked_with_their_source() -> None:
    for source in ("simulation's own view, never released", "charged release"):
        assert internal(samples.private(clients_source=source)).text.count(source) >= 2


@pytest.mark.parametrize("total, distribution", [(8, False), (24, False), (25, True), (200, True)])
def test_many_clients_become_a_distribution_with_a_folded_table(total: int, distribution: bool) -> None:
    summary = samples.private(clients=samples.clients(total))
    seen = internal(summary)
    assert any("bin" in (values.get("class") or "") for _, values in seen.tags) is distribution
    assert sum(len(rows) for of, _, rows in seen.tables if of == "clients") == total


def test_recovered_words_are_marked_on_both_sides() -> None:
    text = render_internal_html(samples.non_private())
    assert "<mark>K-4471,</mark>" in text
    assert "10 of 15 words recovered" in text
    assert "<mark>Carrow</mark>" not in text
    assert "<em>nothing</em>" in text


def test_hostile_text_in_every_field_stays_text() -> None:
    marked = 0

    def hostile(text: str) -> str:
        nonlocal marked
        marked += 1
        return f"{text[:8]}{HOSTILE}{marked}"

    summary = samples.every_text(samples.aborted_with_audit(), hostile)
    text = "".join(text for text, _ in documents(summary))
    seen = Page(text)
    clean = everything(samples.aborted_with_audit())
    known = {tag for tag, _ in clean.tags} | {tag for tag, _ in everything(samples.private()).tags}
    assert {tag for tag, _ in seen.tags} <= known | {"details", "summary"}
    assert not [name for _, values in seen.tags for name in values if name.startswith("on")]
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    text.encode("utf-8")
    assert not re.search("[\x00-\x08\x1b\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 100
    assert json.loads(render_json(summary))["name"] == summary.name


@pytest.mark.parametrize("name", samples.ALL)
def test_nothing_is_fetched_and_nothing_runs(name: str) -> None:
    for place, (text, _) in enumerate(documents(samples.ALL[name]())):
        check_inert(text, pictured=name == "pictured" and place == 2)


def check_inert(text: str, *, pictured: bool) -> None:
    seen = Page(text)
    for tag, values in seen.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "image", "use"}
        assert (tag == "img") == ("src" in values)
        assert PICTURE.fullmatch(values.get("src") or "data:image/png;base64,A")
        assert all(not name.startswith("on") for name in values)
        assert (values.get("href") or "#").startswith("#") or (values["href"] or "").split("#")[0] in BESIDE
    style = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    policy = [
        values["content"]
        for tag, values in seen.tags
        if values.get("http-equiv") == "Content-Security-Policy"
    ]
    pictures = "img-src data:; " if pictured else ""
    assert policy == [
        f"default-src 'none'; {pictures}style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_pictures_stand_beside_the_truth_and_no_other_address_is_drawn() -> None:
    summary = samples.pictured()
    seen = internal(summary)
    assert [values["alt"] for tag, values in seen.tags if tag == "img"] == [
        "true picture",
        "recovered picture",
    ] * 2
    assert "PSNR 200.0 dB, SSIM 1.0000" in seen.text
    hostile = internal(samples.every_text(summary, lambda text: text + '" onerror="alert(1)'))
    assert not [tag for tag, _ in hostile.tags if tag == "img"]
    assert "not a PNG" in hostile.text


def test_curves_mark_where_the_run_lies_and_say_what_is_missing() -> None:
    seen = internal(samples.pictured())
    marks = [values for tag, values in seen.tags if tag == "path" and values.get("class") == "here"]
    assert len(marks) == 3  # 240 tokens per rank lie beyond their curve
    assert "This run: 240 , beyond the curve. Stopped after 8 CPU seconds." in seen.text
    assert (
        "span_exact , tokens in the update over the width of the model: one run takes 31 CPU seconds"
        in seen.text
    )


def test_everything_granted_stands_beside_what_was_used_and_what_is_left_without_it() -> None:
    text = internal(samples.pictured()).text
    assert "Granted at worst batch_size, task, labels, image_shape, one step" in text
    assert "Made use of none of it" in text
    assert "As observed 1 client in one whole round, nothing granted" in text
    assert "as observed 11.30" in text


def test_every_page_has_landmarks_names_and_targets() -> None:
    for text, _ in documents(samples.aborted_with_audit()):
        check_landmarks(Page(text))


def check_landmarks(seen: Page) -> None:
    names = [tag for tag, _ in seen.tags]
    assert all(names.count(landmark) == 1 for landmark in ("header", "nav", "main", "footer", "h1"))
    ids = [values["id"] for _, values in seen.tags if "id" in values]
    assert len(ids) == len(set(ids))
    links = {values["href"] or "" for tag, values in seen.tags if tag == "a"}
    inside = {link for link in links if link.split("#")[0] not in BESIDE}
    assert {link[1:] for link in inside} <= set(ids)
    assert all(values["aria-labelledby"] in ids for tag, values in seen.tags if "aria-labelledby" in values)
    assert all(
        values.get("aria-label") or values.get("aria-hidden") for tag, values in seen.tags if tag == "svg"
    )
    assert next(values for tag, values in seen.tags if tag == "html")["lang"] == "en"


def test_an_upper_bound_is_never_shown_smaller_and_a_lower_bound_never_larger() -> None:
    for value in (7.8012, 7.801, 0.12341, 12.3456, 3.0000001, 1e-9, 999.5, 123456.7):
        assert shown_value(bound(value)) >= value
        assert shown_value(bound(value, upper=False)) <= value
        assert agree(bound(value), value)
    assert 'data-at="audit.findings.3.score">0.4217</data>' in render_internal_html(samples.private())
    assert bound(8.0) == "8"
    assert bound(math.inf) == INFINITE


def test_numbers_are_written_plainly() -> None:
    assert [figure(v) for v in (0.0, 0.5, -12.34567, 1e-7, 1e12)] == ["0", "0.5000", "-12.35", "1e-7", "1e12"]
    assert [size(v) for v in (999, 999_999, 1_000_000, 2.5e12)] == ["999 B", "1000 kB", "1 MB", "2.5 TB"]


@pytest.mark.parametrize(("share", "drawn"), [(1.0 + 2e-5, True), (1.0 - 2e-5, True), (0.5, False)])
def test_epsilon_is_drawn_over_rounds_where_accountants_agree(share: float, drawn: bool) -> None:
    """Found in a real run: the round's figure and the statement differ by what each accountant rounds up."""
    whole = samples.private()
    traced = [
        dataclasses.replace(record, epsilon_spent=record.epsilon_spent * share) for record in whole.rounds
    ]
    text = render_details_html(released(dataclasses.replace(whole, rounds=tuple(traced))))
    assert ("this is the value at the end" not in text) is drawn


def test_classes_are_told_apart_in_the_details_and_in_a_line() -> None:
    summary = samples.private()
    page = render_details_html(summary)
    for words in ("Macro F1", "0.8312", "Who is taken for whom", "Balanced accuracy", "0.0519"):
        assert words in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("Public rows by class") :])
    assert cells[:4] == ["45", "0.8889", "0.8889", "0.8889"]  # 40 of 45 answered, 40 of 45 that are
    assert summary.classes is not None
    assert outcome.class_line(summary.classes) == (
        "classes  macro F1 0.8312, balanced accuracy 0.8297, calibration error 0.0519 on 100 public rows"
    )
    assert "Macro F1" not in render_details_html(samples.perplexity())
