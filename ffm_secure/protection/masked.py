"""Secure aggregation, ffm-secagg: the server learns the sum and who is in it.

`open_sum` of the server's half hands the opened sum on; the unmasking itself stands in
`defenses/secagg/server.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from defenses import secagg
from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg.graph import COMPLETE_UP_TO
from defenses.secagg.masks import RingVector
from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.base import UPLOAD, AggregationResult, ClientRound, ServerRound
from ffm_secure.protection.groups import OpensGroups
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.records import RoundPlan

_STAGES: Mapping[str, secagg.Stage] = {
    "advertise": secagg.Stage.ADVERTISE,
    "share": secagg.Stage.SHARE,
    UPLOAD: secagg.Stage.MASK,
    "confirm": secagg.Stage.CONFIRM,
    "unmask": secagg.Stage.UNMASK,
}


def sharing_graph(config: RunConfig) -> secagg.GraphParameters:
    """Return who shares secrets with whom: everybody with everybody, or neighbours on a random ring in a
    large cohort.

    Guarantee: on a ring too, `colluding` clients with the server open nobody, except with probability 2^-80
    (2^-40 against a server that does not lie); with `threshold` clients left everybody can be opened, except
    with probability 2^-30.
    Raises:
      ParameterError: no ring fits, and on the complete graph too few clients would remain.
    """
    cohort, protection = group_size(config), config.protection
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


def fewest_to_open(config: RunConfig) -> int:
    """Return the fewest clients of a cohort with whom a sum can be opened at all.

    Under masks everybody needs so many holders of shares beside herself, and that may be more than the fewest
    a sum may cover.
    """
    fewest = compatibility.minimum_survivors(config)
    if config.protection.kind == "secagg":
        return max(fewest, sharing_graph(config).threshold + 1)
    return fewest


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBinding:
    """What a party computes of its own copy before it takes part; a session about anything else is refused.

    backbone: fingerprint of the frozen tensors. layout: digest of names, shapes and codec of what is sent.
    mechanism: digest of everything that decides epsilon.
    """

    backbone: str = ""
    layout: str = ""
    mechanism: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTerms:
    """What both halves know and compute alike: the run file's choices, the codec, the operator's roster."""

    config: RunConfig
    codec: VectorCodec
    roster: secagg.Roster
    graph: secagg.GraphParameters
    members: tuple[bytes, ...]  # identity of every site, by index
    binding: SessionBinding = SessionBinding()

    @property
    def minimum(self) -> int:
        """Return the fewest clients a sum may cover."""
        return compatibility.minimum_survivors(self.config)

    def session(self, plan: RoundPlan) -> secagg.SessionParameters:
        """Return the parameters of one round's session."""
        return secagg.SessionParameters(
            run_id=plan.run_id,
            round=plan.round,
            attempt=plan.attempt,
            mode=self.config.protection.mode,
            graph=self.graph.kind,
            clients=len(plan.cohort),
            neighbours=self.graph.neighbours,
            threshold=self.graph.threshold,
            minimum_survivors=self.minimum,
            modulus_bits=self.codec.modulus_bits,
            length=self.codec.length,
            backbone_hash=_digest("backbone", self.binding.backbone),
            layout_hash=_digest("layout", plan.layout),
            quantization_hash=self.codec.digest(),
            mechanism_hash=_digest("mechanism", plan.mechanism),
            model_hash=bytes.fromhex(plan.fingerprint),
            roster=self.roster,
            cohort=self.cohort(plan),
        )

    def cohort(self, plan: RoundPlan) -> tuple[bytes, ...]:
        """Return the identities of a round's cohort, which a site has compared with the public schedule."""
        return tuple(sorted(self.members[site] for site in plan.cohort))

    def policy(self, operator: bytes, plan: RoundPlan) -> secagg.ClientPolicy:
        """Return the least a site of this run insists on in a round;
        its hashes are its own, not the plan's.
        """
        colluding, cohort = self.config.protection.colluding, self.cohort(plan)
        return secagg.ClientPolicy(
            operator=operator,
            federation=self.roster.federation,
            run_id=plan.run_id,
            backbone_hash=_digest("backbone", self.binding.backbone),
            layout_hash=_digest("layout", self.binding.layout),
            mechanism_hash=_digest("mechanism", self.binding.mechanism),
            cohort_rule=lambda *_: cohort,
            # An aborted round leaves the model as it is, and the next one is about it again. Sound with
            # noise, which the
            # ledger charges every time; without a unit it is the gap that docs/threat_model.md states.
            repeat_models=True,
            minimum_survivors=self.minimum,
            colluders=colluding,
            minimum_honest=max(2, min(3, self.minimum - colluding)),
            modes=frozenset({self.config.protection.mode}),
            quantization_hash=self.codec.digest(),
        )


def _digest(kind: str, value: str) -> bytes:
    return secagg.rule_digest(kind, {"digest": value})


class MaskedClientRound:
    """One site's session."""

    def __init__(self, session: secagg.ClientSession, plan: RoundPlan) -> None:
        self._session, self._plan = session, plan

    def respond(self, stage: str, message: bytes) -> bytes:
        """Answer one stage of the protocol."""
        session = self._session
        if stage == "advertise":
            return session.advertise()
        if stage == "share":
            return session.share(message)
        if stage == "confirm":
            return session.confirm(message)
        if stage == "unmask":
            return session.unmask(message)
        raise ProtocolError

    def seal(self, message: bytes, vector: RingVector, *, update: bytes) -> bytes | memoryview:
        """Return the masked vector; or a signed complaint about shares that could not be opened."""
        try:
            model_hash = bytes.fromhex(self._plan.fingerprint)
            return self._session.mask(message, vector, update=update, model_hash=model_hash)
        except ProtocolError:
            if not self._session.complaint:
                raise
            return self._session.complaint


