"""Four ways to carry integer vectors to a sum, in one shape and with bit-identical results.

A client object has `encrypt(values) -> chunks` and `decrypt_sum(chunks, parties) -> int64 sum`; a server
object has `add(chunks)` and `sum_chunks()`. What differs is who can read what lies between, which
`defenses.he.collusion` states.

    plain     everyone reads everything: the definition of the right answer
    masking   any masking protocol, plugged in as two callables
    bfv       exact lattice encryption
    ckks      approximate lattice encryption, rounded to integers above its noise
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses.errors import ParameterError, ProtocolError
from defenses.he import tags
from defenses.he.engines import server_engine
from defenses.he.keys import KeyHolder
from defenses.he.packing import Integers, pack, unpack
from defenses.he.parameters import LARGEST_SUM, Parameters, require
from defenses.he.wire import (
    NOBODY,
    Agreement,
    Role,
    check_parties,
    check_party,
    confirmation_code,
    decode_parameters,
    encode_parameters,
    read_chunks,
    read_confirmation,
    read_sealed,
    seal_chunks,
    write_chunks,
    write_confirmation,
)

Words = npt.NDArray[np.uint64]
_WORDS_PER_CHUNK: Final = 1 << 16


class SumClient(Protocol):
    """One client's side of one agreement."""

    def encrypt(self, values: Integers) -> Iterator[bytes]:
        """Yield the chunks of this client's upload."""

    def decrypt_sum(self, chunks: Iterable[bytes], parties: Sequence[bytes]) -> Integers:
        """Open the sum of exactly these parties."""


class SumServer(Protocol):
    """The server's side of one agreement."""

    @property
    def parties(self) -> tuple[bytes, ...]:
        """List whose uploads were added."""

    def add(self, chunks: Iterable[bytes], *, sender: bytes) -> None:
        """Add one complete upload, or nothing of it; `sender` is the party it must come from."""

    def sum_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of the sum."""


def check_values(values: Integers, agreement: Agreement) -> None:
    """Refuse a vector of another kind, length or magnitude than agreed.

    Raises:
        ParameterError: names what was agreed, never a value.
    """
    if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.shape != (agreement.length,):
        raise ParameterError(
            f"values: pass an int64 array of shape ({agreement.length},), not {type(values).__name__} "
            f"{getattr(values, 'dtype', '')} {getattr(values, 'shape', '')}"
        )
    if max(int(values.max()), -int(values.min())) > agreement.value_bound:
        raise ParameterError(
            f"values exceed the agreed bound {agreement.value_bound}: clip before encrypting"
        )


def _within(total: Integers, count: int, agreement: Agreement) -> bool:
    largest = count * agreement.value_bound
    return max(int(total.max()), -int(total.min())) <= largest


class _WordChunks:
    """Carry 64-bit words as little-endian chunks: the common half of the plain and the masking backend."""

    def __init__(self, agreement: Agreement, mechanism: bytes) -> None:
        if agreement.parties * agreement.value_bound >= LARGEST_SUM:
            raise ParameterError("parties * value_bound: sums must stay below 2^60")
        self.agreement = agreement
        self._digest = agreement.digest(mechanism)
        self._count = -(-agreement.length // _WORDS_PER_CHUNK)

    def write(self, words: Words, *, role: Role, party: bytes = NOBODY) -> Iterator[bytes]:
        parts = (words[start : start + _WORDS_PER_CHUNK] for start in range(0, len(words), _WORDS_PER_CHUNK))
        payloads = (part.astype("<u8").tobytes() for part in parts)
        return write_chunks(payloads, digest=self._digest, count=self._count, role=role, party=party)

    def read(self, chunks: Iterable[bytes], *, role: Role) -> tuple[bytes, Words]:
        words = np.empty(self.agreement.length, dtype=np.uint64)
        start, sender = 0, b""
        limit = 8 * _WORDS_PER_CHUNK
        for party, payload in read_chunks(
            chunks, role=role, digest=self._digest, count=self._count, limit=limit
        ):
            sender = party
            target = words[start : start + _WORDS_PER_CHUNK]
            if len(payload) != 8 * len(target):
                raise ProtocolError
            target[:] = np.frombuffer(payload, dtype="<u8")
            start += len(target)
        return sender, words


class WordAccumulator:
    """Add plain or masked words modulo 2^64; one vector of memory and one upload.

    Nothing is signed here: `sender` is taken from whoever calls.
    """

    def __init__(self, agreement: Agreement, mechanism: str) -> None:
        self._chunks = _WordChunks(agreement, mechanism.encode())
        self._total = np.zeros(agreement.length, dtype=np.uint64)
        self._parties: list[bytes] = []

    @property
    def parties(self) -> tuple[bytes, ...]:
        """List whose uploads were added."""
        return tuple(self._parties)

    def add(self, chunks: Iterable[bytes], *, sender: bytes) -> None:
        """Add one complete upload, or nothing of it; `sender` is the party it must come from."""
        party, words = self._chunks.read(chunks, role="upload")
        if party != sender or party in self._parties or party not in self._chunks.agreement.cohort:
            raise ProtocolError
        self._total += words
        self._parties.append(party)

    def sum_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of the sum."""
        return self._chunks.write(self._total, role="sum")


