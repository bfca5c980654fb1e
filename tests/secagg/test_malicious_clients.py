"""Clients that leave the protocol: what they can spoil, what they cannot, and who is blamed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from defenses.errors import ProtocolError
from defenses.secagg import ServerSession, Stage, drive, frame, messages, unframe
from tests.secagg.parties import (
    Table,
    assert_exact,
    assert_exact_sum,
    bring,
    gather,
    mask,
    play,
    refused,
    run,
)


def corrupted_answer(table: Table, owner: bytes) -> bytes:
    """Answer the unmask request with rubbish, properly signed."""
    honest = table.clients[owner].unmask(table.server.request_for(owner))
    body = b"\0" * (len(honest) - 98)
    transcript = table.server._transcript
    digest = hashlib.sha256(body).digest()
    statement = messages.body_statement("response", transcript, owner, digest)
    signature = table.parties.people[owner].sign(statement)
    return messages.header(messages.Kind.RESPONSE) + owner + signature + body


def test_wrong_shares_from_a_few_clients_do_not_stop_the_sum():
    table = play(gather(9), Stage.UNMASK)
    ids = table.ids
    for owner in ids:
        answer = (
            corrupted_answer(table, owner) if owner in ids[:2]
            else table.clients[owner].unmask(table.server.request_for(owner))
        )  # fmt: skip
        table.server.receive_response(answer)
    assert_exact_sum(table.server, table, ids)


def test_wrong_shares_from_too_many_clients_end_the_round_and_open_nothing():
    table = play(gather(5), Stage.UNMASK)
    for owner in table.ids:
        table.server.receive_response(corrupted_answer(table, owner))
    before = table.server._accumulator.copy()
    refused_by_server(table.server)
    np.testing.assert_array_equal(table.server._accumulator, before)


def refused_by_server(server: ServerSession) -> None:
    with pytest.raises(ProtocolError):
        server.finish()
    with pytest.raises(ProtocolError):
        server.finish()


def test_a_client_that_commits_to_another_secret_ends_the_round():
    """Denial of service, noticed: a dealer whose shares do not fit its commitment cannot be opened."""
    table = play(gather(5), Stage.UNMASK)
    table.server._commitments[0] = bytes(32)
    for owner in table.ids:
        table.server.receive_response(table.clients[owner].unmask(table.server.request_for(owner)))
    refused_by_server(table.server)


def test_nobody_can_speak_for_another_client():
    """Uploads, confirmations and answers are signed: a corrupted client cannot pre-empt an honest one."""
    table = play(gather(5), Stage.MASK)
    ids, server = table.ids, table.server
    mine = mask(table.clients[ids[0]], server.delivery_for(ids[0]), table.vectors[ids[0]])
    stolen = bytearray(mine)
    stolen[2:34] = ids[1]
    refused(lambda: server.receive_masked_input(bytes(stolen)))
    server.receive_masked_input(mine)
    assert server.receive_masked_input(mine) == ids[0]  # a retransmission is acknowledged, and counts once
    for owner in ids[1:]:
        server.receive_masked_input(
            mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner])
        )
    confirmation = table.clients[ids[0]].confirm(server.survivors_message())
    refused(lambda: server.receive_confirmation(confirmation[:2] + ids[1] + confirmation[34:]))
    for owner in ids:
        server.receive_confirmation(
            confirmation if owner == ids[0] else table.clients[owner].confirm(server.survivors_message())
        )
    assert server.receive_confirmation(confirmation) == ids[0]
    answer = table.clients[ids[0]].unmask(server.request_for(ids[0]))
    for owner in ids[1:]:
        refused(lambda owner=owner: server.receive_response(answer[:2] + owner + answer[34:]))
        server.receive_response(table.clients[owner].unmask(server.request_for(owner)))
    server.receive_response(answer)
    assert server.receive_response(answer) == ids[0]
    assert_exact_sum(server, table, ids)


def test_a_refused_upload_leaves_the_accumulator_alone():
    table = play(gather(4), Stage.MASK)
    server, owner = table.server, table.ids[0]
    good = bytes(mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner]))
    for bad in (good[:-1], good + b"\0", good[:-1] + bytes([good[-1] ^ 1]), good[:98], b""):
        refused(lambda bad=bad: server.receive_masked_input(bad))
        assert not server._accumulator.any()
    server.receive_masked_input(good)


def test_a_garbled_sum_is_noticed_by_the_count_coordinate():
    """A client that never cancels its masks, or votes twice, moves the constant coordinate."""
    parties = gather(4, length=5)
    payload = np.array([1, 2, 3], dtype=np.uint32)
    vectors = {owner: frame(payload, weight=1, modulus_bits=32) for owner in parties.people}
    loner = next(iter(parties.people))
    vectors[loner] = vectors[loner] * np.uint32(2)
    opened = drive(parties.clients(), parties.server(), bring(parties, vectors.__getitem__))
    refused(lambda: unframe(opened.sum.vector, survivors=4, modulus_bits=32))


def test_the_masked_vector_of_one_client_looks_uniform():
    """Nothing of a constant vector shows through: bytes of the upload are as even as the keystream."""
    parties = gather(3, length=40_000, modulus_bits=16)
    table = play(parties, Stage.MASK)
    owner = table.ids[0]
    upload = mask(table.clients[owner], table.server.delivery_for(owner), np.zeros(40_000, dtype=np.uint32))
    counts = np.bincount(np.frombuffer(upload[98:], dtype=np.uint8), minlength=256)
    expected = 80_000 / 256
    assert 170 < float(((counts - expected) ** 2 / expected).sum()) < 350


def test_the_whole_of_a_session_is_bytes_and_ids():
    """Schema: every message is version, kind and bytes of known length;
    counts and weights ride inside the vector.
    """
    outcome, vectors = run(gather(4))
    assert_exact(outcome, vectors)
    assert all(isinstance(owner, bytes) and len(owner) == 32 for owner in outcome.traffic)


def test_a_client_can_push_one_other_out_but_not_touch_the_sum_of_the_rest():
    """A neighbour's undecipherable shares make a client leave: it cannot be recovered from them later."""
    parties = gather(6)
    table = play(parties, Stage.SHARE)
    ids, server = table.ids, table.server
    roster = server.roster_message()
    for place, owner in enumerate(ids):
        message = table.clients[owner].share(roster)
        if place == 0:
            sealed = messages.SealedShares.from_bytes(message)
            spoiled = [bytes(86), *sealed.ciphertexts[1:]]
            unsigned = messages.SealedShares(owner, sealed.commitment, b"", spoiled)
            signature = parties.people[owner].sign(unsigned.statement(table.clients[owner].transcript))
            message = messages.SealedShares(owner, sealed.commitment, signature, spoiled).to_bytes()
        server.receive_shares(message)
    refused(lambda: mask(table.clients[ids[1]], server.delivery_for(ids[1]), table.vectors[ids[1]]))
    staying = [ids[0], *ids[2:]]
    for owner in staying:
        server.receive_masked_input(
            mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner])
        )
    for owner in staying:
        server.receive_confirmation(table.clients[owner].confirm(server.survivors_message()))
    for owner in staying:
        server.receive_response(table.clients[owner].unmask(server.request_for(owner)))
    assert_exact_sum(server, table, staying)


def test_oversized_messages_are_refused_before_they_are_read():
    table = play(gather(4), Stage.SHARE)
    huge = messages.header(messages.Kind.SHARES) + bytes(50_000_000)
    refused(lambda: table.server.receive_shares(huge))
    victim = table.clients[table.ids[0]]
    refused(lambda: victim.share(messages.header(messages.Kind.ROSTER) + bytes(192 * 100_000)))
