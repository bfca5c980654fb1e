"""No protection: every vector in the clear, packed as the protections pack theirs; the server sees each
client's update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from defenses.errors import ProtocolError
from defenses.secagg import ring
from defenses.secagg.masks import RingVector
from ffm_secure.protection.base import UPLOAD, AggregationResult, ClientRound, ServerRound, too_few
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.groups import OpensGroups
from ffm_secure.records import RoundPlan


class PlainClientRound:
    """Pack and send."""

    def __init__(self, codec: VectorCodec) -> None:
        self._codec = codec

    def respond(self, stage: str, message: bytes) -> bytes:
        """Refuse: there is no other stage."""
        raise ProtocolError

    def seal(self, message: bytes, vector: RingVector, *, update: bytes) -> bytes:
        """Return the packed vector."""
        return ring.pack(vector, self._codec.modulus_bits)


class PlainServerRound:
    """Add up what arrives, in one accumulator."""

    stages: Sequence[str] = (UPLOAD,)

    def __init__(self, plan: RoundPlan, codec: VectorCodec, minimum: int) -> None:
        self._plan, self._codec, self._minimum = plan, codec, minimum
        self._total: RingVector = np.zeros(codec.length, dtype=ring.word_type(codec.modulus_bits))
        self._arrived: list[int] = []
        self._received = 0

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Ask the whole cohort."""
        return dict.fromkeys(self._plan.cohort, b"")

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Add one packed vector."""
        ring.add_packed(self._total, reply, self._codec.modulus_bits)
        self._arrived.append(site)
        self._received += len(reply)

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Return the sum of those who answered."""
        if len(self._arrived) < self._minimum:
            reason = too_few(len(self._arrived), self._minimum)
            return AggregationResult(ring_sum=None, dropped=lost, aborted=reason, bytes_up=self._received)
        return AggregationResult(
            ring_sum=ring.reduce(self._total, self._codec.modulus_bits),
            survivors=tuple(sorted(self._arrived)),
            dropped=lost,
            bytes_up=self._received,
        )


class PlainClient:
    """A site's half."""

    kind = "none"

    def __init__(self, codec: VectorCodec) -> None:
        self._codec = codec

    def join(self, plan: RoundPlan) -> ClientRound:
        """Begin a round."""
        return PlainClientRound(self._codec)


class PlainServer(OpensGroups):
    """The server's half."""

    kind = "none"

    def __init__(self, codec: VectorCodec, minimum: int) -> None:
        self._codec, self._minimum = codec, minimum

    def open_round(self, plan: RoundPlan) -> ServerRound:
        """Begin a round."""
        return PlainServerRound(plan, self._codec, self._minimum)
