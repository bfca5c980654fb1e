"""Rounds whose keys are agreed on during the round before: two client messages a round, the same refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.secagg import DEFERRED_MODEL, ClientSession, ServerSession, Stage, messages
from defenses.secagg.graph import Mode
from tests.secagg.parties import (
    Parties,
    gather,
    mask,
    play,
    refused,
)


def deferred(mode: Mode, count: int = 5) -> Parties:
    parties = gather(count, mode=mode, deferred_model=True)
    return parties.next_round(round=1, model_hash=DEFERRED_MODEL)


def model_of(round_number: int) -> bytes:
    return bytes([round_number]) * 32


def sessions(parties: Parties, round_number: int) -> tuple[dict[bytes, ClientSession], ServerSession]:
    parties = parties.next_round(round=round_number, model_hash=DEFERRED_MODEL)
    parties = replace(parties, source=parties.source.derive("round", round_number))
    return parties.clients(), parties.server()


@pytest.mark.parametrize("mode, expected", [("semi_honest", 2), ("active", 3)])
def test_a_steady_round_takes_two_client_messages_and_one_more_to_confirm(mode: Mode, expected: int):
    """Upload and next advert travel together, and so do answer and next shares;
    confirming stays a message.
    """
    parties = deferred(mode)
    owners = list(parties.people)
    now, server = sessions(parties, 1)
    for owner in owners:
        server.receive_advertisement(now[owner].advertise())
    for owner in owners:
        server.receive_shares(now[owner].share(server.roster_message()))
    for round_number in range(1, 4):
        following, next_server = sessions(parties, round_number + 1)
        sent = dict.fromkeys(owners, 0)
        vectors = {
            owner: np.full(11, round_number + place, dtype=np.uint32) for place, owner in enumerate(owners)
        }
        deliveries = {owner: server.delivery_for(owner) for owner in owners}
        server.bind_model(model_of(round_number))
        for owner in owners:
            upload = mask(now[owner], deliveries[owner], vectors[owner], model_hash=model_of(round_number))
            parts = messages.unbundle(messages.bundle([upload, following[owner].advertise()]))
            server.receive_masked_input(parts[0])
            next_server.receive_advertisement(bytes(parts[1]))
            sent[owner] += 1
        for owner in owners if mode == "active" else []:
            server.receive_confirmation(now[owner].confirm(server.survivors_message()))
            sent[owner] += 1
        for owner in owners:
            answer = now[owner].unmask(server.request_for(owner))
            shares = following[owner].share(next_server.roster_message())
            parts = messages.unbundle(messages.bundle([answer, shares]))
            server.receive_response(bytes(parts[0]))
            next_server.receive_shares(bytes(parts[1]))
            sent[owner] += 1
        total = server.finish().vector
        np.testing.assert_array_equal(total, np.sum(list(vectors.values()), axis=0, dtype=np.uint32))
        assert set(sent.values()) == {expected}
        now, server = following, next_server


def test_a_client_lost_between_rounds_is_recovered_like_any_other():
    parties = deferred("active")
    table = play_deferred(parties)
    clients, server, owners = table
    server.delivery_for(owners[1])
    server.bind_model(model_of(1))
    vector = np.arange(11, dtype=np.uint32)
    for owner in owners[1:]:
        server.receive_masked_input(
            mask(clients[owner], server.delivery_for(owner), vector, model_hash=model_of(1))
        )
    for owner in owners[1:]:
        server.receive_confirmation(clients[owner].confirm(server.survivors_message()))
    for owner in owners[1:]:
        server.receive_response(clients[owner].unmask(server.request_for(owner)))
    np.testing.assert_array_equal(server.finish().vector, vector * np.uint32(4))


def play_deferred(parties: Parties) -> tuple[dict[bytes, ClientSession], ServerSession, list[bytes]]:
    clients, server = parties.clients(), parties.server()
    for session in clients.values():
        server.receive_advertisement(session.advertise())
    for session in clients.values():
        server.receive_shares(session.share(server.roster_message()))
    return clients, server, list(clients)


def test_a_split_model_is_found_out_before_any_share_is_given_up():
    """A server that shows one client another model:
    an honest server drops its upload, a malicious one gets no answer.
    """
    clients, server, owners = play_deferred(deferred("active"))
    deliveries = {owner: server.delivery_for(owner) for owner in owners}
    server.bind_model(model_of(1))
    vector = np.zeros(11, dtype=np.uint32)
    odd = mask(clients[owners[0]], deliveries[owners[0]], vector, model_hash=model_of(2))
    refused(lambda: server.receive_masked_input(odd))
    for owner in owners[1:]:
        mask(clients[owner], deliveries[owner], vector, model_hash=model_of(1))
    everybody = messages.write_survivors(range(5), 5)
    confirmations = [messages.read_confirmation(clients[owner].confirm(everybody))[1] for owner in owners]
    for owner in owners[1:]:
        peers = [other for other in owners if other != owner]
        rows = [(place, confirmations[owners.index(peer)]) for place, peer in enumerate(peers)]
        refused(lambda o=owner, r=rows: clients[o].unmask(messages.write_active_request(r, 4)))


def test_masks_of_clients_with_different_models_do_not_cancel():
    clients, server, owners = play_deferred(deferred("semi_honest"))
    zero = np.zeros(11, dtype=np.uint32)
    uploads = [
        mask(clients[owner], server.delivery_for(owner), zero, model_hash=model_of(1 + (owner == owners[0])))
        for owner in owners
    ]
    seeds = {bytes(upload[98:]) for upload in uploads}
    assert len(seeds) == 5


def test_a_deferred_model_must_be_named_once_and_be_allowed():
    parties = deferred("active")
    strict = replace(parties, policy=replace(parties.policy, deferred_model=False))
    with pytest.raises(ParameterError, match="model_hash: deferred"):
        strict.clients()
    clients, server, owners = play_deferred(parties)
    delivery = server.delivery_for(owners[0])
    for unnamed in (None, b"", b"model"):
        with pytest.raises(ParameterError, match="model_hash: name it"):
            clients[owners[0]].mask(
                delivery, np.zeros(11, dtype=np.uint32), update=b"u" * 32, model_hash=unnamed
            )
    upload = mask(clients[owners[0]], delivery, np.zeros(11, dtype=np.uint32), model_hash=model_of(1))
    refused(lambda: server.receive_masked_input(upload))
    server.bind_model(model_of(1))
    with pytest.raises(ProtocolError):
        server.bind_model(model_of(1))
    server.receive_masked_input(upload)


def test_a_model_named_up_front_cannot_be_exchanged_when_masking():
    table = play(gather(4), Stage.MASK)
    owner = table.ids[0]
    with pytest.raises(ProtocolError):
        table.server.bind_model(model_of(1))
    session = table.clients[owner]
    refused(
        lambda: mask(session, table.server.delivery_for(owner), table.vectors[owner], model_hash=model_of(1))
    )
    other = table.clients[table.ids[1]]
    mask(other, table.server.delivery_for(other.id), table.vectors[other.id], model_hash=b"m" * 32)


def test_bundles_are_taken_apart_whole_or_not_at_all():
    whole = messages.bundle([b"one", b"", b"three"])
    assert [bytes(part) for part in messages.unbundle(whole)] == [b"one", b"", b"three"]
    assert messages.unbundle(messages.bundle([])) == []
    for damaged in (
        whole[:-1],
        whole + b"\0",
        b"\x02\x08" + whole[2:],
        whole[:2] + b"\xff" * 8 + whole[10:],
        b"",
    ):
        refused(lambda damaged=damaged: messages.unbundle(damaged))
