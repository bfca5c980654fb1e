"""The audit section: each attack's verdict, its score beside guessing and beside no defence, and what it recovered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ffm_secure.charts import Bar, bars
from ffm_secure.report_markup import (
    OBSERVERS,
    Html,
    amount,
    bound,
    duration,
    escape,
    facts,
    figure,
    folded,
    join,
    number,
    tag,
)
from ffm_secure.types import AuditFinding, AuditSummary, RecoveredPair, Verdict

_ORDER: tuple[Verdict, ...] = ("leaked", "inconclusive", "not leaked", "not applicable")
_KIND: dict[Verdict, tuple[str, str]] = {
    "leaked": ("bad", "✕"),
    "inconclusive": ("unsure", "?"),
    "not leaked": ("good", "✓"),
    "not applicable": ("quiet", "–"),
}
_SHOWN_PAIRS = 3
_POINTS = {
    "raw": "raw update",
    "clipped": "clipped update",
    "noised": "noised update",
    "aggregated": "sum of updates",
}


def audit_body(audit: AuditSummary | None) -> Html:
    """List the findings, worst first."""
    if audit is None:
        return tag(
            "p",
            "No attack was run. ",
            tag("code", "ffm-secure audit"),
            " attacks what each observer saw and adds the result here.",
            class_="empty",
        )
    placed = sorted(enumerate(audit.findings), key=lambda item: (_ORDER.index(item[1].verdict), item[0]))
    ran = [_finding(place, finding) for place, finding in placed if finding.verdict != "not applicable"]
    skipped = [_skipped(finding) for _, finding in placed if finding.verdict == "not applicable"]
    spent = tag(
        "span",
        "Budget ",
        audit.budget,
        ", used ",
        number(audit.cpu_seconds, duration(audit.cpu_seconds), "audit.cpu_seconds"),
        " of processor time",
    )
    return tag(
        "div",
        tag("p", audit.sentence, class_="lede") if audit.sentence else None,
        tally(audit),
        tag("p", spent, class_="under"),
        tag("div", *ran, class_="cards") if ran else None,
        folded(f"{len(skipped)} not applicable, and why", tag("ul", *skipped, class_="plain")) if skipped else None,
    )


def tally(audit: AuditSummary) -> Html | None:
    """Count the verdicts, worst first."""
    found = [(verdict, sum(finding.verdict == verdict for finding in audit.findings)) for verdict in _ORDER]
    parts = [tag("span", _badge(verdict), f" {total}", class_="tally") for verdict, total in found if total]
    return tag("p", *parts, class_="tallies") if parts else None


def _badge(verdict: Verdict) -> Html:
    kind, sign = _KIND[verdict]
    return tag("span", tag("span", f"{sign} ", aria_hidden="true"), verdict, class_=f"badge {kind}")


def _skipped(finding: AuditFinding) -> Html:
    where = f"{OBSERVERS[finding.observer]}, {_POINTS[finding.point]}"
    return tag("li", tag("strong", finding.attack), f" ({where}): {finding.reason or 'no reason recorded'}")


def _finding(place: int, finding: AuditFinding) -> Html:
    at = f"audit.findings.{place}"
    rows: list[tuple[str, Html | str]] = [("Time", number(finding.seconds, duration(finding.seconds), f"{at}.seconds"))]
    if finding.knowledge:
        rows.insert(0, ("Knows", ", ".join(finding.knowledge)))
    told = tag(
        "div",
        tag("p", _badge(finding.verdict), class_="verdict"),
        tag("h3", finding.attack),
        tag("p", f"by {OBSERVERS[finding.observer]}, on the {_POINTS[finding.point]}", class_="under"),
        tag("p", finding.reason) if finding.reason else None,
        facts(rows),
    )
    pairs = _pairs(finding.pairs) if finding.pairs else None
    return tag("article", told, _scores(finding, at), pairs, class_=f"card finding {_KIND[finding.verdict][0]}")


def _scores(finding: AuditFinding, at: str) -> Html:
    if finding.score is None:
        return tag("p", f"{finding.measure}: no score", class_="under")
    is_epsilon = "epsilon" in finding.measure.casefold()

    def written(value: float, digits: int = 3) -> str:
        return bound(value, upper=False) if is_epsilon else figure(value, digits)

    values = [v for v in (finding.score, finding.low, finding.high, finding.baseline, finding.control) if v is not None]
    unit = all(math.isfinite(v) and 0 <= v <= 1 for v in values) and "dB" not in finding.measure and not is_epsilon
    interval: list[Html | str] = []
    if finding.low is not None and finding.high is not None:
        low, high = (
            number(finding.low, written(finding.low, 2), f"{at}.low"),
            number(finding.high, written(finding.high, 2), f"{at}.high"),
        )
        interval = [tag("span", " (", low, " to ", high, ")", class_="range")]
    shown = join([number(finding.score, written(finding.score), f"{at}.score"), *interval])
    rows = [
        Bar(
            label="this attack",
            value=finding.score,
            shown=shown,
            role=_KIND[finding.verdict][0],
            low=finding.low,
            high=finding.high,
        )
    ]
    for label, value, field in (
        ("guessing", finding.baseline, "baseline"),
        ("defence off", finding.control, "control"),
    ):
        if value is not None:
            rows.append(
                Bar(label=label, value=value, shown=number(value, written(value), f"{at}.{field}"), role="quiet")
            )
    heading = tag(
        "p",
        f"{finding.measure[:1].upper()}{finding.measure[1:]}",
        ", with its 95 % interval" if interval else None,
        class_="measure",
    )
    about = tag("p", tag("a", "What this epsilon is about", href="#bounds"), class_="under") if is_epsilon else None
    return tag("div", heading, bars(rows, top=1.0 if unit else None), about)


def _pairs(pairs: Sequence[RecoveredPair]) -> Html:
    shown = [_pair(pair) for pair in pairs]
    more = folded(f"and {len(pairs) - _SHOWN_PAIRS} more", *shown[_SHOWN_PAIRS:]) if len(pairs) > _SHOWN_PAIRS else None
    return folded("True beside recovered", *shown[:_SHOWN_PAIRS], more, open_=True)


def _pair(pair: RecoveredPair) -> Html:
    truth, recovered = pair.truth.split(), pair.recovered.split()
    common = Counter(map(_plain, truth)) & Counter(map(_plain, recovered))
    words = f"{sum(common.values())} of {amount(len(truth), 'word')} recovered" if truth else "nothing to recover"
    return tag(
        "div",
        facts([("True", _marked(truth, common)), ("Recovered", _marked(recovered, common))], "facts pair"),
        tag("p", words, class_="under"),
        class_="pairing",
    )


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def _marked(words: Sequence[str], common: Counter[str]) -> Html:
    left, parts = Counter(common), []
    for word in words:
        key = _plain(word)
        hit = left[key] > 0
        left[key] -= hit
        parts.append(tag("mark", word) if hit else escape(word))
    return Html(" ".join(parts)) if parts else tag("em", "nothing")
