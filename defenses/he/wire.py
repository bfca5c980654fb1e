"""What travels: agreements, chunk headers and parameter bundles, as versioned bytes with strict decoding."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from defenses.errors import ParameterError, ProtocolError
from defenses.he.parameters import Parameters
from defenses.signatures import SIGNATURE_BYTES, is_sound_key, verify_signature

PARTY_BYTES: Final = 32
RUN_BYTES: Final = 16
Role = Literal["upload", "sum"]

_MAGIC: Final = b"ffm-he/2"
_ROLES: Final[dict[Role, int]] = {"upload": 1, "sum": 2}
_HEADER: Final = struct.Struct(">8sB16s32sII")
HEADER_BYTES: Final = _HEADER.size
_PARAMETERS: Final = struct.Struct(">8sBBIBBBBBBBB")
_CONFIRMATION: Final = struct.Struct(">8sB16s32s32s64s")
_CONFIRM: Final = 3
_SEAL: Final = 4
_SCHEMES: Final = ("bfv", "ckks")
NOBODY: Final = bytes(PARTY_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """State what one sum is about; every party and the server hold the same.

    `run` are 16 bytes fresh for every run, `round` and `attempt` together never repeat within it. `cohort`
    lists who may bring a vector, by their Ed25519 public keys in ascending order. Each brings `length`
    integers with |x| <= `value_bound`; a sum of fewer than `fewest` is never opened.
    """

    run: bytes
    round: int
    length: int
    value_bound: int
    cohort: tuple[bytes, ...]
    fewest: int
    attempt: int = 0

    @property
    def parties(self) -> int:
        """Return the most vectors that may be added."""
        return len(self.cohort)

    def __post_init__(self) -> None:
        if len(self.run) != RUN_BYTES:
            raise ParameterError(
                f"run has {len(self.run)} bytes: use {RUN_BYTES} random bytes, fresh for every run"
            )
        for name in ("length", "value_bound", "fewest"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("round", "attempt"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ParameterError(f"{name} = {getattr(self, name)}: must be between 0 and 2^63 - 1")
        for party in self.cohort:
            check_party(party)
        if not isinstance(self.cohort, tuple) or list(self.cohort) != sorted(set(self.cohort)):
            raise ParameterError("cohort: list every party once, in a tuple, in ascending order")
        if self.fewest > self.parties:
            raise ParameterError(
                f"fewest = {self.fewest} exceeds parties = {self.parties}: no sum could be opened"
            )

    def digest(self, mechanism: bytes) -> bytes:
        """Hash the agreement together with the encoded mechanism that carries it."""
        numbers = struct.pack(
            ">QQQQQQ", self.round, self.attempt, self.length, self.value_bound, self.parties, self.fewest
        )
        cohort = b"".join(self.cohort)
        return hashlib.sha256(_MAGIC + b" agreement" + self.run + numbers + cohort + mechanism).digest()

    def require_members(self, roster: Collection[bytes]) -> None:
        """Refuse a cohort with anybody in it whom the operator did not admit.

        Raises:
            ParameterError: with the number of strangers.
        """
        strangers = [party for party in self.cohort if party not in roster]
        if strangers:
            raise ParameterError(
                f"cohort: {len(strangers)} of {self.parties} are not on the roster of this federation; "
                "take the cohort from the roster, never from the server"
            )


def check_party(party: bytes) -> None:
    """Refuse a name that cannot be an Ed25519 public key.

    Raises:
        ParameterError: shows what was given.
    """
    if not is_sound_key(party):
        raise ParameterError(
            f"a party is named by its Ed25519 public key of {PARTY_BYTES} bytes, not by {party!r:.40}"
        )


def check_parties(parties: Sequence[bytes], agreement: Agreement) -> None:
    """Refuse a list of parties whose sum may not be opened; constant message."""
    if not agreement.fewest <= len(parties) <= agreement.parties or len(set(parties)) != len(parties):
        raise ProtocolError
    if not set(parties) <= set(agreement.cohort):
        raise ProtocolError


def write_chunks(payloads: Iterable[bytes], *, role: Role, digest: bytes, count: int, party: bytes = NOBODY,
                 ) -> Iterator[bytes]:  # fmt: skip
    """Put a header before each payload: version, role, agreement, party, position, number of chunks."""
    for index, payload in enumerate(payloads):
        yield _HEADER.pack(_MAGIC, _ROLES[role], digest[:16], party, index, count) + payload


def read_chunks(chunks: Iterable[bytes], *, role: Role, digest: bytes, count: int, limit: int,
                ) -> Iterator[tuple[bytes, bytes]]:  # fmt: skip
    """Yield (party, payload) of a complete, ordered upload or sum of one party under one agreement.

    Raises:
        ProtocolError: another version, role, agreement, order, count or party, or a payload above `limit`
          bytes.
    """
    first: bytes | None = None
    coefficients = 0
    for chunk in chunks:
        if not isinstance(chunk, bytes) or not _HEADER.size < len(chunk) <= _HEADER.size + limit:
            raise ProtocolError
        magic, code, bound, party, index, total = _HEADER.unpack_from(chunk)
        first = party if first is None else first
        expected = (_MAGIC, _ROLES[role], digest[:16], first, coefficients, count)
        if (magic, code, bound, party, index, total) != expected or coefficients >= count:
            raise ProtocolError
        if (party == NOBODY) != (role == "sum"):
            raise ProtocolError
        coefficients += 1
        yield party, chunk[_HEADER.size :]
    if coefficients != count:
        raise ProtocolError


def _seal_statement(digest: bytes, party: bytes, content: bytes) -> bytes:
    return _MAGIC + b" upload" + digest + party + content


def seal_chunks(
    chunks: Iterator[bytes], *, digest: bytes, count: int, party: bytes, sign: Callable[[bytes], bytes]
) -> Iterator[bytes]:
    """Pass the chunks of an upload on and end with one more: their sender's signature on all of them."""
    content = hashlib.sha256()
    for chunk in chunks:
        content.update(chunk)
        yield chunk
    signature = sign(_seal_statement(digest, party, content.digest()))
    yield _HEADER.pack(_MAGIC, _SEAL, digest[:16], party, count, count) + signature


