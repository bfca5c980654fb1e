"""The fairness section: how each data owner fared, marked with where the figures come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ffm_secure.records import ClientOutcome, RunSummary
from ffm_secure.report.charts import Change, changes, histogram
from ffm_secure.quantities import metric, amount, bound, count
from ffm_secure.report.markup import Column, Html, facts, five_fields, folded, table, tag
from ffm_secure.report.sections.privacy import budget_words, worst

MOST_ROWS = 24


def clients_body(summary: RunSummary) -> Html:
    """Draw each client's change, or the distribution where there are many, with the table behind it."""
    clients = summary.clients
    if not clients:
        return tag("p", "No figures per client were released.", class_="empty")
    source = tag(
        "p", tag("span", "Source", class_="badge quiet"), " ", summary.clients_source, class_="source"
    )
    body = _few(summary) if len(clients) <= MOST_ROWS else _many(summary)
    return tag(
        "div",
        source,
        _spread(summary),
        body,
        folded(f"All {amount(len(clients), 'client')}", _table(summary)),
    )


def _ordered(summary: RunSummary) -> list[ClientOutcome]:
    sign = -1 if summary.higher_is_better else 1
    return sorted(
        summary.clients,
        key=lambda c: (math.isnan(c.metric), 0.0 if math.isnan(c.metric) else -sign * c.metric, c.client),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank quantile of sorted values."""
    return values[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]


def _spread(summary: RunSummary) -> Html | None:
    values = sorted(c.metric for c in summary.clients if math.isfinite(c.metric))
    if not values:
        return None
    ordered = values if summary.higher_is_better else values[::-1]
    worse = sum(_worse(summary, client) for client in summary.clients)
    rows: list[tuple[str, str]] = [
        ("Worst client", metric(ordered[0])),
        ("Median", metric(_quantile(ordered, 0.5))),
        ("Best client", metric(ordered[-1])),
        ("Worse than before", f"{count(worse)} of {count(len(summary.clients))}"),
    ]
    if len(values) > MOST_ROWS:
        rows.insert(
            1,
            (
                "A tenth is at or below" if summary.higher_is_better else "A tenth is at or above",
                metric(_quantile(ordered, 0.1)),
            ),
        )
    return facts(rows, "facts row")


def _worse(summary: RunSummary, client: ClientOutcome) -> bool:
    gain = client.metric - client.metric_before
    return gain < 0 if summary.higher_is_better else gain > 0


def _few(summary: RunSummary) -> Html:
    rows = [
        Change(
            label=c.client,
            before=c.metric_before,
            after=c.metric,
            shown=f"{metric(c.metric_before)} → {metric(c.metric)}",
        )
        for c in _ordered(summary)
    ]
    caption = (
        f"{summary.metric_name} of the final model for each client, worst first. "
        "Ring: before training. Dot: after."
    )
    return tag(
        "figure", changes(rows, better_up=summary.higher_is_better), tag("figcaption", caption), class_="wide"
    )


def _many(summary: RunSummary) -> Html:
    before, after = [c.metric_before for c in summary.clients], [c.metric for c in summary.clients]
    finite = [value for value in (*before, *after) if math.isfinite(value)] or [0.0, 1.0]
    figures = []
    for values, role, heading in ((before, "quiet", "Before training"), (after, "first", "After")):
        known = sorted(value for value in values if math.isfinite(value))
        median = metric(_quantile(known, 0.5)) if known else "unknown"
        words = f"{heading}: {summary.metric_name} of {amount(len(known), 'client')}, median {median}"
        chart = histogram(
            values, description=words, low=min(finite), high=max(finite), role=role, note=f"median {median}"
        )
        figures.append(tag("figure", tag("h3", heading), chart))
    note = f"How many clients have which {summary.metric_name}; both on one scale."
    return tag("div", tag("div", *figures, class_="figures"), tag("p", note, class_="under"))


def _table(summary: RunSummary) -> Html:
    about = (
        f" Epsilon of each owner's own ledger; {five_fields(worst(summary.statements)[1])}."
        if summary.statements
        else ""
    )
    return table(
        [
            Column(heading="Client", cell=lambda c: c.client, field="client", text=True),
            Column(heading="Examples", cell=lambda c: count(c.examples), field="examples"),
            Column(heading="Rounds", cell=lambda c: count(c.participations), field="participations"),
            Column(heading="Before", cell=lambda c: metric(c.metric_before), field="metric_before"),
            Column(heading="After", cell=lambda c: metric(c.metric), field="metric"),
            Column(heading="Epsilon", cell=lambda c: bound(c.epsilon), field="epsilon"),
            Column(heading="Budget", cell=lambda c: budget_words(c.budget), field="budget"),
        ],
        summary.clients,
        caption=f"{summary.metric_name} per client. Source: {summary.clients_source}.{about}",
        of="clients",
        kind="tight named",
    )