class MaskedServerRound:
    """The aggregator's session, by site index."""

    def __init__(
        self, plan: RoundPlan, terms: MaskedTerms, complaints: Sequence[secagg.Complaint] = ()
    ) -> None:
        self._terms = terms
        colluders = terms.config.protection.colluding
        self._sites = {terms.members[site]: site for site in plan.cohort}
        self._owners = {site: owner for owner, site in self._sites.items()}
        self._session = secagg.ServerSession(
            terms.session(plan), left_out=secagg.left_out(complaints, colluders=colluders)
        )
        self._failed = ""
        active = terms.config.protection.mode == "active"
        self.stages: Sequence[str] = tuple(stage for stage in _STAGES if active or stage != "confirm")

    @property
    def complaints(self) -> tuple[secagg.Complaint, ...]:
        """Return what members hold against each other so far."""
        return self._session.complaints

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Close the stage before, and return what those left are sent."""
        session = self._session
        if stage == "advertise":
            return dict.fromkeys(self._owners, b"")
        try:
            if session.stage is not _STAGES[stage]:
                session.close_stage()
        except ProtocolError as error:
            few = isinstance(error, secagg.NotEnoughClients)
            self._failed = self._few() if few else "protocol aborted"
            raise
        ask = {
            "share": session.roster_message,
            UPLOAD: session.delivery_for,
            "confirm": session.survivors_message,
            "unmask": session.request_for,
        }[stage]
        left = set(session.participants)
        going_out: dict[int, bytes] = {}
        for site, owner in self._owners.items():
            if owner not in left:
                continue
            with suppress(ProtocolError):  # the session has nothing to ask of a site it no longer counts on
                going_out[site] = ask(owner)
        return going_out

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Take in one message; it must come from the site it claims to be from."""
        session = self._session
        if stage == UPLOAD:
            self._require(site, self._receive_upload(reply))
            return
        receive: Mapping[str, Callable[[bytes], bytes]] = {
            "advertise": session.receive_advertisement,
            "share": session.receive_shares,
            "confirm": session.receive_confirmation,
            "unmask": session.receive_response,
        }
        self._require(site, receive[stage](bytes(reply)))

    def _require(self, site: int, owner: bytes) -> None:
        """Refuse another's message from a site: it is a repetition to the session, and no answer of its own.

        Raises:
          ProtocolError: it is one.
        """
        if self._sites.get(owner) != site:
            raise ProtocolError

    def _receive_upload(self, reply: bytes | memoryview) -> bytes:
        """Take in a masked vector, or note a complaint that comes in its place: its sender is out of this
        round.
        """
        try:
            return self._session.receive_masked_input(reply)
        except ProtocolError:
            self._session.receive_complaint(reply)
            raise

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Open the sum."""
        session = self._session
        opened = None
        if not self._failed:
            try:
                opened = session.finish()
            except ProtocolError as error:
                few = isinstance(error, secagg.NotEnoughClients)
                self._failed = self._few() if few else "protocol aborted"
        totals = []
        for item in session.traffic.values():
            totals.append(item.total)
        up, down = sum(item[0] for item in totals), sum(item[1] for item in totals)
        if opened is None:
            return AggregationResult(
                ring_sum=None, dropped=lost, aborted=self._failed, bytes_up=up, bytes_down=down
            )
        survivors = tuple(sorted(self._sites[owner] for owner in opened.survivors))
        return AggregationResult(
            ring_sum=opened.vector, survivors=survivors, dropped=lost, bytes_up=up, bytes_down=down
        )

    def _few(self) -> str:
        return f"fewer than {self._terms.minimum} clients could open the sum"


class MaskedClient:
    """A site's half: its identity, which never leaves it, and what it insists on; `clock` says how late it is
    in seconds.
    """

    kind = "secagg"

    def __init__(
        self,
        identity: secagg.Identity,
        terms: MaskedTerms,
        operator: bytes,
        clock: Callable[[], int],
    ) -> None:
        self._identity, self._terms, self._operator, self._clock = identity, terms, operator, clock

    def join(self, plan: RoundPlan) -> ClientRound:
        """Begin a session; an identity takes part in a round once."""
        policy, source = self._terms.policy(self._operator, plan), RandomSource.system()
        session = secagg.ClientSession(
            self._identity, self._terms.session(plan), policy, source, now=self._clock()
        )
        return MaskedClientRound(session, plan)


class MaskedServer(OpensGroups):
    """The server's half: the roster and the terms, no key; and who was caught spoiling rounds of this run."""

    kind = "secagg"

    def __init__(self, terms: MaskedTerms) -> None:
        self.terms = terms
        self._attempt = (b"", 0, 0)
        self._rounds: list[MaskedServerRound] = []  # one for every group of the newest attempt
        self._complaints: list[secagg.Complaint] = []

    def open_round(self, plan: RoundPlan) -> ServerRound:
        """Begin a session without those whom complaints of earlier rounds point at."""
        attempt = (plan.run_id, plan.round, plan.attempt)
        if attempt != self._attempt:
            for earlier in self._rounds:
                self._complaints += earlier.complaints
            self._attempt, self._rounds = attempt, []
        opened = MaskedServerRound(plan, self.terms, self._complaints)
        self._rounds.append(opened)
        return opened
