"""Members that deal, hold or send wrongly are named,
and a session does not end for the sake of one of them.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import (
    Complaint,
    NotEnoughClients,
    ServerSession,
    Stage,
    drive,
    left_out,
    messages,
    shamir,
)
from defenses.signatures import verify_signature
from tests.secagg.parties import (
    Parties,
    Table,
    assert_exact,
    assert_exact_sum,
    assert_left,
    bring,
    gather,
    mask,
    play,
    refused,
)

# Shares that do not open


def spoil(parties: Parties, table: Table, dealer: bytes, victims: set[int]) -> bytes:
    """Return the dealer's shares with rubbish for some of its neighbours, properly signed."""
    sealed = messages.SealedShares.from_bytes(table.clients[dealer].share(table.server.roster_message()))
    spoiled = [bytes(86) if place in victims else good for place, good in enumerate(sealed.ciphertexts)]
    unsigned = messages.SealedShares(dealer, sealed.commitment, b"", spoiled)
    signature = parties.people[dealer].sign(unsigned.statement(table.clients[dealer].transcript))
    return messages.SealedShares(dealer, sealed.commitment, signature, spoiled).to_bytes()


def play_spoiled(parties: Parties, victims: set[int]) -> Table:
    """Play up to masking, with the first client dealing rubbish to some."""
    table = play(parties, Stage.SHARE)
    for place, owner in enumerate(table.ids):
        message = (
            spoil(parties, table, owner, victims)
            if place == 0
            else table.clients[owner].share(table.server.roster_message())
        )
        table.server.receive_shares(message)
    return table


def complain(table: Table, owner: bytes) -> bytes:
    """Let a client meet the shares that do not open and return its complaint."""
    session = table.clients[owner]
    refused(lambda: mask(session, table.server.delivery_for(owner), table.vectors[owner]))
    assert_left(session)
    return session.complaint


def test_a_dealer_of_undecipherable_shares_is_named_and_left_out_of_the_next_attempt():
    parties = gather(6)
    table = play_spoiled(parties, victims={0, 3})
    ids, server = table.ids, table.server
    for victim in (ids[1], ids[4]):
        server.receive_complaint(complain(table, victim))
    named = {(complaint.reason, complaint.accuser, complaint.accused) for complaint in server.complaints}
    assert named == {("sealed share", ids[1], ids[0]), ("sealed share", ids[4], ids[0])}
    for complaint in server.complaints:
        verify_signature(
            parties.people[complaint.accuser].public_key, complaint.signature, complaint.statement
        )
    excluded = left_out(server.complaints, colluders=1)
    assert excluded == {ids[0]}

    following = parties.next_round()
    again = ServerSession(following.parameters, source=parties.source, left_out=excluded)
    clients = following.clients()
    refused(lambda: again.receive_advertisement(following.clients_without_guard(ids[0]).advertise()))
    vectors = parties.vectors()
    outcome = drive(clients, again, bring(following, vectors.__getitem__))
    assert_exact(outcome, vectors)
    assert set(outcome.sum.survivors) == set(ids[1:])


def test_the_driver_carries_complaints_and_the_others_go_on():
    """The session itself goes on without the victim; who spoiled it comes with the outcome."""

    class Spoiling(ServerSession):
        """Stand for a dealer whose signed ciphertext for one client is rubbish: deliver and expect it so."""

        def _ciphertext(self, dealer: int, receiver: int) -> bytes:
            return bytes(86) if (dealer, receiver) == (0, 2) else super()._ciphertext(dealer, receiver)

    parties = gather(6)
    ids, vectors = list(parties.people), parties.vectors()
    outcome = drive(parties.clients(), Spoiling(parties.parameters), bring(parties, vectors.__getitem__))
    assert_exact(outcome, vectors)
    assert set(outcome.sum.survivors) == set(ids) - {ids[2]}
    assert [(each.accuser, each.accused) for each in outcome.complaints] == [(ids[2], ids[0])]


def forged_complaint(table: Table, owner: bytes, rows: list[tuple[int, bytes]], signer: bytes) -> bytes:
    body = messages.write_complaint_body(rows, len(table.ids) - 1)
    digest = hashlib.sha256(body).digest()
    statement = messages.body_statement("complaint", table.server._transcript, owner, digest)
    signature = table.parties.people[signer].sign(statement)
    return messages.header(messages.Kind.COMPLAINT) + owner + signature + body


