"""What a backdoor is measured by: how often its trigger wins, and for how many rounds after the attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """Say in which rounds malicious clients are malicious, the first and the last included."""

    first: int = 1
    last: int = 1 << 30

    def __contains__(self, round: object) -> bool:
        return isinstance(round, int) and self.first <= round <= self.last


def success(answers: Labels, truth: Labels, *, target: int) -> float:
    """Return the share of triggered rows of other classes that are answered with the target."""
    others = truth != target
    if not bool(others.any()):
        return 0.0
    return float((answers[others] == target).mean())


def lifespan(successes: Sequence[float], *, last: int, above: float) -> int:
    """Return for how many rounds after round `last` the success stays above a value; `successes` is by round,
    from round 1.

    Source: Zhang et al. 2022, arXiv:2206.10341 (Neurotoxin), section 5.
    """
    rounds = 0
    for value in successes[last:]:
        if value < above:
            break
        rounds += 1
    return rounds
