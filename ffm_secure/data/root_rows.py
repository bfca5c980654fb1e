"""Public rows a server learns from itself, to compare what sites send with."""

from __future__ import annotations

import numpy as np

from ffm_secure.data.dataset import Examples
from ffm_secure.errors import DataError


def root_rows(public: Examples, count: int, *, seed: int) -> Examples:
    """Return the `count` public rows that a server learns from to compare sums with.

    Raises:
      DataError: they would leave none to evaluate on.
    """
    if count >= len(public):
        raise DataError(
            f"federation.strategy.root_examples = {count}: there are {len(public)} public rows, and some "
            "must be left to evaluate on; take fewer, or give more public rows"
        )
    order = np.random.default_rng(seed).permutation(len(public))
    return public.take(np.sort(order[len(public) - count :]))
