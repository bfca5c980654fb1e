"""The specification of ffm-secagg/2 written down a second time, as plainly as possible, to compute known
answers from.

It shares no code with the package: bytes are put together by hand, keys come from `cryptography`'s own HKDF,
masks from Python integers. It covers an honest session of the complete graph with 32-bit words and nothing
else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LABEL = b"ffm-secagg/2 "


def hashed(*parts: bytes) -> bytes:
    return hashlib.sha256(LABEL + b"".join(parts)).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, LABEL + info).derive(secret)


def x25519_public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def x25519(secret: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))


def ed25519_public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def words(seed: bytes, count: int) -> list[int]:
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return [int.from_bytes(stream[place : place + 4], "little") for place in range(0, 4 * count, 4)]


@dataclass(frozen=True)
class Member:
    """One client's secrets."""

    identity: bytes
    channel: bytes
    mask: bytes
    own: bytes
    nonce: bytes

    @property
    def id(self) -> bytes:
        return hashlib.sha256(ed25519_public(self.identity)).digest()


def register(
    operator: bytes, members: list[Member], *, federation: bytes, serial: int, expires: int
) -> bytes:
    """Hash what the operator signs."""
    keys = [ed25519_public(member.identity) for member in sorted(members, key=lambda member: member.id)]
    head = len(federation).to_bytes(1, "big") + serial.to_bytes(8, "big") + expires.to_bytes(8, "big")
    return hashed(b"register", ed25519_public(operator), head, federation, *keys)


def session_id(fields: bytes, registered: bytes, members: list[Member]) -> bytes:
    cohort = hashed(b"members", *sorted(member.id for member in members))
    return hashed(b"session", fields, registered, cohort)


def advert(member: Member, session: bytes) -> bytes:
    body = member.id + x25519_public(member.channel) + x25519_public(member.mask) + member.nonce
    signature = Ed25519PrivateKey.from_private_bytes(member.identity).sign(LABEL + b"adv" + session + body)
    return body + signature


def transcript(members: list[Member], session: bytes) -> bytes:
    return hashed(
        b"roster", session, *(advert(member, session) for member in sorted(members, key=lambda m: m.id))
    )


def pair_seed(one: Member, other: Member, salt: bytes) -> bytes:
    shared = x25519(one.mask, x25519_public(other.mask))
    return hkdf(shared, salt, b"pair" + min(one.id, other.id) + max(one.id, other.id))


def self_seed(member: Member, salt: bytes) -> bytes:
    return hkdf(member.own, salt, b"self" + member.id)


def commitment(member: Member, salt: bytes) -> bytes:
    return hashed(b"selfcommit", salt, member.id, member.own)


def masked(member: Member, members: list[Member], salt: bytes, vector: list[int]) -> list[int]:
    """Add the self mask and every pair mask, added by the smaller id and subtracted by the larger,
    modulo 2^32.
    """
    total = [value + mask for value, mask in zip(vector, words(self_seed(member, salt), len(vector)))]
    for other in members:
        if other.id != member.id:
            sign = 1 if member.id < other.id else -1
            stream = words(pair_seed(member, other, salt), len(vector))
            total = [value + sign * mask for value, mask in zip(total, stream)]
    return [value % (1 << 32) for value in total]


def ring(count: int, neighbours: int, salt: bytes) -> list[list[int]]:
    """Shuffle from the last place down,
    by 32-bit words that are thrown away where they would favour somebody.
    """
    stream = Cipher(algorithms.AES256(hkdf(salt, bytes(32), b"graph")), modes.CTR(bytes(16))).encryptor()
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        while (word := int.from_bytes(stream.update(bytes(4)), "big")) >= (1 << 32) - (1 << 32) % (last + 1):
            pass
        other = word % (last + 1)
        order[last], order[other] = order[other], order[last]
    steps = [step for step in range(-neighbours // 2, neighbours // 2 + 1) if step]
    place = {member: position for position, member in enumerate(order)}
    return [sorted(order[(place[member] + step) % count] for step in steps) for member in range(count)]


def cohort(ids: list[bytes], *, seed: bytes, run: bytes, number: int, size: int) -> list[bytes]:
    """Return the members whose hash is smallest."""
    return sorted(
        sorted(ids, key=lambda one: hashed(b"cohort", seed, run, number.to_bytes(8, "big"), one))[:size]
    )


def filled(first: int, place: int) -> bytes:
    return bytes([first + place]) * 32


def three() -> list[Member]:
    """Return the three members of the known session: every secret is one byte, repeated."""
    return [Member(*(filled(first, place) for first in (0x01, 0x11, 0x21, 0x31, 0x41))) for place in range(3)]


def known_session() -> tuple[bytes, bytes, bytes]:
    """Return the roster's digest, the session id and the transcript of the known session."""
    members = three()
    registered = register(b"o" * 32, members, federation=b"known answers", serial=5, expires=2_000_000_000)
    fields = (
        bytes(range(16))
        + (7).to_bytes(8, "big")
        + (2).to_bytes(4, "big")  # run, round, attempt
        + bytes([1, 0])  # active, complete
        # clients, neighbours, threshold, survivors
        + b"".join(number.to_bytes(4, "big") for number in (3, 2, 2, 3))
        + bytes([32])
        + (8).to_bytes(8, "big")  # modulus bits, length
        + b"".join(filled(0xA0 + place, 0) for place in range(5))  # backbone, layout, grid, mechanism, model
    )
    session = session_id(fields, registered, members)
    return registered, session, transcript(members, session)


if __name__ == "__main__":
    registered, session, salt = known_session()
    members = three()
    print("roster", registered.hex(), "\nsession", session.hex(), "\ntranscript", salt.hex())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        print("pair", one, other, pair_seed(members[one], members[other], salt).hex())
    print("self", self_seed(members[0], salt).hex(), "\ncommitment", commitment(members[0], salt).hex())
    for place, member in enumerate(members):
        vector = [(index * (place + 1) - 5) % (1 << 32) for index in range(8)]
        print("masked", place, [f"0x{word:08X}" for word in masked(member, members, salt, vector)])
    print("ring", ring(8, 4, bytes(32)))
    chosen = cohort([member.id for member in members], seed=filled(0x51, 0), run=bytes(16), number=9, size=2)
    print("cohort", [one.hex()[:8] for one in chosen])