def test_a_complaint_is_signed_about_what_the_dealer_signed_and_instead_of_a_vector():
    parties = gather(6)
    table = play_spoiled(parties, victims={0})
    ids, server = table.ids, table.server
    delivered = messages.read_delivery(server.delivery_for(ids[1]), 5)
    genuine = complain(table, ids[1])
    for bad in (
        forged_complaint(table, ids[1], [(0, bytes(85))], ids[1]),  # about something the dealer never sent
        forged_complaint(table, ids[1], delivered[:1], ids[2]),  # signed by somebody else
        forged_complaint(table, ids[1], [], ids[1]),  # about nothing
        genuine[:-1],
        genuine + b"\0",
        genuine[:-1] + bytes([genuine[-1] ^ 1]),
        messages.header(messages.Kind.COMPLAINT) + bytes(10_000_000),
    ):
        refused(lambda bad=bad: server.receive_complaint(bad))
    assert server.complaints == ()
    upload = mask(table.clients[ids[2]], server.delivery_for(ids[2]), table.vectors[ids[2]])
    server.receive_masked_input(upload)
    rows = messages.read_delivery(server.delivery_for(ids[2]), 5)
    refused(lambda: server.receive_complaint(forged_complaint(table, ids[2], rows[:1], ids[2])))
    assert server.receive_complaint(genuine) == ids[1]
    assert server.receive_complaint(genuine) == ids[1]
    assert len(server.complaints) == 1


def test_who_complained_cannot_upload_in_the_same_session():
    table = play(gather(5), Stage.MASK)
    ids, server = table.ids, table.server
    rows = messages.read_delivery(server.delivery_for(ids[0]), 4)
    upload = mask(table.clients[ids[0]], server.delivery_for(ids[0]), table.vectors[ids[0]])
    server.receive_complaint(forged_complaint(table, ids[0], rows[:1], ids[0]))
    refused(lambda: server.receive_masked_input(upload))


def test_shares_altered_by_the_server_make_no_complaint_an_honest_server_takes():
    """A complaint names the ciphertext, so a lying server can show no dealer's signature beside it."""
    table = play(gather(5), Stage.MASK)
    owner = table.ids[0]
    delivery = bytearray(table.server.delivery_for(owner))
    delivery[10] ^= 1
    session = table.clients[owner]
    refused(lambda: mask(session, bytes(delivery), table.vectors[owner]))
    assert session.complaint
    refused(lambda: table.server.receive_complaint(session.complaint))


def test_other_failures_leave_no_complaint():
    table = play(gather(5), Stage.MASK)
    session = table.clients[table.ids[0]]
    refused(lambda: mask(session, b"\x02\x03rubbish", table.vectors[table.ids[0]]))
    assert session.complaint == b""


# Who is left out


def pair(accuser: int, accused: int) -> Complaint:
    return Complaint(reason="sealed share", accuser=bytes([accuser]), accused=bytes([accused]))


def test_a_liar_that_names_many_is_left_out_itself():
    assert left_out([pair(9, 1)], colluders=1) == {b"\1"}
    assert left_out([pair(9, 1), pair(9, 2)], colluders=1) == {b"\x09"}
    assert left_out([pair(9, 1), pair(9, 2)], colluders=2) == {b"\1", b"\2"}
    assert left_out([pair(1, 9), pair(2, 9), pair(3, 9)], colluders=1) == {b"\x09"}
    assert left_out([], colluders=1) == frozenset()


def test_a_dealer_blamed_by_arithmetic_needs_more_doubt_than_there_are_liars():
    doubtful = Complaint(reason="dealt secret", accused=b"d", liars_needed=2)
    assert left_out([doubtful], colluders=2) == frozenset()
    assert left_out([replace(doubtful, liars_needed=3)], colluders=2) == {b"d"}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_liars_cost_the_honest_little_and_no_honest_accuser_pays(data: st.DataObject):
    """Whatever at most c liars say:
    at most c honest ones each are out, and liars who hurt more are out themselves.
    """
    colluders = data.draw(st.integers(1, 3))
    honest = range(10, 18)
    lies = data.draw(st.sets(st.tuples(st.integers(0, colluders - 1), st.sampled_from(honest))))
    truths = data.draw(st.sets(st.tuples(st.sampled_from(honest), st.integers(0, colluders - 1))))
    excluded = left_out([pair(*edge) for edge in (*lies, *truths)], colluders=colluders)
    for _, liar in truths:
        assert bytes([liar]) in excluded
    for liar in range(colluders):
        named = {member for accuser, member in lies if accuser == liar}
        if len(named) > colluders:
            assert bytes([liar]) in excluded
    innocent = {bytes([member]) for member in honest} & excluded
    assert len(innocent) <= colluders * colluders
    assert innocent <= {bytes([member]) for _, member in lies}