class PlainClient:
    """Send integers as they are: no secrecy, the reference for the other backends."""

    def __init__(self, agreement: Agreement, party: bytes) -> None:
        check_party(party)
        self._chunks = _WordChunks(agreement, b"plain")
        self._party = party

    def encrypt(self, values: Integers) -> Iterator[bytes]:
        """Yield the chunks of this client's upload."""
        check_values(values, self._chunks.agreement)
        return self._chunks.write(values.view(np.uint64), role="upload", party=self._party)

    def decrypt_sum(self, chunks: Iterable[bytes], parties: Sequence[bytes]) -> Integers:
        """Open the sum of exactly these parties."""
        agreement = self._chunks.agreement
        check_parties(parties, agreement)
        total = self._chunks.read(chunks, role="sum")[1].view(np.int64)
        if not _within(total, len(parties), agreement):
            raise ProtocolError
        return total


class MaskingClient:
    """Adapt a masking protocol: `mask` hides this client's words, `open_sum` takes the masks off their sum.

    Both work on uint64 words modulo 2^64. `open_sum(words, parties)` is whatever recovery the protocol
    offers.
    """

    def __init__(self, agreement: Agreement, party: bytes, *, mask: Callable[[Words], Words],
                 open_sum: Callable[[Words, Sequence[bytes]], Words]) -> None:  # fmt: skip
        check_party(party)
        self._chunks = _WordChunks(agreement, b"masking")
        self._party = party
        self._mask = mask
        self._open_sum = open_sum

    def encrypt(self, values: Integers) -> Iterator[bytes]:
        """Yield the chunks of this client's upload."""
        check_values(values, self._chunks.agreement)
        masked = self._mask(values.view(np.uint64))
        return self._chunks.write(masked, role="upload", party=self._party)

    def decrypt_sum(self, chunks: Iterable[bytes], parties: Sequence[bytes]) -> Integers:
        """Open the sum of exactly these parties; a sum whose masks do not cancel is refused."""
        agreement = self._chunks.agreement
        check_parties(parties, agreement)
        words = self._open_sum(self._chunks.read(chunks, role="sum")[1], parties)
        total = words.astype(np.uint64, copy=False).view(np.int64)
        if total.shape != (agreement.length,) or not _within(total, len(parties), agreement):
            raise ProtocolError
        return total

    def __repr__(self) -> str:
        return "MaskingClient(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a masking client holds secrets and cannot be pickled")


