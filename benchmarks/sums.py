"""What a server opens of some sites' vectors, as every protection does: added up in the ring, decoded."""

from __future__ import annotations

from collections.abc import Sequence

from defenses.secagg import ring
from defenses.secagg.masks import RingVector
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.records import RoundSum


def opened_sum(
    codec: VectorCodec, sent: Sequence[RingVector], *, round: int, survivors: tuple[int, ...]
) -> RoundSum:
    """Return the sum of what the survivors of a round have sent; the vectors stay as they are."""
    total = sent[0].copy()
    for vector in sent[1:]:
        ring.add_into(total, vector)
    return codec.open(ring.reduce(total, codec.modulus_bits), round=round, survivors=survivors)