# Wrong shares


def close_polynomials(shares: dict[int, bytes], threshold: int) -> set[tuple[int, ...]]:
    """Return which points are off each polynomial that is off at most half of the spare ones:
    by trying all subsets.
    """
    spare, answers = len(shares) - threshold, set()
    for chosen in itertools.combinations(sorted(shares), threshold):
        off = tuple(x for x in sorted(shares) if extrapolate(shares, chosen, x) != number(shares[x]))
        if len(off) <= spare // 2:
            answers.add(off)
    return answers


def number(share: bytes) -> int:
    return int.from_bytes(share, "big") % shamir.PRIME


def extrapolate(shares: dict[int, bytes], chosen: tuple[int, ...], at: int) -> int:
    """Evaluate the polynomial through the chosen shares by the textbook formula."""
    total = 0
    for x in chosen:
        over, under = 1, 1
        for other in chosen:
            if other != x:
                over, under = over * (at - other) % shamir.PRIME, under * (x - other) % shamir.PRIME
        total += number(shares[x]) * over * pow(under, -1, shamir.PRIME)
    return total % shamir.PRIME


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_wrong_shares_are_named_exactly_up_to_half_of_the_spare_ones(data: st.DataObject):
    threshold = data.draw(st.integers(2, 5))
    dealt_to = data.draw(st.integers(threshold, 10))
    points = sorted(data.draw(st.sets(st.integers(1, dealt_to), min_size=threshold)))
    wrong = data.draw(st.sets(st.sampled_from(points)))
    source = RandomSource.seeded(data.draw(st.integers(0, 1000)))
    secret = source.random_bytes(32)
    dealt = shamir.split(secret, threshold=threshold, shares=dealt_to, source=source)
    shares = {x: source.random_bytes(32).rjust(33, b"\0") if x in wrong else dealt[x - 1] for x in points}
    expected = close_polynomials(shares, threshold)
    if len(wrong) <= (len(points) - threshold) // 2:
        assert expected == {tuple(sorted(wrong))}
        recovered = shamir.recover(shares, threshold=threshold, accept=secret.__eq__, source=source)
        assert recovered == (secret, tuple(sorted(wrong)))
    elif expected:
        assert expected == {shamir.wrong_points(shares, threshold=threshold)}
    else:
        with pytest.raises(ProtocolError):
            shamir.wrong_points(shares, threshold=threshold)


def test_liars_whose_errors_cancel_at_zero_do_not_have_others_named():
    """Two of the first shares are shifted so that they still give the secret:
    the polynomial is another, and the rest are off it.
    """
    source, secret = RandomSource.seeded(4), b"s" * 32
    dealt = shamir.split(secret, threshold=4, shares=8, source=source)
    shares = {x: dealt[x - 1] for x in range(1, 9)}
    unit = {x: (1).to_bytes(33, "big") if x == liar else bytes(33) for liar in (1, 2) for x in range(1, 5)}
    ones = [
        number_at_zero({**dict.fromkeys(unit, bytes(33)), liar: (1).to_bytes(33, "big")}) for liar in (1, 2)
    ]
    shares[1] = ((number(shares[1]) + ones[1]) % shamir.PRIME).to_bytes(33, "big")
    shares[2] = ((number(shares[2]) - ones[0]) % shamir.PRIME).to_bytes(33, "big")
    assert shamir.combine({x: shares[x] for x in range(1, 5)}) == secret
    assert shamir.recover(shares, threshold=4, accept=secret.__eq__, source=source) == (secret, (1, 2))


def number_at_zero(shares: dict[int, bytes]) -> int:
    return extrapolate(shares, tuple(shares), 0)


