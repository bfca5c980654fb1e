"""One client's side of one session: takes bytes, returns bytes, only moves forward."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import messages, shamir
from defenses.secagg.graph import Graph, build_graph
from defenses.secagg.keys import Identity, agree, public_of, require_sound_keys
from defenses.secagg.masks import Mask, MaskStreams, RingVector, chunks, word_type
from defenses.secagg.parameters import DEFERRED_MODEL, HASH_BYTES, ClientPolicy, SessionParameters
from defenses.secagg.ring import pack_into, packed_bytes
from defenses.signatures import verify_signature

_ALIGNMENT = 64
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Stage(IntEnum):
    """Name what a client may be asked for next."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONFIRM = 3
    UNMASK = 4
    DONE = 5
    ABORTED = 6


Method = Callable[Concatenate["ClientSession", Arguments], Result]


def _step(expected: Stage) -> Callable[[Method[Arguments, Result]], Method[Arguments, Result]]:
    """Let a method run once, at its stage; whatever goes wrong erases the secrets and looks the same from
    outside.
    """

    def decorate(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
        @functools.wraps(method)
        def run(session: ClientSession, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            following = session._following(expected)
            try:
                result = method(session, *args, **kwargs)
            except Exception:
                session.discard()
            except BaseException:
                session.discard()
                raise
            else:
                session._stage = following
                return result
            # Raised outside the handler, so that it carries no trace of the cause.
            raise ProtocolError

        return run

    return decorate


class _Secrets:
    """Hold what must not outlive the session."""

    __slots__ = ("channels", "mask_key", "self_secret", "shares")

    def __init__(self, mask_key: bytes, self_secret: bytes) -> None:
        self.mask_key = bytearray(mask_key)
        self.self_secret = bytearray(self_secret)
        self.channels: dict[int, bytearray] = {}
        self.shares: dict[int, tuple[bytes, bytes]] = {}

    def erase(self) -> None:
        """Overwrite what can be overwritten and forget the rest;
        copies made by the interpreter may survive.
        """
        for buffer in (self.mask_key, self.self_secret, *self.channels.values()):
            buffer[:] = bytes(len(buffer))
        self.channels.clear()
        self.shares.clear()


class ClientSession:
    """Take part in one session of ffm-secagg/2.

    Call in order, each once: `advertise`, `share`, `mask`, `confirm` (active mode only), `unmask`. Each takes
    the server's message for the stage and returns the client's. A session that was left at any point stays
    left: there is no going back and no resuming, a client that restarts counts as lost, and so does one whose
    process was forked. The round may be tried again under the next attempt.

    `now` is in seconds since 1970, to tell whether the roster still holds.

    Guarantee: nothing but uniformly random bytes, ciphertexts, signatures and ids leaves before the client
    has seen `threshold` confirmations (active mode) of one set of at least `minimum_survivors` survivors; for
    every neighbour at most one of its two secrets is revealed; all secrets are erased on completion, on
    failure and by `discard`. Before an advert, a masked vector or an answer leaves, the identity's guard has
    recorded round and attempt, update, or model.
    Assumes: at most the policy's number of colluders work with the server; the operator's roster is honest.
    Raises: ParameterError from the constructor when the parameters are weaker than the policy, and from
    `mask` for a vector of the wrong kind (the session goes on); ProtocolError, always the same, for
    everything else.
    Source: Bonawitz et al. 2017 (ePrint 2017/281); Bell et al. 2020 (ePrint 2020/704).
    """

    def __init__(
        self,
        identity: Identity,
        parameters: SessionParameters,
        policy: ClientPolicy,
        source: RandomSource,
        *,
        now: int,
    ) -> None:
        policy.admit(parameters, now=now)
        if identity.id not in parameters.roster.members:
            raise ParameterError("this identity is not on the operator's roster")
        if identity.id not in parameters.cohort:
            raise ParameterError("this identity is not in the cohort of this round")
        register = f"{parameters.roster.operator.hex()} {parameters.roster.federation}"
        identity.guard.accept_roster(register, parameters.roster.serial)
        identity.guard.enter(parameters.run_id, parameters.round, parameters.attempt)
        self._process, self._lock = os.getpid(), threading.Lock()
        self._identity, self._parameters, self._policy, self._source = identity, parameters, policy, source
        self._stage = Stage.ADVERTISE
        self._secrets: _Secrets | None = None
        self._channel_key: bytearray | None = None
        self._advert: messages.Advert | None = None
        self._ids: list[bytes] = []
        self._mask_keys: dict[int, bytes] = {}
        self._transcript = b""
        self._graph = Graph(0, neighbours=0, ring=None)
        self._place = -1
        self._neighbours: list[int] = []
        self._survivors: list[int] = []
        self._complaint = self._model_hash = b""

    @property
    def id(self) -> bytes:
        """Return this client's id."""
        return self._identity.id

    @property
    def stage(self) -> Stage:
        """Return what the client may be asked for next."""
        return self._stage

    @property
    def transcript(self) -> bytes:
        """Return the session transcript, empty before `share`; not a secret."""
        return self._transcript

    @property
    def complaint(self) -> bytes:
        """Return the signed message that names the neighbours whose shares did not open, empty if there are
        none.

        `mask` refuses when there are, and the session is over; send this instead of the masked vector. It
        tells the server nothing but which ciphertexts were no good.
        """
        return self._complaint

    def __repr__(self) -> str:
        return f"ClientSession({self.id.hex()[:16]}, {self._stage.name.lower()}, secrets=<hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client session holds secrets and cannot be pickled or copied")

    def discard(self) -> None:
        """Erase all secrets and leave the session for good."""
        self._forget()
        self._stage = Stage.ABORTED

    def _forget(self) -> None:
        if self._secrets is not None:
            self._secrets.erase()
            self._secrets = None
        if self._channel_key is not None:
            self._channel_key[:] = bytes(len(self._channel_key))
            self._channel_key = None

    def _following(self, expected: Stage) -> Stage:
        """Check that the stage is the expected one and return the next; until it is done the session counts
        as left.
        """
        with self._lock:
            if self._stage is not expected or self._process != os.getpid():
                self.discard()
                raise ProtocolError
            self._stage = Stage.ABORTED
        if expected is Stage.MASK and self._parameters.mode == "semi_honest":
            return Stage.UNMASK
        return Stage(expected + 1)

    def _held(self) -> _Secrets:
        if self._secrets is None:
            raise ProtocolError
        return self._secrets

    @_step(Stage.ADVERTISE)
    def advertise(self) -> bytes:
        """Draw fresh keys and return their signed advert (R0)."""
        channel, mask, secret, nonce = (self._source.random_bytes(32) for _ in range(4))
        self._channel_key, self._secrets = bytearray(channel), _Secrets(mask, secret)
        unsigned = messages.Advert(
            id=self.id, channel_key=public_of(channel), mask_key=public_of(mask), nonce=nonce, signature=b""
        )
        signature = self._identity.sign(unsigned.statement(self._parameters.session_id))
        self._advert = messages.Advert(
            id=self.id,
            channel_key=unsigned.channel_key,
            mask_key=unsigned.mask_key,
            nonce=nonce,
            signature=signature,
        )
        return messages.write_advert(self._advert)

    @_step(Stage.SHARE)
    def share(self, roster: bytes) -> bytes:
        """Check everybody's adverts, deal shares of both secrets to the neighbours and return them encrypted
        (R1).
        """
        adverts = self._checked_adverts(roster)
        self._transcript = messages.transcript_of(self._parameters.session_id, adverts)
        self._ids = [advert.id for advert in adverts]
        self._place = self._ids.index(self.id)
        self._graph = build_graph(
            self._parameters.graph, count=len(adverts), neighbours=self._parameters.neighbours,
            transcript=self._transcript,
        )  # fmt: skip
        self._neighbours = self._graph.neighbours(self._place)
        if len(self._neighbours) < self._parameters.threshold:
            raise ProtocolError
        peers = [adverts[neighbour] for neighbour in self._neighbours]
        self._mask_keys = {place: peer.mask_key for place, peer in zip(self._neighbours, peers, strict=True)}
        return self._deal(peers)

    def _checked_adverts(self, roster: bytes) -> list[messages.Advert]:
        if len(roster) > messages.HEADER_BYTES + messages.ADVERT_BYTES * self._parameters.clients:
            raise ProtocolError
        adverts = messages.read_roster(roster)
        self._policy.admit_cohort(self._parameters, len(adverts))
        members, cohort = self._parameters.roster.members, frozenset(self._parameters.cohort)
        require_sound_keys([key for advert in adverts for key in (advert.channel_key, advert.mask_key)])
        if self._advert not in adverts or not cohort.issuperset(advert.id for advert in adverts):
            raise ProtocolError
        for advert in adverts:
            if advert != self._advert:
                statement = advert.statement(self._parameters.session_id)
                verify_signature(members[advert.id], advert.signature, statement)
        return adverts

    def _deal(self, peers: list[messages.Advert]) -> bytes:
        """Split both secrets, set up the channel to every neighbour and seal its two shares."""
        held, transcript = self._held(), self._transcript
        key_shares, self_shares = (
            shamir.split(
                bytes(secret),
                threshold=self._parameters.threshold,
                shares=len(self._neighbours),
                source=self._source,
            )
            for secret in (held.mask_key, held.self_secret)
        )
        shared = agree(bytes(self._channel_key or b""), (peer.channel_key for peer in peers))
        ciphertexts = []
        for index, (peer, secret) in enumerate(zip(peers, shared, strict=True)):
            outgoing = messages.channel_key(secret, transcript=transcript, sender=self.id, receiver=peer.id)
            incoming = messages.channel_key(secret, transcript=transcript, sender=peer.id, receiver=self.id)
            held.channels[index] = bytearray(incoming)
            ciphertexts.append(
                messages.seal_shares(
                    outgoing,
                    point=index + 1,
                    key_share=key_shares[index],
                    self_share=self_shares[index],
                    transcript=transcript,
                    sender=self.id,
                    receiver=peer.id,
                )
            )
        if self._channel_key is not None:
            self._channel_key[:] = bytes(len(self._channel_key))
            self._channel_key = None
        commitment = messages.self_commitment(transcript, self.id, bytes(held.self_secret))
        unsigned = messages.SealedShares(self.id, commitment, b"", ciphertexts)
        signature = self._identity.sign(unsigned.statement(transcript))
        return messages.SealedShares(self.id, commitment, signature, ciphertexts).to_bytes()

    def mask(
        self,
        delivery: bytes,
        vector: RingVector,
        *,
        update: bytes,
        model_hash: bytes,
    ) -> memoryview:
        """Open the neighbours' shares and return the masked vector, packed and signed (R2), as a view of its
        bytes.

        `vector` is not changed. `update` is the digest that names the update inside, so that it enters no
        second session: of what training gave, before rounding and noise. `model_hash` is the model the vector
        comes from, as this client computed it.

        Shapes: vector uint32 (modulus up to 32 bits) or uint64, [length]; message length * m / 8 + 98 bytes.
        """
        if vector.dtype != word_type(self._parameters.modulus_bits) or vector.shape != (
            self._parameters.length,
        ):
            raise ParameterError(
                f"vector: {vector.dtype} of shape {vector.shape}; this session sums "
                f"{word_type(self._parameters.modulus_bits).__name__} of shape ({self._parameters.length},)"
            )
        for name, value in (("update", update), ("model_hash", model_hash)):
            if not isinstance(value, bytes) or len(value) != HASH_BYTES:
                raise ParameterError(f"{name}: name it by a digest of {HASH_BYTES} bytes")
        return self._mask(delivery, vector, update, model_hash)

    @_step(Stage.MASK)
    def _mask(self, delivery: bytes, vector: RingVector, update: bytes, model_hash: bytes) -> memoryview:
        held, deferred = self._held(), self._parameters.model_hash == DEFERRED_MODEL
        if not deferred and model_hash != self._parameters.model_hash:
            raise ProtocolError
        largest = len(self._neighbours) * messages.CIPHERTEXT_BYTES + len(self._neighbours) // 8 + 1
        messages.require_size(delivery, messages.HEADER_BYTES + largest)
        self._open_delivery(messages.read_delivery(delivery, len(self._neighbours)))
        if len(held.shares) < self._parameters.threshold:
            raise ProtocolError
        if deferred:
            self._transcript = messages.bind_model(self._transcript, model_hash)
        self._model_hash = model_hash
        self._identity.guard.spend(update, model=model_hash, repeat=self._policy.repeat_models)
        message = self._upload(vector, self._masks(held))
        # The keys behind the masks have done their work; the shares of others are all that unmasking needs.
        for buffer in (held.mask_key, held.self_secret, *held.channels.values()):
            buffer[:] = bytes(len(buffer))
        return message

    def _open_delivery(self, ciphertexts: list[tuple[int, bytes]]) -> None:
        """Open the neighbours' shares; leave a complaint about those that do not open, and with them the
        session.
        """
        held, spoiled = self._held(), []
        for index, ciphertext in ciphertexts:
            neighbour = self._neighbours[index]
            try:
                held.shares[neighbour] = messages.open_shares(
                    bytes(held.channels[index]), ciphertext,
                    point=self._graph.share_point(self._place, neighbour),
                    transcript=self._transcript, sender=self._ids[neighbour], receiver=self.id,
                )  # fmt: skip
            except ProtocolError:
                spoiled.append((index, ciphertext))
        if not spoiled:
            return
        body = messages.write_complaint_body(spoiled, len(self._neighbours))
        statement = messages.body_statement(
            "complaint", self._transcript, self.id, hashlib.sha256(body).digest()
        )
        signature = self._identity.sign(statement)
        self._complaint = messages.header(messages.Kind.COMPLAINT) + self.id + signature + body
        raise ProtocolError

    def _masks(self, held: _Secrets) -> list[Mask]:
        """Return the self mask and one mask for each neighbour whose shares arrived."""
        sharers = sorted(held.shares)
        shared = agree(bytes(held.mask_key), (self._mask_keys[neighbour] for neighbour in sharers))
        masks = [
            Mask(messages.self_seed(bytes(held.self_secret), transcript=self._transcript, owner=self.id))
        ]
        for neighbour, secret in zip(sharers, shared, strict=True):
            peer = self._ids[neighbour]
            seed = messages.pair_seed(secret, transcript=self._transcript, one=self.id, other=peer)
            masks.append(Mask(seed, negative=self.id > peer))
        return masks

    def _upload(self, vector: RingVector, masks: list[Mask]) -> memoryview:
        """Mask, pack and hash chunk by chunk, so that a vector passes through the cache once."""
        bits, start = self._parameters.modulus_bits, messages.HEADER_BYTES + messages.ID_BYTES + 64
        word, size = word_type(bits), packed_bytes(len(vector), bits)
        # From numpy, which asks for huge pages: first touching 40 MB of small ones costs as much as four
        # masks.
        buffer: npt.NDArray[np.uint8] = np.empty(_ALIGNMENT + start + size, dtype=np.uint8)
        skipped = -(buffer.ctypes.data + start) % _ALIGNMENT
        message = memoryview(buffer)[skipped : skipped + start + size]  # type: ignore[arg-type]
        payload, streams, digest = message[start:], MaskStreams(masks, word), hashlib.sha256()
        scratch: RingVector = np.empty(streams.chunk_words, dtype=word)
        whole: RingVector | None = None
        if bits == 8 * scratch.itemsize:
            whole = np.frombuffer(payload, dtype=word)
        for part in chunks(len(vector), streams.chunk_words):
            window = payload[packed_bytes(part.start, bits) : packed_bytes(part.stop, bits)]
            masked = scratch[: part.stop - part.start] if whole is None else whole[part]
            streams.write(masked, vector[part])
            if whole is None:
                pack_into(window, masked, bits)
            digest.update(window)
        statement = messages.body_statement("masked", self._transcript, self.id, digest.digest())
        message[:start] = messages.header(messages.Kind.MASKED) + self.id + self._identity.sign(statement)
        return message

    @_step(Stage.CONFIRM)
    def confirm(self, survivors: bytes) -> bytes:
        """Check who is said to have uploaded and sign that set (R3, active mode)."""
        messages.require_size(survivors, messages.HEADER_BYTES + len(self._ids) // 8 + 1)
        self._accept_survivors(messages.read_survivors(survivors, len(self._ids)))
        return messages.write_confirmation(self.id, self._identity.sign(self._alive_statement()))

    def _accept_survivors(self, survivors: list[int]) -> None:
        """Accept a set of survivors with me in it, of enough clients, and with no neighbour I have no share
        from.
        """
        alive = set(survivors) & set(self._neighbours)
        if self._place not in survivors or len(survivors) < self._parameters.minimum_survivors:
            raise ProtocolError
        if not alive <= self._held().shares.keys() or len(alive) < self._parameters.threshold:
            raise ProtocolError
        self._survivors = survivors

    def _alive_statement(self) -> bytes:
        return messages.alive_statement(self._transcript, (self._ids[place] for place in self._survivors))

    @_step(Stage.UNMASK)
    def unmask(self, request: bytes) -> bytes:
        """Answer the only unmask request: one share for each neighbour, of its self mask if it uploaded, else
        its key.

        Who uploaded was fixed by `confirm` in active mode; the server names it here in semi-honest mode.
        """
        bitmap = messages.HEADER_BYTES + len(self._ids) // 8 + 1
        messages.require_size(request, bitmap + 64 * len(self._neighbours))
        if self._parameters.mode == "active":
            self._check_confirmations(request)
        else:
            self._accept_survivors(messages.read_request(request, len(self._ids)))
        held, survivors = self._held(), set(self._survivors)
        body = messages.write_shares(
            [self_share if owner in survivors else key_share
             for owner, (key_share, self_share) in sorted(held.shares.items())]
        )  # fmt: skip
        statement = messages.body_statement(
            "response", self._transcript, self.id, hashlib.sha256(body).digest()
        )
        signature = self._identity.sign(statement)
        self._identity.guard.answer(self._model_hash, repeat=self._policy.repeat_models)
        self._forget()
        return messages.header(messages.Kind.RESPONSE) + self.id + signature + body

    def _check_confirmations(self, request: bytes) -> None:
        """Require valid confirmations, by enough surviving neighbours,
        of the very set this client confirmed.
        """
        statement, members = self._alive_statement(), self._parameters.roster.members
        confirmations = messages.read_active_request(request, len(self._neighbours))
        survivors = set(self._survivors)
        if len(confirmations) < self._parameters.threshold:
            raise ProtocolError
        for index, signature in confirmations:
            neighbour = self._neighbours[index]
            if neighbour not in survivors:
                raise ProtocolError
            verify_signature(members[self._ids[neighbour]], signature, statement)
