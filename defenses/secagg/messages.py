"""The bytes of every message: version, kind, fixed-width fields, nothing optional and nothing left over."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from defenses.errors import ProtocolError
from defenses.secagg.keys import LABEL, derive_key, labelled_hash
from defenses.secagg.shamir import SHARE_BYTES
from defenses.signatures import SIGNATURE_BYTES

VERSION = 2
HEADER_BYTES = 2
ID_BYTES = 32
ADVERT_BYTES = 192
CIPHERTEXT_BYTES = 4 + 2 * SHARE_BYTES + 16
_NONCE = bytes(12)


class Kind(IntEnum):
    """Name the messages in the order they are sent."""

    ADVERT = 0
    ROSTER = 1
    SHARES = 2
    DELIVERY = 3
    MASKED = 4
    SURVIVORS = 5
    CONFIRMATION = 6
    REQUEST = 7
    RESPONSE = 8
    BUNDLE = 9
    COMPLAINT = 10


def header(kind: Kind) -> bytes:
    """Return the version and kind that start every message."""
    return bytes((VERSION, kind))


def body_of(message: bytes | bytearray | memoryview, kind: Kind) -> memoryview:
    """Return what follows the header.

    Raises: ProtocolError when version or kind is another.
    """
    view = memoryview(message).cast("B") if len(message) else memoryview(b"")
    if bytes(view[:HEADER_BYTES]) != header(kind):
        raise ProtocolError
    return view[HEADER_BYTES:]


def require_size(message: bytes | bytearray | memoryview, largest: int) -> None:
    """Refuse an oversized message before taking it apart.

    Raises: ProtocolError.
    """
    if len(message) > largest:
        raise ProtocolError


def _fixed(view: memoryview, size: int) -> list[bytes]:
    if size == 0 or len(view) % size:
        raise ProtocolError
    return [bytes(view[start : start + size]) for start in range(0, len(view), size)]


def write_bitmap(present: Iterable[int], count: int) -> bytes:
    """Write which of `count` places are present, least significant bit first, unused bits zero."""
    return sum(1 << place for place in present).to_bytes((count + 7) // 8, "little")


def read_bitmap(view: memoryview, count: int) -> tuple[list[int], memoryview]:
    """Read a bitmap of `count` places; return the places and the rest.

    Raises: ProtocolError when it is short or an unused bit is set.
    """
    size = (count + 7) // 8
    value = int.from_bytes(view[:size], "little")
    if len(view) < size or value >> count:
        raise ProtocolError
    return [place for place in range(count) if value >> place & 1], view[size:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """Hold one client's fresh keys for a session: 192 bytes, signed."""

    id: bytes
    channel_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes

    def statement(self, session_id: bytes) -> bytes:
        """Return what the signature covers."""
        return LABEL + b"adv" + session_id + self.id + self.channel_key + self.mask_key + self.nonce

    def to_bytes(self) -> bytes:
        """Write the five fields."""
        return self.id + self.channel_key + self.mask_key + self.nonce + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Advert:
        """Read the five fields."""
        if len(data) != ADVERT_BYTES:
            raise ProtocolError
        return cls(
            id=data[:32],
            channel_key=data[32:64],
            mask_key=data[64:96],
            nonce=data[96:128],
            signature=data[128:],
        )


def write_advert(advert: Advert) -> bytes:
    """Write the R0 message of a client."""
    return header(Kind.ADVERT) + advert.to_bytes()


def read_advert(message: bytes) -> Advert:
    """Read the R0 message of a client."""
    return Advert.from_bytes(bytes(body_of(message, Kind.ADVERT)))


def write_roster(adverts: Iterable[Advert]) -> bytes:
    """Write the adverts of everybody who showed up, sorted by id."""
    return header(Kind.ROSTER) + b"".join(advert.to_bytes() for advert in adverts)


def read_roster(message: bytes) -> list[Advert]:
    """Read the adverts of everybody.

    Raises: ProtocolError unless they are sorted by distinct ids.
    """
    adverts = []
    for part in _fixed(body_of(message, Kind.ROSTER), ADVERT_BYTES):
        adverts.append(Advert.from_bytes(part))
    if any(before.id >= after.id for before, after in itertools.pairwise(adverts)):
        raise ProtocolError
    return adverts


def transcript_of(session_id: bytes, adverts: Iterable[Advert]) -> bytes:
    """Hash the session and its adverts, sorted by id, into the transcript that salts every key."""
    return labelled_hash("roster", session_id, *(advert.to_bytes() for advert in adverts))


