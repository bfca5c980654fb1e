"""The privacy sections: epsilon over rounds, every epsilon with its five fields, and the promise beside the measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ffm_secure.charts import Bar, Level, Series, bars, line_chart
from ffm_secure.report_markup import (
    INFINITE,
    OBSERVERS,
    Child,
    Column,
    Html,
    bound,
    figure,
    five_fields,
    folded,
    number,
    small,
    table,
    tag,
)
from ffm_secure.types import PrivacyStatement, RunSummary

_SHOWN_EVENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerBound:
    """Hold what an audit measured beside the statement it may contradict."""

    value: float
    upper: PrivacyStatement
    contradicts: bool


def worst(statements: Sequence[PrivacyStatement]) -> tuple[int, PrivacyStatement]:
    """Return the largest finite epsilon with its place, or the first statement where none is finite."""
    finite = [(statement.epsilon, -place) for place, statement in enumerate(statements) if statement.finite]
    place = -max(finite)[1] if finite else 0
    return place, statements[place]


def budget_words(budget: float) -> str:
    """Write a budget."""
    return bound(budget) if math.isfinite(budget) else "no budget"


def lower_bound(summary: RunSummary) -> LowerBound | None:
    """Find the accounted bound that the audited one must stay under: the largest, which holds for every observer."""
    audit, finite = summary.audit, [statement for statement in summary.statements if statement.finite]
    if audit is None or audit.epsilon_lower is None or not finite:
        return None
    upper = max(finite, key=lambda statement: statement.epsilon)
    # An observer without a guarantee may have been the one who measured it: then nothing is contradicted.
    everyone = len(finite) == len(summary.statements)
    return LowerBound(value=audit.epsilon_lower, upper=upper, contradicts=everyone and audit.epsilon_lower > upper.epsilon)


def spent_body(summary: RunSummary) -> Html:
    """Draw epsilon over rounds against the budget, one panel per statement."""
    if not summary.statements:
        return tag("p", "No privacy statement was made.", class_="empty")
    panels = [_panel(summary, place, statement) for place, statement in enumerate(summary.statements)]
    numbers = table(
        [
            Column(heading="Round", cell=lambda r: str(r.round), field="round"),
            Column(heading="Epsilon so far", cell=lambda r: bound(r.epsilon_spent), field="epsilon_spent"),
            Column(heading="Phase", cell=lambda r: r.phase, field="phase", text=True),
        ],
        summary.rounds,
        caption=f"Largest epsilon over data owners after each round. {five_fields(worst(summary.statements)[1])}",
        of="rounds",
    )
    return tag(
        "div",
        tag("div", *panels, class_="figures"),
        folded("The numbers behind these charts", numbers) if summary.rounds else None,
    )


def _panel(summary: RunSummary, place: int, statement: PrivacyStatement) -> Html:
    heading = tag("h3", f"Against {OBSERVERS[statement.observer]}")
    caption = tag("figcaption", five_fields(statement))
    if not statement.finite:
        why = statement.note or "No mechanism bounds what this observer learns."
        return tag("figure", heading, tag("p", INFINITE, class_="big bad"), tag("p", why), caption)
    traced = [record for record in summary.rounds if math.isfinite(record.epsilon_spent)]
    if not traced or not math.isclose(traced[-1].epsilon_spent, statement.epsilon, rel_tol=1e-6):
        shown = number(statement.epsilon, bound(statement.epsilon), f"statements.{place}.epsilon")
        note = "Only the largest epsilon is recorded round by round; this is the value at the end."
        return tag("figure", heading, tag("p", shown, class_="big"), _budget_bars(summary, statement), tag("p", note, class_="under"), caption)
    levels = [Level(label="budget", value=summary.budget_epsilon, role="second")] if math.isfinite(summary.budget_epsilon) else []
    rounds = [record.round for record in traced]
    chart = line_chart(
        [Series(label="spent", x=rounds, y=[record.epsilon_spent for record in traced], step=True)],
        description=f"Epsilon against {OBSERVERS[statement.observer]} over {len(rounds)} rounds: {bound(traced[0].epsilon_spent)} "
        f"after round {rounds[0]}, {bound(statement.epsilon)} after round {rounds[-1]}, budget {budget_words(summary.budget_epsilon)}.",
        levels=levels,
        shown=bound,
        from_zero=True,
    )
    return tag("figure", heading, chart, caption)


def _budget_bars(summary: RunSummary, statement: PrivacyStatement) -> Html:
    rows = [Bar(label="spent", value=statement.epsilon, shown=bound(statement.epsilon))]
    if math.isfinite(summary.budget_epsilon):
        rows.append(Bar(label="budget", value=summary.budget_epsilon, shown=bound(summary.budget_epsilon), role="second"))
    return bars(rows)


def statements_body(statements: Sequence[PrivacyStatement], of: str = "statements") -> Html:
    """List every epsilon with its five fields; infinity is a word with its reason."""
    if not statements:
        return tag("p", "No privacy statement was made.", class_="empty")
    columns = [
        ("Observer", lambda s: OBSERVERS[s.observer]),
        ("Epsilon", _epsilon),
        ("Unit", lambda s: s.unit),
        ("Adjacency", lambda s: s.adjacency),
        ("Mechanism, in order", _events),
        ("Delta and accountant", _accountant),
    ]
    head = tag("tr", *[tag("th", heading, scope="col") for heading, _ in columns])
    rows = []
    for place, statement in enumerate(statements):
        cells = [tag("th", columns[0][1](statement), scope="row", data_label="Observer")]
        shown = number(statement.epsilon, bound(statement.epsilon), f"{of}.{place}.epsilon")
        cells.append(tag("td", tag("span", shown, class_="strong" if statement.finite else "strong bad"), _why(statement), data_label="Epsilon"))
        cells += [tag("td", cell(statement), data_label=heading) for heading, cell in columns[2:]]
        rows.append(tag("tr", *cells))
    caption = tag("caption", "Upper bounds on privacy loss, one per observer; smaller is better.")
    return tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="stack")


def _epsilon(statement: PrivacyStatement) -> Child:
    return bound(statement.epsilon)


def _why(statement: PrivacyStatement) -> Html | None:
    why = statement.note or ("" if statement.finite else "No mechanism bounds what this observer learns.")
    return tag("span", why, class_="why") if why else None


def _events(statement: PrivacyStatement) -> Child:
    if not statement.mechanism:
        return "none"
    items = [tag("li", event) for event in statement.mechanism]
    if len(items) <= _SHOWN_EVENTS:
        return tag("ol", *items, class_="events")
    rest = tag("ol", *items[_SHOWN_EVENTS:], start=_SHOWN_EVENTS + 1, class_="events")
    more = folded(f"and {len(items) - _SHOWN_EVENTS} more", rest)
    return tag("div", tag("ol", *items[:_SHOWN_EVENTS], class_="events"), more)


def _accountant(statement: PrivacyStatement) -> Child:
    return f"delta {small(statement.delta)}, {statement.accountant}, numeric slack {small(statement.slack)} (inside the epsilon)"


def bounds_body(summary: RunSummary) -> Html:
    """Put the accounted upper bound beside the audited lower bound, for every observer."""
    audit = summary.audit
    lower = audit.epsilon_lower if audit is not None else None
    if audit is None or lower is None:
        said = tag("p", "No lower bound was measured: no canary audit ran. The promises below are untested.", class_="lede")
    else:
        said = tag(
            "p",
            "By planting canaries and looking for them, the audit proved that epsilon is at least ",
            tag("strong", number(lower, bound(lower, upper=False), "audit.epsilon_lower")),
            f" ({audit.epsilon_lower_method}). " if audit.epsilon_lower_method else ". ",
            "Accounting promises that it is at most the following.",
            class_="lede",
        )
    panels = [_bounds(summary, statement, lower) for statement in summary.statements]
    return tag("div", said, tag("div", *panels, class_="figures"))


def _bounds(summary: RunSummary, statement: PrivacyStatement, lower: float | None) -> Html:
    rows = []
    if lower is not None:
        rows.append(Bar(label="measured, at least", value=lower, shown=bound(lower, upper=False), role="second"))
    rows.append(Bar(label="promised, at most", value=statement.epsilon, shown=bound(statement.epsilon), role="first" if statement.finite else "bad"))
    if math.isfinite(summary.budget_epsilon):
        rows.append(Bar(label="budget", value=summary.budget_epsilon, shown=bound(summary.budget_epsilon), role="quiet"))
    heading = tag("h3", f"Against {OBSERVERS[statement.observer]}")
    return tag("figure", heading, bars(rows), tag("figcaption", five_fields(statement)))


def spread_words(values: Sequence[float]) -> str:
    """Say the range of some epsilons in words."""
    finite = [value for value in values if math.isfinite(value)]
    return f"{figure(min(finite))} to {figure(max(finite))}" if finite else INFINITE
