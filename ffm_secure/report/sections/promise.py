"""For whom what is promised, what is not protected, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ffm_secure.foreign import JsonValue
from ffm_secure.quantities import INFINITE, amount, bound, count
from ffm_secure.records import ABSENT, DECLINED, NOT_ASKED, REFUSED, RoundRecord, RunSummary
from ffm_secure.report.markup import (
    OBSERVERS,
    Child,
    Html,
    Promise,
    facts,
    five_fields,
    listed,
    number,
    promises,
    tag,
)
from ffm_secure.report.plain_words import held_out_words, meaning, strength
from ffm_secure.report.sections.lead import is_stamped
from ffm_secure.report.sections.privacy import UNBOUNDED

_MOST_NAMES = 16
_MOST_ABORTS = 3


def promise_body(summary: RunSummary) -> Html:
    """Say for whom what holds against whom, in plain words beside the number."""
    if not summary.statements:
        return tag("p", "No privacy statement was made, so nothing is promised.", class_="empty")
    panels = [_panel(summary, promise) for promise in promises(summary.statements)]
    return tag("div", tag("p", _for_whom(summary), class_="lede"), *panels)


def _for_whom(summary: RunSummary) -> str:
    names = list(summary.owners)
    owners = amount(owner_count(summary), "data owner")
    protected = [_each(s.unit) for s in summary.statements if s.finite]
    units = listed(protected) if protected else "no record"
    if not names:
        return f"For {units}, of {owners}."
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return f"For {units}, of {owners}: {listed([*names[:_MOST_NAMES], *more])}."


def _each(unit: str) -> str:
    return "each data owner as a whole" if unit == "client" else f"each {unit}"


def owner_count(summary: RunSummary) -> int:
    """Return how many data owners a run has."""
    asked = setting(summary, "task", "clients")
    return asked if isinstance(asked, int) else len(summary.owners)


def setting(summary: RunSummary, section: str, key: str) -> JsonValue:
    """Return a setting of the run file, None where it was not recorded."""
    table = summary.config.get(section)
    return table.get(key) if isinstance(table, dict) else None


def _panel(summary: RunSummary, promise: Promise) -> Html:
    statement, place = promise.statement, promise.places[0]
    shown = number(statement.epsilon, bound(statement.epsilon), f"statements.{place}.epsilon")
    if not statement.finite:
        return tag(
            "article",
            tag("h3", promise.heading),
            tag("p", "Nothing is promised: epsilon is ", tag("strong", shown, class_="bad"), "."),
            tag("p", statement.note or UNBOUNDED),
            tag("p", five_fields(statement, promise.against), class_="under"),
            class_="promise",
        )
    words = meaning(statement)
    if is_stamped(summary):
        words = f"Would the run keep its word, which it does not (see the warnings), this would hold. {words}"
    return tag(
        "article",
        tag("h3", promise.heading),
        tag("p", tag("strong", "Epsilon ", shown), f" ({strength(statement)}). ", words),
        tag("p", statement.note) if statement.note else None,
        tag("p", five_fields(statement, promise.against), class_="under"),
        class_="promise",
    )


def limits_body(summary: RunSummary) -> Html:
    """List what is not protected."""
    items = [tag("li", *words) for words in _limits(summary)]
    return tag("ul", *items, class_="points")


def _limits(summary: RunSummary) -> Iterator[list[Child]]:
    open_ = [OBSERVERS[s.observer] for s in summary.statements if not s.finite]
    if open_ or not summary.statements:
        yield [f"Nothing is promised against {listed(open_) if open_ else 'anyone'}."]
    yield from _limits_of_the_unit(summary)
    yield [
        "What is true of many people at once, such as how common a condition is: the model is meant to learn "
        "it."
    ]
    data = summary.data
    if data is not None:
        held_out = held_out_words(data)
        names = f", and the {count(len(data.classes))} class names" if data.classes else ""
        yield [f"The {count(data.public_rows)} public rows{held_out}{names}: no epsilon covers them."]
    if summary.plan.breaks:
        yield [tag("strong", "Who could break it: "), summary.plan.breaks]
    for warning in summary.plan.warnings:
        yield [_as_sentence(warning)]


def _as_sentence(text: str) -> str:
    """Begin with a capital, unless the first word is a name, and end with a stop."""
    first = text.partition(" ")[0]
    begin = text if ":" in first or "." in first else f"{text[:1].upper()}{text[1:]}"
    return begin if text.endswith(".") else f"{begin}."


def _limits_of_the_unit(summary: RunSummary) -> Iterator[list[Child]]:
    units = {s.unit for s in summary.statements if s.finite}
    if "record" in units:
        yield [
            "A person with several records: the promise is for each record, and for k of them epsilon is "
            "up to k times as large."
        ]
    if any(unit.startswith("person") for unit in units):
        yield ["What a person has beyond the stated number of records, and people who stand under two names."]
    if units and "client" not in units:
        yield ["That a data owner took part, and in which rounds."]
    if units:
        yield ["What the same rows were used for elsewhere, unless the same ledger counts it."]


def refused_body(summary: RunSummary) -> Html:
    """Say what was refused, given up or lost."""
    rounds = summary.rounds
    if not rounds:
        return tag("p", "No round has finished yet.", class_="empty")
    asked, arrived = sum(len(r.cohort) for r in rounds), sum(len(r.survivors) for r in rounds)
    stages = Counter(stage for record in rounds for stage in record.dropped.values())
    declined, absent, refused = (stages.pop(stage, 0) for stage in (DECLINED, ABSENT, REFUSED))
    not_asked = stages.pop(NOT_ASKED, 0)
    closed = [reason for record in rounds for reason in record.closed]
    lost = ", ".join(f"{count(number_)} while {stage}" for stage, number_ in sorted(stages.items()))
    aborted = [record for record in rounds if record.aborted]
    rows: list[tuple[str, Child]] = [
        ("Updates that arrived", f"{count(arrived)} of {count(asked)} asked for"),
        (
            "Declined by their owner",
            f"{count(declined)}; nothing was charged for them" if declined else "none",
        ),
        ("Not there when a round began", count(absent) if absent else "none"),
        (
            "Left out by the server",
            f"{count(refused)}; no honest owner sends such an update" if refused else "none",
        ),
        ("Lost on the way", lost or "none"),
        *_group_rows(not_asked, closed),
        ("Rounds given up", _aborts(aborted) if aborted else "none"),
    ]
    if summary.status == "budget exhausted":
        rows.append(("Not started", "the round after the last: no budget was left to pay for it"))
    return facts(rows)


def _group_rows(not_asked: int, closed: Sequence[str]) -> list[tuple[str, Child]]:
    """Return rows about sums over groups, where any stayed closed."""
    group_rows: list[tuple[str, Child]] = []
    if not_asked:
        words = f"{count(not_asked)}; too few of their group answered, and nothing was charged for them"
        group_rows.append(("Not asked to pay", words))
    if closed:
        reasons = ", ".join(f"{count(number_)}: {why}" for why, number_ in sorted(Counter(closed).items()))
        group_rows.append(("Sums of single groups left out", reasons))
    return group_rows


def _aborts(aborted: Sequence[RoundRecord]) -> Html:
    shown = [tag("li", tag("strong", f"Round {r.round}: "), r.aborted) for r in aborted[:_MOST_ABORTS]]
    more = len(aborted) - _MOST_ABORTS
    rest = tag("li", f"and {count(more)} more, see the details") if more > 0 else None
    return tag(
        "div",
        f"{count(len(aborted))}; what they reserved stays spent",
        tag("ul", *shown, rest, class_="points"),
    )


__all__ = ["INFINITE", "limits_body", "owner_count", "promise_body", "refused_body", "setting"]
