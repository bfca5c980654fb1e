"""Homomorphic encryption: the server adds ciphertexts and opens nothing; the sites share one key and open the
sum.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from defenses import he
from defenses.errors import ParameterError, ProtocolError
from defenses.he.wire import encode_parameters
from defenses.random_source import RandomSource
from defenses.secagg import Identity, ring
from defenses.secagg.masks import RingVector
from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.base import UPLOAD, AggregationResult, ClientRound, ServerRound, too_few
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.protection.groups import OpensGroups
from ffm_secure.records import RoundPlan

_LENGTH = struct.Struct("<I")
_PARTIES, _TOTAL = "open", "total"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedTerms:
    """What both halves know and compute alike."""

    config: RunConfig
    codec: VectorCodec
    parameters: he.Parameters
    roster: tuple[bytes, ...]  # public key of every site, by index

    @property
    def minimum(self) -> int:
        """Return the fewest clients a sum may cover."""
        return compatibility.minimum_survivors(self.config)

    @property
    def bound(self) -> int:
        """Return the largest size of one coordinate of one site."""
        return value_bound(self.codec)

    def agreement(self, plan: RoundPlan) -> he.Agreement:
        """Return what one round's sum is about."""
        return he.Agreement(
            run=plan.run_id,
            round=plan.round,
            length=self.codec.length,
            value_bound=self.bound,
            cohort=tuple(sorted(self.roster[site] for site in plan.cohort)),
            fewest=self.minimum,
            attempt=plan.attempt,
        )


def value_bound(codec: VectorCodec) -> int:
    """Return the largest size of one coordinate that a codec makes of one site's update."""
    return max(1, codec.max_weight, codec.quantizer.largest * codec.max_weight + codec.noise_bound)


def encrypted_terms(config: RunConfig, codec: VectorCodec, roster: Sequence[bytes]) -> EncryptedTerms:
    """Choose the parameters of a run among the parties of a roster.

    Raises:
      ParameterError: no parameters hold such sums.
    """
    parameters = he.choose(
        "bfv" if config.protection.kind == "bfv" else "ckks",
        parties=group_size(config),
        value_bound=value_bound(codec),
    )
    return EncryptedTerms(config=config, codec=codec, parameters=parameters, roster=tuple(roster))


class Key(Protocol):
    """The key of a run, as a site's round uses it."""

    def holder(self, run_id: bytes) -> he.KeyHolder:
        """Return the key."""

    def open(
        self, client: he.EncryptedClient, plan: RoundPlan, chunks: Iterable[bytes], parties: Sequence[bytes]
    ) -> NDArray[np.int64]:
        """Return the opened sum of a round."""


class SharedKey:
    """The key of a run, as its sites hold it; in a simulation one object stands for all of theirs.

    Each agreement is opened once for all who share this object; they still compare what was opened.
    """

    def __init__(self, parameters: he.Parameters) -> None:
        self._parameters = parameters
        self._holder: he.KeyHolder | None = None
        self._opened: tuple[tuple[bytes, int, int, tuple[bytes, ...]], NDArray[np.int64]] | None = None

    def __repr__(self) -> str:
        return "SharedKey(...)"

    def holder(self, run_id: bytes) -> he.KeyHolder:
        """Return the key, made afresh for a run and after a failed opening."""
        if self._holder is None or not self._holder.usable or self._holder.run != run_id:
            self._holder = he.KeyHolder.generate(self._parameters, random=RandomSource.system(), run=run_id)
        return self._holder

    def open(
        self, client: he.EncryptedClient, plan: RoundPlan, chunks: Iterable[bytes], parties: Sequence[bytes]
    ) -> NDArray[np.int64]:
        """Return the opened sum of a round."""
        what = (plan.run_id, plan.round, plan.attempt, tuple(parties))
        if self._opened is None or self._opened[0] != what:
            self._opened = (what, client.decrypt_sum(chunks, parties))
        return self._opened[1]