def bind_model(transcript: bytes, model_hash: bytes) -> bytes:
    """Extend the transcript of a session with a deferred model by the model it turned out to be about."""
    return labelled_hash("model", transcript, model_hash)


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Hold the R1 message of a client: its self-mask commitment and one ciphertext for each neighbour,
    signed.
    """

    id: bytes
    commitment: bytes
    signature: bytes
    ciphertexts: Sequence[bytes]

    def statement(self, transcript: bytes) -> bytes:
        """Return what the signature covers."""
        return (
            LABEL + b"shares" + transcript + self.id + self.commitment + _digest(b"".join(self.ciphertexts))
        )

    def to_bytes(self) -> bytes:
        """Write the R1 message."""
        return header(Kind.SHARES) + self.id + self.commitment + self.signature + b"".join(self.ciphertexts)

    @classmethod
    def from_bytes(cls, message: bytes) -> SealedShares:
        """Read the R1 message."""
        view = body_of(message, Kind.SHARES)
        if len(view) < 128:
            raise ProtocolError
        return cls(
            bytes(view[:32]), bytes(view[32:64]), bytes(view[64:128]), _fixed(view[128:], CIPHERTEXT_BYTES)
        )


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def self_commitment(transcript: bytes, owner: bytes, secret: bytes) -> bytes:
    """Commit a client to its self-mask secret, so that a wrong reconstruction is noticed."""
    return labelled_hash("selfcommit", transcript, owner, secret)


def channel_key(shared: bytes, *, transcript: bytes, sender: bytes, receiver: bytes) -> bytes:
    """Derive the key that encrypts one message from sender to receiver."""
    return derive_key(shared, salt=transcript, label="share", context=sender + receiver)


def pair_seed(shared: bytes, *, transcript: bytes, one: bytes, other: bytes) -> bytes:
    """Derive the mask seed two neighbours have in common."""
    return derive_key(shared, salt=transcript, label="pair", context=min(one, other) + max(one, other))


def self_seed(secret: bytes, *, transcript: bytes, owner: bytes) -> bytes:
    """Derive the seed of a client's self mask."""
    return derive_key(secret, salt=transcript, label="self", context=owner)


def seal_shares(
    key: bytes,
    *,
    point: int,
    key_share: bytes,
    self_share: bytes,
    transcript: bytes,
    sender: bytes,
    receiver: bytes,
) -> bytes:
    """Encrypt the two shares of a neighbour.

    The zero nonce is safe: each directed key encrypts one message.
    """
    aad = LABEL + b"share" + transcript + sender + receiver
    return ChaCha20Poly1305(key).encrypt(_NONCE, point.to_bytes(4, "big") + key_share + self_share, aad)


def open_shares(
    key: bytes, ciphertext: bytes, *, point: int, transcript: bytes, sender: bytes, receiver: bytes
) -> tuple[bytes, bytes]:
    """Decrypt the two shares from a neighbour: of its mask key and of its self-mask secret.

    Raises: ProtocolError when the ciphertext or the point inside is wrong.
    """
    aad = LABEL + b"share" + transcript + sender + receiver
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, ciphertext, aad)
    except InvalidTag:
        plain = b""
    if len(plain) != CIPHERTEXT_BYTES - 16 or int.from_bytes(plain[:4], "big") != point:
        raise ProtocolError
    return plain[4 : 4 + SHARE_BYTES], plain[4 + SHARE_BYTES :]


def write_delivery(ciphertexts: Sequence[tuple[int, bytes]], neighbours: int) -> bytes:
    """Write the ciphertexts for one client, keyed by place among its sorted neighbours."""
    bitmap = write_bitmap((place for place, _ in ciphertexts), neighbours)
    return header(Kind.DELIVERY) + bitmap + b"".join(ciphertext for _, ciphertext in ciphertexts)


def read_delivery(message: bytes, neighbours: int) -> list[tuple[int, bytes]]:
    """Read the ciphertexts for one client, keyed by place among its sorted neighbours."""
    return _keyed(body_of(message, Kind.DELIVERY), neighbours, CIPHERTEXT_BYTES)


def _keyed(view: memoryview, count: int, size: int) -> list[tuple[int, bytes]]:
    places, rest = read_bitmap(view, count)
    items = _fixed(rest, size)
    if len(items) != len(places):
        raise ProtocolError
    return list(zip(places, items, strict=True))


