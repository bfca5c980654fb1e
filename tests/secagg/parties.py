"""Build the parties of a session, small and seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import (
    ClientPolicy,
    ClientSession,
    Contribution,
    Identity,
    ReplayGuard,
    Roster,
    ServerSession,
    SessionParameters,
    Stage,
    drive,
    messages,
)
from defenses.secagg.driver import Outcome
from defenses.secagg.graph import Mode, threshold_above
from defenses.secagg.masks import RingVector, word_type
from defenses.secagg.ring import reduce


NOW = 1_000_000_000
FEDERATION = "hospitals"
HASHES = {
    "backbone_hash": b"b" * 32,
    "layout_hash": b"l" * 32,
    "quantization_hash": b"q" * 32,
    "mechanism_hash": b"d" * 32,
}


def issue(operator: Identity, people: list[Identity], **changes: object) -> Roster:
    """Sign a roster of these people, valid for a day."""
    settings: dict[str, object] = {"federation": FEDERATION, "serial": 1, "expires": NOW + 86_400, **changes}
    return Roster.issue(operator, [person.public_key for person in people], **settings)


def mask(
    session: ClientSession,
    delivery: bytes,
    vector: RingVector,
    *,
    update: bytes | None = None,
    model_hash: bytes | None = None,
) -> memoryview:
    """Mask a vector, named by its session unless it has another name, of the session's own model."""
    own = session._parameters
    return session.mask(
        delivery,
        vector,
        update=update if update is not None else hashlib.sha256(session.id + own.session_id).digest(),
        model_hash=model_hash if model_hash is not None else own.model_hash,
    )


def bring(
    parties: Parties, vector_of: Callable[[bytes], RingVector | None]
) -> Callable[[bytes], Contribution | None]:
    """Name each client's vector by its session, as `drive` wants it."""
    parameters = parties.parameters

    def contribution(owner: bytes) -> Contribution | None:
        vector = vector_of(owner)
        name = hashlib.sha256(owner + parameters.session_id).digest()
        return (
            None
            if vector is None
            else Contribution(vector=vector, update=name, model_hash=parameters.model_hash)
        )

    return contribution


@dataclass(frozen=True)
class Parties:
    """Everybody in one session."""

    source: RandomSource
    operator: Identity
    people: dict[bytes, Identity]
    parameters: SessionParameters
    policy: ClientPolicy

    def clients(self) -> dict[bytes, ClientSession]:
        return {
            owner: ClientSession(
                person, self.parameters, self.policy, self.source.derive("client", place), now=NOW
            )
            for place, (owner, person) in enumerate(self.people.items())
        }

    def clients_without_guard(self, owner: bytes) -> ClientSession:
        """Return one client in a process that remembers nothing."""
        fresh = Identity(self.people[owner].seed(), guard=ReplayGuard.in_memory())
        stream = self.source.derive("fresh", owner.hex())
        return ClientSession(fresh, self.parameters, self.policy, stream, now=NOW)

    def server(self) -> ServerSession:
        return ServerSession(self.parameters, source=self.source.derive("server"))

    def vectors(self) -> dict[bytes, RingVector]:
        word, bits = word_type(self.parameters.modulus_bits), self.parameters.modulus_bits
        stream = self.source.derive("vectors")
        return {
            owner: reduce(stream.words(self.parameters.length).astype(word), bits) for owner in self.people
        }

    def next_round(self, **changes: object) -> Parties:
        """Go on to another round, and with it to another model; or to whatever else is named."""
        changes.setdefault("round", self.parameters.round + 1)
        changes.setdefault("model_hash", hashlib.sha256(f"model {changes['round']}".encode()).digest())
        return replace(self, parameters=replace(self.parameters, **changes))