def _chunk_count(agreement: Agreement, parameters: Parameters) -> int:
    """Count the ciphertexts of one upload: values, then tags."""
    total = agreement.length + tags.coordinates(agreement.value_bound)
    return -(-total // parameters.values_per_chunk)


def _require(agreement: Agreement, parameters: Parameters) -> None:
    require(parameters, parties=agreement.parties, value_bound=agreement.value_bound, length=agreement.length)


class EncryptedClient:
    """Encrypt for, and open, one agreement under the key of its run (BFV or CKKS, whichever the parameters
    say).

    `identity` signs what this client sends; its public key is the name of the party. `roster` are the public
    keys the operator admitted: a cohort with anybody else in it is refused.

    Guarantee: `decrypt_sum` returns the exact sum of exactly the named parties' vectors, each once, from this
    agreement, or raises. The server cannot have it open anything else (`defenses.he.tags`).
    Assumes: no client works with the server.
    """

    __slots__ = ("_agreement", "_count", "_digest", "_holder", "_identity", "_party")

    def __init__(
        self,
        holder: KeyHolder,
        agreement: Agreement,
        identity: Ed25519PrivateKey,
        *,
        roster: Collection[bytes],
    ) -> None:
        party = identity.public_key().public_bytes_raw()
        agreement.require_members(roster)
        if party not in agreement.cohort:
            raise ParameterError("this identity is not in the cohort of the agreement")
        _require(agreement, holder.parameters)
        if agreement.run != holder.run:
            raise ParameterError(
                "the agreement belongs to another run than the key: rotate the key with the run"
            )
        self._holder = holder
        self._agreement = agreement
        self._identity = identity
        self._party = party
        self._digest = agreement.digest(encode_parameters(holder.parameters))
        self._count = _chunk_count(agreement, holder.parameters)

    def encrypt(self, values: Integers) -> Iterator[bytes]:
        """Yield the chunks of this client's upload, encrypting one at a time, its signature last.

        Keep the chunks if they may have to be sent again.

        Raises:
            ParameterError: values other than agreed.
            ProtocolError: this party encrypted under this agreement before, whatever became of it.
        """
        check_values(values, self._agreement)
        engine, parameters = self._holder.engine(), self._holder.parameters
        self._holder.begin_upload(self._digest, self._party)
        tag = self._holder.tagger(self._digest).tag(values, self._party, self._agreement.value_bound)
        step, length = parameters.values_per_chunk, self._agreement.length

        def payloads() -> Iterator[bytes]:
            for start in range(0, self._count * step, step):
                part = values[start : start + step]
                if start + step > length:
                    part = np.concatenate([part, tag[max(start - length, 0) : start + step - length]])
                yield engine.encrypt(pack(part, parameters))

        fields: dict[str, Any] = {"digest": self._digest, "count": self._count, "party": self._party}
        return seal_chunks(
            write_chunks(payloads(), role="upload", **fields), sign=self._identity.sign, **fields
        )

    def decrypt_sum(self, chunks: Iterable[bytes], parties: Sequence[bytes]) -> Integers:
        """Open the sum of exactly these parties.

        Raises:
            ProtocolError: too few or repeated parties, a malformed or incomplete sum, a second opening of the
                same agreement; or a sum that fails its checks, after which the key is burnt and the run needs
                a new one.
        """
        check_parties(parties, self._agreement)
        engine, agreement = self._holder.engine(), self._agreement
        limit = engine.payload_limit
        received = read_chunks(chunks, role="sum", digest=self._digest, count=self._count, limit=limit)
        # Everything is loaded before anything is opened: a malformed sum fails without touching the key.
        ciphertexts = [engine.load(payload) for _, payload in received]
        self._holder.begin_opening(self._digest)
        try:
            opened = self._open(ciphertexts)
            total, tag = opened[: agreement.length], opened[agreement.length :]
            tagger = self._holder.tagger(self._digest)
            good = _within(total, len(parties), agreement)
            if not good or not tagger.verify(total, tag, parties, agreement.value_bound):
                raise ProtocolError
        except Exception:
            self._holder.burn()
            raise ProtocolError from None
        return total

    def confirm(self, total: Integers, parties: Sequence[bytes]) -> bytes:
        """Return this client's message on what it opened; send it to the others before using the sum."""
        code = confirmation_code(self._confirmed(total, parties), self._party)
        return write_confirmation(digest=self._digest, party=self._party, code=code, sign=self._identity.sign)

    def check_confirmations(
        self, total: Integers, parties: Sequence[bytes], messages: Iterable[bytes]
    ) -> None:
        """Compare what this client opened with what the others did, before the sum leaves it or is used.

        Guarantee: when it returns, a majority of the agreement's parties, or else everybody in the sum,
        opened this very sum of these very parties. So of two different sums of one round that are both
        accepted, one leaves out everybody who confirmed the other: subtracting them singles out nobody.
        Assumes: a client confirms only what it opened, which it can do once. Each message is signed: whoever
        has the key cannot confirm in another's name.
        Raises:
            ProtocolError: another sum, other parties, a forged, repeated or malformed message, or too few of
              them.
        """
        secret, confirmed = self._confirmed(total, parties), {self._party} & set(parties)
        for message in messages:
            party, code = read_confirmation(message, digest=self._digest)
            known = party in parties and (party not in confirmed or party == self._party)
            if not known or not hmac.compare_digest(code, confirmation_code(secret, party)):
                raise ProtocolError
            confirmed.add(party)
        if len(confirmed) < min(len(parties), self._agreement.parties // 2 + 1):
            raise ProtocolError

    def _confirmed(self, total: Integers, parties: Sequence[bytes]) -> bytes:
        """Bind key, agreement, parties and sum; nobody without the key can test a guess of the sum against
        it.
        """
        check_parties(parties, self._agreement)
        content = hashlib.sha256(b"".join(sorted(parties)) + total.astype("<i8").tobytes()).digest()
        return hmac.digest(self._holder.confirmation_key(self._digest), content, "sha256")

    def _open(self, ciphertexts: list[Any]) -> Integers:
        engine, parameters = self._holder.engine(), self._holder.parameters
        step = parameters.values_per_chunk
        opened = np.empty(len(ciphertexts) * step, dtype=np.int64)
        for index, ciphertext in enumerate(ciphertexts):
            opened[index * step : (index + 1) * step] = unpack(engine.decrypt(ciphertext), parameters)
        return opened[: self._agreement.length + tags.coordinates(self._agreement.value_bound)]

    def __repr__(self) -> str:
        return "EncryptedClient(<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encrypting client holds a secret and cannot be pickled")


class Accumulator:
    """Add ciphertexts without any key: all it is given is the public bundle, the agreement and the operator's
    roster.

    Guarantee: only uploads signed by members of the cohort are added, each member's once.
    Memory: the sum and one upload, whatever the number of clients.
    """

    def __init__(self, public_bundle: bytes, agreement: Agreement, *, roster: Collection[bytes]) -> None:
        agreement.require_members(roster)
        parameters = decode_parameters(public_bundle)
        _require(agreement, parameters)
        self._engine = server_engine(parameters)
        self._agreement = agreement
        self._digest = agreement.digest(public_bundle)
        self._count = _chunk_count(agreement, parameters)
        self._total: list[Any] = []
        self._parties: list[bytes] = []
        self._broken = False
        self._lock = threading.Lock()

    @property
    def parties(self) -> tuple[bytes, ...]:
        """List whose uploads were added."""
        return tuple(self._parties)

    def add(self, chunks: Iterable[bytes], *, sender: bytes) -> None:
        """Add one complete upload, or nothing of it; `sender` is the party it must come from and be signed
        by.

        Raises:
            ProtocolError: a malformed, reordered, incomplete, foreign, unsigned or repeated upload, one in
                another's name, or one from outside the cohort.
        """
        self._require_new(sender)
        payloads = read_sealed(
            chunks, sender=sender, digest=self._digest, count=self._count, limit=self._engine.payload_limit
        )
        loaded = [self._engine.load(payload) for payload in payloads]
        with self._lock:
            self._require_new(sender)
            self._parties.append(sender)
            self._add(loaded)

    def _require_new(self, sender: bytes) -> None:
        if self._broken or sender in self._parties or sender not in self._agreement.cohort:
            raise ProtocolError

    def _add(self, loaded: list[Any]) -> None:
        if not self._total:
            self._total = loaded
            return
        try:
            for total, other in zip(self._total, loaded):
                self._engine.add(total, other)
        except ProtocolError:
            self._broken = True
            raise

    def accept_confirmation(self, message: bytes, *, sender: bytes) -> None:
        """Check that a confirmation is one, of a party in the sum and signed by it; what it confirms only the
        holders of the key can tell.

        Raises:
            ProtocolError: it is not.
        """
        party, _ = read_confirmation(message, digest=self._digest)
        if party != sender or party not in self._parties:
            raise ProtocolError

    def sum_chunks(self) -> Iterator[bytes]:
        """Yield the chunks of the sum; refused while fewer parties were added than may be opened."""
        if self._broken or len(self._parties) < self._agreement.fewest:
            raise ProtocolError
        payloads = (self._engine.save(ciphertext) for ciphertext in self._total)
        return write_chunks(payloads, role="sum", digest=self._digest, count=self._count)
