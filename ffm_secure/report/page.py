"""report.html: one page that an officer reads in three minutes, of releases alone."""

from __future__ import annotations

import math

from ffm_secure.quantities import INFINITE, amount, bound, duration
from ffm_secure.records import RunSummary
from ffm_secure.report import outcome
from ffm_secure.report.layout import Masthead, Section, notices, render_page
from ffm_secure.report.markup import Html, five_fields, promises, tag
from ffm_secure.report.sections.attacks import attacks_body
from ffm_secure.report.sections.lead import is_stamped, lead_body
from ffm_secure.report.sections.origins import data_body, people_body
from ffm_secure.report.sections.privacy import lower_bound
from ffm_secure.report.sections.promise import limits_body, owner_count, promise_body, refused_body


def render_html(summary: RunSummary) -> str:
    """Draw what may leave of a summary as one HTML page.

    Guarantee: the same summary gives the same bytes; every text of the run is escaped; nothing is fetched and
    no script runs; every rounded number outside tables carries its exact value. Upper bounds are rounded up
    and lower bounds down.
    Assumes: the summary is what `release.released` returns.
    """
    sections = (
        Section(name="summary", heading="In short", body=lead_body(summary)),
        Section(name="promise", heading="What is promised, to whom", body=promise_body(summary)),
        Section(name="attacks", heading="What was attacked", body=attacks_body(summary.audit)),
        Section(name="limits", heading="What is not protected", body=limits_body(summary)),
        Section(name="refused", heading="What was refused", body=refused_body(summary)),
        Section(name="data", heading="The data", body=data_body(summary)),
        Section(name="people", heading="Who, when, with what", body=people_body(summary)),
    )
    footer = (
        "Written by ffm-secure. Round by round, with settings and every epsilon in full: ",
        tag("a", "details.html", href="details.html"),
        ". The same figures, exact, are in report.json.",
    )
    return render_page(
        Masthead(kind="ffm-secure report", name=summary.name, line=masthead_line(summary)),
        sections,
        footer=footer,
        notices=all_notices(summary),
    )


def masthead_line(summary: RunSummary) -> str:
    """Say in one line how far a run came."""
    return (
        f"{summary.status} · {amount(len(summary.rounds), 'round')} · "
        f"{amount(owner_count(summary), 'data owner')} · {duration(summary.seconds)}"
    )


def all_notices(summary: RunSummary) -> Html | None:
    """List stamps and alarms, then how the run ended."""
    return notices([*summary.stamps, *_alarms(summary)], outcome.warnings(summary))


def _alarms(summary: RunSummary) -> list[str]:
    alarms = []
    if not is_stamped(summary) and not any(statement.finite for statement in summary.statements):
        alarms.append(f"NOT PRIVATE: epsilon is {INFINITE} against every observer.")
    for promise in promises(summary.statements):
        epsilon, budget = promise.statement.epsilon, summary.budget_epsilon
        if math.isfinite(epsilon) and epsilon > budget:
            alarms.append(
                f"OVER BUDGET: epsilon {bound(epsilon)} of {bound(budget)} "
                f"({five_fields(promise.statement, promise.against)})."
            )
    lower = lower_bound(summary)
    if lower is not None and lower.contradicts:
        alarms.append(
            "CONTRADICTION: the audit measured epsilon of at least "
            f"{bound(lower.value, upper=False)}, the accounting "
            f"promises at most {bound(lower.upper.epsilon)} ({five_fields(lower.upper)}). Trust "
            "neither until this is explained."
        )
    return alarms
