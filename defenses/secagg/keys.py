"""Long-term identities, the operator's roster, and the labelled hashes every key of a session comes from."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.replay_guard import ReplayGuard
from defenses.signatures import SIGNATURE_BYTES, is_sound_key, verify_signature

LABEL = b"ffm-secagg/2 "
KEY_BYTES = 32
LARGEST_ROSTER = 1 << 20
_ROSTER_VERSION = 2
_ROSTER_HEAD = struct.Struct(">BQQ")
_CURVE_PRIME = 2**255 - 19
_LOW_ORDER = frozenset(
    point.to_bytes(KEY_BYTES, "little")
    for point in (
        0,
        1,
        _CURVE_PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
)
"""The X25519 public keys below the prime that give everybody the same, all-zero, shared secret."""


def labelled_hash(label: str, *parts: bytes) -> bytes:
    """Hash the parts under a label of this protocol version with SHA-256."""
    return hashlib.sha256(LABEL + label.encode() + b"".join(parts)).digest()


def derive_key(secret: bytes, *, salt: bytes, label: str, context: bytes = b"") -> bytes:
    """Derive 32 bytes by HKDF-SHA256 with the label and context as info.

    Source: RFC 5869; one output block, so the expand step is a single HMAC.
    """
    extracted = hmac.digest(salt or bytes(KEY_BYTES), secret, "sha256")
    return hmac.digest(extracted, LABEL + label.encode() + context + b"\x01", "sha256")


def identity_of(public_key: bytes) -> bytes:
    """Name a client by the SHA-256 of its raw Ed25519 public key."""
    return hashlib.sha256(public_key).digest()


def public_of(secret: bytes) -> bytes:
    """Compute the X25519 public key of a 32-byte secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public_keys: Iterable[bytes]) -> list[bytes]:
    """Run X25519 between one secret and each public key.

    Raises: ValueError for a low-order point, whose shared secret would be all zero (RFC 7748, section 6.1).
    """
    private = X25519PrivateKey.from_private_bytes(secret)
    return [private.exchange(X25519PublicKey.from_public_bytes(public)) for public in public_keys]


def require_sound_keys(keys: Sequence[bytes]) -> None:
    """Check that X25519 public keys are canonical encodings, pairwise different and not of low order.

    Raises: ProtocolError. Two encodings of one point would pass for two keys; with a point of low order
    nobody can agree on a secret, so one member that advertised it would have all honest ones leave.
    """
    if len(set(keys)) != len(keys) or not _LOW_ORDER.isdisjoint(keys):
        raise ProtocolError
    if any(int.from_bytes(key, "little") >= _CURVE_PRIME for key in keys):
        raise ProtocolError


class Identity:
    """Hold a client's (or the operator's) long-term Ed25519 key together with its memory of past rounds.

    Whoever restores an identity from its seed restores its guard too: `ReplayGuard.open`.

    Guarantee: the private key is never printed and never pickled; copying is refused.
    """

    __slots__ = ("_key", "guard", "id", "public_key")

    def __init__(self, seed: bytes, *, guard: ReplayGuard) -> None:
        if len(seed) != KEY_BYTES:
            raise ParameterError(f"the seed of an identity has {KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.id = identity_of(self.public_key)
        self.guard = guard

    @classmethod
    def generate(cls, source: RandomSource) -> Identity:
        """Create a fresh identity that lives as long as this process; keep its guard in a file if it shall
        live longer.
        """
        return cls(source.random_bytes(KEY_BYTES), guard=ReplayGuard.in_memory())

    def seed(self) -> bytes:
        """Export the private key, for storage by its owner."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Sign a message with Ed25519."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.id.hex()[:16]}, key=<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an identity holds a secret and cannot be pickled or copied")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """List the identities the operator admits to a federation, under the operator's signature.

    The roster reaches clients from the operator, never from the aggregating server: who chooses the keys can
    be everybody. `serial` grows with every roster of a federation; `expires` is in seconds since 1970.

    Guarantee: an instance exists only with a valid signature and distinct keys that can be somebody's;
    `members` maps id to public key in the order of the ids; `digest` binds all of it.
    Raises: ProtocolError when the signature is wrong; ParameterError for keys that are no keys.
    """

    operator: bytes
    federation: str
    serial: int
    expires: int
    public_keys: tuple[bytes, ...]
    signature: bytes
    members: Mapping[bytes, bytes] = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        members = {identity_of(key): key for key in self.public_keys}
        if len(members) != len(self.public_keys) or not all(map(is_sound_key, self.public_keys)):
            raise ParameterError("a roster lists distinct Ed25519 public keys, none of small order")
        if list(members) != sorted(members):
            raise ParameterError("a roster lists its keys in the order of their identities")
        statement = _roster_statement(self.federation, self.serial, self.expires, self.public_keys)
        verify_signature(self.operator, self.signature, LABEL + b"operator" + statement)
        object.__setattr__(self, "members", MappingProxyType(members))
        object.__setattr__(self, "digest", labelled_hash("register", self.operator, statement))

    @classmethod
    def issue(
        cls,
        operator: Identity,
        public_keys: Iterable[bytes],
        *,
        federation: str,
        serial: int,
        expires: int,
    ) -> Roster:
        """Sign a list of public keys as the operator."""
        ordered = tuple(sorted(public_keys, key=identity_of))
        statement = _roster_statement(federation, serial, expires, ordered)
        return cls(
            operator=operator.public_key,
            federation=federation,
            serial=serial,
            expires=expires,
            public_keys=ordered,
            signature=operator.sign(LABEL + b"operator" + statement),
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, operator: bytes) -> Roster:
        """Read a stored roster and check it against the operator's public key.

        Raises: ProtocolError when anything about it is wrong.
        """
        try:
            if len(data) > 1 + _ROSTER_HEAD.size + 255 + KEY_BYTES * LARGEST_ROSTER + SIGNATURE_BYTES:
                raise ValueError
            if data[:1] != bytes([_ROSTER_VERSION]):
                raise ValueError
            size, serial, expires = _ROSTER_HEAD.unpack_from(data, 1)
            start = 1 + _ROSTER_HEAD.size
            name, body = data[start : start + size], data[start + size : -SIGNATURE_BYTES]
            if len(data) < start + size + SIGNATURE_BYTES or len(body) % KEY_BYTES:
                raise ValueError
            keys = tuple(body[place : place + KEY_BYTES] for place in range(0, len(body), KEY_BYTES))
            return cls(
                operator=operator, federation=name.decode(), serial=serial, expires=expires, public_keys=keys,
                signature=data[-SIGNATURE_BYTES:],
            )  # fmt: skip
        except (ValueError, struct.error, ProtocolError):
            pass
        raise ProtocolError

    def to_bytes(self) -> bytes:
        """Write version, name, serial, expiry, public keys and signature."""
        statement = _roster_statement(self.federation, self.serial, self.expires, self.public_keys)
        return bytes([_ROSTER_VERSION]) + statement + self.signature


def _roster_statement(federation: str, serial: int, expires: int, public_keys: Iterable[bytes]) -> bytes:
    name = federation.encode()
    if not 1 <= len(name) <= 255 or not federation.isprintable():
        raise ParameterError("federation: name it with 1 to 255 bytes of printable text")
    if not (0 <= serial < 1 << 64 and 0 <= expires < 1 << 64):
        raise ParameterError(f"serial = {serial}, expires = {expires}: must be from 0 to 2^64 - 1")
    return _ROSTER_HEAD.pack(len(name), serial, expires) + name + b"".join(public_keys)
