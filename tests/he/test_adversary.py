"""A malicious server, network or client against our own protocol:
constant refusals, no crash, nothing opened.
"""

from __future__ import annotations

import contextlib
import os
import stat

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.he import (
    Accumulator,
    KeyHolder,
    PlainClient,
    WordAccumulator,
    choose,
    ciphertexts,
)
from defenses.he.engines import SealEngine
from defenses.he.packing import pack
from defenses.he.parameters import ntt_prime
from defenses.he.wire import (
    HEADER_BYTES,
    Scratch,
    decode_parameters,
    encode_parameters,
    seal_chunks,
    write_chunks,
)
from tests.he.common import IDENTITIES, PARTIES, added, agreement, client_of, holder, server_of, upload

pytest.importorskip("tenseal")

ABORTED = r"^protocol aborted$"

BOUND, LENGTH = 1000, 13_000
SETS = {
    "bfv": choose("bfv", parties=5, value_bound=BOUND),
    "ckks": choose("ckks", parties=5, value_bound=BOUND),
    "vectors": choose("bfv", parties=5, value_bound=BOUND, seeded=False),
}
VECTORS = np.random.default_rng(0).integers(-BOUND, BOUND + 1, (5, LENGTH))


@pytest.fixture(params=sorted(SETS))
def parameters(request):
    return SETS[request.param]


def setting(parameters, number: int = 0, fewest: int = 3):
    key = holder(parameters)
    return key, agreement(key.run, parties=5, bound=BOUND, length=LENGTH, number=number, fewest=fewest)


def refuses_and_burns(key, terms, chunks, parties):
    client = client_of(key, terms, 4)
    with pytest.raises(ProtocolError, match=ABORTED):
        client.decrypt_sum(chunks, parties)
    assert not key.usable
    with pytest.raises(ProtocolError):
        client.encrypt(VECTORS[4])


def refuses_untouched(key, terms, chunks, parties):
    with pytest.raises(ProtocolError, match=ABORTED):
        client_of(key, terms, 4).decrypt_sum(chunks, parties)
    assert key.usable


def forge_sum(key, terms, uploads):
    """Add uploads as a malicious server would, without the checks of the honest one."""
    engine = key.engine()
    totals = [engine.load(chunk[HEADER_BYTES:]) for chunk in uploads[0][:-1]]
    for other in uploads[1:]:
        for total, chunk in zip(totals, other):
            engine.add(total, engine.load(chunk[HEADER_BYTES:]))
    digest = terms.digest(key.public_bundle())
    return list(
        write_chunks((engine.save(each) for each in totals), role="sum", digest=digest, count=len(totals))
    )


def uploads_of(key, terms, count=5):
    return [upload(key, terms, index, VECTORS[index]) for index in range(count)]


def test_the_honest_sum_opens_once(parameters):
    key, terms = setting(parameters)
    chunks = added(key, terms, uploads_of(key, terms, 3))
    client = client_of(key, terms, 4)
    np.testing.assert_array_equal(client.decrypt_sum(chunks, PARTIES[:3]), VECTORS[:3].sum(0))
    refuses_untouched(key, terms, chunks, PARTIES[:3])  # a second opening, even of the same sum


def test_a_single_update_is_not_opened_as_a_sum(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 3)
    one = forge_sum(key, terms, uploads[:1])
    refuses_untouched(key, terms, one, PARTIES[:1])  # below `fewest`
    refuses_and_burns(key, terms, one, PARTIES[:3])  # claimed to be three


def test_one_update_added_three_times_is_not_opened(parameters):
    key, terms = setting(parameters)
    refuses_and_burns(key, terms, forge_sum(key, terms, uploads_of(key, terms, 1) * 3), PARTIES[:3])


def test_a_sum_with_a_party_left_out_or_added_is_not_opened(parameters):
    for claimed in (PARTIES[:4], PARTIES[1:5], PARTIES[2:5]):
        key, terms = setting(parameters)
        refuses_and_burns(key, terms, forge_sum(key, terms, uploads_of(key, terms, 3)), claimed)


def test_an_update_of_another_round_does_not_count(parameters):
    key, terms = setting(parameters)
    earlier = agreement(key.run, parties=5, bound=BOUND, length=LENGTH, number=7, fewest=3)
    old, fresh = uploads_of(key, earlier, 1), uploads_of(key, terms, 3)
    with pytest.raises(ProtocolError):  # the honest server sees it in the header
        server_of(key, terms).add(old[0], sender=PARTIES[0])
    refuses_and_burns(key, terms, forge_sum(key, terms, [old[0], *fresh[1:]]), PARTIES[:3])


