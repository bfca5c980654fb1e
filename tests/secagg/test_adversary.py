"""Servers and clients that leave the protocol: every abort of the catalogue, and attacks that must come to
nothing.

Each attack is played against the real sessions with everything the attacker could have: the wire formats, its
own keys, the adverts, all messages. Where it matters, the attack is shown to work once the check it targets
is absent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import (
    ReplayGuard,
    ClientSession,
    Identity,
    Roster,
    Stage,
    drive,
    messages,
)
from defenses.secagg.keys import public_of
from defenses.secagg.masks import Mask, add_masks
from tests.secagg.parties import (
    NOW,
    Parties,
    Table,
    assert_exact_sum,
    assert_left,
    bring,
    gather,
    issue,
    mask,
    play,
    refused,
    run,
)

# R0 and R1: who is there


def tampered_rosters(table: Table) -> dict[str, bytes]:
    """Return rosters a malicious server might send to the first client."""
    adverts = table.adverts()
    own, other, third = adverts[0], adverts[1], adverts[2]
    stranger = Identity.generate(RandomSource.seeded(77))
    session_id = table.parties.parameters.session_id

    def signed_by(identity: Identity, *, owner: bytes, channel: bytes, mask: bytes) -> messages.Advert:
        unsigned = messages.Advert(
            id=owner, channel_key=channel, mask_key=mask, nonce=b"n" * 32, signature=b""
        )
        return replace(unsigned, signature=identity.sign(unsigned.statement(session_id)))

    fresh = [public_of(bytes([seed]) * 32) for seed in (1, 2, 3)]
    colluder = table.parties.people[other.id]
    rosters = {
        "own advert missing": adverts[1:],
        "own keys exchanged": [replace(own, channel_key=fresh[0]), *adverts[1:]],
        "own nonce altered": [replace(own, nonce=bytes(32)), *adverts[1:]],
        "another's channel key substituted": [own, replace(other, channel_key=fresh[0]), *adverts[2:]],
        "another's mask key substituted": [own, replace(other, mask_key=fresh[0]), *adverts[2:]],
        "substituted and signed by a stranger": [
            own, signed_by(stranger, owner=other.id, channel=fresh[0], mask=fresh[1]), *adverts[2:]
        ],
        "signature of another": [own, replace(other, signature=third.signature), *adverts[2:]],
        "somebody twice": [own, other, other, *adverts[2:]],
        "a stranger added": [
            *adverts, signed_by(stranger, owner=stranger.id, channel=fresh[0], mask=fresh[1]),
        ],
        "too few": adverts[:2],
        "a colluder reusing a victim's mask key": [
            own, signed_by(colluder, owner=other.id, channel=fresh[0], mask=third.mask_key), *adverts[2:]
        ],
        "a colluder with one key for both uses": [
            own, signed_by(colluder, owner=other.id, channel=fresh[0], mask=fresh[0]), *adverts[2:]
        ],
        "a colluder with the same point encoded twice": [
            own, signed_by(colluder, owner=other.id, channel=fresh[0], mask=third.mask_key[:31] + bytes(
                [third.mask_key[31] | 0x80])), *adverts[2:]
        ],
        "a colluder with a key of low order": [
            own, signed_by(colluder, owner=other.id, channel=bytes(32), mask=fresh[0]), *adverts[2:]
        ],
    }  # fmt: skip
    written = {
        name: messages.write_roster(sorted(rows, key=lambda row: row.id)) for name, rows in rosters.items()
    }
    written["not sorted"] = messages.write_roster(reversed(adverts))
    written["nobody"] = messages.header(messages.Kind.ROSTER)
    written["another version"] = b"\x01" + table.server.roster_message()[1:]
    written["cut short"] = table.server.roster_message()[:-1]
    return written


ROSTERS = list(tampered_rosters(play(gather(5), Stage.SHARE)))


@pytest.mark.parametrize("attack", ROSTERS)
def test_a_tampered_roster_is_refused(attack: str):
    table = play(gather(5), Stage.SHARE)
    victim = table.clients[table.ids[0]]
    refused(lambda: victim.share(tampered_rosters(table)[attack]))
    assert_left(victim)


LOW_ORDER = [
    0, 1, 2**255 - 20,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]  # fmt: skip


@pytest.mark.parametrize("use", ["channel_key", "mask_key"])
@pytest.mark.parametrize("point", LOW_ORDER, ids=["0", "1", "-1", "order 8", "order 8 too"])
def test_a_key_of_low_order_is_refused_by_the_server_and_the_others_go_on(point: int, use: str):
    """One member could otherwise have all honest ones leave: nobody can agree on a secret with such a key.

    The honest server refuses it; a lying one that passes it on gets no shares, let alone a masked vector.
    """
    parties = gather(5)
    table = play(parties, Stage.ADVERTISE)
    ids, server = table.ids, table.server
    adverts = [table.clients[owner].advertise() for owner in ids[:4]]
    for advert in adverts:
        server.receive_advertisement(advert)
    unsigned = messages.Advert(
        id=ids[4],
        channel_key=public_of(b"c" * 32),
        mask_key=public_of(b"m" * 32),
        nonce=bytes(32),
        signature=b"",
    )
    unsigned = replace(unsigned, **{use: point.to_bytes(32, "little")})
    colluder = parties.people[ids[4]]
    low = replace(unsigned, signature=colluder.sign(unsigned.statement(parties.parameters.session_id)))
    refused(lambda: server.receive_advertisement(messages.write_advert(low)))
    victim = table.clients[ids[3]]
    passed_on = messages.write_roster([*(messages.read_advert(advert) for advert in adverts), low])
    refused(lambda: victim.share(passed_on))
    assert_left(victim)
    for owner in ids[:3]:
        server.receive_shares(table.clients[owner].share(server.roster_message()))


def test_a_client_with_another_model_cannot_be_in_the_same_session():
    """Model inconsistency: the hash of the model is in every signature, so a split cohort does not form."""
    parties = gather(4)
    other = replace(parties, parameters=replace(parties.parameters, model_hash=b"M" * 32))
    table = play(parties, Stage.ADVERTISE)
    ids = table.ids
    split = ClientSession(
        Identity(parties.people[ids[0]].seed(), guard=ReplayGuard.in_memory()),
        other.parameters,
        parties.policy,
        parties.source,
        now=NOW,
    )
    adverts = {ids[0]: split.advertise(), **{owner: table.clients[owner].advertise() for owner in ids[1:]}}
    refused(lambda: table.server.receive_advertisement(adverts[ids[0]]))
    joined = messages.write_roster(messages.read_advert(adverts[owner]) for owner in sorted(ids))
    for session in (split, table.clients[ids[1]]):
        refused(lambda session=session: session.share(joined))


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"mode": "semi_honest"},
        {"run_id": b"r" * 16},
        {"threshold": 4},
        {"layout_hash": b"L" * 32},
        {"quantization_hash": b"Q" * 32},
        {"attempt": 1},
        {"backbone_hash": b"B" * 32},
        {"mechanism_hash": b"D" * 32},
    ],
)
def test_an_advert_of_another_session_is_refused(changes: dict[str, object]):
    """Replay and downgrade: the same identities under any other parameters sign something else."""
    parties = gather(5)
    own = {name: value for name, value in changes.items() if name.endswith("_hash") or name == "run_id"}
    policy = replace(parties.policy, modes=frozenset({"active", "semi_honest"}), **own)
    other = replace(parties, parameters=replace(parties.parameters, **changes), policy=policy)
    person = next(iter(parties.people.values()))
    elsewhere = ClientSession(
        Identity(person.seed(), guard=ReplayGuard.in_memory()),
        other.parameters,
        policy,
        parties.source,
        now=NOW,
    )
    refused(lambda: parties.server().receive_advertisement(elsewhere.advertise()))


def test_two_clients_with_different_rosters_cannot_read_each_other():
    """The transcript salts every key: a server that shows different cohorts gets ciphertexts nobody opens."""
    table = play(gather(6), Stage.SHARE)
    adverts, ids = table.adverts(), table.ids
    one, two = table.clients[ids[0]], table.clients[ids[1]]
    everybody, fewer = messages.write_roster(adverts), messages.write_roster(adverts[:5])
    sealed_one = messages.SealedShares.from_bytes(one.share(everybody))
    two.share(fewer)
    delivery = messages.write_delivery([(0, sealed_one.ciphertexts[0])], 4)
    refused(lambda: mask(two, delivery, table.vectors[ids[1]]))


# Policy


WEAKER: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({}, {"minimum_survivors": 4}, "minimum_survivors = 3"),
    ({}, {"minimum_threshold": 6}, "threshold = 5"),
    ({}, {"colluders": 3}, "minimum_survivors = 3: must be at least 6"),
    ({"minimum_survivors": 6}, {"colluders": 3}, "threshold = 5: must be at least 7"),
    ({"mode": "semi_honest", "threshold": 2}, {}, "mode = semi_honest"),
    ({}, {"modulus_bits": frozenset({24})}, "modulus_bits = 32"),
    ({}, {"maximum_length": 10}, "length = 11"),
    ({}, {"quantization_hash": b"other" * 6}, "quantization_hash"),
    ({}, {"run_id": b"other" * 3}, "run_id"),
    ({}, {"backbone_hash": b"other" * 6}, "backbone_hash"),
    ({}, {"layout_hash": b"other" * 6}, "layout_hash"),
    ({}, {"mechanism_hash": b"other" * 6}, "mechanism_hash"),
    ({}, {"federation": "another"}, "roster: of another federation"),
    ({}, {"operator": b"x" * 32}, "roster: not signed by the operator"),
    ({"graph": "harary", "neighbours": 4, "threshold": 3}, {"colluders": 1}, "neighbours = 4: too few"),
]


@pytest.mark.parametrize("proposed, insisted, message", WEAKER, ids=[row[2] for row in WEAKER])
def test_parameters_weaker_than_the_clients_policy_are_refused(
    proposed: dict[str, object], insisted: dict[str, object], message: str
):
    parties = gather(10)
    policy = replace(parties.policy, **insisted)
    parameters = replace(parties.parameters, **proposed)
    person = next(iter(parties.people.values()))
    with pytest.raises(ParameterError, match=message):
        ClientSession(person, parameters, policy, parties.source, now=NOW)
    assert not person.guard.rounds  # a refused proposal does not use up the round


@pytest.mark.parametrize("settings", [{"minimum_survivors": 2}, {"minimum_honest": 1}, {"colluders": -1}])
def test_a_policy_that_protects_nobody_is_refused(settings: dict[str, int]):
    with pytest.raises(ParameterError):
        replace(gather(3).policy, **settings)


def test_a_cohort_shrunk_until_the_ring_is_unsafe_is_refused():
    """The server withholds adverts: what was safe among all is not among those left."""
    parties = gather(80, neighbours=22, threshold=16, colluders=10, minimum_survivors=60, security_bits=10)
    table = play(parties, Stage.ADVERTISE)
    adverts = sorted(
        (messages.read_advert(session.advertise()) for session in table.clients.values()),
        key=lambda row: row.id,
    )
    table.clients[adverts[0].id].share(messages.write_roster(adverts))
    refused(lambda: table.clients[adverts[1].id].share(messages.write_roster(adverts[:60])))
    refused(lambda: table.clients[adverts[2].id].share(messages.write_roster(adverts[:59])))


def test_a_roster_comes_from_the_operator_alone():
    operator, server, *people = (Identity.generate(RandomSource.seeded(seed)) for seed in range(6))
    roster = issue(operator, people)
    assert Roster.from_bytes(roster.to_bytes(), operator=operator.public_key) == roster
    forged = issue(server, people)
    refused(lambda: Roster.from_bytes(forged.to_bytes(), operator=operator.public_key))
    refused(
        lambda: Roster(
            operator=operator.public_key,
            federation=forged.federation,
            serial=forged.serial,
            expires=forged.expires,
            public_keys=forged.public_keys,
            signature=forged.signature,
        )
    )
    extended = (*roster.public_keys, server.public_key)
    with pytest.raises((ProtocolError, ParameterError)):
        replace(roster, public_keys=extended)
    data = roster.to_bytes()
    for damaged in (
        b"",
        data[:-1],
        b"\0" + data[1:],
        data + b"\0",
        data[:1] + data[33:],
        data[:40] + data[8:],
        data[:5] + bytes([data[5] ^ 1]) + data[6:],  # serial
        data[:15] + bytes([data[15] ^ 1]) + data[16:],  # expiry
        data[:20] + bytes([data[20] ^ 1]) + data[21:],  # name
        b"\x01" + data[1:],
    ):
        refused(lambda damaged=damaged: Roster.from_bytes(damaged, operator=operator.public_key))
    with pytest.raises(ParameterError):
        issue(operator, [people[0], people[0]])


def test_an_identity_off_the_roster_takes_no_part():
    parties = gather(4)
    with pytest.raises(ParameterError, match="not on the operator's roster"):
        ClientSession(
            Identity.generate(parties.source), parties.parameters, parties.policy, parties.source, now=NOW
        )


# R2: shares delivered


def test_an_altered_share_is_refused():
    table = play(gather(5), Stage.MASK)
    owner = table.ids[0]
    for position in (2, 3, 4, 40, -1):
        fresh = play(gather(5), Stage.MASK)
        delivery = bytearray(fresh.server.delivery_for(owner))
        delivery[position] ^= 1
        refused(
            lambda fresh=fresh, delivery=delivery: mask(
                fresh.clients[owner], bytes(delivery), fresh.vectors[owner]
            )
        )
        assert_left(fresh.clients[owner])


def test_shares_cannot_be_swapped_replayed_or_turned_back():
    table = play(gather(5), Stage.MASK)
    owner, vector = table.ids[0], table.vectors[table.ids[0]]
    rows = messages.read_delivery(table.server.delivery_for(owner), 4)
    own = messages.SealedShares.from_bytes(table.sent[owner]).ciphertexts
    attacks = [
        [(0, rows[1][1]), (1, rows[0][1]), *rows[2:]],
        [(0, rows[0][1]), (1, rows[0][1]), *rows[2:]],
        [(place, own[place]) for place in range(4)],
        rows[:2],
        [],
    ]
    for attack in attacks:
        fresh = play(gather(5), Stage.MASK)
        refused(lambda f=fresh, a=attack: mask(f.clients[owner], messages.write_delivery(a, 4), vector))
        assert_left(fresh.clients[owner])


def test_a_wrong_share_point_inside_a_valid_ciphertext_is_refused():
    key, fields = b"k" * 32, {"transcript": b"t" * 32, "sender": b"s" * 32, "receiver": b"r" * 32}
    sealed = messages.seal_shares(key, point=2, key_share=bytes(33), self_share=bytes(33), **fields)
    messages.open_shares(key, sealed, point=2, **fields)
    refused(lambda: messages.open_shares(key, sealed, point=3, **fields))


# R3: survivors


def survivor_lies(table: Table) -> dict[str, bytes]:
    count = len(table.ids)
    return {
        "without me": messages.write_survivors(range(1, count), count),
        "too few": messages.write_survivors(range(2), count),
        "unknown clients": messages.header(messages.Kind.SURVIVORS) + b"\xff",
        "too long": messages.write_survivors(range(count), count) + b"\0",
        "too short": messages.header(messages.Kind.SURVIVORS),
        "another kind": messages.write_request(range(count), count),
    }


@pytest.mark.parametrize("lie", list(survivor_lies(play(gather(5), Stage.CONFIRM))))
def test_a_false_survivor_set_is_refused(lie: str):
    table = play(gather(5), Stage.CONFIRM)
    victim = table.clients[table.ids[0]]
    refused(lambda: victim.confirm(survivor_lies(table)[lie]))
    assert_left(victim)


def test_a_survivor_i_never_heard_from_is_refused():
    """Otherwise a mask that nobody else has would stay in the sum,
    or be opened as if its owner were alive.
    """
    parties = gather(6)
    table = play(parties, Stage.MASK)
    victim, absent = table.ids[0], 3
    rows = [row for row in messages.read_delivery(table.server.delivery_for(victim), 5) if row[0] != absent]
    session = table.clients[victim]
    mask(session, messages.write_delivery(rows, 5), table.vectors[victim])
    refused(lambda: session.confirm(messages.write_survivors(range(6), 6)))
    assert_left(session)


def test_confirmations_of_a_split_survivor_set_are_refused():
    """Equivocation: one client is told everybody is alive, the others that one is gone."""
    table = play(gather(6), Stage.CONFIRM)
    ids = table.ids
    told_all = messages.write_survivors(range(6), 6)
    told_fewer = messages.write_survivors(range(5), 6)
    victim = table.clients[ids[0]]
    victim.confirm(told_all)
    others = [messages.read_confirmation(table.clients[owner].confirm(told_fewer))[1] for owner in ids[1:5]]
    request = messages.write_active_request(list(enumerate(others)), 5)
    refused(lambda: victim.unmask(request))
    assert_left(victim)


def test_too_few_or_misplaced_confirmations_are_refused():
    threshold = gather(6).parameters.threshold
    for build in (
        lambda rows: rows[: threshold - 1],
        lambda rows: [],
        lambda rows: [(place, rows[0][1]) for place, _ in rows],
        lambda rows: [*rows[:-1], (rows[-1][0], bytes(64))],
    ):
        table = play(gather(6), Stage.UNMASK)
        owner = table.ids[0]
        rows = messages.read_active_request(table.server.request_for(owner), 5)
        victim = table.clients[owner]
        refused(lambda v=victim, r=rows, b=build: v.unmask(messages.write_active_request(b(r), 5)))
        assert_left(victim)


# R4: one answer


@pytest.mark.parametrize("mode", ["active", "semi_honest"])
def test_a_second_unmask_request_is_refused(mode: str):
    """Asked twice, a client that answered twice would give away both secrets of a neighbour."""
    table = play(gather(5, mode=mode), Stage.UNMASK)
    owner = table.ids[0]
    request = table.server.request_for(owner)
    session = table.clients[owner]
    session.unmask(request)
    assert session.stage is Stage.DONE
    assert session._secrets is None
    refused(lambda: session.unmask(request))
    if mode == "semi_honest":
        refused(lambda: session.unmask(messages.write_request(range(4), 5)))


@pytest.mark.parametrize("mode", ["active", "semi_honest"])
def test_a_response_has_one_secret_of_each_neighbour(mode: str):
    """The client derives who is dead itself:
    for every owner exactly one of its two shares is in the answer.
    """
    parties = gather(6, mode=mode)
    table = play(parties, Stage.MASK)
    ids = table.ids
    for owner in ids[1:]:
        upload = mask(table.clients[owner], table.server.delivery_for(owner), table.vectors[owner])
        table.server.receive_masked_input(upload)
    if mode == "active":
        for owner in ids[1:]:
            table.server.receive_confirmation(table.clients[owner].confirm(table.server.survivors_message()))
    witness = table.clients[ids[1]]
    held = dict(witness._held().shares)
    body = messages.SignedBody.from_bytes(
        witness.unmask(table.server.request_for(ids[1])), messages.Kind.RESPONSE
    ).body
    answered = messages.read_shares(body)
    assert len(answered) == len(held) == 5
    for (owner, (key_share, self_share)), answer in zip(sorted(held.items()), answered):
        assert answer == (key_share if owner == 0 else self_share)
        assert (self_share if owner == 0 else key_share) not in answered


def test_a_late_upload_of_a_client_declared_dead_stays_hidden():
    """The server holds the late vector and all pair masks; the self mask still covers it."""
    parties = gather(6)
    table = play(parties, Stage.MASK)
    ids, server = table.ids, table.server
    late = mask(table.clients[ids[0]], server.delivery_for(ids[0]), table.vectors[ids[0]])
    for owner in ids[1:]:
        server.receive_masked_input(
            mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner])
        )
    for owner in ids[1:]:
        server.receive_confirmation(table.clients[owner].confirm(server.survivors_message()))
    refused(lambda: server.receive_masked_input(late))
    for owner in ids[1:]:
        server.receive_response(table.clients[owner].unmask(server.request_for(owner)))
    collected = server._collect_shares()[0]
    body = messages.SignedBody.from_bytes(late, messages.Kind.MASKED).body
    stripped = np.frombuffer(body, dtype=np.uint32).copy()
    add_masks(
        stripped, [Mask(mask.seed, negative=not mask.negative) for mask in server._pair_masks(0, collected)]
    )
    difference = stripped - table.vectors[ids[0]]
    assert (difference != 0).all()
    commitment = server._commitments[0]
    with pytest.raises(ProtocolError):
        server._recover(
            0,
            collected,
            lambda guess: messages.self_commitment(server._transcript, ids[0], guess) == commitment,
        )
    assert_exact_sum(server, table, ids[1:])


# Order


def test_stages_only_move_forward():
    calls: dict[Stage, Callable[[ClientSession], object]] = {
        Stage.ADVERTISE: lambda session: session.advertise(),
        Stage.SHARE: lambda session: session.share(b""),
        Stage.MASK: lambda session: mask(session, b"", np.zeros(11, dtype=np.uint32)),
        Stage.CONFIRM: lambda session: session.confirm(b""),
        Stage.UNMASK: lambda session: session.unmask(b""),
    }
    for mode in ("active", "semi_honest"):
        for at in calls:
            if mode == "semi_honest" and at is Stage.CONFIRM:
                continue
            for wrong in calls:
                if wrong is at:
                    continue
                table = play(gather(4, mode=mode), at)
                victim = table.clients[table.ids[0]]
                assert victim.stage is at
                refused(lambda v=victim, w=wrong: calls[w](v))
                assert victim._secrets is None


def test_the_server_refuses_messages_out_of_order_and_goes_on():
    parties = gather(4)
    table = play(parties, Stage.SHARE)
    server = table.server
    for owner, message in table.sent.items():
        for receive in (
            server.receive_shares,
            server.receive_masked_input,
            server.receive_confirmation,
            server.receive_response,
            server.receive_complaint,
        ):
            refused(lambda r=receive, m=message: r(m))
        # The advert itself, sent again because its receipt was lost, is acknowledged; another one comes too
        # late.
        assert server.receive_advertisement(message) == owner
        refused(
            lambda owner=owner: server.receive_advertisement(parties.clients_without_guard(owner).advertise())
        )
    for call in (lambda: server.delivery_for(b"nobody"), lambda: server.survivors_message()):
        with pytest.raises((ProtocolError, KeyError)):
            call()


def test_a_round_is_entered_once_and_rounds_only_grow():
    parties = gather(4)
    run(parties)
    person = next(iter(parties.people.values()))
    for round_number in (0, 1):
        earlier = replace(parties.parameters, round=round_number)
        refused(
            lambda earlier=earlier: ClientSession(person, earlier, parties.policy, parties.source, now=NOW)
        )
    ClientSession(person, replace(parties.parameters, round=2), parties.policy, parties.source, now=NOW)
    restarted = Identity(person.seed(), guard=person.guard)
    again = replace(parties.parameters, round=2)
    refused(lambda: ClientSession(restarted, again, parties.policy, parties.source, now=NOW))


# Differencing


def test_resubmitting_an_update_gives_it_away_and_is_refused():
    """Two sums over cohorts that differ by one client are that client's vector;
    naming the update prevents it.
    """
    parties = gather(5)
    ids, vectors = list(parties.people), parties.vectors()
    first = open_with(parties, vectors, skip=None, remember=False)
    second = open_with(parties.next_round(), vectors, skip=ids[2], remember=False)
    np.testing.assert_array_equal(
        first - second, vectors[ids[2]]
    )  # the attack, where clients remember nothing

    fresh = gather(5, seed=1)
    vectors = fresh.vectors()
    open_with(fresh, vectors, skip=None, remember=True)
    with pytest.raises(ProtocolError):
        open_with(fresh.next_round(), vectors, skip=ids[2], remember=True)


def open_with(
    parties: Parties, vectors: dict[bytes, np.ndarray], *, skip: bytes | None, remember: bool
) -> np.ndarray:
    forgetful = {owner: parties.clients_without_guard(owner) for owner in parties.people}
    clients, server = parties.clients() if remember else forgetful, parties.server()
    present = {owner: session for owner, session in clients.items() if owner != skip}
    for session in present.values():
        server.receive_advertisement(session.advertise())
    for session in present.values():
        server.receive_shares(session.share(server.roster_message()))
    for owner, session in present.items():
        update = hashlib.sha256(b"update 1 of " + owner).digest()
        server.receive_masked_input(mask(session, server.delivery_for(owner), vectors[owner], update=update))
    for session in present.values():
        server.receive_confirmation(session.confirm(server.survivors_message()))
    for owner, session in present.items():
        server.receive_response(session.unmask(server.request_for(owner)))
    return server.finish().vector


def test_an_update_that_left_may_not_be_retried_even_after_an_abort():
    """Others may have opened the first sum without this client's answer,
    so the upload is the point of no return.
    """
    parties = gather(4)
    table = play(parties, Stage.MASK)
    owner = table.ids[0]
    mask(table.clients[owner], table.server.delivery_for(owner), table.vectors[owner], update=b"u" * 32)
    table.clients[owner].discard()
    again = play(parties.next_round(), Stage.MASK)
    refused(
        lambda: mask(
            again.clients[owner], again.server.delivery_for(owner), again.vectors[owner], update=b"u" * 32
        )
    )


def test_rows_touched_by_one_client_show_in_the_sum():
    """Not an attack on the masks but on what a sum is:
    a coordinate only one client moves is that client's.
    """
    parties = gather(5)
    vectors = {owner: np.zeros(11, dtype=np.uint32) for owner in parties.people}
    loner = list(parties.people)[2]
    vectors[loner][7] = 4242
    parties_clients = parties.clients()
    opened = drive(parties_clients, parties.server(), bring(parties, vectors.__getitem__))
    assert opened.sum.vector.tolist() == [0] * 7 + [4242] + [0] * 3
