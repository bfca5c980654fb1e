"""The strongest attacker of the threat model: a lying server with everything its corrupted clients know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import ClientSession, Stage, messages, shamir
from defenses.secagg.keys import agree, public_of
from defenses.secagg.masks import Mask, add_masks
from tests.secagg.parties import (
    NOW,
    Table,
    gather,
    mask,
    play,
    refused,
)

CORRUPTED = 3


def answers_of_a_split_cohort(table: Table) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Tell one honest client that the victim uploaded and two that it did not, with corrupted clients
    confirming both.

    Returns the shares of the victim's self-mask secret and of its key that the coalition ends up with, by
    point.
    """
    ids, count = table.ids, len(table.ids)
    victim, corrupted, told_alive, told_dead = 0, range(1, 1 + CORRUPTED), [4], [5, 6]
    everybody, others = range(count), range(1, count)
    known: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
    for place in corrupted:  # what corrupted clients hold, they hand over
        key_share, self_share = table.clients[ids[place]]._held().shares[victim]
        known[0][place], known[1][place] = self_share, key_share
    transcript = table.clients[ids[0]].transcript
    for group, survivors in ((told_alive, everybody), (told_dead, others)):
        statement = messages.alive_statement(transcript, (ids[place] for place in survivors))
        signed = {place: table.parties.people[ids[place]].sign(statement) for place in corrupted}
        honest = [victim, *group] if group is told_alive else group
        for place in honest:
            claim = messages.write_survivors(survivors, count)
            signed[place] = messages.read_confirmation(table.clients[ids[place]].confirm(claim))[1]
        for place in group:
            neighbours = [other for other in range(count) if other != place]
            rows = [(neighbours.index(other), signed[other]) for other in sorted(signed) if other != place]
            answer = table.clients[ids[place]].unmask(messages.write_active_request(rows, count - 1))
            body = messages.SignedBody.from_bytes(answer, messages.Kind.RESPONSE).body
            share = messages.read_shares(body)[0]  # the victim is first among everybody's neighbours
            known[0 if group is told_alive else 1][place] = share
    return known


def test_a_threshold_one_too_low_opens_a_client_and_the_policy_refuses_it():
    """Seven clients, three corrupted: 2t > k + c asks for t = 5.

    At t = 4 the split cohort opens the victim.
    """
    parties = gather(7, threshold=4)
    table = play(parties, Stage.MASK)
    ids, server = table.ids, table.server
    uploads = [mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner]) for owner in ids]
    self_shares, key_shares = answers_of_a_split_cohort(table)
    transcript = table.clients[ids[0]].transcript
    secret, key = (shamir.combine(dict(list(shares.items())[:4])) for shares in (self_shares, key_shares))
    advert = server._adverts[ids[0]]
    assert public_of(key) == advert.mask_key
    masks = [Mask(messages.self_seed(secret, transcript=transcript, owner=ids[0]), negative=True)]
    peers = [server._adverts[owner] for owner in ids[1:]]
    for peer, shared in zip(peers, agree(key, [peer.mask_key for peer in peers])):
        seed = messages.pair_seed(shared, transcript=transcript, one=ids[0], other=peer.id)
        masks.append(Mask(seed, negative=ids[0] < peer.id))
    opened = np.frombuffer(uploads[0][98:], dtype=np.uint32).copy()
    add_masks(opened, masks)
    np.testing.assert_array_equal(opened, table.vectors[ids[0]])  # the attack works where the rule is broken

    with pytest.raises(ParameterError, match="threshold = 4: must be at least 5 against 3 colluders"):
        gather(7, threshold=4, colluders=CORRUPTED, minimum_survivors=6).clients()


def test_the_same_split_fails_at_the_required_threshold():
    table = play(gather(7, threshold=5, colluders=CORRUPTED, minimum_survivors=6), Stage.MASK)
    for owner in table.ids:
        mask(table.clients[owner], table.server.delivery_for(owner), table.vectors[owner])
    with pytest.raises(ProtocolError):
        answers_of_a_split_cohort(table)


def test_a_client_that_hears_only_from_corrupted_neighbours_masks_nothing():
    """Isolation: with nobody honest among its masks, the coalition could subtract them all."""
    table = play(gather(7, colluders=CORRUPTED, minimum_survivors=6), Stage.MASK)
    victim = table.ids[0]
    rows = messages.read_delivery(table.server.delivery_for(victim), 6)[:CORRUPTED]
    refused(lambda: mask(table.clients[victim], messages.write_delivery(rows, 6), table.vectors[victim]))


