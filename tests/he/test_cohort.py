"""Who may be in a sum: the cohort of the agreement, from the operator's roster,
each under its own signature, once.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.he import Accumulator, EncryptedClient, KeyHolder, KeyRequest, choose
from defenses.he.packing import pack
from defenses.he.tags import PRIMES
from defenses.he.wire import HEADER_BYTES, seal_chunks, write_chunks
from defenses.random_source import RandomSource
from defenses.signatures import is_sound_key, verify_signature
from tests.he.common import IDENTITIES, PARTIES, agreement, client_of, holder, public, server_of, upload

pytest.importorskip("tenseal", reason="the extra 'he' is not installed")

PARAMETERS = choose("bfv", parties=8, value_bound=100)
VECTORS = np.random.default_rng(0).integers(-100, 101, (8, 20))
MEMBERS = PARTIES[:2]
"""The operator's roster in the attack below: a victim and one client that lies."""


def forge_upload(key: KeyHolder, terms, name: bytes, values, sign) -> list[bytes]:
    """Encrypt in any name, as whoever holds the key of the run can."""
    client = client_of(key, terms, 0)
    tag = key.tagger(client._digest).tag(values, name, terms.value_bound)
    whole, step, engine = np.concatenate([values, tag]), PARAMETERS.values_per_chunk, key.engine()
    parts = (whole[start : start + step] for start in range(0, len(whole), step))
    payloads = [engine.encrypt(pack(part, PARAMETERS)) for part in parts]
    fields = {"digest": client._digest, "count": client._count, "party": name}
    return list(seal_chunks(write_chunks(payloads, role="upload", **fields), sign=sign, **fields))


def test_one_client_cannot_read_another_by_inventing_the_rest_of_a_cohort():
    """The attack: seven names of the liar's own, vectors it knows, and the sum is the victim's vector plus
    those.

    The victim's own check passed, and the honest server added them all. Now both refuse such a cohort, and
    inside an honest cohort nobody else's signature can be had.
    """
    key = holder(PARAMETERS)
    invented = agreement(key.run, parties=8, bound=100, length=20, fewest=8)
    with pytest.raises(ParameterError, match="cohort: 6 of 8 are not on the roster"):
        EncryptedClient(key, invented, IDENTITIES[0], roster=MEMBERS)
    with pytest.raises(ParameterError, match="cohort: 6 of 8 are not on the roster"):
        Accumulator(key.public_bundle(), invented, roster=MEMBERS)

    server = server_of(key, invented)
    server.add(client_of(key, invented, 0).encrypt(VECTORS[0]), sender=PARTIES[0])
    for place in range(2, 8):
        lie = forge_upload(key, invented, PARTIES[place], VECTORS[place], IDENTITIES[1].sign)
        for sender in (PARTIES[place], PARTIES[1]):
            with pytest.raises(ProtocolError):
                server.add(lie, sender=sender)
    assert server.parties == (PARTIES[0],)


def test_a_party_outside_the_cohort_is_refused_at_both_ends():
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    with pytest.raises(ParameterError, match="not in the cohort"):
        client_of(key, terms, 3)
    outsider = forge_upload(key, terms, PARTIES[3], VECTORS[3], IDENTITIES[3].sign)
    server = server_of(key, terms)
    with pytest.raises(ProtocolError):
        server.add(outsider, sender=PARTIES[3])
    for place in range(3):
        server.add(upload(key, terms, place, VECTORS[place]), sender=PARTIES[place])
    chunks, client = list(server.sum_chunks()), client_of(key, terms, 0)
    with pytest.raises(ProtocolError):
        client.decrypt_sum(chunks, [*PARTIES[:2], PARTIES[3]])
    assert key.usable
    np.testing.assert_array_equal(client.decrypt_sum(chunks, PARTIES[:3]), VECTORS[:3].sum(0))


def test_the_cohort_and_the_attempt_are_part_of_the_agreement():
    terms = agreement(bytes(16), parties=4, bound=100, length=20)
    digests = {
        terms.digest(b""),
        replace(terms, attempt=1).digest(b""),
        replace(terms, round=1).digest(b""),
        replace(terms, cohort=tuple(PARTIES[1:5])).digest(b""),
        replace(terms, cohort=terms.cohort[:3]).digest(b""),
    }
    assert len(digests) == 5
    assert replace(terms, cohort=terms.cohort[:3]).parties == 3


