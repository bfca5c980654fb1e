"""The aggregator's side of one session: routes shares, adds uploads into one accumulator, opens the sum."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import messages, shamir
from defenses.secagg.client import Stage
from defenses.secagg.complaints import Complaint
from defenses.secagg.graph import Graph, build_graph
from defenses.secagg.keys import agree, public_of, require_sound_keys
from defenses.secagg.masks import Mask, RingVector, add_masks, word_type
from defenses.secagg.parameters import DEFERRED_MODEL, SessionParameters
from defenses.secagg.ring import add_packed, packed_bytes, reduce
from defenses.signatures import verify_signature

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate["ServerSession", Arguments], Result]


class NotEnoughClients(ProtocolError):
    """Too few clients are left to open the sum; the round is over and nothing was revealed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSum:
    """Hold an opened sum: the ring vector, reduced modulo 2^modulus_bits, and whose vectors are in it."""

    vector: RingVector
    modulus_bits: int
    survivors: tuple[bytes, ...]
    transcript: bytes


@dataclass(slots=True)
class Traffic:
    """Count the bytes one client sent and received, by stage."""

    up: dict[Stage, int]
    down: dict[Stage, int]

    @property
    def total(self) -> tuple[int, int]:
        """Return all bytes up and all bytes down."""
        return sum(self.up.values()), sum(self.down.values())


