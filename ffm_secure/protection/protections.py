"""What hides one client's vector from the server: nothing, secure aggregation, or homomorphic encryption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from defenses import he, secagg
from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import ring
from defenses.secagg.graph import COMPLETE_UP_TO
from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.records import RoundPlan

_STAGES = {
    "advertise": secagg.Stage.ADVERTISE,
    "share": secagg.Stage.SHARE,
    "train": secagg.Stage.MASK,
    "upload": secagg.Stage.MASK,
    "confirm": secagg.Stage.CONFIRM,
    "unmask": secagg.Stage.UNMASK,
}
AFTER_UPLOAD = frozenset({"confirm", "unmask"})
"""Stages at which a client has already uploaded: whoever is lost there is in the sum."""
Contribute = Callable[[int], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationResult:
    """The ring sum over the survivors, or the reason why it stayed closed, and the bytes it took."""

    ring_sum: npt.NDArray[Any] | None
    survivors: tuple[int, ...] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)
    aborted: str = ""
    bytes_up: int = 0
    bytes_down: int = 0


class Protection(Protocol):
    """Collect one round's vectors into one sum; asks for each client's vector when it is needed, in the given order."""

    kind: str

    def collect(
        self, round_plan: RoundPlan, *, contribute: Contribute, drop: Mapping[int, str], order: Sequence[int]
    ) -> AggregationResult:
        """Run the protocol of one round."""


class Unprotected:
    """Send every vector in the clear, packed as the protections pack theirs: the server sees each client's change."""

    kind = "none"

    def __init__(self, code: VectorCodec, minimum: int) -> None:
        self.code, self.minimum = code, minimum

    def collect(
        self, round_plan: RoundPlan, *, contribute: Contribute, drop: Mapping[int, str], order: Sequence[int]
    ) -> AggregationResult:
        """Add up what arrives."""
        total, arrived, sent = np.zeros(self.code.length, dtype=ring.word_type(self.code.modulus_bits)), [], 0
        for client in order:
            payload = ring.pack(contribute(client), self.code.modulus_bits)
            if drop.get(client, "unmask") not in AFTER_UPLOAD:
                continue
            sent += len(payload)
            ring.add_packed(total, payload, self.code.modulus_bits)
            arrived.append(client)
        if len(arrived) < self.minimum:
            return AggregationResult(
                ring_sum=None,
                dropped=drop,
                aborted=f"{len(arrived)} of at least {self.minimum} clients answered",
                bytes_up=sent,
            )
        return AggregationResult(
            ring_sum=ring.reduce(total, self.code.modulus_bits),
            survivors=tuple(arrived),
            dropped=drop,
            bytes_up=sent,
        )


def sharing_graph(config: RunConfig) -> secagg.GraphParameters:
    """Return who shares secrets with whom: everybody with everybody, or neighbours on a random ring in a large cohort.

    Guarantee: on a ring too, `colluding` clients with the server open nobody, except with probability 2^-80 (2^-40 against a
    server that does not lie); with `threshold` clients left everybody can be opened, except with probability 2^-30.
    Raises:
      ParameterError: no ring fits, and on the complete graph too few clients would remain.
    """
    cohort, protection = config.federation.cohort, config.protection
    if cohort <= COMPLETE_UP_TO[protection.mode]:
        threshold = max(2, compatibility.shamir_threshold(config))
        return secagg.GraphParameters(kind="complete", neighbours=cohort - 1, threshold=threshold)
    return secagg.find_graph_parameters(
        cohort,
        corrupted=protection.colluding / cohort,
        dropouts=1 - compatibility.minimum_survivors(config) / cohort,
        mode=protection.mode,
        security_bits=80 if protection.mode == "active" else 40,
    )


