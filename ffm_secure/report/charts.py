"""Small charts drawn as inline SVG or plain boxes: no script, labels on the lines instead of legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffm_secure.quantities import metric
from ffm_secure.report.markup import Html, join, tag

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 128.0, 14.0, 34.0
LABEL_GAP = 17.0
MOST_DOTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Hold one line: a value per round; values that are not finite leave a gap."""

    label: str
    x: Sequence[int]
    y: Sequence[float]
    role: str = "first"  # first, second, quiet: a colour of the page
    step: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Hold one horizontal line to compare with."""

    label: str
    value: float
    role: str = "quiet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Name the places 0, 1, 2, ... of an axis that is not rounds; `mark` is where this run lies."""

    noun: str
    names: Sequence[str]
    mark: float | None = None


def short(value: float) -> str:
    """Write a value beside a line, where little room is."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 1e-3:
        return metric(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def seconds(value: float) -> str:
    """Write seconds beside a line."""
    return f"{short(value)} s"


@dataclass(frozen=True, slots=True)
class _Frame:
    low: float
    high: float
    first: int
    last: int

    def x(self, value: float) -> float:
        inner = WIDTH - LEFT - RIGHT
        return LEFT + (
            inner / 2 if self.last == self.first else inner * (value - self.first) / (self.last - self.first)
        )

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - self.low) / (self.high - self.low))


def line_chart(
    series: Sequence[Series],
    *,
    description: str,
    levels: Sequence[Level] = (),
    shown: Callable[[float], str] = short,
    from_zero: bool = False,
    aborted: Sequence[int] = (),
    whole: bool = False,
    axis: Axis | None = None,
) -> Html:
    """Draw values over rounds, or another axis; lines are labelled at their ends, aborted rounds crossed."""
    rounds = sorted({value for line in series for value in line.x})
    values = [v for line in series for v in line.y if math.isfinite(v)] + [level.value for level in levels]
    if not rounds or not values:
        return tag("p", "Nothing to draw: no finite value was recorded.", class_="empty")
    ticks = nice_ticks(min([*values, 0.0]) if from_zero else min(values), max(values), whole=whole)
    frame = _Frame(ticks[0], ticks[-1], rounds[0], rounds[-1])
    parts = [
        _grid(frame, ticks, shown),
        _round_axis(frame, rounds) if axis is None else _named_axis(frame, axis),
    ]
    parts += [_level(frame, level) for level in levels]
    parts += [_line(frame, line, shown, axis) for line in series]
    parts += [_crossed(frame, value) for value in aborted]
    parts.append(_labels(frame, series, levels, shown))
    return tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=description, class_="chart"
    )


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return three to six round numbers that span [low, high].

    >>> nice_ticks(0.0, 8.0)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    if max(abs(low), abs(high)) < 1e-300:  # a quarter of the span would be no number any more
        low = high = 0.0
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(high) / 2 or 1.0
        low, high = (0.0, 2 * high) if high > 0 else (low - pad, high + pad)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    steps = [
        power * factor for factor in (1, 2, 2.5, 5, 10, 20, 50) if not whole or (power * factor).is_integer()
    ]
    step = next(step for step in [*steps, 1.0] if (high - low) / step <= 4)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(start, stop + 1)]


def _text(x: float, y: float, words: str, kind: str) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", class_=kind)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=kind)


def _tick(value: float, ticks: Sequence[float], shown: Callable[[float], str]) -> str:
    if shown not in (short, seconds):
        return shown(value)
    unit = " s" if shown is seconds else ""
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += 0 if abs(step * 10**digits - round(step * 10**digits)) < 1e-6 else 1
    return (f"{value:,.{digits}f}" if digits <= 4 and abs(value) < 1e5 else f"{value:.2g}") + unit


def _grid(frame: _Frame, ticks: Sequence[float], shown: Callable[[float], str]) -> Html:
    parts = []
    for value in ticks:
        y = frame.y(value)
        parts.append(_rule(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(_text(LEFT - 7, y + 4, _tick(value, ticks, shown), "tick end"))
    return join(parts)


def _round_axis(frame: _Frame, rounds: Sequence[int]) -> Html:
    middle = (rounds[0] + rounds[-1]) // 2
    chosen = sorted({rounds[0], rounds[-1]} | ({middle} if rounds[-1] - rounds[0] >= 4 else set()))
    words = [f"round {value:,}" if place == 0 else f"{value:,}" for place, value in enumerate(chosen)]
    return join(
        _text(frame.x(value), HEIGHT - 12, word, "tick middle")
        for value, word in zip(chosen, words, strict=True)
    )


def _named_axis(frame: _Frame, axis: Axis) -> Html:
    last = len(axis.names) - 1
    every = math.ceil(len(axis.names) / 5)
    chosen = sorted(
        {last, *(place for place in range(0, last + 1, every) if last - place >= every or place == last)}
    )
    parts = [_text(frame.x(place), HEIGHT - 12, axis.names[place], "tick middle") for place in chosen]
    if axis.mark is not None:
        x = frame.x(axis.mark)
        rule = tag("path", d=f"M{x:.1f} {TOP:.1f}L{x:.1f} {HEIGHT - BOTTOM:.1f}", class_="here")
        parts.append(tag("g", tag("title", "this run"), rule))
    return join(parts)


def _level(frame: _Frame, level: Level) -> Html:
    y = frame.y(level.value)
    return _rule(LEFT, y, WIDTH - RIGHT, y, f"level {level.role}")


def _line(frame: _Frame, line: Series, shown: Callable[[float], str], axis: Axis | None) -> Html:
    path, pen_down, before = [], False, 0.0
    points = list(zip(line.x, line.y, strict=True))
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        if pen_down and line.step:
            path.append(f"L{frame.x(x):.1f} {before:.1f}")
        path.append(f"{'L' if pen_down else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen_down, before = True, frame.y(y)
    every = max(1, math.ceil(len(points) / MOST_DOTS))
    visible = "dot" if len(points) <= 24 else "dot faint"
    dots = [
        tag(
            "circle",
            tag(
                "title",
                f"{f'round {x:,}' if axis is None else f'{axis.noun} {axis.names[x]}'}: "
                f"{line.label} {shown(y)}",
            ),
            cx=f"{frame.x(x):.1f}",
            cy=f"{frame.y(y):.1f}",
            r=2.6,
            class_=f"{visible} {line.role}",
        )
        for x, y in points[::every]
        if math.isfinite(y)
    ]
    return join([tag("path", d="".join(path), class_=f"line {line.role}"), *dots])


def _crossed(frame: _Frame, value: int) -> Html:
    x, y = frame.x(value), HEIGHT - BOTTOM
    cross = tag("path", d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6", class_="cross")
    return tag("g", tag("title", f"round {value:,} was aborted"), cross)


def _labels(
    frame: _Frame, series: Sequence[Series], levels: Sequence[Level], shown: Callable[[float], str]
) -> Html:
    wanted = [
        (frame.y(level.value), f"{level.label} {shown(level.value)}", f"{level.role} soft")
        for level in levels
    ]
    for line in series:
        last = next((v for v in reversed(line.y) if math.isfinite(v)), None)
        if last is not None:
            wanted.append((frame.y(last), f"{line.label} {shown(last)}", line.role))
    wanted.sort(key=lambda item: item[0])
    places = spread([y for y, _, _ in wanted], gap=LABEL_GAP, low=TOP, high=HEIGHT - BOTTOM)
    x = WIDTH - RIGHT + 7
    return join(
        _text(x, y + 4, words, f"label {role}") for y, (_, words, role) in zip(places, wanted, strict=True)
    )


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Push sorted places apart until neighbours are `gap` from each other, moving each as little as needed.

    >>> spread([10.0, 12.0], gap=10.0, low=0.0, high=100.0)
    [6.0, 16.0]
    """
    groups: list[tuple[float, int]] = []  # centre, members
    for place in places:
        centre, members = min(max(place, low), high), 1
        while groups and centre - groups[-1][0] < gap * (members + groups[-1][1]) / 2:
            other, count = groups.pop()
            centre, members = (centre * members + other * count) / (members + count), members + count
            reach = gap * (members - 1) / 2
            centre = max(min(centre, high - reach), low + reach)
        groups.append((centre, members))
    return [centre + gap * (i - (members - 1) / 2) for centre, members in groups for i in range(members)]


