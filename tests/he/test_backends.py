"""Four backends, one answer: the same int64 sums, bit for bit, including extremes."""

from __future__ import annotations

import numpy as np
import pytest

from defenses.errors import ParameterError, ProtocolError
from defenses.he import (
    MaskingClient,
    PlainClient,
    WordAccumulator,
    choose,
    error_bound,
)
from tests.he.common import (
    PARTIES,
    agreement,
    client_of,
    encrypted_sum,
    holder,
    masked_sum,
    pairwise_masks,
    plain_sum,
    server_of,
)

pytest.importorskip("tenseal")

# (most parties, bound): small lanes, common lanes, digits, the largest sums.
SETTINGS = [
    (2, 1),
    (3, 127),
    (3, 2**15 - 1),
    (5, 2**15),
    (6, 2**19 - 1),
    (4, 2**31 - 1),
    (3, 2**40),
    (2, 2**59 - 1),
]
PATTERNS = ("uniform", "largest", "smallest", "mixed", "zero")


def draw(generator: np.random.Generator, pattern: str, shape: tuple[int, int], bound: int) -> np.ndarray:
    if pattern == "uniform":
        return generator.integers(-bound, bound + 1, shape)
    if pattern == "mixed":
        return generator.choice(np.array([-bound, -1, 0, 1, bound]), shape)
    return np.full(shape, {"largest": bound, "smallest": -bound, "zero": 0}[pattern], dtype=np.int64)