class SecureAggregation:
    """Run ffm-secagg/1 among the cohort: the server learns the sum and who is in it.

    In a simulation every party lives in this process, but all of them speak bytes through the protocol's own state machines,
    with keys from the system's randomness; a round's keys are fresh and are erased with its sessions.
    """

    kind = "secagg"

    def __init__(self, code: VectorCodec, config: RunConfig, owners: Sequence[str]) -> None:
        self.code, self.config, self.graph = code, config, sharing_graph(config)
        source = RandomSource.system()
        operator = secagg.Identity.generate(source)
        self.identities = tuple(secagg.Identity.generate(source) for _ in owners)
        self.roster = secagg.Roster.issue(operator, [identity.public_key for identity in self.identities])
        minimum = compatibility.minimum_survivors(config)
        self.policy = secagg.ClientPolicy(
            operator=operator.public_key,
            minimum_survivors=minimum,
            colluders=config.protection.colluding,
            minimum_honest=max(2, min(3, minimum - config.protection.colluding)),
            modes=frozenset({config.protection.mode}),
            quantization_hash=code.digest(),
        )

    def collect(
        self, round_plan: RoundPlan, *, contribute: Contribute, drop: Mapping[int, str], order: Sequence[int]
    ) -> AggregationResult:
        """Run one session; too few survivors, or anything improper, leaves the sum closed."""
        parameters = self._parameters(round_plan)
        source = RandomSource.system()
        members = {
            self.identities[client].id: client for client in (*order, *(set(round_plan.cohort) - set(order)))
        }
        sessions = {
            owner: secagg.ClientSession(self.identities[client], parameters, self.policy, source)
            for owner, client in members.items()
        }
        server = secagg.ServerSession(parameters)
        lost = {owner: self._stage(drop[client]) for owner, client in members.items() if client in drop}
        try:
            outcome = secagg.drive(sessions, server, lambda owner: contribute(members[owner]), lost)
        except ProtocolError as error:
            few = isinstance(error, secagg.NotEnoughClients)
            reason = (
                f"fewer than {self.policy.minimum_survivors} clients could open the sum"
                if few
                else "protocol aborted"
            )
            up, down = _bytes(server.traffic)
            return AggregationResult(
                ring_sum=None, dropped=dict(drop), aborted=reason, bytes_up=up, bytes_down=down
            )
        survivors = tuple(sorted(members[owner] for owner in outcome.sum.survivors))
        up, down = _bytes(outcome.traffic)
        dropped = {**{members[owner]: stage.name.lower() for owner, stage in outcome.lost.items()}, **drop}
        return AggregationResult(
            ring_sum=outcome.sum.vector, survivors=survivors, dropped=dropped, bytes_up=up, bytes_down=down
        )

    def _stage(self, name: str) -> secagg.Stage:
        """Return where the protocol loses a client; without a confirmation it is lost at the next message."""
        stage = _STAGES[name]
        semi_honest = self.config.protection.mode == "semi_honest"
        return secagg.Stage.UNMASK if stage is secagg.Stage.CONFIRM and semi_honest else stage

    def _parameters(self, round_plan: RoundPlan) -> secagg.SessionParameters:
        count = len(round_plan.cohort)
        return secagg.SessionParameters(
            run_id=round_plan.run_id,
            round=round_plan.round,
            mode=self.config.protection.mode,
            graph=self.graph.kind,
            clients=count,
            neighbours=self.graph.neighbours,
            threshold=self.graph.threshold,
            minimum_survivors=self.policy.minimum_survivors,
            modulus_bits=self.code.modulus_bits,
            length=self.code.length,
            layout_hash=hashlib.sha256(b"flat vector 1").digest(),
            quantization_hash=self.code.digest(),
            model_hash=bytes.fromhex(round_plan.fingerprint),
            roster=self.roster,
        )


def _bytes(traffic: Mapping[bytes, Any]) -> tuple[int, int]:
    totals = [item.total for item in traffic.values()]
    return sum(up for up, _ in totals), sum(down for _, down in totals)


