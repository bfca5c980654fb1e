"""Markup that escapes by construction, and the one way each kind of number is written on a page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffm_secure.foreign import Value
from ffm_secure.quantities import bound, figure, small
from ffm_secure.records import Observer, PrivacyStatement, RoundRecord

OBSERVERS: dict[Observer, str] = {
    "public": "the public",
    "client": "other clients",
    "server": "the server",
    "colluding_server": "a server with colluding clients",
}
# Control characters, lone surrogates and direction overrides could hide or reorder what a reader sees.
_UNSEEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")
_UNSEEN |= dict.fromkeys((*range(8234, 8239), *range(8294, 8298), 65534, 65535), "�")
_UNSEEN |= dict.fromkeys(range(55296, 57344), "�")
_VOID = {"meta", "br", "img"}


class Html(str):
    """Hold finished markup; a plain `str` is escaped wherever it meets markup."""

    __slots__ = ()


Child = str | None


def escape(text: str) -> Html:
    """Return `text` as markup that shows exactly its visible characters.

    >>> escape('<b title="x">')
    '&lt;b title=&quot;x&quot;&gt;'
    """
    return text if isinstance(text, Html) else Html(html.escape(text.translate(_UNSEEN), quote=True))


def join(children: Iterable[Child]) -> Html:
    """Concatenate children, escaping those that are not markup yet."""
    return Html("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """Build one element; `class_` means class, `aria_label` aria-label; None and False leave one out.

    >>> tag("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        parts.append(word if value is True else f'{word}="{escape(str(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if name in _VOID else Html(f"{opening}{join(children)}</{name}>")


def exact(value: float | int | None) -> str:
    """Write a number as report.json does."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    return repr(value)


def number(value: float | int, shown: str, at: str) -> Html:
    """Show a rounded number that carries its exact value and its place in report.json."""
    return tag("data", shown, value=exact(value), data_at=at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Hold one statement, every observer it is made for in the same words, and its places in report.json."""

    statement: PrivacyStatement
    places: tuple[int, ...]
    against: str

    @property
    def heading(self) -> str:
        """Name the observers as a heading."""
        return f"Against {self.against.partition(':')[0]}"


def promises(statements: Sequence[PrivacyStatement]) -> list[Promise]:
    """Put statements together that differ in nothing but the observer."""
    groups: dict[PrivacyStatement, list[int]] = {}
    for place, statement in enumerate(statements):
        groups.setdefault(replace(statement, observer="public"), []).append(place)
    merged = []
    for places in groups.values():
        names = listed([OBSERVERS[statements[place].observer] for place in places])
        everyone = len(places) >= len(OBSERVERS) and len(places) == len(statements)
        merged.append(
            Promise(
                statement=statements[places[0]],
                places=tuple(places),
                against=f"every observer: {names}" if everyone else names,
            )
        )
    return merged


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does, each once.

    >>> listed(["a", "b", "a", "c"])
    'a, b and c'
    """
    unique = list(dict.fromkeys(words))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _events(statement: PrivacyStatement) -> str:
    more = f"; and {len(statement.mechanism) - 2} more" if len(statement.mechanism) > 2 else ""
    return ("; ".join(statement.mechanism[:2]) or "none") + more


def five_fields(statement: PrivacyStatement, against: str = "") -> str:
    """Say in one line what an epsilon is about; printed beside every epsilon."""
    return (
        f"unit {statement.unit} · adjacency {statement.adjacency} · against "
        f"{against or OBSERVERS[statement.observer]} · "
        f"mechanism {_events(statement)} · delta {small(statement.delta)}, {statement.accountant}, "
        f"slack {bound(statement.slack, digits=2)}"
    )


def five_facts(statement: PrivacyStatement, against: str = "") -> Html:
    """List what an epsilon is about."""
    accounted = f"{small(statement.delta)}; {statement.accountant}; slack {bound(statement.slack, digits=2)}"
    return facts(
        [
            ("Unit", statement.unit),
            ("Adjacency", statement.adjacency),
            ("Observer", against or OBSERVERS[statement.observer]),
            ("Mechanism", _events(statement)),
            ("Delta, accountant", accounted),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Describe one column: its heading, the field of report.json it shows, and how a row is written."""

    heading: str
    cell: Callable[[Any], Child]
    field: str = ""
    text: bool = False


def table(
    columns: Sequence[Column], rows: Sequence[Any], *, caption: str, of: str = "", kind: str = ""
) -> Html:
    """Build a table whose first column names the row; a tight one is stacked on a phone."""
    head = tag("tr", *[_head(column) for column in columns])
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", *[_row(columns, row, labelled="tight" in kind) for row in rows]),
        class_=kind or None,
        data_of=of or None,
    )


def _head(column: Column) -> Html:
    long = any(len(word) > 14 for word in column.heading.split())
    kinds = [*([] if column.text else ["n"]), *(["long"] if long else [])]
    return tag(
        "th", column.heading, scope="col", data_field=column.field or None, class_=" ".join(kinds) or None
    )


def _row(columns: Sequence[Column], row: Value, *, labelled: bool) -> Html:
    cells = []
    for place, column in enumerate(columns):
        name, scope = ("th", "row") if place == 0 else ("td", None)
        label = column.heading if labelled else None
        cells.append(
            tag(name, column.cell(row), scope=scope, class_=None if column.text else "n", data_label=label)
        )
    return tag("tr", *cells)


def phase_column(rounds: Sequence[RoundRecord], *, trained: int) -> list[Column]:
    """Return columns of phases and of how far their changes agree, where there is more than one phase.

    The heading says how large a cosine of `trained` numbers chance alone gives in 95 of 100 cases: 2 /
    sqrt(trained).
    """
    if all(record.phase == "private" for record in rounds):
        return []
    chance = figure(2 / max(1, trained) ** 0.5, 2)
    agreement = Column(
        heading=f"Public and private change, cosine (by chance within ±{chance})",
        cell=lambda record: "none" if record.alignment is None else figure(record.alignment),
        field="alignment",
    )
    return [Column(heading="Phase", cell=lambda record: record.phase, field="phase"), agreement]


def folded(heading: str, *children: Child, open_: bool = False) -> Html:
    """Fold children under a heading that opens without script."""
    return tag("details", tag("summary", heading), *children, open=open_)


def facts(pairs: Iterable[tuple[str, Child]], kind: str = "facts") -> Html:
    """List names with their values."""
    return tag("dl", *[tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_=kind)