@pytest.mark.parametrize(
    "cohort",
    [tuple(PARTIES[:3][::-1]), (PARTIES[0], PARTIES[0]), (bytes(32),), (b"short",), (), list(PARTIES[:3])],
    ids=["not sorted", "twice", "small order", "short", "nobody", "a list"],
)
def test_a_cohort_that_cannot_be_is_refused(cohort):
    with pytest.raises(ParameterError):
        replace(agreement(bytes(16), parties=3, bound=100, length=20), cohort=cohort)


def test_an_upload_needs_its_senders_signature_over_all_of_it():
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    chunks = upload(key, terms, 0, VECTORS[0])
    other = upload(key, replace(terms, attempt=1), 0, VECTORS[1])
    seal = chunks[-1]
    flipped = seal[:-1] + bytes([seal[-1] ^ 1])
    changed = chunks[0][:-1] + bytes([chunks[0][-1] ^ 1])
    for bad in (
        chunks[:-1],
        [*chunks[:-1], flipped],
        [*chunks[:-1], other[-1]],
        [changed, *chunks[1:]],
        [*chunks, seal],
        [*chunks[:-1], seal[:HEADER_BYTES]],
        [*chunks[:-1], seal + b"\0"],
        [*chunks[:-1], None],
        [*chunks[:-1], seal[:25] + PARTIES[1] + seal[57:]],
    ):
        server = server_of(key, terms)
        with pytest.raises(ProtocolError):
            server.add(bad, sender=PARTIES[0])
        assert server.parties == ()
    server.add(chunks, sender=PARTIES[0])
    assert server.parties == (PARTIES[0],)


# Once


def test_a_second_vector_under_one_agreement_is_refused_whatever_object_asks():
    """Two vectors under one pad and one weight give a relation that helps to forge a third."""
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    client = client_of(key, terms, 0)
    client.encrypt(VECTORS[0])  # asked for, and lost on the way
    for again in (client, client_of(key, terms, 0)):
        with pytest.raises(ProtocolError):
            again.encrypt(VECTORS[1])
        with pytest.raises(ProtocolError):
            again.encrypt(VECTORS[0])
    list(client_of(key, terms, 1).encrypt(VECTORS[1]))
    list(client_of(key, replace(terms, attempt=1), 0).encrypt(VECTORS[0]))


def test_a_refused_vector_uses_nothing_up():
    key = holder(PARAMETERS)
    client = client_of(key, agreement(key.run, parties=3, bound=100, length=20), 0)
    with pytest.raises(ParameterError):
        client.encrypt(np.full(20, 101))
    list(client.encrypt(VECTORS[0]))


def test_two_vectors_under_one_agreement_would_tell_the_key_of_the_tags():
    """Why once: the difference of two tags is the weights' product with a known difference,
    free of the pad.
    """
    tagger = holder(PARAMETERS).tagger(b"d" * 32)
    unit = np.zeros(20, dtype=np.int64)
    unit[3] = 1
    one, two = (tagger.tag(vector, PARTIES[0], 2**40) for vector in (VECTORS[0], VECTORS[0] + unit))
    other, more = (tagger.tag(vector, PARTIES[1], 2**40) for vector in (VECTORS[1], VECTORS[1] + unit))
    np.testing.assert_array_equal((two - one) % np.array(PRIMES), (more - other) % np.array(PRIMES))