def _receives(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
    """Turn whatever a client's message provokes into one ProtocolError that leaves the session as it was."""

    @functools.wraps(method)
    def run(session: ServerSession, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            with session._lock:
                return method(session, *args, **kwargs)
        except Exception:
            pass
        raise ProtocolError

    return run


def _alone(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
    """Keep other threads out of the session meanwhile: what is checked must still hold when it is set."""

    @functools.wraps(method)
    def run(session: ServerSession, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with session._lock:
            return method(session, *args, **kwargs)

    return run


class ServerSession:
    """Aggregate one session of ffm-secagg/2 without learning more than the sum.

    For each stage first feed the clients' messages to the `receive_` method (in any order, each client once),
    then ask for what goes back; the first question, or `close_stage`, closes the stage for good. In order:
    `receive_advertisement`, `roster_message`, `receive_shares`, `delivery_for`, `receive_masked_input` or
    `receive_complaint`, then `survivors_message` and `receive_confirmation` in active mode, then
    `request_for`, `receive_response`, `finish`.

    `left_out` are members of the cohort whose adverts are refused: those the complaints of earlier attempts
    point at.

    Guarantee: a `receive_` method returns the sender's id, or raises ProtocolError and is as if it had not
    been called, so one client's nonsense never ends the session for the others; the same message again is
    acknowledged and counts once. A question that comes too early is refused and may be asked again. Threads
    may share a session. Vectors are added to one accumulator as they
    come: at any number of clients the session holds one vector, plus the message being added.
    Raises: NotEnoughClients (a ProtocolError) when a stage would close with too few, and it stays open;
    ProtocolError from `finish` when the shares do not fit together.
    """

    def __init__(
        self,
        parameters: SessionParameters,
        *,
        source: RandomSource | None = None,
        left_out: Collection[bytes] = (),
    ) -> None:
        self._parameters = parameters
        self._lock = threading.RLock()
        self._welcome = frozenset(parameters.cohort).difference(left_out)
        self._accepted: dict[tuple[messages.Kind, bytes], bytes] = {}
        self._complaints: list[Complaint] = []
        self._complainers: set[int] = set()
        self._source = source if source is not None else RandomSource.system()
        self._stage = Stage.ADVERTISE
        self._adverts: dict[bytes, messages.Advert] = {}
        self._keys: set[bytes] = set()
        self._order: list[bytes] = []
        self._place: dict[bytes, int] = {}
        self._transcript = self._setup_transcript = b""
        self._graph = Graph(0, neighbours=0, ring=None)
        self._shares: dict[int, messages.SealedShares] = {}
        self._commitments: dict[int, bytes] = {}
        self._sharers: set[int] = set()
        self._uploaded: set[int] = set()
        self._survivors: list[int] = []
        self._accumulator = np.zeros(0, dtype=np.uint32)
        self._confirmations: dict[int, bytes] = {}
        self._requested: set[int] = set()
        self._responses: dict[int, dict[int, bytes]] = {}
        self._signed_responses: dict[int, tuple[bytes, bytes]] = {}
        self._roster_message = b""
        self._traffic: dict[bytes, Traffic] = {}

    @property
    def stage(self) -> Stage:
        """Return which stage's messages are being received."""
        return self._stage

    @property
    def traffic(self) -> Mapping[bytes, Traffic]:
        """Return the bytes of each client so far: accepted messages up, messages handed out down."""
        return self._traffic

    @property
    def participants(self) -> tuple[bytes, ...]:
        """Return the ids of those still expected to answer at this stage, sorted."""
        if self._stage is Stage.ADVERTISE:
            return tuple(sorted(self._adverts))
        if self._stage is Stage.SHARE:
            return tuple(self._order)
        places = sorted(self._sharers) if self._stage is Stage.MASK else self._survivors
        return tuple(self._order[place] for place in places)

    @property
    def complaints(self) -> tuple[Complaint, ...]:
        """Return what members hold against each other so far; see `complaints.left_out`."""
        return tuple(self._complaints)

    @_alone
    def close_stage(self) -> Stage:
        """Stop receiving for this stage and return the next one.

        Raises: NotEnoughClients when too few arrived, and the stage stays open; ProtocolError when unmasking,
        which `finish` ends.
        """
        closers = {
            Stage.ADVERTISE: self._close_adverts,
            Stage.SHARE: self._close_shares,
            Stage.MASK: self._close_uploads,
            Stage.CONFIRM: self._close_confirmations,
        }
        if self._stage not in closers:
            raise ProtocolError
        closers[self._stage]()
        return self._stage

    def _require(self, stage: Stage) -> None:
        if self._stage is not stage:
            raise ProtocolError

    def _count_up(self, owner: bytes, size: int) -> None:
        traffic = self._traffic.setdefault(owner, Traffic({}, {}))
        traffic.up[self._stage] = traffic.up.get(self._stage, 0) + size

    def _send(self, owner: bytes, message: bytes) -> bytes:
        traffic = self._traffic.setdefault(owner, Traffic({}, {}))
        traffic.down[self._stage] = traffic.down.get(self._stage, 0) + len(message)
        return message

    @staticmethod
    def _need(arrived: int, fewest: int) -> None:
        if arrived < fewest:
            raise NotEnoughClients

    @property
    def _fewest(self) -> int:
        return max(self._parameters.minimum_survivors, self._parameters.threshold + 1)

    def _again(self, kind: messages.Kind, owner: bytes, signed: bytes) -> bool:
        """Say whether this very message was accepted before,
        by what its signature covers and the signature.
        """
        return self._accepted.get((kind, owner)) == signed

    def _accept(self, kind: messages.Kind, owner: bytes, signed: bytes, size: int) -> bytes:
        """Note an accepted message, so that its retransmission is known, and count its bytes."""
        self._accepted[kind, owner] = signed
        self._count_up(owner, size)
        return owner

    # R0

    @_receives
    def receive_advertisement(self, message: bytes) -> bytes:
        """Accept a client's advert and return its id."""
        messages.require_size(message, messages.HEADER_BYTES + messages.ADVERT_BYTES)
        advert = messages.read_advert(message)
        statement = advert.statement(self._parameters.session_id)
        signed = statement + advert.signature
        if self._again(messages.Kind.ADVERT, advert.id, signed):
            return advert.id
        self._require(Stage.ADVERTISE)
        if advert.id in self._adverts or len(self._adverts) >= self._parameters.clients:
            raise ProtocolError
        keys = (advert.channel_key, advert.mask_key)
        require_sound_keys(keys)
        if self._keys.intersection(keys) or advert.id not in self._welcome:
            raise ProtocolError
        self._verify(advert.id, advert.signature, statement)
        self._adverts[advert.id] = advert
        self._keys.update(keys)
        return self._accept(messages.Kind.ADVERT, advert.id, signed, len(message))

    def _close_adverts(self) -> None:
        self._need(len(self._adverts), self._fewest)
        self._order = sorted(self._adverts)
        self._place = {owner: place for place, owner in enumerate(self._order)}
        adverts = [self._adverts[owner] for owner in self._order]
        self._transcript = messages.transcript_of(self._parameters.session_id, adverts)
        self._setup_transcript = self._transcript
        self._graph = build_graph(
            self._parameters.graph, count=len(adverts), neighbours=self._parameters.neighbours,
            transcript=self._transcript, remember=True,
        )  # fmt: skip
        self._roster_message = messages.write_roster(adverts)
        self._stage = Stage.SHARE

    @_alone
    def roster_message(self, owner: bytes | None = None) -> bytes:
        """Return everybody's adverts, the same bytes for all; the first call closes R0.

        Give `owner` to have the bytes counted as sent to that client.
        """
        if self._stage is Stage.ADVERTISE:
            self._close_adverts()
        self._require(Stage.SHARE)
        return self._roster_message if owner is None else self._send(owner, self._roster_message)

    # R1

    @_receives
    def receive_shares(self, message: bytes) -> bytes:
        """Accept a client's encrypted shares and return its id."""
        messages.require_size(
            message, messages.HEADER_BYTES + 128 + messages.CIPHERTEXT_BYTES * len(self._order)
        )
        sealed = messages.SealedShares.from_bytes(message)
        statement = sealed.statement(self._setup_transcript)
        signed = statement + sealed.signature
        if self._again(messages.Kind.SHARES, sealed.id, signed):
            return sealed.id
        self._require(Stage.SHARE)
        place = self._place[sealed.id]
        if place in self._shares or len(sealed.ciphertexts) != len(self._graph.neighbours(place)):
            raise ProtocolError
        self._verify(sealed.id, sealed.signature, statement)
        self._shares[place] = sealed
        self._commitments[place] = sealed.commitment
        return self._accept(messages.Kind.SHARES, sealed.id, signed, len(message))

    def _verify(self, owner: bytes, signature: bytes, statement: bytes) -> None:
        verify_signature(self._parameters.roster.members[owner], signature, statement)

    def _close_shares(self) -> None:
        self._need(len(self._shares), self._fewest)
        self._sharers = set(self._shares)
        self._accumulator = np.zeros(self._parameters.length, dtype=word_type(self._parameters.modulus_bits))
        self._stage = Stage.MASK

    @_alone
    def delivery_for(self, owner: bytes) -> bytes:
        """Return the shares the neighbours dealt to a client; the first call closes R1."""
        if self._stage is Stage.SHARE:
            self._close_shares()
        self._require(Stage.MASK)
        place = self._place.get(owner, -1)
        if place not in self._sharers:
            raise ProtocolError
        neighbours = self._graph.neighbours(place)
        ciphertexts = []
        for index, neighbour in enumerate(neighbours):
            if neighbour in self._sharers:
                ciphertexts.append((index, self._ciphertext(neighbour, place)))
        return self._send(owner, messages.write_delivery(ciphertexts, len(neighbours)))

    def _ciphertext(self, dealer: int, receiver: int) -> bytes:
        return self._shares[dealer].ciphertexts[self._graph.share_point(receiver, dealer) - 1]

    @_receives
    def receive_complaint(self, message: bytes | bytearray | memoryview) -> bytes:
        """Accept, instead of a masked vector, a client's complaint about shares it could not open; return its
        id.

        The complaint must be about the very ciphertexts their dealers signed. The complainer is out of this
        session; it and the dealers are in `complaints`.
        """
        largest = messages.HEADER_BYTES + 96 + len(self._order) // 8 + 1 + 32 * len(self._order)
        messages.require_size(message, largest)
        complaint = messages.SignedBody.from_bytes(message, messages.Kind.COMPLAINT)
        statement = complaint.statement("complaint", self._setup_transcript)
        signed = statement + complaint.signature
        if self._again(messages.Kind.COMPLAINT, complaint.id, signed):
            return complaint.id
        self._require(Stage.MASK)
        place = self._place[complaint.id]
        neighbours = self._graph.neighbours(place)
        spoiled = messages.read_complaint_body(complaint.body, len(neighbours))
        if place not in self._sharers or place in self._uploaded | self._complainers or not spoiled:
            raise ProtocolError
        for index, digest in spoiled:
            dealer = neighbours[index]
            if dealer not in self._sharers or not messages.matches(self._ciphertext(dealer, place), digest):
                raise ProtocolError
        self._verify(complaint.id, complaint.signature, statement)
        self._complainers.add(place)
        for index, _ in spoiled:
            self._complain(
                Complaint(
                    reason="sealed share",
                    accuser=complaint.id,
                    accused=self._order[neighbours[index]],
                    statement=statement,
                    signature=complaint.signature,
                )
            )
        return self._accept(messages.Kind.COMPLAINT, complaint.id, signed, len(message))

    def _complain(self, complaint: Complaint) -> None:
        if complaint not in self._complaints:
            self._complaints.append(complaint)

    # R2

    @_alone
    def bind_model(self, model_hash: bytes) -> None:
        """Say which model a session set up with a deferred one is about; before the first upload, once."""
        self._require(Stage.MASK)
        if self._parameters.model_hash != DEFERRED_MODEL or self._setup_transcript != self._transcript:
            raise ProtocolError
        self._transcript = messages.bind_model(self._transcript, model_hash)

    @_receives
    def receive_masked_input(self, message: bytes | bytearray | memoryview) -> bytes:
        """Add a client's masked vector to the accumulator and return its id."""
        bits = self._parameters.modulus_bits
        size = packed_bytes(self._parameters.length, bits)
        messages.require_size(message, messages.HEADER_BYTES + messages.ID_BYTES + 64 + size)
        upload = messages.SignedBody.from_bytes(message, messages.Kind.MASKED)
        statement = upload.statement("masked", self._transcript)
        signed = statement + upload.signature
        if self._again(messages.Kind.MASKED, upload.id, signed):
            return upload.id
        self._require(Stage.MASK)
        place = self._place[upload.id]
        if (
            place not in self._sharers
            or place in self._uploaded | self._complainers
            or len(upload.body) != size
        ):
            raise ProtocolError
        if self._parameters.model_hash == DEFERRED_MODEL and self._setup_transcript == self._transcript:
            raise ProtocolError
        self._verify(upload.id, upload.signature, statement)
        add_packed(self._accumulator, upload.body, bits)
        self._uploaded.add(place)
        return self._accept(messages.Kind.MASKED, upload.id, signed, len(message))

    add_masked_input = receive_masked_input

    def _close_uploads(self) -> None:
        self._need(len(self._uploaded), self._parameters.minimum_survivors)
        self._survivors = sorted(self._uploaded)
        self._shares.clear()
        self._stage = Stage.CONFIRM if self._parameters.mode == "active" else Stage.UNMASK

    # R3

    @_alone
    def survivors_message(self, owner: bytes | None = None) -> bytes:
        """Return who uploaded, the same bytes for all (active mode); the first call closes R2."""
        if self._stage is Stage.MASK and self._parameters.mode == "active":
            self._close_uploads()
        self._require(Stage.CONFIRM)
        message = messages.write_survivors(self._survivors, len(self._order))
        return message if owner is None else self._send(owner, message)

    @_receives
    def receive_confirmation(self, message: bytes) -> bytes:
        """Accept a client's signature on the set of survivors and return its id."""
        messages.require_size(message, messages.HEADER_BYTES + messages.ID_BYTES + 64)
        owner, signature = messages.read_confirmation(message)
        statement = self._alive_statement()
        if self._again(messages.Kind.CONFIRMATION, owner, statement + signature):
            return owner
        self._require(Stage.CONFIRM)
        place = self._place[owner]
        if place not in self._uploaded or place in self._confirmations:
            raise ProtocolError
        self._verify(owner, signature, statement)
        self._confirmations[place] = signature
        return self._accept(messages.Kind.CONFIRMATION, owner, statement + signature, len(message))

    def _close_confirmations(self) -> None:
        self._need(len(self._confirmations), self._parameters.threshold + 1)
        self._stage = Stage.UNMASK

    def _alive_statement(self) -> bytes:
        return messages.alive_statement(self._transcript, (self._order[place] for place in self._survivors))

    # R4

    @_alone
    def request_for(self, owner: bytes) -> bytes:
        """Return the unmask request for a client; the first call closes R2 (semi-honest) or R3 (active).

        Raises: NotEnoughClients when too few of this client's neighbours confirmed; the session goes on
        without it.
        """
        if self._stage is Stage.MASK and self._parameters.mode == "semi_honest":
            self._close_uploads()
        if self._stage is Stage.CONFIRM:
            self._close_confirmations()
        self._require(Stage.UNMASK)
        place = self._place.get(owner, -1)
        if place not in self._uploaded:
            raise ProtocolError
        message = self._request(place)
        self._requested.add(place)
        return self._send(owner, message)

    def _request(self, place: int) -> bytes:
        if self._parameters.mode == "semi_honest":
            return messages.write_request(self._survivors, len(self._order))
        if place not in self._confirmations:
            raise ProtocolError
        neighbours, wanted = self._graph.neighbours(place), self._parameters.threshold
        confirmed = [
            (index, self._confirmations[neighbour])
            for index, neighbour in enumerate(neighbours)
            if neighbour in self._confirmations
        ]
        if len(confirmed) < wanted:
            raise NotEnoughClients
        return messages.write_active_request(confirmed[:wanted], len(neighbours))

    @_receives
    def receive_response(self, message: bytes) -> bytes:
        """Accept a client's shares of its neighbours' secrets and return its id."""
        messages.require_size(message, messages.HEADER_BYTES + 96 + shamir.SHARE_BYTES * len(self._order))
        response = messages.SignedBody.from_bytes(message, messages.Kind.RESPONSE)
        statement = response.statement("response", self._transcript)
        signed = statement + response.signature
        if self._again(messages.Kind.RESPONSE, response.id, signed):
            return response.id
        self._require(Stage.UNMASK)
        place = self._place[response.id]
        if place not in self._requested or place in self._responses:
            raise ProtocolError
        owners = [neighbour for neighbour in self._graph.neighbours(place) if neighbour in self._sharers]
        shares = messages.read_shares(response.body)
        if len(shares) != len(owners):
            raise ProtocolError
        self._verify(response.id, response.signature, statement)
        self._responses[place] = dict(zip(owners, shares, strict=True))
        self._signed_responses[place] = (statement, response.signature)
        return self._accept(messages.Kind.RESPONSE, response.id, signed, len(message))

    @_alone
    def finish(self) -> RingSum:
        """Rebuild the secrets that open the sum, remove the masks and return it; can be called once.

        Guarantee: for every client either its self-mask secret or its key is rebuilt, never both, and each is
        checked against what the client committed to. Members whose shares are wrong are in `complaints`
        afterwards.
        Raises: NotEnoughClients when some client has fewer than `threshold` answers, or this is asked too
        early; ProtocolError when its answers give no secret that fits. Further answers may still come, and it
        be asked again.
        """
        if self._stage < Stage.UNMASK:
            raise NotEnoughClients
        self._require(Stage.UNMASK)
        collected = self._collect_shares()
        masks = [self._self_mask(place, collected[place]) for place in self._survivors]
        for place in sorted(self._sharers - self._uploaded):
            masks.extend(self._pair_masks(place, collected[place]))
        add_masks(self._accumulator, masks)
        self._stage = Stage.DONE
        return RingSum(
            vector=reduce(self._accumulator, self._parameters.modulus_bits),
            modulus_bits=self._parameters.modulus_bits,
            survivors=tuple(self._order[place] for place in self._survivors),
            transcript=self._transcript,
        )

    def _collect_shares(self) -> dict[int, dict[int, bytes]]:
        """Return for each client whose shares went out the answers about it, by share point.

        A client that shared, never uploaded and has no surviving neighbour left no mask in the sum.
        """
        collected: dict[int, dict[int, bytes]] = {place: {} for place in sorted(self._sharers)}
        for holder, shares in self._responses.items():
            for owner, share in shares.items():
                collected[owner][self._graph.share_point(holder, owner)] = share
        for place, shares in collected.items():
            needed = place in self._uploaded or self._uploaded.intersection(self._graph.neighbours(place))
            if needed and len(shares) < self._parameters.threshold:
                raise NotEnoughClients
        return collected

    def _recover(self, place: int, shares: Mapping[int, bytes], accept: Callable[[bytes], bool]) -> bytes:
        """Rebuild a secret of one client;
        complain about holders whose shares are wrong, or about its dealer.
        """
        holders, owner = self._graph.neighbours(place), self._order[place]
        try:
            secret, wrong = shamir.recover(
                shares, threshold=self._parameters.threshold, accept=accept, source=self._source
            )
        except ProtocolError:
            needed = shamir.liars_needed(shares, threshold=self._parameters.threshold)
            self._complain(Complaint(reason="dealt secret", accused=owner, liars_needed=needed))
            raise
        for point in wrong:
            holder = holders[point - 1]
            statement, signature = self._signed_responses[holder]
            self._complain(
                Complaint(
                    reason="answered share",
                    accuser=owner,
                    accused=self._order[holder],
                    statement=statement,
                    signature=signature,
                )
            )
        return secret

    def _self_mask(self, place: int, shares: Mapping[int, bytes]) -> Mask:
        owner, commitment = self._order[place], self._commitments[place]
        secret = self._recover(
            place,
            shares,
            lambda guess: messages.self_commitment(self._setup_transcript, owner, guess) == commitment,
        )
        return Mask(messages.self_seed(secret, transcript=self._transcript, owner=owner), negative=True)

    def _pair_masks(self, place: int, shares: Mapping[int, bytes]) -> list[Mask]:
        """Return the masks that survivors share with one lost client, signed to cancel what they uploaded."""
        owner = self._order[place]
        partners = [neighbour for neighbour in self._graph.neighbours(place) if neighbour in self._uploaded]
        if not partners:
            return []
        advertised = self._adverts[owner].mask_key
        secret = self._recover(place, shares, lambda guess: public_of(guess) == advertised)
        peers = [self._order[partner] for partner in partners]
        shared = agree(secret, (self._adverts[peer].mask_key for peer in peers))
        pair_masks: list[Mask] = []
        for peer, key in zip(peers, shared, strict=True):
            pair_masks.append(
                Mask(
                    messages.pair_seed(key, transcript=self._transcript, one=owner, other=peer),
                    negative=peer < owner,
                )
            )
        return pair_masks
