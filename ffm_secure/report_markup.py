"""Markup that escapes by construction, and the one way each kind of number is written on a page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from ffm_secure.types import Observer, PrivacyStatement

INFINITE = "none (infinite)"
OBSERVERS: dict[Observer, str] = {
    "public": "the public",
    "client": "other clients",
    "server": "the server",
    "colluding_server": "a server with colluding clients",
}
# Control characters, lone surrogates and direction overrides could hide or reorder what a reader sees.
_UNSEEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}
_UNSEEN |= {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFFE, 0xFFFF)}
_UNSEEN |= {code: "\N{REPLACEMENT CHARACTER}" for code in range(0xD800, 0xE000)}
_VOID = {"meta", "br"}


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
    """Build one element; `class_` means class, `aria_label` means aria-label, None and False leave an attribute out.

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


def figure(value: float | None, digits: int = 4) -> str:
    """Write a measured value to a few significant digits.

    >>> figure(0.87412), figure(123456.7), figure(float("nan"))
    ('0.8741', '123,457', 'not a number')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -5 <= size < 9:
        return _power(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def _power(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def bound(value: float, *, upper: bool = True, digits: int = 3) -> str:
    """Write an epsilon: upper bounds are rounded up and lower bounds down, so that rounding never flatters.

    >>> bound(7.8012), bound(7.8099, upper=False), bound(8.0), bound(float("inf"))
    ('7.81', '7.8', '8', 'none (infinite)')
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else INFINITE
    context = Context(prec=digits, rounding=ROUND_CEILING if upper else ROUND_FLOOR)
    rounded = context.plus(Decimal(repr(float(value)))).normalize()
    if rounded == 0:
        return "0"
    return f"{rounded:,f}" if -5 <= rounded.adjusted() < 9 else _power(f"{rounded:e}")


def small(value: float) -> str:
    """Write a delta or a slack: short, in powers of ten where that is shorter.

    >>> small(1e-5), small(0.01), small(0.0)
    ('1e-5', '0.01', '0')
    """
    return figure(value) if not math.isfinite(value) else _power(f"{value:e}") if 0 < value < 1e-3 else f"{value:g}"


def count(value: int) -> str:
    """Write a whole number with thousands separated."""
    return f"{value:,}"


def size(value: float) -> str:
    """Write a number of bytes in decimal units.

    >>> size(0), size(1234), size(15_300_000)
    ('0 B', '1.23 kB', '15.3 MB')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:.0f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Write seconds as a person would say them.

    >>> duration(0.0123), duration(4.25), duration(200), duration(7500)
    ('0.012 s', '4.2 s', '3 min 20 s', '2 h 05 min')
    """
    if not math.isfinite(value):
        return figure(value)
    if value < 59.95:
        return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: int, noun: str) -> str:
    """Write a count with its noun in the right number."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def five_fields(statement: PrivacyStatement) -> str:
    """Say in one line what an epsilon is about; printed beside every epsilon."""
    events = "; ".join(statement.mechanism[:2]) or "no mechanism"
    more = f"; and {len(statement.mechanism) - 2} more" if len(statement.mechanism) > 2 else ""
    return (
        f"unit {statement.unit} · adjacency {statement.adjacency} · against {OBSERVERS[statement.observer]} · "
        f"mechanism {events}{more} · delta {small(statement.delta)}, {statement.accountant}, "
        f"slack {small(statement.slack)}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Describe one column: its heading, the field of report.json it shows, and how a row is written."""

    heading: str
    cell: Callable[[Any], Child]
    field: str = ""
    text: bool = False


def table(columns: Sequence[Column], rows: Sequence[Any], *, caption: str, of: str = "", kind: str = "") -> Html:
    """Build a data table whose first column names the row."""
    head = tag("tr", *[
        tag("th", column.heading, scope="col", data_field=column.field or None, class_=None if column.text else "n")
        for column in columns
    ])  # fmt: skip
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        tag("tbody", *[_row(columns, row) for row in rows]),
        class_=kind or None,
        data_of=of or None,
    )


def _row(columns: Sequence[Column], row: Any) -> Html:
    cells = []
    for place, column in enumerate(columns):
        name, scope = ("th", "row") if place == 0 else ("td", None)
        cells.append(tag(name, column.cell(row), scope=scope, class_=None if column.text else "n"))
    return tag("tr", *cells)


def folded(heading: str, *children: Child, open_: bool = False) -> Html:
    """Fold children under a heading that opens without script."""
    return tag("details", tag("summary", heading), *children, open=open_)


def facts(pairs: Iterable[tuple[str, Child]], kind: str = "facts") -> Html:
    """List names with their values."""
    return tag("dl", *[tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_=kind)
