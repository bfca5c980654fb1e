"""Lay out report.html: one self-contained page, warnings first, without script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from ffm_secure.records import AuditSummary, PlanSummary, RunSummary
from ffm_secure.report import outcome
from ffm_secure.report.charts import sparkline
from ffm_secure.report.markup import (
    INFINITE,
    OBSERVERS,
    Child,
    Column,
    Html,
    amount,
    bound,
    count,
    duration,
    facts,
    figure,
    five_facts,
    five_fields,
    folded,
    listed,
    number,
    promises,
    size,
    table,
    tag,
)
from ffm_secure.report.sections.audit import audit_body, tally
from ffm_secure.report.sections.clients import clients_body
from ffm_secure.report.sections.privacy import (
    bounds_body,
    budget_words,
    lower_bound,
    spent_body,
    statements_body,
    worst,
)
from ffm_secure.report.sections.rounds import cost_body, opened, participation_body, utility_body

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_CONFIG_ORDER = ("task", "model", "federation", "privacy", "protection", "audit", "speed")


def render_html(summary: RunSummary) -> str:
    """Draw a summary as one HTML page.

    Guarantee: the same summary gives the same bytes; every text of the run is escaped; nothing is
    fetched and no
    script runs (a content policy in the page forbids both); every rounded number outside tables carries
    its exact
    value. Upper bounds are rounded up and lower bounds down.
    """
    sections = [
        ("summary", "Summary", _summary_body(summary)),
        ("plan", "Plan", _plan_body(summary)),
        ("utility", "What was learned", utility_body(summary)),
        ("spent", "What was spent", spent_body(summary)),
        ("statements", "Every epsilon, in full", statements_body(summary.statements)),
        ("bounds", "Promised and measured", bounds_body(summary)),
        ("cost", "Traffic and time", cost_body(summary)),
        ("participation", "Who took part", participation_body(summary)),
        ("clients", "Client by client", clients_body(summary)),
        ("audit", "What was exposed", audit_body(summary.audit)),
        ("configuration", "Configuration", _configuration_body(summary)),
        ("software", "Software", _software_body(summary)),
        ("ledger", "Ledger", _ledger_body(summary)),
    ]
    head = _head(f"{summary.name} – ffm-secure report", summary.audit)
    body = tag(
        "body",
        tag("a", "Skip to the summary", href="#summary", class_="skip"),
        _masthead(summary),
        tag(
            "nav",
            *[tag("a", heading, href=f"#{name}") for name, heading, _ in sections],
            aria_label="Sections",
        ),
        tag("main", _notices(summary), *[_section(name, heading, body) for name, heading, body in sections]),
        tag(
            "footer",
            tag("p", "Written by ffm-secure. The same figures, exact, are in report.json beside this page."),
        ),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def render_audit_html(audit: AuditSummary, name: str, notes: Sequence[str]) -> str:
    """Draw the audit of one update, of any system, as one HTML page; `notes` say how its names were read.

    Guarantee: as for `render_html`.
    """
    items = [_notice(text, "warning") for text in notes]
    notices = tag("section", tag("ul", *items), aria_label="Notes", class_="notices") if items else None
    body = tag(
        "body",
        tag("header", tag("p", "ffm-secure audit", class_="brand"), tag("h1", name)),
        tag("main", notices, _section("audit", "What was exposed", audit_body(audit))),
        tag("footer", tag("p", "Written by ffm-secure. The same figures, exact, are in report.json.")),
    )
    page = tag("html", _head(f"{name} – ffm-secure audit", audit), body, lang="en")
    return "<!doctype html>\n" + page + "\n"


def _head(title: str, audit: AuditSummary | None) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(audit)),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", _style()),
    )


def _policy(audit: AuditSummary | None) -> str:
    """Allow nothing to be fetched; pictures inside the page only where there are some."""
    pictures = audit is not None and any(finding.pictures for finding in audit.findings)
    return _POLICY.replace("style-src", "img-src data:; style-src") if pictures else _POLICY


@cache
def _style() -> Html:
    return Html(files("ffm_secure.report").joinpath("report.css").read_text(encoding="utf-8"))


def _section(name: str, heading: str, body: Html) -> Html:
    return tag(
        "section", tag("h2", heading, id=f"{name}-title"), body, id=name, aria_labelledby=f"{name}-title"
    )


def _masthead(summary: RunSummary) -> Html:
    line = (
        f"{summary.status} · {amount(len(summary.rounds), 'round')} · "
        f"{amount(len(summary.clients), 'client')} · "
        f"{duration(summary.seconds)}"
    )
    return tag(
        "header", tag("p", "ffm-secure report", class_="brand"), tag("h1", summary.name), tag("p", line)
    )


def _notices(summary: RunSummary) -> Html | None:
    alarms = [*summary.stamps, *_alarms(summary)]
    warnings = [*summary.plan.warnings, *outcome.warnings(summary)]
    if not alarms and not warnings:
        return None
    items = [_notice(text, "alarm") for text in alarms] + [_notice(text, "warning") for text in warnings]
    return tag("section", tag("ul", *items), aria_label="Warnings", class_="notices")


def _notice(text: str, kind: str) -> Html:
    head, colon, rest = text.partition(":")
    named = colon and len(head) <= 60
    words = [tag("strong", f"{head}{colon}"), rest] if named else [text]
    return tag(
        "li", tag("span", "Alarm " if kind == "alarm" else "Note ", class_="unseen"), *words, class_=kind
    )


def _alarms(summary: RunSummary) -> list[str]:
    found = []
    if not _stamped(summary) and not any(statement.finite for statement in summary.statements):
        found.append(f"NOT PRIVATE: epsilon is {INFINITE} against every observer.")
    for promise in promises(summary.statements):
        epsilon, budget = promise.statement.epsilon, summary.budget_epsilon
        if math.isfinite(epsilon) and epsilon > budget:
            found.append(
                f"OVER BUDGET: epsilon {bound(epsilon)} of {bound(budget)} "
                f"({five_fields(promise.statement, promise.against)})."
            )
    lower = lower_bound(summary)
    if lower is not None and lower.contradicts:
        found.append(
            "CONTRADICTION: the audit measured epsilon of at least "
            f"{bound(lower.value, upper=False)}, the accounting "
            f"promises at most {bound(lower.upper.epsilon)} ({five_fields(lower.upper)}). Trust "
            "neither until this is explained."
        )
    return found


def _stamped(summary: RunSummary) -> bool:
    """Tell whether the run itself says that its epsilon is worth nothing."""
    return any(stamp.upper().startswith("NOT PRIVATE") for stamp in summary.stamps)


def _summary_body(summary: RunSummary) -> Html:
    lead = f"{_learned(summary)}; {_kept(summary)}; {_exposed(summary.audit)}"
    cards = tag(
        "div",
        _learned_card(summary),
        _spent_card(summary),
        _exposed_card(summary.audit),
        class_="cards three told",
    )
    return tag("div", tag("p", lead if lead.endswith((".", "!", "?")) else lead + ".", class_="lead"), cards)


def _learned(summary: RunSummary) -> str:
    name = summary.metric_name[:1].upper() + summary.metric_name[1:]
    if not summary.rounds:
        return "No round has finished, so nothing was learned yet"
    done, lost = len(opened(summary.rounds)), len(summary.rounds) - len(opened(summary.rounds))
    rounds = f"{count(done)} of {amount(done + lost, 'round')}" if lost else amount(done, "round")
    before, after = summary.metric_zero_round, summary.metric_final
    if not math.isfinite(after):
        return f"After {rounds} the {summary.metric_name} is {figure(after)}: training diverged"
    if math.isnan(before) or before == after:
        return f"{name} was {figure(after, 3)} after {rounds}"
    words = (
        f"{name} {'rose' if after > before else 'fell'} from {figure(before, 3)} to {figure(after, 3)} "
        f"in {rounds}"
    )
    if not outcome.beats(summary, before):
        return f"{words}, which is worse than not training"
    majority = summary.metric_majority
    return (
        words
        if majority is None
        else f"{words} (always guessing the most common class scores {figure(majority, 3)})"
    )


def _kept(summary: RunSummary) -> str:
    if _stamped(summary) and any(s.finite for s in summary.statements):
        return "this run is not private, and its epsilon promises nothing"
    kept = [
        OBSERVERS[s.observer] for s in summary.statements if s.finite and s.epsilon <= summary.budget_epsilon
    ]
    open_ = [OBSERVERS[s.observer] for s in summary.statements if not s.finite]
    if not kept:
        return (
            "no privacy is guaranteed against anyone"
            if not any(s.finite for s in summary.statements)
            else "the privacy budget was overspent"
        )
    everyone = len(kept) == len(summary.statements) and len(set(kept)) == len(OBSERVERS)
    words = f"the privacy budget was kept against {'every observer' if everyone else listed(kept)}"
    return words if not open_ else f"{words}, but nothing is guaranteed against {listed(open_)}"


def _exposed(audit: AuditSummary | None) -> str:
    if audit is None:
        return "no attack was run, so what is exposed was not measured"
    if audit.sentence:
        sentence = audit.sentence
        return "audit: " + (sentence[0].lower() + sentence[1:] if sentence[1:2].islower() else sentence)
    leaks = sum(finding.verdict == "leaked" for finding in audit.findings)
    told = sum(finding.verdict in ("leaked", "not leaked") for finding in audit.findings)
    return f"{leaks} of {amount(told, 'attack')} that can tell found a leak"


def _card(heading: str, big: Child, *rest: Child, words: bool = False) -> Html:
    return tag(
        "article",
        tag("h3", heading),
        tag("p", big, class_="big words" if words else "big"),
        *rest,
        class_="card",
    )


def _learned_card(summary: RunSummary) -> Html:
    best = "higher is better" if summary.higher_is_better else "lower is better"
    rows: list[tuple[str, Child]] = [
        (
            "Before training",
            number(summary.metric_zero_round, figure(summary.metric_zero_round), "metric_zero_round"),
        ),
    ]
    if summary.metric_majority is not None:
        majority = number(summary.metric_majority, figure(summary.metric_majority), "metric_majority")
        rows.append(("Always the most common class", majority))
    final = number(summary.metric_final, figure(summary.metric_final), "metric_final")
    note = tag("p", f"{summary.metric_name}, on the public evaluation set; {best}", class_="under")
    return _card(
        "Learned",
        final,
        note,
        facts(rows, "facts short"),
        sparkline([record.metric for record in summary.rounds]),
        words=not math.isfinite(summary.metric_final),
    )


def _spent_card(summary: RunSummary) -> Html:
    if not summary.statements:
        return _card(
            "Spent", INFINITE, tag("p", "No privacy statement was made.", class_="under"), words=True
        )
    place, statement = worst(summary.statements)
    shown = number(statement.epsilon, bound(statement.epsilon), f"statements.{place}.epsilon")
    budget = tag(
        "span", " of ", number(summary.budget_epsilon, budget_words(summary.budget_epsilon), "budget_epsilon")
    )
    words = "epsilon, the largest over data owners" if statement.finite else "no epsilon is guaranteed"
    if statement.finite and _stamped(summary):
        words = "epsilon of the mechanism; this run does not keep it, see the warnings"
    note = tag("p", words, class_="under")
    against = next(promise.against for promise in promises(summary.statements) if place in promise.places)
    open_ = [s for s in summary.statements if not s.finite] if statement.finite else []
    rest = facts([(f"Against {OBSERVERS[s.observer]}", INFINITE) for s in open_]) if open_ else None
    return _card(
        "Spent",
        tag("span", shown, budget if statement.finite else None),
        note,
        five_facts(statement, against),
        rest,
        words=not statement.finite,
    )


def _exposed_card(audit: AuditSummary | None) -> Html:
    if audit is None:
        return _card(
            "Exposed",
            "not audited",
            tag("p", "No attack was run on this run: exposure is not measured.", class_="under"),
            words=True,
        )
    leaks = sum(finding.verdict == "leaked" for finding in audit.findings)
    told = sum(
        finding.verdict in ("leaked", "not leaked") for finding in audit.findings
    )  # the rest prove nothing
    return _card(
        "Exposed",
        f"{leaks} of {told}",
        tag("p", f"attack{'' if told == 1 else 's'} that can tell found a leak", class_="under"),
        tag("p", audit.sentence) if audit.sentence else None,
        tally(audit),
    )


def _plan_body(summary: RunSummary) -> Html:
    plan = summary.plan
    share = plan.trainable_parameters / plan.total_parameters if plan.total_parameters else 0.0
    trained = tag(
        "span",
        number(plan.trainable_parameters, count(plan.trainable_parameters), "plan.trainable_parameters"),
        " of ",
        number(plan.total_parameters, count(plan.total_parameters), "plan.total_parameters"),
        f" parameters ({100 * share:.3g}\N{NO-BREAK SPACE}%)",
    )
    up, down = plan.bytes_up_per_client_round, plan.bytes_down_per_client_round
    sent = tag(
        "span",
        number(up, size(up), "plan.bytes_up_per_client_round"),
        " up, ",
        number(down, size(down), "plan.bytes_down_per_client_round"),
        " down, per client and round",
    )
    noise = tag(
        "span",
        "noise multiplier ",
        number(plan.noise_multiplier, figure(plan.noise_multiplier), "plan.noise_multiplier"),
    )
    reveals = facts(
        [(f"To {OBSERVERS[name]}", plan.reveals[name]) for name in OBSERVERS if name in plan.reveals]
    )
    return tag(
        "div",
        tag("p", plan.headline, class_="lede"),
        tag(
            "div",
            _plan_card("Trains", plan.trains, trained),
            _plan_card("Sends", plan.sends, sent),
            _plan_card("Spends", plan.spends, noise),
            class_="cards three",
        ),
        tag(
            "div",
            tag("article", tag("h3", "Reveals"), reveals, class_="card plain"),
            tag("article", tag("h3", "What breaks it"), tag("p", plan.breaks), class_="card plain"),
            class_="cards two",
        ),
        _asked(plan) if plan.queries else None,
        folded("The epsilon that was planned", statements_body(plan.statements, of="plan.statements"))
        if plan.statements
        else None,
    )


def _asked(plan: PlanSummary) -> Html:
    """Show what is asked of the rows beside learning, and what each answer costs."""
    columns: list[Column] = [
        Column(heading="Question", cell=lambda item: item.query, field="query"),
        Column(heading="Answer", cell=lambda item: item.words, field="words"),
        Column(heading="Of rows", cell=lambda item: item.rows, field="rows"),
        Column(heading="Numbers", cell=lambda item: f"{item.numbers:,}", field="numbers"),
        Column(
            heading="Noise over bound",
            cell=lambda item: figure(item.noise_multiplier),
            field="noise_multiplier",
        ),
        Column(heading="Epsilon alone", cell=lambda item: bound(item.epsilon), field="epsilon"),
    ]
    caption = (
        "What the run asks beside learning; learning is calibrated for what the answers leave of the budget."
    )
    return table(columns, plan.queries, caption=caption, of="plan.queries")


def _plan_card(heading: str, words: str, under: Html) -> Html:
    return tag(
        "article", tag("h3", heading), tag("p", words), tag("p", under, class_="under"), class_="card plain"
    )


def _configuration_body(summary: RunSummary) -> Html:
    config = summary.config
    tables = [name for name in _CONFIG_ORDER if isinstance(config.get(name), dict)]
    tables += sorted(name for name in config if isinstance(config[name], dict) and name not in tables)
    plain = [(name, _value(config[name])) for name in sorted(config) if name not in tables]
    groups = (
        [tag("article", tag("h3", "Run"), facts(plain, "facts code"), class_="card plain")] if plain else []
    )
    for name in tables:
        rows = [(key, _value(config[name][key], outer=True)) for key in _kind_first(config[name])]
        groups.append(tag("article", tag("h3", f"[{name}]"), facts(rows, "facts code"), class_="card plain"))
    return (
        tag("div", *groups, class_="cards columns")
        if groups
        else tag("p", "No configuration was recorded.", class_="empty")
    )


def _kind_first(table: Mapping[str, object]) -> list[str]:
    return sorted(table, key=lambda key: (key != "kind", key))


def _value(value: object, *, outer: bool = False) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_value(value[key])}" for key in _kind_first(value))
        return inside if outer and inside else f"{{ {inside} }}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _software_body(summary: RunSummary) -> Html:
    if not summary.software:
        return tag("p", "No versions were recorded.", class_="empty")
    return facts([(name, summary.software[name]) for name in sorted(summary.software)], "facts code columns")


def _ledger_body(summary: RunSummary) -> Html:
    entries = number(summary.ledger_entries, count(summary.ledger_entries), "ledger_entries")
    return tag(
        "div",
        facts([("Entries", entries), ("Head of the hash chain", tag("code", summary.ledger_head or "none"))]),
        tag(
            "p",
            "Compare this head with the one ",
            tag("code", "ffm-secure ledger"),
            " prints: equal heads mean equal histories.",
            class_="under",
        ),
    )