class EncryptedClientRound:
    """Encrypt, open with the others, compare."""

    def __init__(self, plan: RoundPlan, terms: EncryptedTerms, key: Key, identity: Identity) -> None:
        self._plan, self._terms, self._key, self._guard = plan, terms, key, identity.guard
        holder, agreement = key.holder(plan.run_id), terms.agreement(plan)
        signing = Ed25519PrivateKey.from_private_bytes(identity.seed())
        self._client = he.EncryptedClient(holder, agreement, signing, roster=terms.roster)
        self._guard.enter(plan.run_id, plan.round, plan.attempt)
        self._parties: tuple[bytes, ...] = ()
        self._total: NDArray[np.int64] | None = None

    def respond(self, stage: str, message: bytes) -> bytes:
        """Open the sum of the named parties; compare what others opened; hand the sum on."""
        if stage == _PARTIES:
            return self._open(message)
        if stage == "confirm" and self._total is not None:
            self._client.check_confirmations(self._total, self._parties, split_parts(message))
            return b""
        if stage == _TOTAL and self._total is not None:
            bits = self._terms.codec.modulus_bits
            return ring.pack(ring.from_signed(self._total, bits), bits)
        raise ProtocolError

    def _open(self, message: bytes) -> bytes:
        parts = split_parts(message)
        if not parts:
            raise ProtocolError
        names, *chunks = parts
        self._parties = tuple(names[start : start + 32] for start in range(0, len(names), 32))
        self._total = self._key.open(self._client, self._plan, chunks, self._parties)
        return self._client.confirm(self._total, self._parties)

    def seal(self, message: bytes, vector: RingVector, *, update: bytes) -> bytes:
        """Return the ciphertexts."""
        values = ring.signed(vector, self._terms.codec.modulus_bits)
        # As under masks: an aborted round leaves the model as it is, and the next one is about it again.
        self._guard.spend(update, model=bytes.fromhex(self._plan.fingerprint), repeat=True)
        try:
            return join_parts(self._client.encrypt(values))
        except ParameterError:  # no vector of the codec: this site is lost to the round, and nobody else
            raise ProtocolError from None