def test_more_liars_than_can_be_corrected_cannot_have_others_named():
    """Three liars among m = t + 3 choose errors whose shortest recurrence has its roots at two honest points.

    The syndromes (1, a + b, (a + b)^2 - ab) have the locator (x - a)(x - b), whoever made them.
    """
    prime, source, secret = shamir.PRIME, RandomSource.seeded(6), b"s" * 32
    dealt = shamir.split(secret, threshold=4, shares=7, source=source)
    shares, liars, framed = {x: dealt[x - 1] for x in range(1, 8)}, (1, 2, 5), (3, 4)
    wanted = [1, sum(framed), sum(framed) ** 2 - framed[0] * framed[1]]
    weights, _ = shamir._weights(tuple(range(1, 8)))
    for liar in liars:
        others = [other for other in liars if other != liar]
        # The factor of this liar in sum(u x^j) = wanted_j, by Lagrange's polynomials on the three points.
        under = (liar - others[0]) * (liar - others[1])
        factor = (wanted[2] - sum(others) * wanted[1] + others[0] * others[1] * wanted[0]) * pow(
            under, -1, prime
        )
        error = factor * pow(weights[liar - 1] * liar, -1, prime)
        shares[liar] = ((number(shares[liar]) + error) % prime).to_bytes(33, "big")
    syndromes = [
        sum(weight * x * number(shares[x]) * x**j for x, weight in enumerate(weights, start=1)) % prime
        for j in range(3)
    ]
    assert syndromes == wanted
    with pytest.raises(ProtocolError):
        shamir.wrong_points(shares, threshold=4)
    assert shamir.recover(shares, threshold=4, accept=secret.__eq__, source=source) == (secret, ())


def test_beyond_half_of_the_spare_shares_the_secret_may_come_back_and_nobody_is_named():
    source, secret = RandomSource.seeded(5), b"s" * 32
    dealt = shamir.split(secret, threshold=2, shares=7, source=source)
    shares = {x: dealt[x - 1] if x > 3 else source.random_bytes(32).rjust(33, b"\0") for x in range(1, 8)}
    assert shamir.recover(shares, threshold=2, accept=secret.__eq__, source=source) == (secret, ())


def answer(table: Table, owner: bytes, *, lie: bool) -> bytes:
    """Answer the unmask request, honestly or with rubbish that is properly signed."""
    honest = table.clients[owner].unmask(table.server.request_for(owner))
    if not lie:
        return honest
    body = b"\0" * (len(honest) - 98)
    digest = hashlib.sha256(body).digest()
    statement = messages.body_statement("response", table.server._transcript, owner, digest)
    return (
        messages.header(messages.Kind.RESPONSE) + owner + table.parties.people[owner].sign(statement) + body
    )


@pytest.mark.parametrize("places", [{0}, {2, 5}, {0, 1}])
def test_the_server_names_holders_that_lie_with_their_own_signature(places: set[int]):
    """Ten clients, threshold 5, nine answers for each secret: up to two liars are corrected and named."""
    parties = gather(10, threshold=5)
    table = play(parties, Stage.UNMASK)
    liars = {table.ids[place] for place in places}
    for owner in table.ids:
        table.server.receive_response(answer(table, owner, lie=owner in liars))
    assert_exact_sum(table.server, table, table.ids)
    complaints = table.server.complaints
    assert {complaint.accused for complaint in complaints} == liars
    for complaint in complaints:
        key = parties.people[complaint.accused].public_key
        verify_signature(key, complaint.signature, complaint.statement)
    assert left_out(complaints, colluders=2) == liars


def test_a_dealer_whose_shares_fit_no_commitment_is_named():
    parties = gather(8)
    table = play(parties, Stage.UNMASK)
    table.server._commitments[0] = bytes(32)
    for owner in table.ids:
        table.server.receive_response(answer(table, owner, lie=False))
    refused(table.server.finish)
    assert [(each.reason, each.accused) for each in table.server.complaints] == [
        ("dealt secret", table.ids[0])
    ]
    assert left_out(table.server.complaints, colluders=1) == {table.ids[0]}


# What does not end a session


