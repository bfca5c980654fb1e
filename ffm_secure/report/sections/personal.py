"""Models that never leave home: for the internal page alone, beside a model made alone and the shared one."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from ffm_secure.quantities import count, metric
from ffm_secure.records import PersonalOutcome, RunSummary
from ffm_secure.report.markup import Column, Html, facts, table, tag

_MODELS: tuple[tuple[str, Callable[[PersonalOutcome], float]], ...] = (
    ("Made alone", lambda outcome: outcome.local),
    ("The shared one", lambda outcome: outcome.shared),
    ("The owner's own", lambda outcome: outcome.own),
)


def personal_body(summary: RunSummary) -> Html:
    """Tabulate every owner's three models on rows of its own; the mean and the worst tenth come first."""
    rows = [(name, _words(summary, figure_of)) for name, figure_of in _MODELS]
    columns = [
        Column(heading="Client", cell=lambda item: item.client, field="client", text=True),
        Column(heading="Rows tested", cell=lambda item: count(item.rows), field="rows"),
        Column(heading="Made alone", cell=lambda item: metric(item.local), field="local"),
        Column(heading="Shared", cell=lambda item: metric(item.shared), field="shared"),
        Column(heading="Own", cell=lambda item: metric(item.own), field="own"),
    ]
    caption = (
        f"{summary.metric_name} on each owner's own rows. Own models hold their owner's rows without noise: "
        "they and these figures stay at home."
    )
    return tag("div", facts(rows, "facts"), table(columns, summary.personal, caption=caption, of="personal"))


def _words(summary: RunSummary, figure_of: Callable[[PersonalOutcome], float]) -> str:
    figures = [figure_of(outcome) for outcome in summary.personal]
    known = sorted(value for value in figures if math.isfinite(value))
    if not known:
        return "unknown"
    return f"mean {metric(fmean(known))}, worst tenth {metric(worst_tenth(known, summary.higher_is_better))}"


def worst_tenth(values: list[float], higher_is_better: bool) -> float:
    """Return the mean over the worst tenth of values, one of them at least.

    >>> worst_tenth([0.5, 0.9, 0.7], True)
    0.5
    """
    ordered = sorted(values, reverse=not higher_is_better)
    return fmean(ordered[: max(1, len(ordered) // 10)])
