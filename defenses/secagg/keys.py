"""Long-term identities, the operator's roster, and the labelled hashes every key of a session comes from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource

LABEL = b"ffm-secagg/1 "
KEY_BYTES = 32
SIGNATURE_BYTES = 64
_ROSTER_VERSION = 1
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


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature.

    Raises: ProtocolError when it does not verify.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        return
    except (InvalidSignature, ValueError):
        pass
    raise ProtocolError


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

    Raises: ProtocolError. Two encodings of one point would pass for two keys; with a point of low order nobody can agree
    on a secret, so one member that advertised it would have all honest ones leave.
    """
    if len(set(keys)) != len(keys) or not _LOW_ORDER.isdisjoint(keys):
        raise ProtocolError
    if any(int.from_bytes(key, "little") >= _CURVE_PRIME for key in keys):
        raise ProtocolError


class ReplayGuard:
    """Remember which rounds a client entered and which updates it uploaded, so that neither happens twice.

    Rounds of one run only grow. An update whose masked form left the client may not enter a second session, whether or
    not the first one finished: the others may have opened it without this client, and two sums over cohorts that
    differ by one member give that member's update away.

    Guarantee: `enter` and `spend` raise ProtocolError on the second use and never forget within a process.
    Assumes: a deployment that restarts clients stores `rounds` and passes it back.
    """

    __slots__ = ("_rounds", "_updates")

    def __init__(self, rounds: Mapping[bytes, int] | None = None) -> None:
        self._rounds = dict(rounds or {})
        self._updates: set[bytes] = set()

    @property
    def rounds(self) -> Mapping[bytes, int]:
        """Return the last round entered for each run."""
        return MappingProxyType(dict(self._rounds))

    def enter(self, run_id: bytes, round_number: int) -> None:
        """Record that a session of this round starts.

        Raises: ProtocolError when the run already reached this round.
        """
        if round_number <= self._rounds.get(run_id, -1):
            raise ProtocolError
        self._rounds[run_id] = round_number

    def spend(self, update: bytes) -> None:
        """Record that an update is about to leave the client.

        Raises: ProtocolError when it left before.
        """
        if update in self._updates:
            raise ProtocolError
        self._updates.add(update)


class Identity:
    """Hold a client's (or the operator's) long-term Ed25519 key together with its memory of past rounds.

    Guarantee: the private key is never printed and never pickled; copying is refused.
    """

    __slots__ = ("_key", "guard", "id", "public_key")

    def __init__(self, seed: bytes, *, guard: ReplayGuard | None = None) -> None:
        if len(seed) != KEY_BYTES:
            raise ParameterError(f"the seed of an identity has {KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.id = identity_of(self.public_key)
        self.guard = guard if guard is not None else ReplayGuard()

    @classmethod
    def generate(cls, source: RandomSource) -> Identity:
        """Create a fresh identity."""
        return cls(source.random_bytes(KEY_BYTES))

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

    The roster reaches clients from the operator, never from the aggregating server: who chooses the keys can be
    everybody.

    Guarantee: an instance exists only with a valid signature and distinct keys; `members` maps id to public key in
    the order of the ids.
    Raises: ProtocolError when the signature is wrong; ParameterError for keys that are no keys.
    """

    operator: bytes
    public_keys: tuple[bytes, ...]
    signature: bytes
    members: Mapping[bytes, bytes] = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        members = {identity_of(key): key for key in self.public_keys}
        if len(members) != len(self.public_keys) or any(len(key) != KEY_BYTES for key in self.public_keys):
            raise ParameterError(f"a roster lists distinct public keys of {KEY_BYTES} bytes")
        if list(members) != sorted(members):
            raise ParameterError("a roster lists its keys in the order of their identities")
        verify_signature(self.operator, self.signature, _roster_statement(self.public_keys))
        object.__setattr__(self, "members", MappingProxyType(members))
        object.__setattr__(self, "digest", hashlib.sha256(b"".join(members)).digest())

    @classmethod
    def issue(cls, operator: Identity, public_keys: Iterable[bytes]) -> Roster:
        """Sign a list of public keys as the operator."""
        ordered = tuple(sorted(public_keys, key=identity_of))
        return cls(
            operator=operator.public_key,
            public_keys=ordered,
            signature=operator.sign(_roster_statement(ordered)),
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, operator: bytes) -> Roster:
        """Read a stored roster and check it against the operator's public key.

        Raises: ProtocolError when anything about it is wrong.
        """
        body, signature = data[1:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        if data[:1] != bytes([_ROSTER_VERSION]) or len(data) < 1 + SIGNATURE_BYTES or len(body) % KEY_BYTES:
            raise ProtocolError
        keys = tuple(body[start : start + KEY_BYTES] for start in range(0, len(body), KEY_BYTES))
        try:
            return cls(operator=operator, public_keys=keys, signature=signature)
        except ParameterError:
            pass
        raise ProtocolError

    def to_bytes(self) -> bytes:
        """Write version, public keys and signature."""
        return bytes([_ROSTER_VERSION]) + b"".join(self.public_keys) + self.signature


def _roster_statement(public_keys: Iterable[bytes]) -> bytes:
    return LABEL + b"operator" + b"".join(public_keys)
