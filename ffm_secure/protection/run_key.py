"""How the key of an encrypted run gets from site to site, sealed, past a server that carries it: three stages
before the upload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from defenses import he
from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from defenses.secagg.masks import RingVector
from ffm_secure.protection.base import AggregationResult, ServerRound
from ffm_secure.protection.encrypted import (
    EncryptedClientRound,
    EncryptedServer,
    EncryptedServerRound,
    EncryptedTerms,
    join_parts,
    split_parts,
)
from ffm_secure.records import RoundPlan

OFFER, WRAP, UNWRAP = "offer key", "wrap key", "unwrap key"
STAGES: Final = (OFFER, WRAP, UNWRAP)
_HAS_KEY, _NO_KEY = b"\x01", b"\x00"
_KEY_BYTES: Final = 32
_WHICH: Final = bytes(32)  # any agreement's digest: names a key by what only its holders can compute
_LENGTH: Final = struct.Struct("<I")


class RunKey:
    """One site's copy of the key of a run: made here, or handed over by another site.

    Guarantee: a key that a failed opening has burnt is never taken again from another site. The key and this
    memory live as long as the process; a site that starts anew asks for the key anew, and its guard keeps it
    from any round it was in.
    """

    def __init__(self, terms: EncryptedTerms, identity: Identity) -> None:
        self._terms, self.identity = terms, identity
        self._signing = Ed25519PrivateKey.from_private_bytes(identity.seed())
        self._holder: he.KeyHolder | None = None
        self._request: he.KeyRequest | None = None
        self._which = b""
        self._burnt: set[bytes] = set()

    def __repr__(self) -> str:
        return "RunKey(...)"

    def holder(self, run_id: bytes) -> he.KeyHolder:
        """Return the key.

        Raises:
          ProtocolError: this site has none.
        """
        if not self._has(run_id):
            raise ProtocolError
        assert self._holder is not None
        return self._holder

    def open(
        self, client: he.EncryptedClient, plan: RoundPlan, chunks: Iterable[bytes], parties: Sequence[bytes]
    ) -> NDArray[np.int64]:
        """Return the opened sum of a round."""
        return client.decrypt_sum(chunks, parties)

    def offer(self, run_id: bytes) -> bytes:
        """Say that this site has the key, or ask for it."""
        if self._has(run_id):
            return _HAS_KEY
        self._request = he.KeyRequest(self._signing, run=run_id, random=RandomSource.system())
        return _NO_KEY + self._request.offer

    def wrap(self, run_id: bytes, message: bytes) -> bytes:
        """Seal the key for every site that asked; a key is made where nobody has one."""
        if not self._has(run_id):
            holder = he.KeyHolder.generate(self._terms.parameters, random=RandomSource.system(), run=run_id)
            self._keep(holder)
        holder = self.holder(run_id)
        random, roster = RandomSource.system(), self._terms.roster
        wrapped = [
            holder.wrap_for(offer, identity=self._signing, roster=roster, random=random)
            for offer in split_parts(message)
        ]
        return join_parts(wrapped)

    def unwrap(self, message: bytes) -> bytes:
        """Take the key from the site that sealed it."""
        request, self._request = self._request, None
        sender, wrapped = message[:_KEY_BYTES], message[_KEY_BYTES:]
        if request is None or sender not in self._terms.roster:
            raise ProtocolError
        self._keep(request.unwrap(wrapped, holder=sender, parameters=self._terms.parameters))
        return b""

    def _has(self, run_id: bytes) -> bool:
        if self._holder is not None and not self._holder.usable:
            self._burnt.add(self._which)
            self._holder = None
        return self._holder is not None and self._holder.run == run_id

    def _keep(self, holder: he.KeyHolder) -> None:
        which = holder.confirmation_key(_WHICH)
        if which in self._burnt:
            holder.close()
            raise ProtocolError
        self._holder, self._which = holder, which


class KeyedClientRound:
    """A site's round: the key first, then as if it had always been there."""

    def __init__(self, plan: RoundPlan, terms: EncryptedTerms, key: RunKey) -> None:
        self._plan, self._terms, self._key = plan, terms, key
        self._inner: EncryptedClientRound | None = None

    def respond(self, stage: str, message: bytes) -> bytes:
        """Answer a stage."""
        if self._inner is None and stage == OFFER:
            return self._key.offer(self._plan.run_id)
        if self._inner is None and stage == WRAP:
            return self._key.wrap(self._plan.run_id, message)
        if self._inner is None and stage == UNWRAP:
            return self._key.unwrap(message)
        return self._round().respond(stage, message)

    def seal(self, message: bytes, vector: RingVector, *, update: bytes) -> bytes | memoryview:
        """Return the ciphertexts."""
        return self._round().seal(message, vector, update=update)

    def _round(self) -> EncryptedClientRound:
        if self._inner is None:
            self._inner = EncryptedClientRound(self._plan, self._terms, self._key, self._key.identity)
        return self._inner