class EncryptedServerRound:
    """Add ciphertexts, send the sum to those in it, take back what they opened and agreed on."""

    stages: Sequence[str] = (UPLOAD, _PARTIES, "confirm", _TOTAL)

    def __init__(self, plan: RoundPlan, terms: EncryptedTerms) -> None:
        self._plan, self._terms = plan, terms
        bundle = encode_parameters(terms.parameters)  # of the parameters alone: there is no key in it
        self._adder = he.Accumulator(bundle, terms.agreement(plan), roster=terms.roster)
        self._arrived: list[int] = []
        self._confirmations: dict[int, bytes] = {}
        self._agreed: list[int] = []
        self._totals: dict[bytes, RingVector] = {}  # each different sum that some site says it opened
        self._said: dict[int, bytes] = {}  # by which site: its key among them
        self._failed = ""
        self._up = self._down = 0

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Return what goes out at a stage."""
        if stage == UPLOAD:
            return dict.fromkeys(self._plan.cohort, b"")
        if stage == _PARTIES:
            return self._sums()
        self._require(len(self._confirmations) >= self._needed, "protocol aborted")
        if stage == "confirm":
            compared = sum(len(message) for message in self._confirmations.values())
            asked = tuple(self._confirmations)
            self._up, self._down = self._up + compared, self._down + compared * len(asked)
            return dict.fromkeys(asked, join_parts(self._confirmations.values()))
        self._require(len(self._agreed) >= self._needed, "protocol aborted")
        return dict.fromkeys(self._agreed, b"")

    @property
    def _needed(self) -> int:
        """Return how many of those in the sum must have opened the same: as many as clients insist on."""
        return min(len(self._arrived), len(self._plan.cohort) // 2 + 1)

    def _sums(self) -> Mapping[int, bytes]:
        arrived, minimum = self._arrived, self._terms.minimum
        self._require(len(arrived) >= minimum, too_few(len(arrived), minimum))
        chunks = list(self._adder.sum_chunks())
        self._down = sum(len(chunk) for chunk in chunks) * len(arrived)
        return dict.fromkeys(arrived, join_parts([b"".join(self._adder.parties), *chunks]))

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Take in one answer."""
        if stage == UPLOAD:
            chunks = split_parts(bytes(reply))
            self._up += sum(len(chunk) for chunk in chunks)
            self._adder.add(chunks, sender=self._terms.roster[site])
            self._arrived.append(site)
        elif stage == _PARTIES:
            self._adder.accept_confirmation(bytes(reply), sender=self._terms.roster[site])
            self._confirmations[site] = bytes(reply)
        elif stage == "confirm":
            self._agreed.append(site)
        else:
            self._keep_total(site, reply)

    def _keep_total(self, site: int, reply: bytes | memoryview) -> None:
        codec = self._terms.codec
        if len(reply) != ring.packed_bytes(codec.length, codec.modulus_bits):
            raise ProtocolError
        digest = hashlib.sha256(reply).digest()
        self._said[site] = digest
        if digest not in self._totals:
            self._totals[digest] = ring.unpack(reply, codec.modulus_bits)

    def _common_total(self) -> tuple[RingVector | None, tuple[int, ...]]:
        """Return the sum that as many sites hand on as must have opened the same, and who hands on another.

        Clients have compared what they opened before; here one that says something else afterwards is told
        from the others, and ends no round.
        """
        for digest, total in self._totals.items():
            others = tuple(site for site, another in self._said.items() if another != digest)
            if len(self._said) - len(others) >= self._needed:
                return total, others
        return None, ()

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Return the sum the sites opened; who handed on another is named as lost there."""
        total, liars = self._common_total()
        if total is not None and not self._failed:
            return AggregationResult(
                ring_sum=total,
                survivors=tuple(sorted(self._arrived)),
                dropped={**lost, **dict.fromkeys(liars, _TOTAL)},
                aborted="",
                bytes_up=self._up,
                bytes_down=self._down,
            )
        different = "the sites say they opened different sums" if len(self._totals) > 1 else ""
        return AggregationResult(
            ring_sum=None,
            survivors=(),
            dropped=lost,
            aborted=self._failed or different or "protocol aborted",
            bytes_up=self._up,
            bytes_down=self._down,
        )

    def _require(self, condition: bool, reason: str) -> None:
        if not condition:
            self._failed = reason
            raise ProtocolError


class EncryptedClient:
    """A site's half: the key of the run, and its own identity with the memory of what it sent."""

    def __init__(self, terms: EncryptedTerms, key: SharedKey, identity: Identity) -> None:
        self.kind = terms.config.protection.kind
        self._terms, self._key, self._identity = terms, key, identity

    def join(self, plan: RoundPlan) -> ClientRound:
        """Begin a round."""
        return EncryptedClientRound(plan, self._terms, self._key, self._identity)


class EncryptedServer(OpensGroups):
    """The server's half: parameters, no key of any kind."""

    def __init__(self, terms: EncryptedTerms) -> None:
        self.kind = terms.config.protection.kind
        self.terms = terms

    def open_round(self, plan: RoundPlan) -> ServerRound:
        """Begin a round."""
        return EncryptedServerRound(plan, self.terms)


def join_parts(parts: Iterable[bytes]) -> bytes:
    """Put parts into one message, each behind its length."""
    joined = bytearray()
    for part in parts:
        joined += _LENGTH.pack(len(part)) + part
    return bytes(joined)


def split_parts(message: bytes) -> list[bytes]:
    """Cut a message into its parts.

    Raises:
      ProtocolError: the lengths do not add up.
    """
    parts, start = [], 0
    while start < len(message):
        if start + _LENGTH.size > len(message):
            raise ProtocolError
        (length,) = _LENGTH.unpack_from(message, start)
        start += _LENGTH.size
        if start + length > len(message):
            raise ProtocolError
        parts.append(message[start : start + length])
        start += length
    return parts
