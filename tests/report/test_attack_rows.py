"""One row for each attack and one count of one audit: page, terminal and sentence cannot disagree."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from ffm_secure.auditing.wording import sentence
from ffm_secure.cli.audit_table import audit_lines
from ffm_secure.records import AuditFinding, AuditSummary, Observer, RunSummary, Verdict
from ffm_secure.report.attack_rows import ORDER, attack_rows, count_outcomes, observers_of
from ffm_secure.report.page import render_html
from ffm_secure.report.release import NOT_TRIED, released
from ffm_secure.report.sections.attacks import attacks_body

from . import samples
from .test_page import Page


def finding(attack: str, observer: Observer, verdict: Verdict, *, tried: bool = True) -> AuditFinding:
    measure = "token F1" if tried else NOT_TRIED
    return AuditFinding(
        observer=observer, attack=attack, point="raw", verdict=verdict, measure=measure, score=0.5
    )


FINDINGS = st.lists(
    st.builds(
        finding,
        st.sampled_from(("span", "idlg", "lamp", "dlg", "llg")),
        st.sampled_from(get_args(Observer)),
        st.sampled_from(get_args(Verdict)),
        tried=st.booleans(),
    ).filter(lambda item: item.measure != NOT_TRIED or item.verdict == "inconclusive"),
    min_size=1,
    max_size=30,
)


def summary(findings: list[AuditFinding]) -> RunSummary:
    audit = AuditSummary(
        budget="quick",
        cpu_seconds=1.0,
        findings=tuple(findings),
        epsilon_lower=None,
        sentence=sentence(findings),
    )
    return samples.private(audit=audit)


@settings(max_examples=40, deadline=None)
@given(findings=FINDINGS)
def test_sentence_card_and_rows_count_the_same_attacks(findings: list[AuditFinding]) -> None:
    counts = count_outcomes(attack_rows(findings))
    leaked, passed = counts.get("leaked", 0), counts.get("not leaked", 0)
    words = sentence(findings)
    if leaked:
        assert f"({leaked} of {leaked + passed} attack" in words
    elif passed:
        assert f"No leak found: {passed} attack" in words
        assert f"; {counts.get('inconclusive', 0)} " in words
        untried = counts.get("not tried", 0)
        assert (f", {untried} w" in words) == bool(untried)
    shown = Page(render_html(released(summary(findings)))).text
    assert f"{leaked} of {leaked + passed}" in shown


@settings(max_examples=40, deadline=None)
@given(findings=FINDINGS)
def test_every_attack_has_one_row_and_answers_come_first(findings: list[AuditFinding]) -> None:
    rows = attack_rows(findings)
    assert sorted(row.attack for row in rows) == sorted({item.attack for item in findings})
    ranks = [ORDER.index(row.outcome) for row in rows]
    assert ranks == sorted(ranks)
    for row in rows:
        for observer in observers_of(rows):
            own = [item for item in findings if (item.attack, item.observer) == (row.attack, observer)]
            assert (observer in row.cells) == bool(own)
            if any(item.verdict == "leaked" for item in own):
                assert row.cells[observer] == "leaked"
        assert row.telling.attack == row.attack


@settings(max_examples=40, deadline=None)
@given(findings=FINDINGS)
def test_the_terminal_counts_what_the_page_counts(findings: list[AuditFinding]) -> None:
    audit = summary(findings).audit
    assert audit is not None
    lines = audit_lines(audit)
    for outcome, total in count_outcomes(attack_rows(findings)).items():
        if outcome not in ("leaked", "not leaked"):
            assert sum(line.strip().startswith(f"{total} {outcome}: ") for line in lines) == 1
    named = [attack for row in attack_rows(findings) for attack in (row.attack,)]
    assert all(sum(bool(re.search(rf"\b{name}\b", line)) for line in lines[1:]) == 1 for name in named)


def test_observers_are_columns_and_an_attack_is_one_row_on_the_page() -> None:
    findings = [
        finding("span", "server", "not leaked"),
        finding("lamp", "public", "inconclusive"),
        finding("span", "public", "leaked"),
        finding("dlg", "server", "inconclusive", tried=False),
    ]
    text = Page(render_html(released(summary(findings)))).text
    table = text[text.index("Looks for") : text.index("Not leaked” stands")]
    assert table.count("span") == table.count("lamp") == 1
    assert table.index("span") < table.index("lamp")
    assert "The public The server" in table
    assert re.search(r"span words of the texts ✕ leaked ✓ not leaked", table)
    assert "dlg" not in table
    assert re.search(r"1 attack was not tried under this budget: dlg", text)


def test_an_audit_without_any_finding_is_drawn() -> None:
    base = summary([finding("span", "server", "leaked")])
    assert base.audit is not None
    empty = dataclasses.replace(base, audit=dataclasses.replace(base.audit, findings=(), sentence=""))
    assert "0 of 0" in Page(render_html(released(empty))).text


def test_an_attack_that_read_nothing_still_says_what_it_looks_for() -> None:
    audit = samples.audit()
    silent = dataclasses.replace(audit.findings[0], attack="span", verdict="inconclusive", measure="")
    page = str(attacks_body(dataclasses.replace(audit, findings=(silent,))))
    assert "what the records say" in page
