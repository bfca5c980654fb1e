"""A coordinator that follows the protocol with everybody but one site, to which it lies in every way it can.

What it sends is signed with its own key, sealed and carried as in any run: a lie is told inside the envelope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from defenses.random_source import RandomSource
from defenses.secagg import Identity, messages
from defenses.secagg.keys import public_of
from defenses.secagg.messages import Advert
from ffm_secure import federation, record_codec
from ffm_secure.coordinator.sealed_courier import SealedCourier
from ffm_secure.federation import TrainingResult
from ffm_secure.models.backbone import vector_fingerprint
from ffm_secure.records import RoundPlan
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.stages import PLAN, encode_vector, join_plan, split_plan
from tests.parties.helpers import Federation

VICTIM = 0
SITES = 4
NEIGHBOURS = SITES - 1
FRESH = public_of(bytes([9]) * 32)


@dataclass(slots=True)
class Heard:
    """What a coordinator was answered in the round that is under way, by stage and site."""

    answers: dict[str, dict[int, bytes]] = field(default_factory=dict)

    @property
    def victim(self) -> bytes:
        """Return the victim's identity."""
        return messages.read_advert(self.answers["advertise"][VICTIM]).id

    def adverts(self) -> list[Advert]:
        """Return everybody's adverts, sorted."""
        everybody = [messages.read_advert(answer) for answer in self.answers["advertise"].values()]
        return sorted(everybody, key=lambda advert: advert.id)