def test_a_sum_of_an_earlier_round_is_not_opened_again(parameters):
    key, terms = setting(parameters)
    later = agreement(key.run, parties=5, bound=BOUND, length=LENGTH, number=1, fewest=3)
    uploads = uploads_of(key, terms, 3)
    refuses_untouched(key, later, added(key, terms, uploads), PARTIES[:3])  # by its header
    relabelled = forge_sum(key, later, uploads)  # with the right header
    refuses_and_burns(key, later, relabelled, PARTIES[:3])


def test_updates_of_another_run_do_not_count(parameters):
    key, terms = setting(parameters)
    other = holder(parameters, seed=1)
    foreign = agreement(other.run, parties=5, bound=BOUND, length=LENGTH, fewest=3)
    stranger = uploads_of(other, foreign, 1)
    with pytest.raises(ProtocolError):
        server_of(key, terms).add(stranger[0], sender=PARTIES[0])
    mixed = forge_sum(key, terms, [stranger[0], *uploads_of(key, terms, 3)[1:]])
    refuses_and_burns(key, terms, mixed, PARTIES[:3])


def test_chunks_in_another_order_are_refused(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 3)
    assert len(uploads[0]) >= 2
    turned = [uploads[0][1], uploads[0][0], *uploads[0][2:]]
    for bad in (turned, uploads[0][:-1], [*uploads[0], uploads[0][-1]], uploads[0][:1] * len(uploads[0]), []):
        with pytest.raises(ProtocolError):
            server_of(key, terms).add(bad, sender=PARTIES[0])
    chunks = added(key, terms, uploads)
    refuses_untouched(key, terms, [chunks[1], chunks[0], *chunks[2:]], PARTIES[:3])
    # The server rewrites the headers: position 0 and 1 exchanged inside.
    bodies = [chunk[HEADER_BYTES:] for chunk in chunks]
    relabelled = [
        chunk[:HEADER_BYTES] + body for chunk, body in zip(chunks, [bodies[1], bodies[0], *bodies[2:]])
    ]
    refuses_and_burns(key, terms, relabelled, PARTIES[:3])


def test_chunks_of_two_sums_do_not_mix(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 4)
    one, other = forge_sum(key, terms, uploads[:3]), forge_sum(key, terms, [*uploads[:2], uploads[3]])
    refuses_and_burns(key, terms, [one[0], *other[1:]], PARTIES[:3])


def test_an_upload_in_the_name_of_another_is_refused(parameters):
    key, terms = setting(parameters)
    chunks = uploads_of(key, terms, 1)[0]
    server = server_of(key, terms)
    with pytest.raises(ProtocolError):
        server.add(chunks, sender=PARTIES[1])
    server.add(chunks, sender=PARTIES[0])
    plain = WordAccumulator(terms, "plain")
    with pytest.raises(ProtocolError):
        plain.add(PlainClient(terms, PARTIES[0]).encrypt(VECTORS[0]), sender=PARTIES[1])
    assert server.parties == (PARTIES[0],)
    assert plain.parties == ()


def test_two_versions_of_one_upload_do_not_mix(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 3)
    fork = KeyHolder(
        parameters, run=key.run, root=key._root, material=key._material
    )  # it forgot what it sent
    again = upload(fork, terms, 0, VECTORS[4])
    forged = forge_sum(key, terms, [[uploads[0][0], *again[1:]], *uploads[1:]])
    refuses_and_burns(key, terms, forged, PARTIES[:3])


def test_chunks_of_two_parties_or_roles_do_not_mix(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 3)
    with pytest.raises(ProtocolError):
        server_of(key, terms).add([uploads[0][0], *uploads[1][1:]], sender=PARTIES[0])
    chunks = added(key, terms, uploads)
    with pytest.raises(ProtocolError):
        server_of(key, terms).add(chunks, sender=PARTIES[0])
    refuses_untouched(key, terms, uploads[0], PARTIES[:3])


