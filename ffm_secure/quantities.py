"""How numbers are written for people: the same one the same way in the terminal, on a page and on a card."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

INFINITE = "none (infinite)"


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
        return power(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def power(text: str) -> str:
    """Shorten a number in powers of ten.

    >>> power("1.500e-07")
    '1.5e-7'
    """
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def metric(value: float | None) -> str:
    """Write a metric or a score: four places where it lies between -1 and 1, four digits beyond.

    >>> metric(0.42), metric(0.08754), metric(0.0), metric(45.2961)
    ('0.4200', '0.0875', '0.0000', '45.30')
    """
    if value is None or not math.isfinite(value) or abs(value) > 1:
        return figure(value)
    return f"{value:.4f}"


def bound(value: float, *, upper: bool = True, digits: int = 4) -> str:
    """Write an epsilon: upper bounds are rounded up and lower bounds down, so that rounding never flatters.

    >>> bound(7.80123), bound(7.80999, upper=False), bound(8.0), bound(float("inf"))
    ('7.802', '7.809', '8', 'none (infinite)')
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else INFINITE
    context = Context(prec=digits, rounding=ROUND_CEILING if upper else ROUND_FLOOR)
    rounded = context.plus(Decimal(repr(float(value)))).normalize()
    if rounded == 0:
        return "0"
    return f"{rounded:,f}" if -5 <= rounded.adjusted() < 9 else power(f"{rounded:e}")


def small(value: float) -> str:
    """Write a delta or a slack: short, in powers of ten where that is shorter.

    >>> small(1e-5), small(0.01), small(0.0)
    ('1e-5', '0.01', '0')
    """
    if not math.isfinite(value):
        return figure(value)
    return power(f"{value:e}") if 0 < value < 1e-3 else f"{value:g}"


def count(value: int) -> str:
    """Write a whole number with thousands separated."""
    return f"{value:,}"


def amount(value: int, noun: str) -> str:
    """Write a count with its noun in the right number."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


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
