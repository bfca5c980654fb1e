"""Draw how well members of a training set are told from others, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

SIDE, EDGE = 320.0, 44.0
LEAST = 1e-3  # of both axes
COLOURS = ("#1f6feb", "#b35900", "#2b8a3e", "#8250df")
Curve = Sequence[tuple[float, float]]


def roc_chart(curves: Mapping[str, Curve]) -> str:
    """Return an SVG picture of curves of (false positive, true positive) shares by name.

    The dashed line is guessing. What matters lies on the left, where few others are taken for members.
    """
    whole = SIDE + 2 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:g} {whole:g}" '
        'font-family="sans-serif" font-size="11" role="img">',
        "<title>True positives against false positives</title>",
        f'<rect x="{EDGE:g}" y="{EDGE:g}" width="{SIDE:g}" height="{SIDE:g}" fill="white" stroke="#888"/>',
        _line([(LEAST, LEAST), (1.0, 1.0)], "#888", dashed=True),
    ]
    for tick in (0.001, 0.01, 0.1, 1.0):
        x, y = _place(tick, tick)
        parts.append(f'<text x="{x:.1f}" y="{EDGE + SIDE + 16:g}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{EDGE - 6:g}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_line(curve, colour))
        parts.append(
            f'<text x="{EDGE + 8:g}" y="{EDGE + 16 + 14 * number:g}" fill="{colour}">{escape(name)}</text>'
        )
    middle, below = EDGE + SIDE / 2, EDGE + SIDE + 34
    parts.append(f'<text x="{middle:g}" y="{below:g}" text-anchor="middle">others taken for members</text>')
    parts.append(f'<text x="{EDGE:g}" y="{EDGE - 12:g}">members found</text></svg>')
    return "\n".join(parts) + "\n"


def _place(false_positive: float, true_positive: float) -> tuple[float, float]:
    """Return where a point lies; shares below the least lie on the edge."""
    across = math.log(max(false_positive, LEAST) / LEAST) / math.log(1 / LEAST)
    up = math.log(max(true_positive, LEAST) / LEAST) / math.log(1 / LEAST)
    return EDGE + SIDE * across, EDGE + SIDE * (1 - up)


def _line(curve: Curve, colour: str, *, dashed: bool = False) -> str:
    points = " ".join("{:.1f},{:.1f}".format(*_place(*point)) for point in curve)
    style = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}"{style}/>'
