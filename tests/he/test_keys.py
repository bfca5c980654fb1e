"""The key: only its addressee opens it, the server never has it, and it cannot be printed,
pickled or reused.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses.errors import ParameterError, ProtocolError
from defenses.he import KeyHolder, KeyRequest, choose
from defenses.he.engines import SealEngine, VectorEngine, server_engine
from defenses.he.packing import pack
from defenses.random_source import RandomSource
from tests.he.common import PARTIES, added, agreement, client_of, holder, server_of, upload

pytest.importorskip("tenseal")

ABORTED = r"^protocol aborted$"

RUN = bytes(range(16))
PARAMETERS = choose("bfv", parties=4, value_bound=1000)
FALLBACK = choose("bfv", parties=4, value_bound=1000, seeded=False)


def identity(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def name(number: int) -> bytes:
    return identity(number).public_key().public_bytes_raw()


ROSTER = [name(number) for number in (1, 2, 3)]


def request(number: int, run: bytes = RUN) -> KeyRequest:
    return KeyRequest(identity(number), run=run, random=RandomSource.seeded(number))


def key_of(parameters=PARAMETERS) -> KeyHolder:
    return KeyHolder.generate(parameters, run=RUN, random=RandomSource.seeded(7))


def wrap(key: KeyHolder, offer: bytes, sender: int = 1) -> bytes:
    return key.wrap_for(offer, identity=identity(sender), roster=ROSTER, random=RandomSource.seeded(9))


@pytest.mark.parametrize("parameters", [PARAMETERS, FALLBACK])
def test_a_wrapped_key_encrypts_and_opens_together_with_the_original(parameters):
    key, asked = key_of(parameters), request(2)
    other = asked.unwrap(wrap(key, asked.offer), holder=name(1), parameters=parameters)
    terms = agreement(RUN, parties=4, bound=1000, length=50)
    vectors = np.random.default_rng(0).integers(-1000, 1001, (2, 50))
    chunks = added(key, terms, [upload(key, terms, 0, vectors[0]), upload(other, terms, 1, vectors[1])])
    for each in (key, other):
        opened = client_of(each, terms, 0).decrypt_sum(chunks, PARTIES[:2])
        np.testing.assert_array_equal(opened, vectors.sum(0))


def test_a_wrapped_key_opens_only_for_its_addressee_and_only_once():
    key, asked, other = key_of(), request(2), request(3)
    wrapped = wrap(key, asked.offer)
    for wrong in (
        other,
        KeyRequest(identity(2), run=RUN, random=RandomSource.seeded(99)),
        request(2, bytes(16)),
    ):
        with pytest.raises(ProtocolError, match=ABORTED):
            wrong.unwrap(wrapped, holder=name(1), parameters=PARAMETERS)
    for holder_name in (name(2), name(3), b"", bytes(32)):
        with pytest.raises(ProtocolError):
            asked.unwrap(wrapped, holder=holder_name, parameters=PARAMETERS)
    with pytest.raises(ProtocolError):  # parameters the client did not agree to
        asked.unwrap(wrapped, holder=name(1), parameters=FALLBACK)
    asked.unwrap(wrapped, holder=name(1), parameters=PARAMETERS)
    with pytest.raises(ProtocolError):
        asked.unwrap(wrapped, holder=name(1), parameters=PARAMETERS)


def test_every_flipped_bit_and_every_truncation_of_a_wrapped_key_is_refused():
    asked = request(2)
    wrapped = wrap(key_of(), asked.offer)
    assert len(wrapped) < 400
    for position in range(8 * len(wrapped)):
        altered = bytearray(wrapped)
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(ProtocolError, match=ABORTED):
            asked.unwrap(bytes(altered), holder=name(1), parameters=PARAMETERS)
    for length in range(len(wrapped)):
        with pytest.raises(ProtocolError, match=ABORTED):
            asked.unwrap(wrapped[:length], holder=name(1), parameters=PARAMETERS)
    with pytest.raises(ProtocolError):
        asked.unwrap(wrapped + b"\0", holder=name(1), parameters=PARAMETERS)


def test_offers_are_refused_when_altered_foreign_or_of_another_run():
    key, good = key_of(), request(2).offer
    stranger, elsewhere = request(5).offer, request(2, bytes(16)).offer
    swapped = good[:-96] + request(3).offer[-96:-64] + good[-64:]  # another's X25519 key under this identity
    for offer in (stranger, elsewhere, swapped, good[:-1], good + b"\0", b""):
        with pytest.raises(ProtocolError, match=ABORTED):
            wrap(key, offer)
    for position in range(8 * len(good)):
        altered = bytearray(good)
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(ProtocolError):
            wrap(key, bytes(altered))


def test_an_all_zero_shared_secret_is_refused():
    body = request(2).offer[:-96] + bytes(32)
    with pytest.raises(ProtocolError):
        wrap(key_of(), body + identity(2).sign(body))


def test_the_public_bundle_is_a_function_of_the_parameters_alone():
    first, second = holder(PARAMETERS, seed=1), holder(PARAMETERS, seed=2)
    assert first.public_bundle() == second.public_bundle()
    assert len(first.public_bundle()) < 64


@pytest.mark.parametrize(
    "parameters", [PARAMETERS, FALLBACK, choose("ckks", parties=4, value_bound=1000, seeded=False)]
)
def test_the_server_engine_can_neither_encrypt_nor_decrypt(parameters):
    key = holder(parameters)
    values = np.arange(parameters.values_per_chunk) % 1000
    ciphertext = key.engine().encrypt(pack(values, parameters))
    server = server_engine(parameters)
    loaded = server.load(ciphertext)
    with pytest.raises(ProtocolError):
        server.decrypt(loaded)
    if isinstance(server, VectorEngine):
        assert not server._context.has_secret_key()
        assert not server._context.is_private()
    else:
        assert server._decryptor is None
        assert server._encryptor is None
    # A key the server makes up itself opens nothing either.
    if isinstance(server, SealEngine):
        guess = SealEngine(parameters, bytes(63) + b"\1")
        assert (guess.decrypt(guess.load(ciphertext)) != pack(values, parameters)).mean() > 0.99


def test_keys_of_two_runs_and_of_two_roots_differ():
    values = pack(np.zeros(PARAMETERS.values_per_chunk, dtype=np.int64), PARAMETERS)
    root = bytes(range(32))
    first = KeyHolder(PARAMETERS, run=RUN, root=root, material=b"")
    again = KeyHolder(PARAMETERS, run=RUN, root=root, material=b"")
    rotated = KeyHolder(PARAMETERS, run=bytes(16), root=root, material=b"")
    payload = first.engine().encrypt(values)
    assert (again.engine().decrypt(again.engine().load(payload)) == values).all()
    assert (rotated.engine().decrypt(rotated.engine().load(payload)) != values).mean() > 0.99


def test_two_encryptions_of_one_value_have_nothing_in_common():
    engine = key_of().engine()
    zeros = pack(np.zeros(PARAMETERS.values_per_chunk, dtype=np.int64), PARAMETERS)
    first, second = engine.encrypt(zeros), engine.encrypt(zeros)
    words = [np.frombuffer(each, dtype=np.uint8) for each in (first, second)]
    assert (words[0] == words[1]).mean() < 0.1


def test_a_key_fits_only_its_run():
    with pytest.raises(ParameterError, match="rotate the key"):
        client_of(key_of(), agreement(bytes(16), parties=4, bound=1000, length=5), 0)


def test_secrets_are_neither_printed_nor_pickled_nor_copied():
    key, asked = key_of(), request(2)
    terms = agreement(RUN, parties=4, bound=1000, length=5)
    secrets = [key, asked, client_of(key, terms, 0), key.engine()]
    root = key._root
    for secret in secrets:
        assert "hidden" in repr(secret)
        assert root.hex() not in repr(secret)
        assert repr(root) not in repr(secret)
        for take in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                take(secret)


def test_a_closed_key_refuses_everything():
    key, offer = key_of(), request(2).offer
    terms = agreement(RUN, parties=4, bound=1000, length=5)
    client = client_of(key, terms, 0)
    key.close()
    assert not key.usable
    assert key._root == b""
    for action in (
        lambda: client.encrypt(np.zeros(5, dtype=np.int64)),
        lambda: client.decrypt_sum([], PARTIES[:1]),
        lambda: wrap(key, offer),
        key.engine,
    ):
        with pytest.raises(ProtocolError):
            action()


def test_nothing_is_left_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    key = key_of()
    terms = agreement(RUN, parties=4, bound=1000, length=5)
    server = server_of(key, terms)
    server.add(upload(key, terms, 0, np.arange(5)), sender=PARTIES[0])
    client_of(key, terms, 0).decrypt_sum(server.sum_chunks(), PARTIES[:1])
    assert list(tmp_path.iterdir()) == []
