"""Options of a builtin data set: whole numbers with a default and bounds."""

from __future__ import annotations

from collections.abc import Mapping

from ffm_secure.errors import DataError

Bounds = tuple[int, int, int]  # default, least, most
SEED: Bounds = (0, 0, 2**31 - 1)


def checked_options(name: str, options: Mapping[str, int], allowed: Mapping[str, Bounds]) -> dict[str, int]:
    """Fill in the defaults of what `builtin:name` was not given.

    Raises:
      DataError: an option the set does not have, or a value outside its bounds.

    >>> checked_options("toy", {"size": 20}, {"size": (10, 1, 50), "seed": SEED})
    {'size': 20, 'seed': 0}
    """
    problems = []
    for option, value in options.items():
        if option not in allowed:
            problems.append(f"builtin:{name} has no option {option!r}; it has {', '.join(allowed)}")
            continue
        _, least, most = allowed[option]
        if not least <= value <= most:
            problems.append(f"builtin:{name}: {option} = {value}: must lie between {least} and {most}")
    if problems:
        raise DataError("; ".join(problems))
    chosen = {}
    for option, (default, _, _) in allowed.items():
        chosen[option] = options.get(option, default)
    return chosen
