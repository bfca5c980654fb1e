"""One data owner as a party: it is sent bytes and answers bytes, and decides for itself whether it takes
part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from defenses.dp import Reservation
from defenses.errors import BudgetExceeded, ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg.masks import RingVector
from ffm_secure import record_codec
from ffm_secure.protection.base import UPLOAD, ClientRound, ClientSide, update_name
from ffm_secure.records import LEARN, Acceptance, RoundPlan
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.errors import BroadcastRefused
from ffm_secure.site.broadcast import BroadcastReader, plan_of
from ffm_secure.site.own_record import OwnRecord
from ffm_secure.site.plan_check import differences
from ffm_secure.site.noise_memory import NoiseMemory
from ffm_secure.site.private_frames import without_locals
from ffm_secure.site.site_ledger import SiteLedger
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.site.truth import TruthKeeper
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.transport.stages import BEGIN, EVALUATE, FINISH, OPENED, PLAN

_MOST_REASONS = 3  # of a crafted broadcast that one line names
_LOG = logging.getLogger(__name__)  # a site's own log: nothing of it is sent


@dataclass(slots=True, kw_only=True)
class _Round:
    """What a site remembers between the messages of one round."""

    plan: RoundPlan
    start: Tensor
    reservations: tuple[Reservation, ...] = ()
    client_round: ClientRound | None = None
    begun: bool = False
    uploaded: bool = False


class Site:
    """Hold what one data owner has: its rows, its ledger, its half of the protection, its own state.

    Guarantee: a row is read only in the upload stage, after the ledger has reserved the round's event and
    after the plan, the model and the mechanism were found to be those agreed on. Why a site refuses is
    written to its own log; all that is sent is whether its budget was the reason. One reservation pays for
    one draw: whatever is repeated, the rows are learned from once, and once only.
    """

    def __init__(
        self,
        *,
        spec: RunSpec,
        data: SiteData,
        ledger: SiteLedger,
        protection: ClientSide,
        answers: Mapping[str, ClientSide] | None = None,
        broadcasts: BroadcastReader,
        borrow_trainer: Callable[[], AbstractContextManager[SiteTrainer]],
        evaluation: Encoded | None = None,
        truth: TruthKeeper | None = None,
        record: OwnRecord | None = None,
        noise: NoiseMemory | None = None,
    ) -> None:
        self.spec, self.data, self.ledger = spec, data, ledger
        self._protection, self._broadcasts, self._borrow_trainer = protection, broadcasts, borrow_trainer
        self._answers = answers or {}  # the halves of the protection that queries travel by
        self._evaluation = evaluation  # public rows
        self._truth, self._record = truth, record
        self._noise = noise  # this site's own, where the noise of a run has a memory
        self._round: _Round | None = None
        self._run_id: bytes | None = None  # of the run this site takes part in, from its first acceptance on

    def __repr__(self) -> str:
        return f"Site({self.data.name!r})"

    @property
    def takes_part(self) -> bool:
        """Tell whether this site has accepted the newest plan and its round is not over."""
        return self._round is not None

    def read_plan(self, message: bytes) -> RoundPlan:
        """Return the plan in a message, without acting on it."""
        return plan_of(message)

    @without_locals
    def handle(self, stage: str, message: bytes) -> bytes | memoryview:
        """Answer one message.

        Raises:
          ProtocolError: the message is out of turn or improper; the site is lost to this round.
        """
        if stage == PLAN:
            return self._consider(message)
        if stage == EVALUATE:
            return self._evaluate(message)
        if self._round is None:
            raise ProtocolError
        if stage == BEGIN:
            return self._begin(self._round)
        if stage == FINISH:
            return self._finish(self._round, message)
        if self._round.client_round is None:
            raise ProtocolError
        if stage == UPLOAD:
            return self._upload(self._round, self._round.client_round, message)
        return self._round.client_round.respond(stage, message)

    def _consider(self, message: bytes) -> bytes:
        """Take part or not: plan, model, mechanism and budget are looked at; nothing is charged yet."""
        self._round = None
        try:
            broadcast = self._broadcasts.read(message)
        except BroadcastRefused as crafted:
            reasons = "; ".join(crafted.reasons[:_MOST_REASONS])
            more = len(crafted.reasons) - _MOST_REASONS
            _LOG.warning(
                "%s takes no part in a round: its broadcast looks crafted: %s%s",
                self.data.name,
                reasons,
                f"; and {more} more reasons" if more > 0 else "",
            )
            return record_codec.canonical_bytes(Acceptance(accepted=False))
        plan = broadcast.plan
        refused = differences(plan, self.spec, site=self.data.index, fingerprint=broadcast.fingerprint)
        if self._run_id not in (None, plan.run_id):
            refused = (*refused, "it belongs to another run than the one this site takes part in")
        if refused:
            _LOG.warning("%s takes no part in round %d: %s", self.data.name, plan.round, "; ".join(refused))
            return record_codec.canonical_bytes(Acceptance(accepted=False))
        if not self.ledger.affords(plan):
            _LOG.warning("%s takes no part in round %d: its budget does not pay", self.data.name, plan.round)
            return record_codec.canonical_bytes(Acceptance(accepted=False, affordable=False))
        self._run_id = plan.run_id
        self._round = _Round(plan=plan, start=broadcast.vector)
        if self._record is not None:
            self._record.broadcast(plan, broadcast.vector)
        return record_codec.canonical_bytes(Acceptance(accepted=True))

    def _begin(self, current: _Round) -> bytes:
        """Join the protocol, which sends nothing yet, then pay; from here on the round counts as spent."""
        if current.begun:
            raise ProtocolError
        current.begun = True
        try:
            side = self._answers.get(current.plan.query, self._protection)
            client_round = side.join(self.spec.own_part(current.plan, self.data.index))
        except ParameterError:
            raise ProtocolError from None
        try:
            current.reservations = self.ledger.reserve(current.plan)
        except BudgetExceeded:
            self._round = None
            return record_codec.canonical_bytes(Acceptance(accepted=False, affordable=False))
        current.client_round = client_round
        return record_codec.canonical_bytes(Acceptance(accepted=True, receipt=self.ledger.receipt()))

    def _upload(self, current: _Round, client_round: ClientRound, message: bytes) -> bytes | memoryview:
        """Learn from the own rows, once, and seal what comes of it."""
        if current.uploaded:
            raise ProtocolError
        current.uploaded = True
        with self._borrow_trainer() as trainer:
            source = self.source(current.plan)
            vector = trainer.run_round(self.data, current.plan, current.start, source, self._noise)
            rows = trainer.rows_used
            charged_anew = self.spec.config.privacy.unit != "none"
            update = update_name(current.plan, trainer.learned, fresh_noise=charged_anew)
        if not self.spec.message(current.plan.query).codec.holds(vector):
            _LOG.warning(
                "%s sends nothing in round %d: what it made does not have the form of an update",
                self.data.name,
                current.plan.round,
            )
            raise ProtocolError
        if self._truth is not None and current.plan.query == LEARN:
            self._keep(self._truth, current, vector, rows)
        if self._record is not None:
            self._record.sent(current.plan, current.start, vector, self.data, rows)
        return client_round.seal(message, vector, update=update)

    def _keep(self, truth: TruthKeeper, current: _Round, vector: RingVector, rows: Collection[int]) -> None:
        """Keep at home what a recorded round was learned from; a site that plays a colluder keeps what it
        sent, too.
        """
        plan = current.plan
        truth.keep(self.data.name, plan.round, self.data.examples, rows)
        colluding = self.spec.config.protection.colluding
        if colluding and self.data.index in plan.cohort[-colluding:]:
            opened = self.spec.codec.open(vector, round=plan.round, survivors=(self.data.index,))
            restored = self.spec.restored(opened, plan, current.start)
            truth.keep_update(self.data.name, plan.round, restored.values)

    def _finish(self, current: _Round, message: bytes) -> bytes:
        """Note in the ledger what was released, and say where it stands."""
        self._round = None
        if message == OPENED and current.uploaded:
            self.ledger.spend(current.reservations)
        return record_codec.canonical_bytes(self.ledger.receipt())

    def _evaluate(self, message: bytes) -> bytes:
        """Evaluate this site's own model, with what it keeps at home, on public rows."""
        broadcast = self._broadcasts.read(message)
        plan = broadcast.plan
        if self._run_id not in (None, plan.run_id) or plan.fingerprint != broadcast.fingerprint:
            raise ProtocolError
        assert self._evaluation is not None, "a site is asked to evaluate where it was given public rows"
        with self._borrow_trainer() as trainer:
            own = trainer.states.load(
                self.data.index, broadcast.vector, run_id=plan.run_id, before=plan.round
            )
            trainer.trainable.load_vector(own)
            evaluation = trainer.task.evaluate(
                trainer.trainable.model, self._evaluation, device=self.spec.device
            )
        return record_codec.canonical_bytes(evaluation)

    def source(self, plan: RoundPlan) -> RandomSource:
        """Return the randomness of one round:
        the system's, or a replayable stream where nothing is claimed.
        """
        config = self.spec.config
        if config.privacy.unit == "none" or config.privacy.noise == "seeded":
            return RandomSource.seeded(config.seed).derive("client", plan.round, self.data.index)
        return RandomSource.system()
