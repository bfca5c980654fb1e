"""The audit: each attack's verdict, its score beside guessing and beside no defence, what it recovered."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from ffm_secure.records import AuditFinding, AuditSummary, LeakCurve, RecoveredPair, RecoveredPicture, Verdict
from ffm_secure.report.sections.attacks import KIND, badge, no_attack, tally
from ffm_secure.report.charts import Axis, Bar, Level, Series, bars, line_chart
from ffm_secure.quantities import metric, amount, bound, duration
from ffm_secure.report.markup import OBSERVERS, Html, escape, facts, folded, join, number, tag

_ORDER: tuple[Verdict, ...] = ("leaked", "not leaked", "inconclusive", "not applicable")
_SHOWN_PAIRS = 3
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
_AXES = {
    "records": "records in the update",
    "tokens per width": "tokens in the update over the width of the model",
    "tokens per rank": "tokens in the update over the rank of LoRA",
    "rounds": "rounds",
    "noise multiplier": "noise multiplier",
}
_POINTS = {
    "raw": "raw update",
    "clipped": "clipped update",
    "noised": "noised update",
    "aggregated": "sum of updates",
}


def audit_body(audit: AuditSummary | None) -> Html:
    """List the findings, worst first."""
    if audit is None:
        return no_attack()
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
        curves_body(audit.curves) if audit.curves else None,
        folded(f"{len(skipped)} not applicable, and why", tag("ul", *skipped, class_="plain"))
        if skipped
        else None,
    )


def _skipped(finding: AuditFinding) -> Html:
    where = f"{OBSERVERS[finding.observer]}, {_POINTS[finding.point]}"
    return tag("li", tag("strong", finding.attack), f" ({where}): {finding.reason or 'no reason recorded'}")


def _finding(place: int, finding: AuditFinding) -> Html:
    at = f"audit.findings.{place}"
    rows: list[tuple[str, Html | str]] = [
        ("Time", number(finding.seconds, duration(finding.seconds), f"{at}.seconds"))
    ]
    rows = [*_ledger(finding), *rows]
    outcome = tag(
        "div",
        tag("p", badge(finding.verdict), class_="verdict"),
        tag("h3", finding.attack),
        tag("p", f"by {OBSERVERS[finding.observer]}, on the {_POINTS[finding.point]}", class_="under"),
        tag("p", finding.reason) if finding.reason else None,
        facts(rows),
    )
    beside = [
        _pairs(finding.pairs) if finding.pairs else None,
        _gallery(finding, at) if finding.pictures else None,
    ]
    return tag(
        "article", outcome, _scores(finding, at), *beside, class_=f"card finding {KIND[finding.verdict][0]}"
    )


def _ledger(finding: AuditFinding) -> list[tuple[str, Html | str]]:
    """List what the number assumes: what was granted, what the attack used, what was really sent."""
    if not finding.granted:
        return [("Knows", ", ".join(finding.knowledge))] if finding.knowledge else []
    rows: list[tuple[str, Html | str]] = [
        ("Granted at worst", ", ".join(finding.granted)),
        ("Made use of", ", ".join(finding.knowledge) or "none of it"),
    ]
    return [*rows, ("As observed", finding.observed_reason)] if finding.observed_reason else rows


def _scores(finding: AuditFinding, at: str) -> Html:
    if finding.score is None:
        return tag("p", f"{finding.measure}: no score", class_="under")
    is_epsilon = "epsilon" in finding.measure.casefold()

    def written(value: float) -> str:
        return bound(value, upper=False) if is_epsilon else metric(value)

    known = (finding.score, finding.low, finding.high, finding.baseline, finding.control, finding.observed)
    values = [v for v in known if v is not None]
    unit = (
        all(math.isfinite(v) and 0 <= v <= 1 for v in values)
        and "dB" not in finding.measure
        and not is_epsilon
    )
    interval: list[Html | str] = []
    if finding.low is not None and finding.high is not None:
        low, high = (
            number(finding.low, written(finding.low), f"{at}.low"),
            number(finding.high, written(finding.high), f"{at}.high"),
        )
        interval = [tag("span", " (", low, " to ", high, ")", class_="range")]
    shown = join([number(finding.score, written(finding.score), f"{at}.score"), *interval])
    rows = [
        Bar(
            label="this attack",
            value=finding.score,
            shown=shown,
            role=KIND[finding.verdict][0],
            low=finding.low,
            high=finding.high,
        )
    ]
    for label, value, field in (
        ("as observed", finding.observed, "observed"),
        ("guessing", finding.baseline, "baseline"),
        ("defence off", finding.control, "control"),
    ):
        if value is not None:
            rows.append(
                Bar(
                    label=label,
                    value=value,
                    shown=number(value, written(value), f"{at}.{field}"),
                    role="quiet",
                )
            )
    heading = tag(
        "p",
        f"{finding.measure[:1].upper()}{finding.measure[1:]}",
        ", with its 99 % interval" if interval else None,
        class_="measure",
    )
    about = (
        tag("p", tag("a", "What this epsilon is about", href="details.html#bounds"), class_="under")
        if is_epsilon
        else None
    )
    return tag("div", heading, bars(rows, top=1.0 if unit else None), about)


def _pairs(pairs: Sequence[RecoveredPair]) -> Html:
    shown = [_pair(pair) for pair in pairs]
    more = (
        folded(f"and {len(pairs) - _SHOWN_PAIRS} more", *shown[_SHOWN_PAIRS:])
        if len(pairs) > _SHOWN_PAIRS
        else None
    )
    return folded("True beside recovered", *shown[:_SHOWN_PAIRS], more, open_=True)


def _pair(pair: RecoveredPair) -> Html:
    truth, recovered = pair.truth.split(), pair.recovered.split()
    common = Counter(map(_plain, truth)) & Counter(map(_plain, recovered))
    words = (
        f"{sum(common.values())} of {amount(len(truth), 'word')} recovered" if truth else "nothing to recover"
    )
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


def _gallery(finding: AuditFinding, at: str) -> Html:
    """Show true pictures beside recovered ones; an address that is no PNG is not drawn."""
    shown = [_pictured(place, one, at) for place, one in enumerate(finding.pictures)]
    return folded("True beside recovered", tag("div", *shown, class_="gallery"), open_=True)


def _pictured(place: int, one: RecoveredPicture, at: str) -> Html:
    where = f"{at}.pictures.{place}"
    quality = join(
        [
            "PSNR ",
            number(one.psnr, metric(one.psnr), f"{where}.psnr"),
            " dB, SSIM ",
            number(one.ssim, metric(one.ssim), f"{where}.ssim"),
        ]
    )
    both = [_picture(one.truth, "true picture"), _picture(one.recovered, "recovered picture")]
    return tag("figure", tag("div", *both, class_="beside"), tag("figcaption", "True, recovered. ", quality))


def _picture(address: str, words: str) -> Html:
    if not _PICTURE.fullmatch(address):
        return tag("em", f"{words}: not a PNG, so it is not drawn")
    return tag("img", src=address, alt=words)


def curves_body(curves: Sequence[LeakCurve]) -> Html:
    """Draw how each leak grows and falls; one point alone is no audit."""
    panels = [_curve(place, one) for place, one in enumerate(curves) if one.x]
    missing = [
        tag("li", tag("strong", one.attack), f", {_AXES[one.axis]}: {one.reason}")
        for one in curves
        if not one.x
    ]
    about = (
        "The same attacks on invented data, undefended but for the noise shown, on this run's own "
        "model. The upright line "
        "is where this run lies."
    )
    return tag(
        "div",
        tag("h3", "How the leak grows"),
        tag("p", about, class_="under"),
        tag("div", *panels, class_="figures") if panels else None,
        folded(f"{amount(len(missing), 'curve')} not drawn, and why", tag("ul", *missing, class_="plain"))
        if missing
        else None,
        class_="growth",
    )


def _curve(place: int, one: LeakCurve) -> Html:
    line = Series(label="attack", x=range(len(one.x)), y=one.y)
    levels = () if one.baseline is None else (Level(label="guessing", value=one.baseline),)
    axis = Axis(noun=one.axis, names=[_place(value) for value in one.x], mark=_between(one.x, one.here))
    here = None
    if one.here is not None:
        outside = ", beyond the curve" if axis.mark is None else ""
        here = join(
            [" This run: ", number(one.here, _place(one.here), f"audit.curves.{place}.here"), f"{outside}."]
        )
    words = f"{one.measure[:1].upper()}{one.measure[1:]} against {_AXES[one.axis]}"
    chart = line_chart([line], description=f"{one.attack}: {words}", levels=levels, axis=axis, from_zero=True)
    caption = tag(
        "figcaption", words, ".", here, f" {one.reason[:1].upper()}{one.reason[1:]}." if one.reason else None
    )
    return tag("figure", tag("h4", one.attack), chart, caption)


def _place(value: float) -> str:
    """Write a place on an axis as briefly as it can be."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _between(places: Sequence[float], here: float | None) -> float | None:
    """Return where a value lies among growing places, in places; logarithmic where both are positive."""
    if here is None or not places or not places[0] <= here <= places[-1]:
        return None
    for place, (low, high) in enumerate(pairwise(places)):
        if low <= here <= high:
            share = math.log(here / low) / math.log(high / low) if low > 0 else (here - low) / (high - low)
            return place + share
    return 0.0