class KeyedClient:
    """A site's half of an encrypted run among machines."""

    def __init__(self, terms: EncryptedTerms, identity: Identity) -> None:
        self.kind = terms.config.protection.kind
        self._terms, self.key = terms, RunKey(terms, identity)

    def join(self, plan: RoundPlan) -> KeyedClientRound:
        """Begin a round."""
        return KeyedClientRound(plan, self._terms, self.key)


class KeyedServerRound:
    """Carry offers and sealed keys between the sites, then add what they encrypt."""

    def __init__(
        self, plan: RoundPlan, terms: EncryptedTerms, inner: ServerRound, suspects: set[int] | None = None
    ) -> None:
        self._plan, self._terms, self._inner = plan, terms, inner
        self._suspects = set() if suspects is None else suspects  # of the run: they hand on no key that fits
        self._holders: list[int] = []
        self._offers: dict[int, bytes] = {}
        self._wrapped: dict[int, bytes] = {}
        self._up = self._down = 0
        self.stages: Sequence[str] = (*STAGES, *self._inner.stages)

    @property
    def _holder(self) -> int:
        """Return the site that hands the key on: one that has it, or the first to make one.

        Whoever failed at it is asked again where nobody else is left.
        """
        for candidates in (set(self._holders), set(self._offers)):
            if candidates - self._suspects:
                return min(candidates - self._suspects)
        return min(self._holders or self._offers)

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Return what goes out at a stage."""
        if stage == OFFER:
            return dict.fromkeys(self._plan.cohort, b"")
        if stage == WRAP:
            going_out = self._to_wrap()
        elif stage == UNWRAP:
            sender = self._terms.roster[self._holder] if self._wrapped else b""
            going_out = {site: sender + wrapped for site, wrapped in self._wrapped.items()}
        else:
            return self._inner.messages(stage)
        self._down += sum(map(len, going_out.values()))
        return going_out

    def _to_wrap(self) -> dict[int, bytes]:
        if not self._offers:
            return {}
        asking = [offer for site, offer in sorted(self._offers.items()) if site != self._holder]
        return {self._holder: join_parts(asking)}

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Take in one answer."""
        if stage not in STAGES:
            self._inner.receive(stage, site, reply)
            return
        content = bytes(reply)
        self._up += len(content)
        if stage == OFFER and content == _HAS_KEY:
            self._holders.append(site)
        elif stage == OFFER and content[:1] == _NO_KEY:
            self._offers[site] = content[1:]
        elif stage == WRAP:
            asking = [other for other in sorted(self._offers) if other != self._holder]
            parts = split_parts(content)
            if len(parts) != len(asking):
                raise ProtocolError
            self._wrapped = dict(zip(asking, parts, strict=True))
        elif content:
            raise ProtocolError

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Return the sum the sites opened."""
        result = self._inner.open_sum(lost)
        if self._offers and self._holder not in self._suspects:
            kept_waiting = any(lost.get(site) == UNWRAP for site in self._wrapped)
            if kept_waiting or lost.get(self._holder) == WRAP:
                self._suspects.add(self._holder)
        return replace(result, bytes_up=result.bytes_up + self._up, bytes_down=result.bytes_down + self._down)


class KeyedServer:
    """The server's half of an encrypted run among machines: parameters, no key of any kind."""

    def __init__(self, terms: EncryptedTerms) -> None:
        self.kind = terms.config.protection.kind
        self.terms = terms
        self._suspects: set[int] = set()

    def open_round(self, plan: RoundPlan) -> KeyedServerRound:
        """Begin a round."""
        return KeyedServerRound(plan, self.terms, EncryptedServerRound(plan, self.terms), self._suspects)

    def open_groups(self, plan: RoundPlan, groups: Sequence[tuple[int, ...]]) -> KeyedServerRound:
        """Begin a round with a sum for every group; the key is one, handed on in the whole cohort."""
        sums = EncryptedServer(self.terms).open_groups(plan, groups)
        return KeyedServerRound(plan, self.terms, sums, self._suspects)