def test_two_clients_with_one_stream_of_randomness_do_not_take_part_together():
    """A forked process or a copied seed gives two clients the same keys; the session notices."""
    parties = gather(4)
    ids = list(parties.people)
    twins = [
        ClientSession(
            parties.people[owner], parties.parameters, parties.policy, RandomSource.seeded(99), now=NOW
        )
        for owner in ids[:2]
    ]
    server = parties.server()
    first, second = (twin.advertise() for twin in twins)
    server.receive_advertisement(first)
    refused(lambda: server.receive_advertisement(second))
    others = [parties.clients_without_guard(owner).advertise() for owner in ids[2:]]
    roster = messages.write_roster(
        sorted(
            (messages.read_advert(advert) for advert in (first, second, *others)),
            key=lambda advert: advert.id,
        )
    )
    refused(lambda: twins[0].share(roster))


def test_a_phantom_survivor_opens_nothing():
    """The server counts a client that never uploaded among the survivors,
    to reach the minimum with fewer vectors.
    """
    parties = gather(6, minimum_survivors=6)
    table = play(parties, Stage.MASK)
    ids, server = table.ids, table.server
    for owner in ids[1:]:
        server.receive_masked_input(
            mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner])
        )
    mask(table.clients[ids[0]], server.delivery_for(ids[0]), table.vectors[ids[0]])  # lost on the way
    server._uploaded.add(0)
    for owner in ids:
        server.receive_confirmation(table.clients[owner].confirm(server.survivors_message()))
    for owner in ids:
        server.receive_response(table.clients[owner].unmask(server.request_for(owner)))
    partial = np.sum([table.vectors[owner] for owner in ids[1:]], axis=0, dtype=np.uint32)
    assert (server.finish().vector != partial).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_a_lying_server_says_no_honest_client_is_opened(data: st.DataObject):
    """Any deliveries, any two survivor sets told to anybody, corrupted clients signing everything.

    For every honest client the coalition must end up short of `threshold` shares of at least one of its two
    secrets.
    """
    colluders = data.draw(st.integers(0, 2))
    count = data.draw(st.integers(5, 7))
    parties = gather(count, colluders=colluders, minimum_survivors=max(3, colluders + 2), minimum_honest=2)
    table = play(parties, Stage.MASK)
    ids, threshold = table.ids, parties.parameters.threshold
    corrupted, honest = set(range(colluders)), list(range(colluders, count))
    claims = [sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=3))) for _ in range(2)]
    told = {place: data.draw(st.integers(0, 1)) for place in honest}
    signed: list[dict[int, bytes]] = [{}, {}]
    transcript = table.clients[ids[0]].transcript
    for number, claim in enumerate(claims):
        statement = messages.alive_statement(transcript, (ids[place] for place in claim))
        for place in corrupted & set(claim):
            signed[number][place] = table.parties.people[ids[place]].sign(statement)
    for place in honest:
        session, rows = (
            table.clients[ids[place]],
            messages.read_delivery(table.server.delivery_for(ids[place]), count - 1),
        )
        if data.draw(st.booleans()):
            rows = [row for row in rows if data.draw(st.booleans()) or row[0] % 2]
        try:
            mask(session, messages.write_delivery(rows, count - 1), table.vectors[ids[place]])
            confirmation = session.confirm(messages.write_survivors(claims[told[place]], count))
        except ProtocolError:
            continue
        signed[told[place]][place] = messages.read_confirmation(confirmation)[1]
    gathered = {owner: [set(corrupted), set(corrupted)] for owner in honest}
    for place in honest:
        session, claim, available = table.clients[ids[place]], claims[told[place]], signed[told[place]]
        if session.stage is not Stage.UNMASK:
            continue
        owners, neighbours = (
            sorted(session._held().shares),
            [other for other in range(count) if other != place],
        )
        rows = [(neighbours.index(other), available[other]) for other in sorted(available) if other != place]
        try:
            session.unmask(messages.write_active_request(rows, count - 1))
        except ProtocolError:
            continue
        for owner in set(owners) - corrupted:
            gathered[owner][0 if owner in claim else 1].add(place)
    for self_holders, key_holders in gathered.values():
        assert len(self_holders) < threshold or len(key_holders) < threshold
