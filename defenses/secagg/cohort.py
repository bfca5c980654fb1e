"""Who may take part in a round:
a public function of a public seed, which every client computes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from defenses.errors import ParameterError
from defenses.secagg.keys import labelled_hash

CohortRule = Callable[[Iterable[bytes], bytes, int, int], tuple[bytes, ...]]
"""From the ids on the roster, the run, the round and the size of a cohort to the ids of its members, sorted.
"""


def choose_cohort(
    members: Iterable[bytes], *, seed: bytes, run_id: bytes, round_number: int, size: int
) -> tuple[bytes, ...]:
    """Return the ids of `size` members, sorted: those whose hash under seed, run and round is smallest.

    Without a rule that everybody can check, a server that picks the cohorts of two rounds on one model can
    have their sums differ by one client. The same round has the same cohort in every attempt.

    Assumes: the seed was fixed before the server could try many, by the operator or a public source, and is
    public.
    Raises: ParameterError for a size that the roster does not have, or a seed that is not 32 bytes.
    """
    candidates = sorted(set(members))
    if not 1 <= size <= len(candidates):
        raise ParameterError(f"size = {size}: must be from 1 to the {len(candidates)} members of the roster")
    if len(seed) != 32:
        raise ParameterError(f"seed has {len(seed)} bytes: must have 32")
    place = run_id + round_number.to_bytes(8, "big")
    ranked = sorted(candidates, key=lambda member: labelled_hash("cohort", seed, place, member))
    return tuple(sorted(ranked[:size]))


def seeded_cohorts(seed: bytes) -> CohortRule:
    """Return the rule that `choose_cohort` makes of a seed, for a client's policy."""

    def rule(members: Iterable[bytes], run_id: bytes, round_number: int, size: int) -> tuple[bytes, ...]:
        return choose_cohort(members, seed=seed, run_id=run_id, round_number=round_number, size=size)

    return rule


def whole_roster(members: Iterable[bytes], run_id: bytes, round_number: int, size: int) -> tuple[bytes, ...]:
    """Say that everybody on the roster may take part in every round."""
    return tuple(sorted(members))
