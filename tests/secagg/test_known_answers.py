"""Known answers: the byte-exact specification of ffm-secagg/2, and the primitives it stands on.

The session vector is a three-client session with byte-filled keys. Its figures were printed by
`tests/secagg/prototype.py`, which shares no code with the package (`python -m tests.secagg.prototype`), and
the test holds package and prototype to them. Version 2 changed the label, the session id (attempt, cohort,
backbone, mechanism) and the roster; the Shamir figures are those of version 1. The RFC values are from the
documents named beside them; where an independent implementation is at hand (`cryptography` for HKDF, a direct
curve computation for X25519) the test computes them a second way too.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from defenses.errors import ProtocolError
from defenses.secagg import (
    ClientPolicy,
    Identity,
    ReplayGuard,
    Roster,
    SessionParameters,
    choose_cohort,
    messages,
    shamir,
)
from defenses.secagg.client import ClientSession
from defenses.secagg.graph import build_graph
from defenses.secagg.keys import LABEL, agree, derive_key, public_of
from defenses.secagg.masks import Mask, add_masks, keystream
from defenses.secagg.ring import reduce
from defenses.secagg.server import ServerSession
from defenses.signatures import verify_signature
from tests.secagg import prototype
from tests.secagg.parties import NOW, mask

HEX = bytes.fromhex


def test_keystream_words():
    key = bytes(range(32))
    assert [f"{word:08x}" for word in keystream(key, 4, np.uint32)] == [
        "b60090f2",
        "d09f492a",
        "6a9af3a9",
        "80772edd",
    ]
    assert [f"{word:016x}" for word in keystream(key, 2, np.uint64)] == [
        "d09f492ab60090f2",
        "80772edd6a9af3a9",
    ]


def test_graph_of_eight():
    graph = build_graph("harary", count=8, neighbours=4, transcript=bytes(32))
    expected = [
        [1, 2, 4, 5],
        [0, 3, 4, 7],
        [0, 4, 5, 6],
        [1, 4, 6, 7],
        [0, 1, 2, 3],
        [0, 2, 6, 7],
        [2, 3, 5, 7],
        [1, 3, 5, 6],
    ]
    assert [graph.neighbours(member) for member in range(8)] == expected
    assert prototype.ring(8, 4, bytes(32)) == expected


def test_shamir_shares():
    coefficients = [
        int.from_bytes(hashlib.sha256(b"kat-coeff" + j.to_bytes(4, "big")).digest(), "big") % shamir.PRIME
        for j in (1, 2)
    ]
    shares = shamir.evaluate(b"\x01" * 32, coefficients, shares=4)
    assert [share.hex()[2:] for share in shares] == [
        "70ced54d58ecc58848f6f690de1b2169815c69bc5ccedddd55edd17bc5bf7af7",
        "e79b5e00532b86304739423093d650960d2950a4f609cfd8b87af42dc0090b60",
        "65669b19efbd42f8fbc7e3e022328e86a467b5baccb1d6f328a86916efddb113",
        "ea308c9a2ea1fbe266a2db9f892fdb3b471798fde0c6f32ca6763037553d6e62",
    ]
    assert shamir.combine(dict(zip((1, 2, 4), (shares[0], shares[1], shares[3])))) == b"\x01" * 32


def test_the_shamir_field_is_the_smallest_prime_above_two_to_the_256():
    def passes_miller_rabin(candidate: int) -> bool:
        odd, twos = candidate - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            power = pow(base, odd, candidate)
            if power in (1, candidate - 1):
                continue
            if not any((power := power * power % candidate) == candidate - 1 for _ in range(twos - 1)):
                return False
        return True

    primes = [offset for offset in range(1, 298, 2) if passes_miller_rabin(2**256 + offset)]
    assert primes == [297]
    assert shamir.PRIME == 2**256 + 297


class Scripted:
    """Replay fixed secrets where a client would draw random ones:
    32-byte strings first, then coefficients.
    """

    def __init__(self, strings: list[bytes]) -> None:
        self._strings = strings

    def random_bytes(self, count: int) -> bytes:
        return self._strings.pop(0)

    def below(self, bound: int) -> int:
        return 1


def filled(first: int, client: int) -> bytes:
    return bytes([first + client]) * 32


def known_parameters(people: list[Identity], operator: Identity) -> SessionParameters:
    keys = [person.public_key for person in people]
    return SessionParameters(
        run_id=bytes(range(16)), round=7, attempt=2, mode="active", graph="complete", clients=3, neighbours=2,
        threshold=2, minimum_survivors=3, modulus_bits=32, length=8, backbone_hash=filled(0xA0, 0),
        layout_hash=filled(0xA1, 0), quantization_hash=filled(0xA2, 0), mechanism_hash=filled(0xA3, 0),
        model_hash=filled(0xA4, 0),
        roster=Roster.issue(operator, keys, federation="known answers", serial=5, expires=2_000_000_000),
    )  # fmt: skip


def test_session_of_three():
    people = [Identity(filled(0x01, j), guard=ReplayGuard.in_memory()) for j in range(3)]
    operator = Identity(b"o" * 32, guard=ReplayGuard.in_memory())
    parameters = known_parameters(people, operator)
    registered, session, known_transcript = prototype.known_session()
    assert parameters.roster.digest == registered
    assert registered.hex() == "e838560d04b2bbb55a676ae870f29bde1ddc242ac3c660b355632ee9f30eb40f"
    assert parameters.session_id == session
    assert session.hex() == "c5d4704432eadb95f7ff848357066659e761ea3332627fbea58ab8e75dcc7833"
    assert people[0].id.hex() == "34750f98bd59fcfc946da45aaabe933be154a4b5094e1c4abf42866505f3c97e"
    server = ServerSession(parameters)
    policy = ClientPolicy(
        operator=operator.public_key, federation="known answers", run_id=parameters.run_id,
        backbone_hash=filled(0xA0, 0), layout_hash=filled(0xA1, 0), quantization_hash=filled(0xA2, 0),
        mechanism_hash=filled(0xA3, 0),
    )  # fmt: skip
    clients = []
    for j, person in enumerate(people):
        script = Scripted([filled(0x11, j), filled(0x21, j), filled(0x31, j), filled(0x41, j)])
        clients.append(ClientSession(person, parameters, policy, script, now=NOW))
    for client in clients:
        server.receive_advertisement(client.advertise())
    for client in clients:
        server.receive_shares(client.share(server.roster_message()))
    transcript = clients[0].transcript
    assert transcript == known_transcript
    assert transcript.hex() == "e8c5041b7a5bb6e9072ffa7aa6d02f276a3192a724ecb86a73dc30a5f73ed8bc"
    check_session_keys(transcript, people)
    vectors = [
        (np.arange(8, dtype=np.int64) * (j + 1) - 5).astype(np.uint64).astype(np.uint32) for j in range(3)
    ]
    uploads = [
        mask(client, server.delivery_for(client.id), vector) for client, vector in zip(clients, vectors)
    ]
    members = prototype.three()
    for member, upload, vector in zip(members, uploads, vectors):
        body = messages.SignedBody.from_bytes(upload, messages.Kind.MASKED).body
        expected = prototype.masked(member, members, transcript, vector.tolist())
        assert np.frombuffer(body, dtype="<u4").tolist() == expected
    body = messages.SignedBody.from_bytes(uploads[0], messages.Kind.MASKED).body
    assert np.frombuffer(body, dtype="<u4").tolist() == [
        0x3721DBB1, 0x07A897EE, 0x7FAE7DC7, 0x2CA229F6, 0x0C0A71C2, 0xA06FC7A5, 0xE6827987, 0x80430CE9,
    ]  # fmt: skip
    for upload in uploads:
        server.receive_masked_input(upload)
    for client in clients:
        server.receive_confirmation(client.confirm(server.survivors_message()))
    for client in clients:
        server.receive_response(client.unmask(server.request_for(client.id)))
    assert server.finish().vector.tolist() == [
        0xFFFFFFF1, 0xFFFFFFF7, 0xFFFFFFFD, 0x00000003, 0x00000009, 0x0000000F, 0x00000015, 0x0000001B,
    ]  # fmt: skip


def test_cohort_of_two_in_three():
    ids = [member.id for member in prototype.three()]
    chosen = choose_cohort(ids, seed=filled(0x51, 0), run_id=bytes(16), round_number=9, size=2)
    assert list(chosen) == prototype.cohort(ids, seed=filled(0x51, 0), run=bytes(16), number=9, size=2)
    assert [member.hex()[:8] for member in chosen] == ["6a3803d5", "b62e867f"]


def check_session_keys(transcript: bytes, people: list[Identity]) -> None:
    """Compare the seeds and commitments of the session vector."""

    def pair(one: int, other: int) -> str:
        shared = agree(filled(0x21, one), [public_of(filled(0x21, other))])[0]
        seed = messages.pair_seed(shared, transcript=transcript, one=people[one].id, other=people[other].id)
        return seed.hex()

    assert pair(0, 1) == "ccf997627d475d0cc96b128d527d7a944449bd6ac16fcc54c2be8b9bf5fc9509" == pair(1, 0)
    assert pair(0, 2) == "60ca3e5a4983fc76faf6410dafc7d7184b7b4dfeb1b2d1f3caf42340b5350e21"
    assert pair(1, 2) == "8765a413127acaac60c3c0c2cb14e83b2639f84dfeef5fc2c94e8c76d4237733"
    assert keystream(HEX(pair(0, 1)), 4, np.uint32).tolist() == prototype.words(HEX(pair(0, 1)), 4)
    owner = people[0].id
    assert messages.self_seed(filled(0x31, 0), transcript=transcript, owner=owner).hex() == (
        "2b2c06d1484e687be9b9417b84d624b40e1dd89754a8ffb9585ec0325995ed44"
    )
    assert messages.self_commitment(transcript, owner, filled(0x31, 0)).hex() == (
        "59ecec546160952ee8368b8396d9c3c73f651f6e5c8f3db5634ef702e09d5358"
    )


# Primitives


def curve25519(scalar: bytes, point: int) -> bytes:
    """Multiply on the Montgomery curve y^2 = x^3 + 486662 x^2 + x by plain double-and-add on x/z:
    RFC 7748 section 5.
    """
    prime = 2**255 - 19
    number = int.from_bytes(scalar, "little") & ~7 & ((1 << 255) - 1) | 1 << 254
    low, high = (1, 0), (point, 1)
    for bit in reversed(range(255)):
        if number >> bit & 1:
            low, high = high, low
        (a, b), (c, d) = low, high
        plus, minus = (a + b) % prime, (a - b) % prime
        cross, other = (c - d) * plus % prime, (c + d) * minus % prime
        high = ((cross + other) ** 2 % prime, point * (cross - other) ** 2 % prime)
        square, difference = plus * plus % prime, (plus * plus - minus * minus) % prime
        low = (square * minus * minus % prime, difference * (square + 121665 * difference) % prime)
        if number >> bit & 1:
            low, high = high, low
    x, z = low
    return (x * pow(z, -1, prime) % prime).to_bytes(32, "little")


def test_x25519_section_5_2_of_rfc_7748():
    scalar = HEX("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = HEX("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    expected = HEX("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")
    assert agree(scalar, [point]) == [expected]
    assert curve25519(scalar, int.from_bytes(point, "little") & (1 << 255) - 1) == expected


def test_x25519_iterated_in_rfc_7748():
    scalar = point = (9).to_bytes(32, "little")
    for step in range(1000):
        scalar, point = agree(scalar, [point])[0], scalar
        if step == 0:
            assert scalar.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_x25519_section_6_1_of_rfc_7748():
    alice = HEX("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = HEX("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert public_of(alice).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert [key.hex() for key in agree(alice, [public_of(bob)])] == [shared]
    assert [key.hex() for key in agree(bob, [public_of(alice)])] == [shared]
    assert curve25519(alice, int.from_bytes(public_of(bob), "little")).hex() == shared


LOW_ORDER = [
    0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]  # fmt: skip


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_low_order_point_is_refused(point: int):
    with pytest.raises(ValueError):
        agree(b"\x07" * 32, [point.to_bytes(32, "little")])


def test_ed25519_section_7_1_of_rfc_8032():
    rows = [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            (
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701c"
                "f9b46bd25bf5f0595bbe24655141438e7a100b"
            ),
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "72",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            (
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0"
                "f11d8c387b2eaeb4302aeeb00d291612bb0c00"
            ),
        ),
    ]
    for seed, message, public_key, signature in rows:
        identity = Identity(HEX(seed), guard=ReplayGuard.in_memory())
        assert identity.public_key.hex() == public_key
        assert identity.sign(HEX(message)).hex() == signature
        verify_signature(identity.public_key, HEX(signature), HEX(message))
        with pytest.raises(ProtocolError):
            verify_signature(identity.public_key, HEX(signature), HEX(message) + b"!")


def test_hkdf_case_1_of_rfc_5869_and_the_key_derivation_in_use():
    case = HKDF(hashes.SHA256(), 42, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert case.derive(b"\x0b" * 22).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert hmac.digest(bytes(range(13)), b"\x0b" * 22, "sha256").hex() == (
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    )
    for salt in (b"", b"s" * 32):
        reference = HKDF(hashes.SHA256(), 32, salt or None, LABEL + b"pair" + b"context")
        assert derive_key(b"k" * 32, salt=salt, label="pair", context=b"context") == reference.derive(
            b"k" * 32
        )


def test_chacha20_poly1305_section_2_8_2_of_rfc_8439():
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    sealed = ChaCha20Poly1305(bytes(range(0x80, 0xA0))).encrypt(
        HEX("070000004041424344454647"), text, HEX("50515253c0c1c2c3c4c5c6c7")
    )
    assert sealed[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


def test_aes_256_ctr_section_f_5_5_of_sp_800_38a():
    key = HEX("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    text = HEX("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(range(0xF0, 0x100)))).encryptor()
    assert stream.update(text).hex() == "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"


# Masks


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize("length", [0, 1, 16383, 16384, 16385, 40_000])
def test_fast_masks_equal_their_definition(word: type, length: int):
    masks = [Mask(bytes([seed]) * 32, negative=bool(seed % 2)) for seed in range(5)]
    vector = np.arange(length, dtype=word)
    expected = vector.copy()
    for each in masks:
        stream = keystream(each.seed, length, word)
        expected = expected - stream if each.negative else expected + stream
    add_masks(vector, masks)
    np.testing.assert_array_equal(vector, expected)


def test_many_masks_are_applied_in_batches():
    masks = [Mask(seed.to_bytes(32, "big"), negative=seed % 3 == 0) for seed in range(1100)]
    vector = np.zeros(5, dtype=np.uint32)
    add_masks(vector, masks)
    total = sum((-1 if m.negative else 1) * keystream(m.seed, 5, np.uint32).astype(np.int64) for m in masks)
    np.testing.assert_array_equal(vector, reduce((total & 0xFFFFFFFF).astype(np.uint32), 32))


def test_every_seed_bit_changes_the_mask():
    """Folding or truncating the seed would leave some of the 256 neighbours with the same mask."""
    base = bytes(range(32))
    flipped = [
        keystream((int.from_bytes(base, "big") ^ 1 << bit).to_bytes(32, "big"), 8, np.uint32)
        for bit in range(256)
    ]
    words = np.stack([keystream(base, 8, np.uint32), *flipped])
    assert len({row.tobytes() for row in words}) == 257
    distances = np.unpackbits((words[1:] ^ words[0]).view(np.uint8), axis=1).sum(axis=1)
    assert distances.min() > 80
    assert distances.max() < 176


def test_mask_words_cover_their_whole_range():
    words = keystream(b"w" * 32, 1 << 16, np.uint32)
    counts = np.bincount(words >> np.uint32(24), minlength=256)
    chi_square = float(((counts - 256.0) ** 2 / 256.0).sum())
    assert 170 < chi_square < 350  # 255 degrees of freedom: mean 255, standard deviation 22.6
    assert int(words.max()) > 0xFFF00000
    assert int(words.min()) < 0x000FFFFF