class Encrypted:
    """Add ciphertexts: the server learns not even the sum; the clients, who share one key of this run, open it.

    In a simulation one key holder stands for all clients, and one opening for all of theirs; they still compare it. Whoever
    uploaded is in the sum; nobody is asked twice.
    """

    def __init__(self, code: VectorCodec, config: RunConfig, owners: Sequence[str]) -> None:
        self.kind, self.code, self.config = config.protection.kind, code, config
        source = RandomSource.system()
        self.identities = tuple(Ed25519PrivateKey.from_private_bytes(source.random_bytes(32)) for _ in owners)
        self.names = tuple(identity.public_key().public_bytes_raw() for identity in self.identities)
        self.minimum = compatibility.minimum_survivors(config)
        self.bound = max(1, code.max_weight, code.quantizer.largest * code.max_weight + code.noise_bound)
        self.parameters = he.choose(
            config.protection.kind, parties=config.federation.cohort, value_bound=self.bound
        )  # type: ignore[arg-type]
        self.holder: he.KeyHolder | None = None

    def collect(
        self, round_plan: RoundPlan, *, contribute: Contribute, drop: Mapping[int, str], order: Sequence[int]
    ) -> AggregationResult:
        """Encrypt, add, open."""
        if self.holder is None or not self.holder.usable:
            self.holder = he.KeyHolder.generate(
                self.parameters, random=RandomSource.system(), run=round_plan.run_id
            )
        agreement = he.Agreement(
            run=round_plan.run_id,
            round=round_plan.round,
            length=self.code.length,
            value_bound=self.bound,
            cohort=tuple(sorted(self.names[client] for client in round_plan.cohort)),
            fewest=self.minimum,
        )
        server, sent, arrived = (
            he.Accumulator(self.holder.public_bundle(), agreement, roster=self.names),
            0,
            [],
        )
        for client in order:
            if client in drop:
                continue
            values = ring.signed(contribute(client), self.code.modulus_bits)
            upload = list(self._client(agreement, client).encrypt(values))
            sent += sum(len(chunk) for chunk in upload)
            server.add(upload, sender=self.names[client])
            arrived.append(client)
        if len(arrived) < self.minimum:
            reason = f"{len(arrived)} of at least {self.minimum} clients answered"
            return AggregationResult(ring_sum=None, dropped=dict(drop), aborted=reason, bytes_up=sent)
        chunks = list(server.sum_chunks())
        down = sum(len(chunk) for chunk in chunks) * len(arrived)
        openers = [self._client(agreement, client) for client in arrived]
        try:
            total = openers[0].decrypt_sum(chunks, server.parties)
            messages = [opener.confirm(total, server.parties) for opener in openers]
            for opener in openers:
                opener.check_confirmations(total, server.parties, messages)
        except ProtocolError:
            return AggregationResult(
                ring_sum=None, dropped=dict(drop), aborted="protocol aborted", bytes_up=sent, bytes_down=down
            )
        compared = sum(len(message) for message in messages)
        sent, down = sent + compared, down + compared * len(arrived)
        return AggregationResult(
            ring_sum=ring.from_signed(total, self.code.modulus_bits),
            survivors=tuple(sorted(arrived)),
            dropped=dict(drop),
            bytes_up=sent,
            bytes_down=down,
        )

    def _client(self, agreement: he.Agreement, client: int) -> he.EncryptedClient:
        if self.holder is None:
            raise ProtocolError
        return he.EncryptedClient(self.holder, agreement, self.identities[client], roster=self.names)


def build_protection(config: RunConfig, *, code: VectorCodec, owners: Sequence[str]) -> Protection:
    """Return the protection a run file names."""
    if config.protection.kind in ("bfv", "ckks"):
        return Encrypted(code, config, owners)
    if config.protection.kind == "secagg":
        return SecureAggregation(code, config, owners)
    return Unprotected(code, compatibility.minimum_survivors(config))