def sparkline(values: Sequence[float]) -> Html | None:
    """Draw the shape of a curve without axes, as an ornament of a figure given in words."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2 or min(finite) == max(finite):
        return None
    low, span, last = min(finite), max(finite) - min(finite), len(finite) - 1
    points = [(4 + 232 * i / last, 44 - 38 * (value - low) / span) for i, value in enumerate(finite)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dot = tag("circle", cx=f"{points[-1][0]:.1f}", cy=f"{points[-1][1]:.1f}", r=3.5, class_="dot first")
    return tag(
        "svg",
        tag("path", d=path, class_="line first"),
        dot,
        viewBox="0 0 240 50",
        aria_hidden="true",
        class_="spark",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Hold one labelled length, with the range it may lie in."""

    label: str
    value: float
    shown: Html | str
    role: str = "first"
    low: float | None = None
    high: float | None = None


def bars(rows: Sequence[Bar], *, top: float | None = None) -> Html:
    """Draw lengths on one common scale as a list; a whisker shows the range."""
    finite = [v for row in rows for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]
    low, high = min([0.0, *finite]), max([top or 0.0, *finite])
    return tag("ul", *[_bar(row, low, (high - low) or 1.0) for row in rows], class_="bars")


def _percent(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def _bar(row: Bar, low: float, span: float) -> Html:
    def place(value: float) -> float:
        return (value - low) / span if math.isfinite(value) else float(value > 0)

    kind = f"fill {row.role}" + ("" if math.isfinite(row.value) else " endless")
    parts = [tag("span", class_=kind, style=f"inline-size:{_percent(place(row.value))}")]
    if row.low is not None and row.high is not None:
        width = place(row.high) - place(row.low)
        parts.append(
            tag(
                "span",
                class_="whisker",
                style=f"inset-inline-start:{_percent(place(row.low))};inline-size:{_percent(width)}",
            )
        )
    return tag(
        "li",
        tag("span", row.label, class_="what"),
        tag("span", *parts, class_="track", aria_hidden="true"),
        tag("span", row.shown, class_="value"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Hold one client's move from before to after."""

    label: str
    before: float
    after: float
    shown: str


def changes(rows: Sequence[Change], *, better_up: bool) -> Html:
    """Draw each client's move as a line from a ring (before) to a dot (after)."""
    finite = [v for row in rows for v in (row.before, row.after) if math.isfinite(v)]
    if not finite:
        return tag("p", "Nothing to draw: no finite value was recorded.", class_="empty")
    low, high = min(finite), max(finite)
    pad = (high - low) * 0.04 or 1.0
    return tag(
        "ul", *[_change(row, low - pad, high - low + 2 * pad, better_up) for row in rows], class_="bars moves"
    )


def _change(row: Change, low: float, span: float, better_up: bool) -> Html:
    parts = []
    if math.isfinite(row.before) and math.isfinite(row.after):
        start, stop = sorted(((row.before - low) / span, (row.after - low) / span))
        worse = (row.after < row.before) == better_up and row.after != row.before
        kind = f"reach {'bad' if worse else 'first'}"
        parts = [
            tag(
                "span",
                class_=kind,
                style=f"inset-inline-start:{_percent(start)};inline-size:{_percent(stop - start)}",
            ),
            tag("span", class_="ring", style=f"inset-inline-start:{_percent((row.before - low) / span)}"),
            tag(
                "span",
                class_=f"point {'bad' if worse else 'first'}",
                style=f"inset-inline-start:{_percent((row.after - low) / span)}",
            ),
        ]
    return tag(
        "li",
        tag("span", row.label, class_="what"),
        tag("span", *parts, class_="track", aria_hidden="true"),
        tag("span", row.shown, class_="value"),
    )


def histogram(
    values: Sequence[float], *, description: str, low: float, high: float, role: str, note: str
) -> Html:
    """Draw how many clients lie where, on a scale given from outside so that two can be compared."""
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return tag("p", "Nothing to draw: no finite value was recorded.", class_="empty")
    ticks = nice_ticks(low, high)
    slots, height, left, right = 24, 130.0, 16.0, 16.0
    start, span = ticks[0], ticks[-1] - ticks[0]
    counts = [0] * slots
    for value in finite:
        counts[min(slots - 1, max(0, int(slots * (value - start) / span)))] += 1
    width, base, most = (WIDTH - left - right) / slots, height - 26, max(counts)
    parts = []
    for slot, members in enumerate(counts):
        tall = (base - 26) * members / most
        where = f"{start + slot * span / slots:.4g} to {start + (slot + 1) * span / slots:.4g}: {members:,}"
        x, y = left + slot * width + 0.75, base - tall
        parts.append(
            tag(
                "rect",
                tag("title", where),
                x=f"{x:.1f}",
                y=f"{y:.1f}",
                width=f"{width - 1.5:.1f}",
                height=f"{tall:.1f}",
                class_=f"bin {role}",
            )
        )
    parts.append(_rule(left, base, WIDTH - right, base, "grid"))
    for place, value in enumerate(ticks):
        x = left + (WIDTH - left - right) * (value - start) / span
        anchor = "start" if place == 0 else "end" if place == len(ticks) - 1 else "middle"
        parts.append(_text(x, height - 9, _tick(value, ticks, short), f"tick {anchor}"))
    parts.append(_text(left, 15, note, f"label {role}"))
    return tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=description, class_="chart"
    )