@dataclass(frozen=True, slots=True)
class SignedBody:
    """Hold an R2 or R4 message: who sent it, a signature, and a body that is not copied."""

    id: bytes
    signature: bytes
    body: memoryview

    @classmethod
    def from_bytes(cls, message: bytes | bytearray | memoryview, kind: Kind) -> SignedBody:
        """Read the message."""
        view = body_of(message, kind)
        if len(view) < ID_BYTES + SIGNATURE_BYTES:
            raise ProtocolError
        return cls(bytes(view[:32]), bytes(view[32:96]), view[96:])

    def statement(self, label: str, transcript: bytes) -> bytes:
        """Return what the signature covers."""
        return body_statement(label, transcript, self.id, _digest(self.body))


def body_statement(label: str, transcript: bytes, owner: bytes, digest: bytes) -> bytes:
    """Return what the signature of an R2 or R4 message covers, from the digest of its body."""
    return LABEL + label.encode() + transcript + owner + digest


def write_complaint_body(ciphertexts: Sequence[tuple[int, bytes]], neighbours: int) -> bytes:
    """Write the body of a complaint: which neighbours' ciphertexts did not open, and their SHA-256."""
    bitmap = write_bitmap((place for place, _ in ciphertexts), neighbours)
    return bitmap + b"".join(_digest(ciphertext) for _, ciphertext in ciphertexts)


def read_complaint_body(body: memoryview, neighbours: int) -> list[tuple[int, bytes]]:
    """Read the body of a complaint: place among the sorted neighbours, and digest."""
    return _keyed(body, neighbours, hashlib.sha256().digest_size)


def matches(ciphertext: bytes, digest: bytes) -> bool:
    """Say whether a complaint is about this ciphertext."""
    return _digest(ciphertext) == digest


def write_survivors(survivors: Iterable[int], count: int) -> bytes:
    """Write who uploaded, as a bitmap over the sorted roster."""
    return header(Kind.SURVIVORS) + write_bitmap(survivors, count)


def read_survivors(message: bytes, count: int, kind: Kind = Kind.SURVIVORS) -> list[int]:
    """Read who uploaded."""
    places, rest = read_bitmap(body_of(message, kind), count)
    if rest:
        raise ProtocolError
    return places


def alive_statement(transcript: bytes, survivors: Iterable[bytes]) -> bytes:
    """Return what a client signs to confirm one set of survivors, given in sorted order."""
    return LABEL + b"alive" + transcript + _digest(b"".join(survivors))


def write_confirmation(owner: bytes, signature: bytes) -> bytes:
    """Write the R3 message of a client."""
    return header(Kind.CONFIRMATION) + owner + signature


def read_confirmation(message: bytes) -> tuple[bytes, bytes]:
    """Read the R3 message of a client."""
    view = body_of(message, Kind.CONFIRMATION)
    if len(view) != ID_BYTES + SIGNATURE_BYTES:
        raise ProtocolError
    return bytes(view[:32]), bytes(view[32:])


def write_active_request(signatures: Sequence[tuple[int, bytes]], neighbours: int) -> bytes:
    """Write the R4 request in active mode: neighbours' confirmations, keyed by place among the neighbours."""
    bitmap = write_bitmap((place for place, _ in signatures), neighbours)
    return header(Kind.REQUEST) + bitmap + b"".join(signature for _, signature in signatures)


def read_active_request(message: bytes, neighbours: int) -> list[tuple[int, bytes]]:
    """Read the R4 request in active mode."""
    return _keyed(body_of(message, Kind.REQUEST), neighbours, SIGNATURE_BYTES)


def write_request(survivors: Iterable[int], count: int) -> bytes:
    """Write the R4 request in semi-honest mode: who uploaded."""
    return header(Kind.REQUEST) + write_bitmap(survivors, count)


def read_request(message: bytes, count: int) -> list[int]:
    """Read the R4 request in semi-honest mode."""
    return read_survivors(message, count, Kind.REQUEST)


def write_shares(shares: Sequence[bytes]) -> bytes:
    """Write the body of an R4 response."""
    return b"".join(shares)


def read_shares(body: memoryview) -> list[bytes]:
    """Read the body of an R4 response."""
    return _fixed(body, SHARE_BYTES)


def bundle(parts: Sequence[bytes | memoryview]) -> bytes:
    """Put several messages into one, such as an upload and the next round's advert."""
    return header(Kind.BUNDLE) + b"".join(len(part).to_bytes(8, "big") + bytes(part) for part in parts)


def unbundle(message: bytes | memoryview) -> list[memoryview]:
    """Take a bundle apart, without copying.

    Raises: ProtocolError when it is no bundle of whole messages.
    """
    rest, parts = body_of(message, Kind.BUNDLE), []
    while len(rest):
        size = int.from_bytes(rest[:8], "big")
        if len(rest) < 8 or size > len(rest) - 8:
            raise ProtocolError
        parts.append(rest[8 : 8 + size])
        rest = rest[8 + size :]
    return parts
