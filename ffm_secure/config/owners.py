"""How data owners are called whom nobody has named."""

from __future__ import annotations


def numbered_names(count: int) -> tuple[str, ...]:
    """Name owners whom no column names.

    >>> numbered_names(2)
    ('client-1', 'client-2')
    """
    width = len(str(count))
    return tuple(f"client-{index + 1:0{width}d}" for index in range(count))
