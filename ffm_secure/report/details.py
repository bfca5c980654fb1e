"""details.html: everything that may leave and does not fit on one page; and the internal pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ffm_secure.quantities import bound, count, figure, size
from ffm_secure.records import AuditSummary, PlanSummary, RunSummary
from ffm_secure.report.layout import Masthead, Section, has_pictures, notices, render_page
from ffm_secure.report.markup import OBSERVERS, Column, Html, facts, folded, number, table, tag
from ffm_secure.report.page import all_notices, masthead_line
from ffm_secure.report.sections.attacks import attacks_body
from ffm_secure.report.sections.audit import audit_body, curves_body
from ffm_secure.report.sections.classes import classes_body
from ffm_secure.report.sections.clients import clients_body
from ffm_secure.report.sections.evaluation import evaluation_body
from ffm_secure.report.sections.personal import personal_body
from ffm_secure.report.sections.privacy import bounds_body, spent_body, statements_body
from ffm_secure.report.sections.rounds import cost_body, participation_body, utility_body
from ffm_secure.report.sections.stream import stream_body

_CONFIG_ORDER = ("document", "task", "model", "federation", "privacy", "protection", "audit", "speed")
_BACK = ("Written by ffm-secure. The page to begin with is ", tag("a", "report.html", href="report.html"))


def render_details_html(summary: RunSummary) -> str:
    """Draw round by round what may leave, with the settings and every epsilon in full.

    Guarantee: as for `render_html`.
    Assumes: the summary is what `release.released` returns.
    """
    sections = [
        Section(name="plan", heading="Plan", body=_plan_body(summary)),
        Section(name="utility", heading="What was learned", body=utility_body(summary)),
        *_by_class(summary),
        *_staged(summary),
        *_evaluated(summary),
        Section(name="spent", heading="What was spent", body=spent_body(summary)),
        Section(
            name="statements", heading="Every epsilon, in full", body=statements_body(summary.statements)
        ),
        Section(name="bounds", heading="Promised and measured", body=bounds_body(summary)),
        Section(name="cost", heading="Traffic and time", body=cost_body(summary)),
        Section(name="participation", heading="Who took part", body=participation_body(summary)),
        Section(name="attacks", heading="Every attack", body=_attacks(summary.audit)),
        Section(name="configuration", heading="Configuration", body=_configuration_body(summary)),
        Section(name="software", heading="Software", body=_software_body(summary)),
        Section(name="ledger", heading="Ledger", body=_ledger_body(summary)),
    ]
    if summary.clients:
        sections.insert(-4, Section(name="clients", heading="Client by client", body=clients_body(summary)))
    return render_page(
        Masthead(kind="ffm-secure report, details", name=summary.name, line=masthead_line(summary)),
        sections,
        footer=(*_BACK, ". The same figures, exact, are in report.json."),
        notices=all_notices(summary),
    )


def _by_class(summary: RunSummary) -> tuple[Section, ...]:
    """Return the section on the classes, where the model tells any apart."""
    if summary.classes is None:
        return ()
    return (Section(name="classes", heading="Class by class", body=classes_body(summary.classes)),)


def _evaluated(summary: RunSummary) -> tuple[Section, ...]:
    """Return the section on private rows, where the run released any figure of them."""
    if summary.evaluation is None:
        return ()
    body = evaluation_body(summary.evaluation)
    return (Section(name="evaluation", heading="What private rows say", body=body),)


def _staged(summary: RunSummary) -> tuple[Section, ...]:
    """Return the section on the stages of a stream, where there is one."""
    if summary.stream is None:
        return ()
    return (Section(name="stream", heading="Stage by stage", body=stream_body(summary.stream)),)


def _personal(summary: RunSummary) -> tuple[Section, ...]:
    """Return the section on models that never left home, where the run made any."""
    if not summary.personal:
        return ()
    return (Section(name="personal", heading="Models that stay at home", body=personal_body(summary)),)


def render_internal_html(summary: RunSummary) -> str:
    """Draw what must not leave: figures per owner, scores of attacks on private rows, what they recovered.

    Guarantee: as for `render_html`.
    """
    sections = (
        Section(name="audit", heading="What was exposed", body=audit_body(summary.audit)),
        Section(name="clients", heading="Client by client", body=clients_body(summary)),
        *_personal(summary),
    )
    return render_page(
        Masthead(
            kind="ffm-secure report, internal", name=summary.name, line=masthead_line(summary), internal=True
        ),
        sections,
        footer=(*_BACK, ". The same figures, exact, are in internal.json."),
        notices=all_notices(summary),
        pictures=has_pictures(summary.audit),
    )


def render_audit_html(audit: AuditSummary, name: str, notes: Sequence[str], *, internal: bool = False) -> str:
    """Draw the audit of one update, of any system, as one HTML page; `notes` say how its names were read.

    The internal page shows scores and what was recovered; the other one how each attack ended.
    Guarantee: as for `render_html`.
    """
    body = audit_body(audit) if internal else attacks_body(audit)
    heading, data = (
        ("What was exposed", "internal.json") if internal else ("What was attacked", "report.json")
    )
    sections = [Section(name="audit", heading=heading, body=body)]
    if not internal:
        sections.append(Section(name="all", heading="Every attack", body=_attacks(audit)))
    back: Sequence[str] = _BACK if internal else ("Written by ffm-secure",)
    return render_page(
        Masthead(kind="ffm-secure audit", name=name, internal=internal),
        sections,
        footer=(*back, f". The same figures, exact, are in {data}."),
        notices=notices((), notes),
        pictures=internal and has_pictures(audit),
        contents=False,
    )


def _attacks(audit: AuditSummary | None) -> Html:
    curves = None if audit is None or not audit.curves else curves_body(audit.curves)
    return tag("div", attacks_body(audit, whole=True), curves)


def _without_compression(uncompressed: int) -> Html | None:
    if not uncompressed:
        return None
    figure_of = number(uncompressed, size(uncompressed), "plan.bytes_up_uncompressed")
    return tag("span", "; ", figure_of, " up without compression")


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
        _without_compression(plan.bytes_up_uncompressed),
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
        Column(heading="Answer", cell=lambda item: item.words, field="words", text=True),
        Column(heading="Of rows", cell=lambda item: item.rows, field="rows", text=True),
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
    return table(columns, plan.queries, caption=caption, of="plan.queries", kind="tight")


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