Change = Callable[[bytes, Heard], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lie:
    """What the victim is sent in the place of a stage's message, or between two stages, or both."""

    name: str
    stage: str = ""
    change: Change = lambda message, heard: message
    after: str = ""  # when this stage is over, the victim is asked once more
    beside: str = ""  # in the name of this one
    aside: Change = lambda message, heard: message
    lost_at: str = ""  # where the victim leaves the round


def _of_roster(change: Callable[[list[Advert], int], list[Advert]]) -> Change:
    """Lie about who is there: `change` is given the adverts and the victim's place among them."""

    def lie(message: bytes, heard: Heard) -> bytes:
        adverts = messages.read_roster(message)
        own = next(place for place, advert in enumerate(adverts) if advert.id == heard.victim)
        return messages.write_roster(change(adverts, own))

    return lie


def _others_changed(**fields: bytes) -> Change:
    def change(adverts: list[Advert], own: int) -> list[Advert]:
        other = (own + 1) % len(adverts)
        adverts[other] = dataclasses.replace(adverts[other], **fields)
        return adverts

    return _of_roster(change)


def _with_a_stranger(adverts: list[Advert], own: int) -> list[Advert]:
    stranger = Identity.generate(RandomSource.system())
    unsigned = Advert(id=stranger.id, channel_key=FRESH, mask_key=FRESH, nonce=bytes(32), signature=b"")
    signed = dataclasses.replace(unsigned, signature=stranger.sign(unsigned.statement(bytes(32))))
    return sorted([*adverts, signed], key=lambda advert: advert.id)


def _swapped_shares(message: bytes, heard: Heard) -> bytes:
    (first, one), (second, other), *rest = messages.read_delivery(message, NEIGHBOURS)
    return messages.write_delivery([(first, other), (second, one), *rest], NEIGHBOURS)


def _altered_share(message: bytes, heard: Heard) -> bytes:
    return message[:-1] + bytes([message[-1] ^ 1])


def _without_confirmations(message: bytes, heard: Heard) -> bytes:
    return messages.write_active_request([], NEIGHBOURS)


def _forged_confirmations(message: bytes, heard: Heard) -> bytes:
    rows = messages.read_active_request(message, NEIGHBOURS)
    return messages.write_active_request([(place, bytes(64)) for place, _ in rows], NEIGHBOURS)


def _survivors_but(message: bytes, heard: Heard) -> bytes:
    own = [advert.id for advert in heard.adverts()].index(heard.victim)
    return messages.write_survivors([place for place in range(SITES) if place != own], SITES)


def _another_model(message: bytes, heard: Heard) -> bytes:
    """Send a model of its own to the victim alone, under a plan that names it rightly."""
    plan_bytes, broadcast = split_plan(message)
    vector = torch.from_numpy(np.frombuffer(broadcast, dtype="<f4").astype(np.float32))
    vector[0] += 0.01
    plan = record_codec.from_bytes(RoundPlan, plan_bytes, "a plan")
    changed = dataclasses.replace(plan, fingerprint=vector_fingerprint(vector))
    return join_plan(record_codec.canonical_bytes(changed), encode_vector(vector))


def _everybody(message: bytes, heard: Heard) -> bytes:
    return messages.write_roster(heard.adverts())


def _lie(name: str, stage: str, change: Change) -> Lie:
    return Lie(name=name, stage=stage, change=change, lost_at=stage)


LIES: Sequence[Lie] = (
    _lie("the victim is not there", "share", _of_roster(lambda rows, own: rows[:own] + rows[own + 1 :])),
    _lie("too few are there", "share", _of_roster(lambda rows, own: rows[own : own + 1])),
    _lie("a stranger is there", "share", _of_roster(_with_a_stranger)),
    _lie("another's key for shares", "share", _others_changed(channel_key=FRESH)),
    _lie("another's key for masks", "share", _others_changed(mask_key=FRESH)),
    _lie("a key of low order", "share", _others_changed(channel_key=bytes(32))),
    _lie("a signature of nobody", "share", _others_changed(signature=bytes(64))),
    _lie("who is there, cut short", "share", lambda message, heard: message[:-1]),
    _lie("shares that went to another", "upload", _swapped_shares),
    _lie("a share that was altered", "upload", _altered_share),
    _lie("no shares", "upload", lambda message, heard: messages.write_delivery([], NEIGHBOURS)),
    _lie("survivors without the victim", "confirm", _survivors_but),
    _lie("too few survivors", "confirm", lambda message, heard: messages.write_survivors([0, 1], SITES)),
    _lie("survivors nobody knows", "confirm", lambda message, heard: message[:-1] + b"\xff"),
    _lie("nobody has confirmed", "unmask", _without_confirmations),
    _lie("confirmations that were forged", "unmask", _forged_confirmations),
    Lie(name="a stage is left out", after="advertise", beside="unmask", lost_at="share"),
    Lie(
        name="a second set of survivors", after="confirm", beside="confirm", aside=_survivors_but,
        lost_at="unmask",
    ),
    Lie(name="asked twice", after="unmask", beside="unmask"),
    Lie(
        name="another model than the others'", stage=PLAN, change=_another_model, after="advertise",
        beside="share", aside=_everybody, lost_at="advertise",
    ),
)  # fmt: skip


QUICK: Sequence[Lie] = tuple(
    lie
    for lie in LIES
    if lie.name
    in (
        "a stranger is there",
        "another's key for masks",
        "a share that was altered",
        "no shares",
        "survivors without the victim",
        "nobody has confirmed",
        "a second set of survivors",
        "asked twice",
        "another model than the others'",
    )
)
"""One of every kind, for the default suite; all of them go over the engine."""


@dataclass(slots=True)
class Lying:
    """Carry as the sealed courier does, and tell the lie of each round."""

    sealed: SealedCourier
    lies: Sequence[Lie]
    round: int = 0
    heard: Heard = field(default_factory=Heard)
    answered: dict[str, bytes | None] = field(default_factory=dict)  # what came back for a lie, by its name

    def send(self, stage: str, going_out: Mapping[int, bytes]) -> Iterator[Reply]:
        if stage == PLAN:
            self.round, self.heard = self.round + 1, Heard()
        lie = self.lies[self.round - 1]
        changed = dict(going_out)
        if stage == lie.stage and VICTIM in changed:
            changed[VICTIM] = lie.change(changed[VICTIM], self.heard)
        for reply in self.sealed.send(stage, changed):
            if not isinstance(reply.content, Lost):
                self.heard.answers.setdefault(stage, {})[reply.site] = bytes(reply.content)
            if stage == lie.stage and reply.site == VICTIM:
                self.note(lie, reply)
            yield reply
        if stage == lie.after:
            (answer,) = self.sealed.send(lie.beside, {VICTIM: lie.aside(going_out[VICTIM], self.heard)})
            self.note(lie, answer)

    def note(self, lie: Lie, reply: Reply) -> None:
        """Keep what came back for a lie; nothing where the victim refused."""
        self.answered[lie.name] = None if isinstance(reply.content, Lost) else bytes(reply.content)

    def seconds_at_sites(self) -> float:
        return 0.0

    def close(self) -> None:
        self.sealed.close()


def run_with_lies(whole: Federation, courier: Courier, lies: Sequence[Lie]) -> tuple[Lying, TrainingResult]:
    """Run a coordinator that tells one lie a round."""
    ready = whole.coordinator()
    try:
        coordinator = ready.coordinator
        start = coordinator.begin()
        lying = Lying(coordinator.sealed(courier), lies)
        return lying, federation.run(coordinator.server, lying, coordinator.store, start=start)
    finally:
        ready.close()