def read_sealed(
    chunks: Iterable[bytes], *, sender: bytes, digest: bytes, count: int, limit: int
) -> Iterator[bytes]:
    """Yield the payloads of one party's complete upload; only the end of the iteration says that it is
    genuine.

    Raises:
        ProtocolError: as `read_chunks`; an upload in another's name, or without its sender's signature.
    """
    content, last = hashlib.sha256(), b""

    def body() -> Iterator[bytes]:
        nonlocal last
        for index, chunk in enumerate(chunks):
            if index == count:
                last = chunk
                continue
            if isinstance(chunk, bytes) and len(chunk) <= _HEADER.size + limit:
                content.update(chunk)
            yield chunk

    for party, payload in read_chunks(body(), role="upload", digest=digest, count=count, limit=limit):
        if party != sender:
            raise ProtocolError
        yield payload
    head = _HEADER.pack(_MAGIC, _SEAL, digest[:16], sender, count, count)
    if not isinstance(last, bytes) or len(last) != len(head) + SIGNATURE_BYTES or last[: len(head)] != head:
        raise ProtocolError
    verify_signature(sender, last[len(head) :], _seal_statement(digest, sender, content.digest()))


def confirmation_code(secret: bytes, party: bytes) -> bytes:
    """Return one party's code over what `secret` stands for; in its own name, so that no code can be passed
    on as another's.
    """
    return hmac.digest(secret, party, "sha256")


def _confirmation_statement(digest: bytes, party: bytes, code: bytes) -> bytes:
    return _MAGIC + b" confirm" + digest + party + code


def write_confirmation(*, digest: bytes, party: bytes, code: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """Write a client's message on the sum it opened: version, role, agreement, party, code, signature."""
    signature = sign(_confirmation_statement(digest, party, code))
    return _CONFIRMATION.pack(_MAGIC, _CONFIRM, digest[:16], party, code, signature)


def read_confirmation(message: bytes, *, digest: bytes) -> tuple[bytes, bytes]:
    """Return party and code of a confirmation under one agreement, signed by that party.

    Raises:
        ProtocolError: malformed, of another version or agreement, or not signed by the party it names.
    """
    if not isinstance(message, bytes) or len(message) != _CONFIRMATION.size:
        raise ProtocolError
    magic, role, bound, party, code, signature = _CONFIRMATION.unpack(message)
    if (magic, role, bound) != (_MAGIC, _CONFIRM, digest[:16]):
        raise ProtocolError
    verify_signature(party, signature, _confirmation_statement(digest, party, code))
    return party, code


def encode_parameters(parameters: Parameters) -> bytes:
    """Encode a parameter set; this is all the server holds of an encryption, and nothing in it depends on the
    key.
    """
    each = parameters
    return _PARAMETERS.pack(
        _MAGIC,
        _SCHEMES.index(each.scheme),
        each.seeded,
        each.poly_modulus_degree,
        each.plain_bits,
        each.scale_bits,
        each.lanes,
        each.lane_bits,
        each.digits,
        each.digit_bits,
        0,
        len(each.coefficient_bits),
    ) + bytes(each.coefficient_bits)


def decode_parameters(bundle: bytes) -> Parameters:
    """Decode a parameter set strictly: one byte string for each set and nothing after it.

    Raises:
        ProtocolError: anything else.
    """
    try:
        magic, scheme, seeded, degree, plain, scale, lanes, lane_bits, digits, digit_bits, _, primes = (
            _PARAMETERS.unpack_from(bundle)
        )
        parameters = Parameters(
            scheme="ckks" if scheme else "bfv",
            poly_modulus_degree=degree,
            coefficient_bits=tuple(bundle[_PARAMETERS.size : _PARAMETERS.size + primes]),
            plain_bits=plain,
            scale_bits=scale,
            lanes=lanes,
            lane_bits=lane_bits,
            digits=digits,
            digit_bits=digit_bits,
            seeded=bool(seeded),
        )
        if magic == _MAGIC and encode_parameters(parameters) == bundle:
            return parameters
    except (struct.error, TypeError, ValueError, AttributeError):
        pass
    raise ProtocolError


class Scratch:
    """Lend a path to libraries that only read and write files, without leaving anything on a disk.

    Guarantee: on Linux the path names anonymous memory of this process (memfd); elsewhere, or when not
    `anonymous`, it is a file in a fresh directory with mode 0700, in memory where there is /dev/shm, removed
    on exit.
    """

    __slots__ = ("_anonymous", "_descriptor", "_directory", "path")

    def __init__(self, *, anonymous: bool = True) -> None:
        self._anonymous = anonymous and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")

    def __enter__(self) -> Scratch:
        self._directory: str | None = None
        if self._anonymous:
            self._descriptor = os.memfd_create("ffm-he", os.MFD_CLOEXEC)
            self.path = f"/proc/self/fd/{self._descriptor}"
            return self
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._directory = tempfile.mkdtemp(prefix="ffm-he-", dir=base)
        self.path = os.path.join(self._directory, "scratch")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        return self

    def read(self) -> bytes:
        """Return what the library wrote last."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def write(self, content: bytes) -> str:
        """Replace the content and return the path to load it from."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)
        return self.path

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        if self._directory is not None:
            os.unlink(self.path)
            os.rmdir(self._directory)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a scratch file may hold secrets and cannot be pickled")