def test_a_refused_upload_leaves_nothing_behind(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 4)
    server = server_of(key, terms)
    server.add(uploads[0], sender=PARTIES[0])
    broken = [*uploads[3][:-1], uploads[3][-1][:-20]]
    for bad, sender in ((broken, 3), (uploads[0], 0), ([*uploads[3], uploads[3][0]], 3)):
        with pytest.raises(ProtocolError):
            server.add(bad, sender=PARTIES[sender])
    server.add(uploads[1], sender=PARTIES[1])
    with pytest.raises(ProtocolError):
        server.sum_chunks()  # still fewer than may be opened
    server.add(uploads[2], sender=PARTIES[2])
    opened = client_of(key, terms, 4).decrypt_sum(server.sum_chunks(), server.parties)
    np.testing.assert_array_equal(opened, VECTORS[:3].sum(0))


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_a_shift_by_the_server_is_noticed(scheme):
    # Anyone can add a known plaintext to a BFV ciphertext; the tag notices a change of one unit in one
    # coordinate.
    from tenseal import sealapi

    parameters = SETS[scheme]
    key, terms = setting(parameters)
    engine = key.engine()
    totals = [engine.load(chunk[HEADER_BYTES:]) for chunk in added(key, terms, uploads_of(key, terms, 3))]
    delta = np.zeros(parameters.values_per_chunk, dtype=np.int64)
    delta[5] = 1
    plain = sealapi.Plaintext()
    if scheme == "bfv":
        engine._encoder.encode(pack(delta, parameters).tolist(), plain)
    else:
        slots = pack(delta, parameters).astype(float).tolist()
        engine._encoder.encode(slots, 2.0**parameters.scale_bits, plain)
    engine._evaluator.add_plain_inplace(totals[0], plain)
    assert (
        engine.decrypt(totals[0])[5]
        == pack(VECTORS[:3].sum(0)[: parameters.values_per_chunk], parameters)[5] + 1
    )
    digest = terms.digest(key.public_bundle())
    forged = list(
        write_chunks((engine.save(each) for each in totals), role="sum", digest=digest, count=len(totals))
    )
    refuses_and_burns(key, terms, forged, PARTIES[:3])


def test_a_client_beyond_its_bound_is_noticed_when_the_sum_leaves_the_range(parameters):
    # A client that runs its own code has the key, so it can send anything, with a valid tag.
    key, terms = setting(parameters)
    huge = VECTORS[0].copy()
    huge[17] = 6 * BOUND
    client = client_of(key, terms, 0)
    tag = key.tagger(client._digest).tag(huge, PARTIES[0], BOUND)
    whole = np.concatenate([huge, tag])
    step, engine = parameters.values_per_chunk, key.engine()
    payloads = [
        engine.encrypt(pack(whole[start : start + step], parameters)) for start in range(0, len(whole), step)
    ]
    fields = {"digest": client._digest, "count": client._count, "party": PARTIES[0]}
    evil = list(
        seal_chunks(write_chunks(payloads, role="upload", **fields), sign=IDENTITIES[0].sign, **fields)
    )
    chunks = added(key, terms, [evil, *uploads_of(key, terms, 3)[1:]])
    refuses_and_burns(key, terms, chunks, PARTIES[:3])


def test_a_client_cannot_count_twice_under_two_names_without_the_key(parameters):
    key, terms = setting(parameters)
    uploads = uploads_of(key, terms, 2)
    renamed = [chunk[:25] + PARTIES[2] + chunk[57:] for chunk in uploads[0]]
    with pytest.raises(ProtocolError):  # the honest server sees whose signature is missing
        added(key, terms, [*uploads, renamed])
    refuses_and_burns(key, terms, forge_sum(key, terms, [*uploads, renamed]), PARTIES[:3])


def mutations(message: bytes, generator: np.random.Generator, count: int):
    for _ in range(count):
        kind, position = generator.integers(5), int(generator.integers(len(message)))
        if kind == 0:
            altered = bytearray(message)
            altered[position] ^= 1 << int(generator.integers(8))
            yield bytes(altered)
        elif kind == 1:
            yield message[:position]
        elif kind == 2:
            yield message + generator.bytes(int(generator.integers(1, 200)))
        elif kind == 3:
            yield (
                message[:position]
                + generator.bytes(int(generator.integers(1, 64)))
                + message[position + 32 :]
            )
        else:
            yield message[:HEADER_BYTES] + generator.bytes(int(generator.integers(1, 40_000)))