def test_an_early_question_does_not_end_the_session():
    parties = gather(5)
    table = play(parties, Stage.ADVERTISE)
    clients, server, ids = table.clients, table.server, table.ids

    def too_early(*calls: object) -> None:
        for call in calls:
            before = server.stage
            with pytest.raises(ProtocolError):
                call()
            assert server.stage is before

    def everything() -> tuple[object, ...]:
        return (
            server.finish, server.survivors_message, lambda: server.request_for(ids[0]),
            lambda: server.delivery_for(ids[0]), server.close_stage,
        )  # fmt: skip

    too_early(server.roster_message, *everything())
    for session in clients.values():
        server.receive_advertisement(session.advertise())
    assert server.close_stage() is Stage.SHARE
    too_early(*everything())
    for session in clients.values():
        server.receive_shares(session.share(server.roster_message()))
    server.close_stage()
    too_early(server.finish, server.survivors_message, lambda: server.request_for(ids[0]), server.close_stage)
    for owner, session in clients.items():
        server.receive_masked_input(mask(session, server.delivery_for(owner), table.vectors[owner]))
    server.close_stage()
    too_early(server.finish, lambda: server.request_for(ids[0]), server.close_stage)
    for session in clients.values():
        server.receive_confirmation(session.confirm(server.survivors_message()))
    server.close_stage()
    for owner, session in list(clients.items())[:2]:
        server.receive_response(session.unmask(server.request_for(owner)))
    with pytest.raises(NotEnoughClients):
        server.finish()
    for owner, session in list(clients.items())[2:]:
        server.receive_response(session.unmask(server.request_for(owner)))
    assert_exact_sum(server, table, ids)


def test_every_message_sent_twice_counts_once():
    """A transport that lost a receipt sends again, at once or stages later:
    the sum and the counted bytes stay the same.
    """
    once, twice = (play(gather(5), Stage.ADVERTISE) for _ in range(2))
    totals = []
    for table, copies in ((once, 1), (twice, 2)):
        server = table.server
        receive = {
            Stage.ADVERTISE: server.receive_advertisement, Stage.SHARE: server.receive_shares,
            Stage.MASK: server.receive_masked_input, Stage.CONFIRM: server.receive_confirmation,
            Stage.UNMASK: server.receive_response,
        }  # fmt: skip
        sent: list[tuple[Stage, bytes, bytes]] = []
        for stage in receive:
            for owner, session in table.clients.items():
                message = respond(table, stage, owner)
                sent.append((stage, owner, message))
                assert session.stage > stage
                for _ in range(copies):
                    assert receive[stage](message) == owner
            for earlier, owner, message in sent if copies == 2 else ():
                assert receive[earlier](message) == owner
            if stage is not Stage.UNMASK:
                server.close_stage()
        totals.append((server.finish().vector, {owner: each.total for owner, each in server.traffic.items()}))
    np.testing.assert_array_equal(totals[0][0], totals[1][0])
    assert totals[0][1] == totals[1][1]


def respond(table: Table, stage: Stage, owner: bytes) -> bytes:
    session, server = table.clients[owner], table.server
    if stage is Stage.ADVERTISE:
        return session.advertise()
    if stage is Stage.SHARE:
        return session.share(server.roster_message(owner))
    if stage is Stage.MASK:
        return bytes(mask(session, server.delivery_for(owner), table.vectors[owner]))
    if stage is Stage.CONFIRM:
        return session.confirm(server.survivors_message(owner))
    return session.unmask(server.request_for(owner))


class Dawdling(ServerSession):
    """Take so long over a signature that another thread would come between check and sum."""

    def _verify(self, owner: bytes, signature: bytes, statement: bytes) -> None:
        super()._verify(owner, signature, statement)
        time.sleep(0.02)


def test_an_upload_handed_in_by_two_threads_at_once_counts_once():
    table = play(gather(5), Stage.ADVERTISE)
    server, ids = Dawdling(table.parties.parameters, source=table.parties.source), table.ids
    table.server = server
    for owner in ids:
        server.receive_advertisement(table.clients[owner].advertise())
    for owner in ids:
        server.receive_shares(table.clients[owner].share(server.roster_message()))
    upload = {
        owner: bytes(mask(table.clients[owner], server.delivery_for(owner), table.vectors[owner]))
        for owner in ids
    }
    start = threading.Barrier(2 * len(ids))

    def hand_in(message: bytes) -> None:
        start.wait()
        assert server.receive_masked_input(message) in ids

    threads = [threading.Thread(target=hand_in, args=(message,)) for message in 2 * list(upload.values())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.close_stage()
    for owner in ids:
        server.receive_confirmation(table.clients[owner].confirm(server.survivors_message()))
    server.close_stage()
    for owner in ids:
        server.receive_response(table.clients[owner].unmask(server.request_for(owner)))
    assert_exact_sum(server, table, ids)
