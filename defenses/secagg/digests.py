"""Digests a client computes of its own vector and rules, to hold a proposed session to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from defenses.errors import ParameterError
from defenses.secagg.keys import labelled_hash

Setting = str | int | float | bool | bytes | None


def layout_digest(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """Hash names and shapes of what a vector is made of, in its order.

    Guarantee: two layouts have one digest only if they are the same: every part is written with its length.
    """
    parts = []
    for name, shape in tensors:
        numbers = b"".join(size.to_bytes(8, "big") for size in shape)
        parts += [_sized(name.encode()), _sized(numbers)]
    return labelled_hash("layout", *parts)


def rule_digest(kind: str, settings: Mapping[str, Setting]) -> bytes:
    """Hash a rule (quantisation, mechanism, clip) by its kind and its settings, in the order of their names.

    Guarantee: 1, 1.0, True and "1" are different settings; a float is hashed exactly.
    Raises: ParameterError for a setting that is not a number, a text, bytes, a truth value or None, or not
    finite.
    """
    parts = [_sized(kind.encode())]
    for name in sorted(settings):
        parts += [_sized(name.encode()), _sized(_setting(name, settings[name]))]
    return labelled_hash("rule", *parts)


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(4, "big") + part


def _setting(name: str, value: Setting) -> bytes:
    if isinstance(value, float) and math.isfinite(value):
        return b"f" + value.hex().encode()
    if isinstance(value, bool) or value is None or (isinstance(value, int) and abs(value) < 1 << 256):
        return b"i" + repr(value).encode()
    if isinstance(value, str):
        return b"s" + value.encode()
    if isinstance(value, bytes):
        return b"b" + value
    raise ParameterError(f"{name}: a setting is a finite number, a text, bytes, a truth value or None")
