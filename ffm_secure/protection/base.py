"""What every protection offers: a half for a site and a half for the server, which speak bytes and know no
courier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from defenses.secagg.masks import RingVector
from ffm_secure.records import RoundPlan

UPLOAD = "upload"
"""The stage at which a site's sealed update travels; every protection has it."""
AFTER_UPLOAD = frozenset({"confirm", "unmask"})
"""Stages at which a client has already uploaded: whoever is lost there is in the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationResult:
    """The ring sum over the survivors, or the reason why it stayed closed, and the bytes it took."""

    ring_sum: RingVector | None
    survivors: tuple[int, ...] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)  # site -> stage at which it was lost
    aborted: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    groups: tuple[AggregationResult, ...] = ()  # one result a group, where sums are over groups

    @property
    def parts(self) -> tuple[AggregationResult, ...]:
        """Return one result for every sum that the round was to open."""
        return self.groups or (self,)


class ClientRound(Protocol):
    """One site's half of one round.

    Guarantee: each stage is answered once, in order; `seal` is given the ring vector and nothing else of the
    site.
    """

    def respond(self, stage: str, message: bytes) -> bytes:
        """Answer a stage that needs no update.

        Raises:
          ProtocolError: the message is refused; the site is lost to this round.
        """

    def seal(self, message: bytes, vector: RingVector, *, update: bytes) -> bytes | memoryview:
        """Answer the upload stage with the sealed update; `update` names what it was made of (`update_name`).

        Guarantee: under a protection, the site's memory of what it sent is on disk before the answer is
        returned.
        """


class ServerRound(Protocol):
    """The server's half of one round: which stages there are, what goes out, what comes back."""

    @property
    def stages(self) -> Sequence[str]:
        """Return the stages in order."""

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Return what each site still taking part is sent at a stage; asking closes the stage before.

        Raises:
          ProtocolError: too few are left, so the sum stays closed.
        """

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Take in one site's answer.

        Raises:
          ProtocolError: it is refused, and as if it had not come.
        """

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Open the sum, or say why it stays closed;
        `lost` says at which stage each missing site was missed.
        """


class ClientSide(Protocol):
    """What a site holds of a protection: its own identity or key, and what it insists on."""

    kind: str

    def join(self, plan: RoundPlan) -> ClientRound:
        """Begin a round.

        Raises:
          ProtocolError: the site may not take part in it, for instance twice.
        """


class ServerSide(Protocol):
    """What the server holds of a protection: public facts alone."""

    kind: str

    def open_round(self, plan: RoundPlan) -> ServerRound:
        """Begin a round among the cohort of a plan."""

    def open_groups(self, plan: RoundPlan, groups: Sequence[tuple[int, ...]]) -> ServerRound:
        """Begin a round with a sum of its own for every group of the cohort."""


def update_name(plan: RoundPlan, learned: bytes, *, fresh_noise: bool) -> bytes:
    """Name an update, so that it enters no second session: 32 bytes.

    With noise that the ledger charges anew, by the attempt it was made in. Without, by what was learned
    (`learned`, a digest before rounding) and from which model: two sums that hold one and the same update
    single out whoever is in one of them alone.
    """
    model = bytes.fromhex(plan.fingerprint)
    if not fresh_noise:
        return hashlib.sha256(b"ffm-secure learned" + model + learned).digest()
    place = plan.run_id + plan.round.to_bytes(8, "big") + plan.attempt.to_bytes(4, "big")
    return hashlib.sha256(b"ffm-secure attempt" + place + model).digest()


def too_few(answered: int, minimum: int) -> str:
    """Say why a sum stays closed."""
    return f"{answered} of at least {minimum} clients answered"