@pytest.mark.parametrize("most, bound", SETTINGS)
def test_four_backends_give_the_same_sums_on_1000_random_cases(most, bound):
    keys = [holder(choose(scheme, parties=most, value_bound=bound), seed=most) for scheme in ("bfv", "ckks")]
    generator = np.random.default_rng([most, bound])
    for case in range(1000 // len(SETTINGS)):
        count, length = int(generator.integers(1, most + 1)), int(generator.integers(1, 400))
        vectors = draw(generator, PATTERNS[case % len(PATTERNS)], (count, length), bound)
        terms = [agreement(key.run, parties=most, bound=bound, length=length, number=case) for key in keys]
        expected = vectors.sum(0)
        results = [
            plain_sum(terms[0], vectors),
            masked_sum(terms[0], vectors, seed=case),
            *(encrypted_sum(key, each, vectors) for key, each in zip(keys, terms)),
        ]
        for result in results:
            assert result.dtype == np.int64
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("scheme, seeded", [("bfv", True), ("bfv", False), ("ckks", True), ("ckks", False)])
def test_vectors_of_several_chunks_and_both_engines(scheme, seeded):
    parameters = choose(scheme, parties=3, value_bound=2**15 - 1, seeded=seeded)
    for length in (
        parameters.values_per_chunk - 1,
        parameters.values_per_chunk,
        3 * parameters.values_per_chunk + 17,
    ):
        key = holder(parameters)
        vectors = np.random.default_rng(length).integers(-(2**15) + 1, 2**15, (3, length))
        terms = agreement(key.run, parties=3, bound=2**15 - 1, length=length)
        np.testing.assert_array_equal(encrypted_sum(key, terms, vectors), vectors.sum(0))


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_two_hundred_parties(scheme):
    bound = 2**15 - 1
    key = holder(choose(scheme, parties=200, value_bound=bound))
    vectors = np.random.default_rng(0).integers(-bound, bound + 1, (200, 50))
    vectors[:, 0], vectors[:, 1] = bound, -bound
    terms = agreement(key.run, parties=200, bound=bound, length=50, fewest=200)
    np.testing.assert_array_equal(encrypted_sum(key, terms, vectors), vectors.sum(0))


def test_the_ckks_error_stays_within_the_printed_bound():
    from defenses.he.engines import SealEngine
    from defenses.he.packing import pack

    parameters = choose("ckks", parties=10, value_bound=2**15 - 1)
    engine = SealEngine(parameters, bytes(range(64)))
    generator = np.random.default_rng(3)
    packed = [
        pack(generator.integers(-(2**15) + 1, 2**15, parameters.values_per_chunk), parameters)
        for _ in range(10)
    ]
    total = engine.load(engine.encrypt(packed[0]))
    for slots in packed[1:]:
        engine.add(total, engine.load(engine.encrypt(slots)))
    from tenseal import sealapi

    plain = sealapi.Plaintext()
    engine._decryptor.decrypt(total, plain)
    error = np.abs(np.array(engine._encoder.decode_double(plain)) - sum(packed)).max()
    assert 0 < error < error_bound(parameters, 10)


def test_uploads_stream_chunk_by_chunk():
    key = holder(choose("bfv", parties=2, value_bound=100))
    terms = agreement(key.run, parties=2, bound=100, length=10**6)
    chunks = client_of(key, terms, 0).encrypt(np.zeros(10**6, dtype=np.int64))
    first = next(chunks)
    assert len(first) < 40_000


def test_upload_size_meets_the_target():
    bound, length = 2**15 - 1, 100_000
    key = holder(choose("bfv", parties=10, value_bound=bound))
    values = np.random.default_rng(0).integers(-bound, bound + 1, length)
    terms = agreement(key.run, parties=10, bound=bound, length=length)
    sent = sum(map(len, client_of(key, terms, 0).encrypt(values)))
    assert sent / length <= 3.5


@pytest.mark.parametrize(
    "values", [np.zeros(9, dtype=np.int64), np.zeros(10, dtype=np.int32), np.zeros((2, 5), dtype=np.int64),
               np.full(10, 101), np.full(10, -101), np.full(10, -(2**63)), [0] * 10],
)  # fmt: skip
def test_values_outside_the_agreement_are_refused_before_anything_is_sent(values):
    key = holder(choose("bfv", parties=2, value_bound=100))
    terms = agreement(key.run, parties=2, bound=100, length=10)
    for client in (client_of(key, terms, 0), PlainClient(terms, PARTIES[0])):
        with pytest.raises(ParameterError) as caught:
            client.encrypt(values)
        assert "101" not in str(caught.value)


def test_plain_and_masked_sums_refuse_what_does_not_fit():
    terms = agreement(bytes(16), parties=3, bound=10, length=5, fewest=2)
    server = WordAccumulator(terms, "plain")
    server.add(PlainClient(terms, PARTIES[0]).encrypt(np.full(5, 10)), sender=PARTIES[0])
    client = PlainClient(terms, PARTIES[0])
    for parties in ([], PARTIES[:1], [PARTIES[0]] * 2, PARTIES[:4], [b"short", PARTIES[0]]):
        with pytest.raises(ProtocolError):
            client.decrypt_sum(server.sum_chunks(), parties)
    with pytest.raises(ProtocolError):  # the same party twice
        server.add(PlainClient(terms, PARTIES[0]).encrypt(np.full(5, 10)), sender=PARTIES[0])


def test_masks_that_do_not_cancel_are_refused():
    terms = agreement(bytes(16), parties=3, bound=10, length=5)
    mask = pairwise_masks(0, 2, 5, 0)
    client = MaskingClient(terms, PARTIES[0], mask=mask, open_sum=lambda words, parties: words)
    server = WordAccumulator(terms, "masking")
    server.add(client.encrypt(np.zeros(5, dtype=np.int64)), sender=PARTIES[0])
    with pytest.raises(ProtocolError):
        client.decrypt_sum(server.sum_chunks(), server.parties)


def test_the_server_refuses_one_party_too_many():
    key = holder(choose("bfv", parties=2, value_bound=100))
    terms = agreement(key.run, parties=2, bound=100, length=10)
    server, zeros = server_of(key, terms), np.zeros(10, dtype=np.int64)
    server.add(client_of(key, terms, 0).encrypt(zeros), sender=PARTIES[0])
    server.add(client_of(key, terms, 1).encrypt(zeros), sender=PARTIES[1])
    with pytest.raises(ParameterError, match="not in the cohort"):
        client_of(key, terms, 2)
    stranger = client_of(key, agreement(key.run, parties=2, bound=100, length=10, number=1), 0).encrypt(zeros)
    with pytest.raises(ProtocolError):
        server.add(stranger, sender=PARTIES[2])
    assert server.parties == (PARTIES[0], PARTIES[1])