def test_threads_encrypt_and_open_once():
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    digest, passed = client_of(key, terms, 0)._digest, []

    def ask() -> None:
        start.wait()
        for begin in (lambda: key.begin_upload(digest, PARTIES[0]), lambda: key.begin_opening(digest)):
            try:
                begin()
            except ProtocolError:
                continue
            passed.append(begin)

    start = threading.Barrier(8)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_does_not_share_the_key():
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    client = client_of(key, terms, 0)
    child = os.fork()
    if child == 0:
        try:
            client.encrypt(VECTORS[0])
        except ProtocolError:
            os._exit(0 if not key.usable else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    list(client.encrypt(VECTORS[0]))


# Confirmations and keys


def test_a_client_with_the_key_cannot_confirm_in_anothers_name():
    """The code alone is no signature: everybody has its key."""
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    liar, victim, third = (client_of(key, terms, place) for place in (1, 0, 2))
    total = VECTORS[:3].sum(0)
    good = third.confirm(total, PARTIES[:3])
    forger = EncryptedClient(key, terms, IDENTITIES[2], roster=PARTIES)
    forger._identity = IDENTITIES[1]
    forged = forger.confirm(total, PARTIES[:3])
    assert forged[:-64] == good[:-64]
    with pytest.raises(ProtocolError):
        victim.check_confirmations(total, PARTIES[:3], [liar.confirm(total, PARTIES[:3]), forged])
    victim.check_confirmations(total, PARTIES[:3], [liar.confirm(total, PARTIES[:3]), good])


EDWARDS_PRIME = 2**255 - 19
EDWARDS_D = -121665 * pow(121666, -1, EDWARDS_PRIME) % EDWARDS_PRIME


def edwards_add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Add on -x^2 + y^2 = 1 + d x^2 y^2, by the affine formula of RFC 8032 section 5.1."""
    (a, b), (c, d) = one, other
    cross = EDWARDS_D * a * b * c * d % EDWARDS_PRIME
    x = (a * d + b * c) * pow(1 + cross, -1, EDWARDS_PRIME)
    y = (b * d + a * c) * pow(1 - cross, -1, EDWARDS_PRIME)
    return x % EDWARDS_PRIME, y % EDWARDS_PRIME


def small_points() -> set[tuple[int, int]]:
    """Return the eight points whose order divides eight: the multiples of one of order eight, by halving (0,
    -1) twice.

    A point (x, y) with x = sqrt(-1) y doubles to one with y = 0, which doubles to (0, -1).
    """
    root = pow(2, (EDWARDS_PRIME - 1) // 4, EDWARDS_PRIME)
    for y_squared in solve_quadratic(EDWARDS_D, 2, -1):
        y = square_root(y_squared)
        if y is not None:
            start = (root * y % EDWARDS_PRIME, y)
            break
    points, point = set(), (0, 1)
    for _ in range(8):
        points.add(point)
        point = edwards_add(point, start)
    assert point == (0, 1)
    return points


def solve_quadratic(a: int, b: int, c: int) -> list[int]:
    root = square_root((b * b - 4 * a * c) % EDWARDS_PRIME)
    half = pow(2 * a, -1, EDWARDS_PRIME)
    return [] if root is None else [(sign * root - b) * half % EDWARDS_PRIME for sign in (1, -1)]


def square_root(value: int) -> int | None:
    candidate = pow(value, (EDWARDS_PRIME + 3) // 8, EDWARDS_PRIME)
    for factor in (1, pow(2, (EDWARDS_PRIME - 1) // 4, EDWARDS_PRIME)):
        if pow(candidate * factor, 2, EDWARDS_PRIME) == value % EDWARDS_PRIME:
            return candidate * factor % EDWARDS_PRIME
    return None


def test_public_keys_of_small_order_are_refused_wherever_a_signature_is_checked():
    points = small_points()
    assert len(points) == 8
    for _, y in points:
        for encoded in (y, y | 1 << 255, *([y + EDWARDS_PRIME] if y < 19 else [])):
            key = encoded.to_bytes(32, "little")
            assert not is_sound_key(key)
            # The signature of the identity with S = 0 fits every message whose challenge is a multiple of the
            # order.
            for message in (b"a", b"b", b"c"):
                with pytest.raises(ProtocolError):
                    verify_signature(key, (1).to_bytes(32, "little") + bytes(32), message)
    assert all(is_sound_key(party) for party in PARTIES)
    assert not is_sound_key(b"short")
    assert not is_sound_key((EDWARDS_PRIME + 5).to_bytes(32, "little"))


def test_without_the_check_a_key_of_small_order_signs_everything():
    """Shown against the library itself, so that the refusal above is seen to matter."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    neutral = Ed25519PublicKey.from_public_bytes((1).to_bytes(32, "little"))
    neutral.verify((1).to_bytes(32, "little") + bytes(32), b"whatever it is")


def test_one_upload_handed_in_by_many_threads_is_added_once():
    key = holder(PARAMETERS)
    terms = agreement(key.run, parties=3, bound=100, length=20)
    server, chunks = server_of(key, terms), upload(key, terms, 0, VECTORS[0])
    start, refused = threading.Barrier(6), []

    def hand_in() -> None:
        start.wait()
        try:
            server.add(chunks, sender=PARTIES[0])
        except ProtocolError:
            refused.append(True)

    threads = [threading.Thread(target=hand_in) for _ in range(6)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change as often as they can
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert server.parties == (PARTIES[0],)
    assert len(refused) == 5


def test_an_oversized_wrapped_key_is_refused_before_it_is_read():
    asked = KeyRequest(IDENTITIES[0], run=bytes(16), random=RandomSource.seeded(1))
    with pytest.raises(ProtocolError):
        asked.unwrap(bytes(1 << 27), holder=public(IDENTITIES[1]), parameters=PARAMETERS)
