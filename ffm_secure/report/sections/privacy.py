"""The privacy sections: epsilon over rounds, its five fields, the promise beside the measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffm_secure.records import PrivacyStatement, RoundRecord, RunSummary
from ffm_secure.report.charts import Bar, Level, Series, bars, line_chart
from ffm_secure.quantities import INFINITE, bound, small
from ffm_secure.report.markup import (
    OBSERVERS,
    Child,
    Column,
    Html,
    Promise,
    five_facts,
    five_fields,
    folded,
    number,
    phase_column,
    promises,
    table,
    tag,
)

SAME = 1e-3  # two upper bounds on one history may differ by what accountants round up
UNBOUNDED = "No mechanism bounds what this observer learns."
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
    """Find the accounted bound the audited one must stay under: the largest, for every observer."""
    audit, finite = summary.audit, [statement for statement in summary.statements if statement.finite]
    if audit is None or audit.epsilon_lower is None or not finite:
        return None
    upper = max(finite, key=lambda statement: statement.epsilon)
    # An observer without a guarantee may have been the one who measured it: then nothing is contradicted.
    everyone = len(finite) == len(summary.statements)
    return LowerBound(
        value=audit.epsilon_lower, upper=upper, contradicts=everyone and audit.epsilon_lower > upper.epsilon
    )


def spent_body(summary: RunSummary) -> Html:
    """Draw epsilon over rounds against the budget, one panel for each promise."""
    if not summary.statements:
        return tag("p", "No privacy statement was made.", class_="empty")
    panels = [_panel(summary, promise) for promise in promises(summary.statements)]
    numbers = table(
        [
            Column(heading="Round", cell=lambda r: str(r.round), field="round"),
            Column(heading="Epsilon so far", cell=lambda r: bound(r.epsilon_spent), field="epsilon_spent"),
            *phase_column(summary.rounds, trained=summary.plan.trainable_parameters),
        ],
        summary.rounds,
        caption=(
            f"Largest epsilon over data owners after each round. {five_fields(worst(summary.statements)[1])}"
        ),
        of="rounds",
    )
    return tag("div", *panels, folded("The numbers behind these charts", numbers) if summary.rounds else None)


def _panel(summary: RunSummary, promise: Promise) -> Html:
    statement, note = promise.statement, None
    traced = [record for record in summary.rounds if math.isfinite(record.epsilon_spent)]
    if not statement.finite:
        chart = tag("p", INFINITE, class_="big bad")
        note = tag("p", statement.note or UNBOUNDED)
    elif not traced or not math.isclose(traced[-1].epsilon_spent, statement.epsilon, rel_tol=SAME):
        chart = _budget_bars(summary, statement)
        note = tag(
            "p",
            "Only the largest epsilon is recorded round by round; this is the value at the end.",
            class_="under",
        )
    else:
        chart = _epsilon_chart(summary, promise, traced)
    figure_ = tag("div", tag("h3", promise.heading), chart, note)
    return tag("figure", figure_, five_facts(statement, promise.against), class_="split")


def _epsilon_chart(summary: RunSummary, promise: Promise, traced: Sequence[RoundRecord]) -> Html:
    budget = summary.budget_epsilon
    first, last = traced[0], traced[-1]
    return line_chart(
        [Series(label="spent", x=[r.round for r in traced], y=[r.epsilon_spent for r in traced], step=True)],
        description=(
            f"Epsilon against {promise.against} over rounds: {bound(first.epsilon_spent)} after round "
            f"{first.round}, {bound(last.epsilon_spent)} after round {last.round}, "
            f"budget {budget_words(budget)}."
        ),
        levels=[Level(label="budget", value=budget, role="second")] if math.isfinite(budget) else [],
        shown=bound,
        from_zero=True,
    )


def _budget_bars(summary: RunSummary, statement: PrivacyStatement) -> Html:
    rows = [Bar(label="spent", value=statement.epsilon, shown=bound(statement.epsilon))]
    if math.isfinite(summary.budget_epsilon):
        rows.append(
            Bar(
                label="budget",
                value=summary.budget_epsilon,
                shown=bound(summary.budget_epsilon),
                role="quiet",
            )
        )
    return bars(rows)


def statements_body(statements: Sequence[PrivacyStatement], of: str = "statements") -> Html:
    """List every epsilon with its five fields; infinity is a word with its reason."""
    if not statements:
        return tag("p", "No privacy statement was made.", class_="empty")
    columns: list[tuple[str, Callable[[PrivacyStatement], Child]]] = [
        ("Unit", lambda s: s.unit),
        ("Adjacency", lambda s: s.adjacency),
        ("Mechanism, in order", _events),
        ("Delta and accountant", _accountant),
    ]
    headings = ["Observer", "Epsilon", *[heading for heading, _ in columns]]
    head = tag("tr", *[tag("th", heading, scope="col") for heading in headings])
    rows = []
    for place, statement in enumerate(statements):
        shown = number(statement.epsilon, bound(statement.epsilon), f"{of}.{place}.epsilon")
        strong = tag("span", shown, class_="strong" if statement.finite else "strong bad")
        cells = [
            tag("th", OBSERVERS[statement.observer], scope="row", data_label="Observer"),
            tag("td", strong, _why(statement), data_label="Epsilon"),
            *[tag("td", cell(statement), data_label=heading) for heading, cell in columns],
        ]
        rows.append(tag("tr", *cells))
    caption = tag("caption", "Upper bounds on privacy loss, one per observer; smaller is better.")
    return tag("table", caption, tag("thead", head), tag("tbody", *rows), class_="stack")


def _why(statement: PrivacyStatement) -> Html | None:
    why = statement.note or ("" if statement.finite else UNBOUNDED)
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
    slack = f"numeric slack {bound(statement.slack, digits=2)} (inside the epsilon)"
    return f"delta {small(statement.delta)}, {statement.accountant}, {slack}"


def bounds_body(summary: RunSummary) -> Html:
    """Put the accounted upper bound beside the audited lower bound, for every observer."""
    audit = summary.audit
    lower = audit.epsilon_lower if audit is not None else None
    if audit is None or lower is None:
        summary_line = tag(
            "p",
            "No lower bound was measured: no canary audit ran. The promises below are untested.",
            class_="lede",
        )
    else:
        summary_line = tag(
            "p",
            "By planting canaries and looking for them, the audit proved that epsilon is at least ",
            tag("strong", number(lower, bound(lower, upper=False), "audit.epsilon_lower")),
            f" ({audit.epsilon_lower_method}). " if audit.epsilon_lower_method else ". ",
            "Accounting promises that it is at most the following.",
            class_="lede",
        )
    panels = [_bounds(summary, promise, lower) for promise in promises(summary.statements)]
    return tag("div", summary_line, *panels)


def _bounds(summary: RunSummary, promise: Promise, lower: float | None) -> Html:
    statement, rows = promise.statement, []
    if lower is not None:
        rows.append(
            Bar(label="measured, at least", value=lower, shown=bound(lower, upper=False), role="second")
        )
    kind = "first" if statement.finite else "bad"
    rows.append(
        Bar(label="promised, at most", value=statement.epsilon, shown=bound(statement.epsilon), role=kind)
    )
    if math.isfinite(summary.budget_epsilon):
        rows.append(
            Bar(
                label="budget",
                value=summary.budget_epsilon,
                shown=bound(summary.budget_epsilon),
                role="quiet",
            )
        )
    about = tag("figcaption", five_fields(statement, promise.against))
    return tag("figure", tag("div", tag("h3", promise.heading), bars(rows)), about, class_="split")