def gather(
    count: int = 5,
    *,
    mode: Mode = "active",
    seed: int = 0,
    length: int = 11,
    modulus_bits: int = 32,
    neighbours: int | None = None,
    threshold: int | None = None,
    minimum_survivors: int = 3,
    colluders: int = 0,
    **policy: object,
) -> Parties:
    """Bring `count` clients and an operator together."""
    source = RandomSource.seeded(seed)
    operator = Identity.generate(source)
    people = sorted((Identity.generate(source) for _ in range(count)), key=lambda person: person.id)
    degree = neighbours if neighbours is not None else count - 1
    parameters = SessionParameters(
        run_id=source.random_bytes(16),
        round=1,
        mode=mode,
        graph="complete" if neighbours is None else "harary",
        clients=count,
        neighbours=degree,
        threshold=threshold or threshold_above(neighbours=degree, corrupted=colluders, mode=mode),
        minimum_survivors=minimum_survivors,
        modulus_bits=modulus_bits,
        length=length,
        model_hash=b"m" * 32,
        roster=issue(operator, people),
        **HASHES,
    )
    settings: dict[str, object] = {"modes": frozenset({mode}), "colluders": colluders, **policy}
    return Parties(
        source,
        operator,
        {person.id: person for person in people},
        parameters,
        ClientPolicy(
            operator=operator.public_key,
            federation=FEDERATION,
            run_id=parameters.run_id,
            **{**HASHES, **settings},
        ),
    )


def plain_sum(
    vectors: Mapping[bytes, RingVector], survivors: tuple[bytes, ...], modulus_bits: int
) -> list[int]:
    """Add up with Python integers: the obvious definition."""
    columns = zip(*(vectors[owner].tolist() for owner in survivors), strict=True)
    return [sum(column) % (1 << modulus_bits) for column in columns]


def run(
    parties: Parties, drop: Mapping[bytes, object] | None = None
) -> tuple[Outcome, dict[bytes, RingVector]]:
    """Drive one session over random vectors."""
    vectors = parties.vectors()
    return drive(parties.clients(), parties.server(), bring(parties, vectors.__getitem__), drop), vectors


def assert_exact(outcome: Outcome, vectors: Mapping[bytes, RingVector]) -> None:
    """Check that the opened sum is the plain sum over the survivors."""
    expected = plain_sum(vectors, outcome.sum.survivors, outcome.sum.modulus_bits)
    np.testing.assert_array_equal(outcome.sum.vector, np.array(expected, dtype=outcome.sum.vector.dtype))


CONSTANT = "protocol aborted"


@dataclass
class Table:
    """Hold a session in progress, with everything that was sent so far."""

    parties: Parties
    clients: dict[bytes, ClientSession]
    server: ServerSession
    vectors: dict[bytes, np.ndarray]
    sent: dict[bytes, bytes]

    @property
    def ids(self) -> list[bytes]:
        return list(self.clients)

    def adverts(self) -> list[messages.Advert]:
        return messages.read_roster(self.server.roster_message())


def play(parties: Parties, until: Stage) -> Table:
    """Play honestly up to the point where clients are about to act at a stage."""
    table = Table(parties, parties.clients(), parties.server(), parties.vectors(), {})
    server = table.server

    def each(act: Callable[[bytes, ClientSession], bytes], receive: Callable[[bytes], bytes]) -> None:
        for owner, session in table.clients.items():
            table.sent[owner] = act(owner, session)
            receive(table.sent[owner])

    if until > Stage.ADVERTISE:
        each(lambda owner, session: session.advertise(), server.receive_advertisement)
        server.roster_message()
    if until > Stage.SHARE:
        each(lambda owner, session: session.share(server.roster_message()), server.receive_shares)
        server.delivery_for(table.ids[0])
    if until > Stage.MASK:
        each(
            lambda owner, session: mask(session, server.delivery_for(owner), table.vectors[owner]),
            server.receive_masked_input,
        )
    if until > Stage.CONFIRM and parties.parameters.mode == "active":
        each(lambda owner, session: session.confirm(server.survivors_message()), server.receive_confirmation)
    return table


def assert_left(session: ClientSession) -> None:
    """Check that a client is out for good: no secrets, no further answer at any stage."""
    assert session.stage is Stage.ABORTED
    assert session._secrets is None
    assert session._channel_key is None
    for call in (
        session.advertise,
        lambda: session.share(b""),
        lambda: mask(session, b"", np.zeros(11, dtype=np.uint32)),
        lambda: session.confirm(b""),
        lambda: session.unmask(b""),
    ):
        refused(call)


def refused(call: Callable[[], object]) -> None:
    """Check that a call fails with the constant error and nothing attached to it."""
    with pytest.raises(ProtocolError) as caught:
        call()
    assert str(caught.value) == CONSTANT
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def assert_exact_sum(server: ServerSession, table: Table, survivors: list[bytes]) -> None:
    expected = np.sum([table.vectors[owner] for owner in survivors], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(server.finish().vector, expected)