@pytest.mark.parametrize(
    "budget", [400, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_hostile_uploads_never_crash_the_server(parameters, budget):
    key, terms = setting(parameters)
    first, *rest = upload(key, terms, 0, VECTORS[0])
    server, messages = server_of(key, terms), set()
    for message in mutations(first, np.random.default_rng(4), budget):
        try:
            server.add([message, *rest], sender=PARTIES[0])
        except ProtocolError as error:
            messages.add(str(error))
            if server.parties:
                raise AssertionError("a refused upload was counted") from error
        else:
            raise AssertionError("a damaged upload was counted")
    assert messages == {"protocol aborted"}


@pytest.mark.parametrize(
    "budget", [150, pytest.param(30_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_hostile_sums_never_crash_a_client_and_never_open(parameters, budget):
    key, terms = setting(parameters)
    root, material = key._root, key._material
    first, *rest = added(key, terms, uploads_of(key, terms, 3))
    refused = 0
    for message in mutations(first, np.random.default_rng(5), budget):
        client = client_of(key, terms, 0)
        try:
            opened = client.decrypt_sum([message, *rest], PARTIES[:3])
        except ProtocolError:
            refused += 1
        else:
            # A low bit of a coefficient is noise: too little to change the sum.
            np.testing.assert_array_equal(opened, VECTORS[:3].sum(0))
        if not key.usable or key._opened:  # a malformed sum leaves the key untouched
            key = KeyHolder(parameters, run=key.run, root=root, material=material)
    assert refused > 0.6 * budget


def test_foreign_objects_in_place_of_chunks_are_refused(parameters):
    key, terms = setting(parameters)
    good = upload(key, terms, 0, VECTORS[0])
    for bad in (
        [None],
        ["text"],
        [b""],
        [b"\0" * HEADER_BYTES],
        [good[0][:HEADER_BYTES]],
        [bytearray(good[0])],
        [b"\0" * 10**6],
    ):
        with pytest.raises(ProtocolError):
            server_of(key, terms).add(bad, sender=PARTIES[0])


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_ciphertext_that_hides_nothing_or_leaves_its_prime_is_refused(name):
    engine = holder(SETS[name]).engine()
    total = engine.load(engine.encrypt(pack(np.arange(10), SETS[name])))
    payload = engine.save(total)
    half = len(payload) // 2
    assert engine.save(engine.load(payload)) == payload
    with pytest.raises(ProtocolError):
        engine.load(payload[:half] + bytes(half))
    with pytest.raises(ProtocolError):
        engine.load(b"\xff" * len(payload))


def test_the_wire_form_of_a_prime_round_trips_and_is_strict():
    generator = np.random.default_rng(7)
    for bits in (*range(20, 61, 5), 48, 56):
        prime = ntt_prime(bits, 4096)
        row = generator.integers(0, prime, 4096, dtype=np.uint64)
        row[:2] = 0, prime - 1
        packed = ciphertexts._pack(row, prime)
        assert len(packed) == 4096 * bits // 8
        np.testing.assert_array_equal(ciphertexts._unpack(packed, prime, 4096), row)
        row[5] = prime
        with pytest.raises(ProtocolError):
            ciphertexts._unpack(ciphertexts._pack(row, prime), prime, 4096)


def test_a_three_part_ciphertext_and_foreign_parameters_are_refused():
    from tenseal import sealapi

    engine = SealEngine(SETS["bfv"], bytes(range(64)))
    other = SealEngine(choose("bfv", parties=5, value_bound=30), bytes(range(64)))
    assert other.payload_limit != engine.payload_limit
    zeros = pack(np.zeros(10, dtype=np.int64), SETS["bfv"])
    with pytest.raises(ProtocolError):
        engine.load(other.encrypt(zeros))
    square = engine.load(engine.encrypt(zeros))
    engine._evaluator.multiply_inplace(square, engine.load(engine.encrypt(zeros)))
    assert isinstance(square, sealapi.Ciphertext)
    assert square.size() == 3
    with pytest.raises(ProtocolError):
        engine.load(engine.save(square))


def test_hostile_bundles_are_refused(parameters):
    bundle = encode_parameters(parameters)
    terms = agreement(bytes(16), parties=5, bound=BOUND, length=LENGTH)
    assert decode_parameters(bundle) == parameters
    generator = np.random.default_rng(6)
    for length in range(len(bundle)):
        with pytest.raises(ProtocolError):
            decode_parameters(bundle[:length])
    for position in range(8 * len(bundle)):
        altered = bytearray(bundle)
        altered[position // 8] ^= 1 << position % 8
        with contextlib.suppress(ProtocolError, ParameterError):
            Accumulator(bytes(altered), terms, roster=PARTIES)
    for _ in range(2000):
        with pytest.raises(ProtocolError):
            decode_parameters(generator.bytes(int(generator.integers(0, 64))))


def test_a_weak_bundle_is_refused_by_the_server():
    from defenses.he.parameters import replace

    weak = replace(SETS["bfv"], poly_modulus_degree=1024)
    terms = agreement(bytes(16), parties=5, bound=BOUND, length=LENGTH)
    with pytest.raises(ParameterError, match="128-bit security"):
        Accumulator(encode_parameters(weak), terms, roster=PARTIES)


@pytest.mark.parametrize("anonymous", [True, False])
def test_scratch_files_are_private_and_gone(anonymous):
    with Scratch(anonymous=anonymous) as scratch:
        with open(scratch.write(b"abcdef"), "rb") as file:
            assert file.read() == b"abcdef"
        with open(scratch.path, "wb") as file:
            file.write(b"xy")
        assert scratch.read() == b"xy"
        path = scratch.path
        if not anonymous:
            assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not os.path.exists(path) or anonymous
