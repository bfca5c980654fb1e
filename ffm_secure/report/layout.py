"""The shell of every page: head with a content policy, masthead, notices, sections, footer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ffm_secure.records import AuditSummary
from ffm_secure.report.markup import Child, Html, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a page: its place in addresses, its heading, its content."""

    name: str
    heading: str
    body: Html


@dataclass(frozen=True, slots=True, kw_only=True)
class Masthead:
    """What stands above everything: the kind of page, what it is about, and a line below."""

    kind: str
    name: str
    line: Child = None
    internal: bool = False  # it holds what was read or counted on private rows


def render_page(
    masthead: Masthead,
    sections: Sequence[Section],
    *,
    footer: Sequence[Child],
    notices: Html | None = None,
    pictures: bool = False,
    contents: bool = True,
) -> str:
    """Put a page together.

    Guarantee: self-contained; nothing is fetched and no script runs (the policy in the page forbids both);
    pictures inside the page are allowed only where `pictures` says so.
    """
    links = [tag("a", one.heading, href=f"#{one.name}") for one in sections]
    body = tag(
        "body",
        tag("a", "Skip to the content", href=f"#{sections[0].name}", class_="skip"),
        _internal_mark() if masthead.internal else None,
        _header(masthead),
        tag("nav", *links, aria_label="Sections") if contents else None,
        tag("main", notices, *map(_section, sections)),
        tag("footer", tag("p", *footer)),
        class_="internal" if masthead.internal else None,
    )
    head = _head(f"{masthead.name} – {masthead.kind}", pictures=pictures)
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def has_pictures(audit: AuditSummary | None) -> bool:
    """Tell whether an audit recovered pictures."""
    return audit is not None and any(finding.pictures for finding in audit.findings)


def notices(alarms: Sequence[str], warnings: Sequence[str]) -> Html | None:
    """List what a reader must know before any figure, worst first."""
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


def _internal_mark() -> Html:
    return tag(
        "p",
        tag("strong", "INTERNAL: "),
        "holds figures of private rows and what attacks recovered from them. No epsilon counts these. "
        "It must not leave; ",
        tag("a", "report.html", href="report.html"),
        " may.",
        class_="mark",
    )


def _header(masthead: Masthead) -> Html:
    return tag(
        "header",
        tag("p", masthead.kind, class_="brand"),
        tag("h1", masthead.name),
        tag("p", masthead.line) if masthead.line else None,
    )


def _section(one: Section) -> Html:
    title = f"{one.name}-title"
    return tag("section", tag("h2", one.heading, id=title), one.body, id=one.name, aria_labelledby=title)


def _head(title: str, *, pictures: bool) -> Html:
    policy = _POLICY.replace("style-src", "img-src data:; style-src") if pictures else _POLICY
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", _style()),
    )


@cache
def _style() -> Html:
    return Html(files("ffm_secure.report").joinpath("report.css").read_text(encoding="utf-8"))
