"""What everybody agrees on before the first round: the server and every site hold the same;
no data is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from defenses.errors import ProtocolError
from ffm_secure.compression import Compression, PublicState
from ffm_secure.config import compatibility
from ffm_secure.config.groups import fewest_groups, groups_of
from ffm_secure.config.run_file import RunConfig
from ffm_secure.lifecycle.base import Algorithm, AnswerSheet
from ffm_secure.models.backbone import vector_fingerprint
from ffm_secure.privacy.mechanism import Mechanism
from defenses.dp import Event
from ffm_secure.privacy.query_noise import QueryNoise, answers_paid
from ffm_secure.protection.codec import VectorCodec
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Query
from ffm_secure.records import LEARN, Observer, Point, RecordedObservation, RoundPlan, RoundSum
from ffm_secure.strategies import ServerState, Strategy

Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a query of a run is under: its own noise, code and schedule.

    Guarantee: its event, like that of learning, comes from the one object that bounds and noises the answer.
    """

    item: agenda.Item
    query: Query
    mechanism: QueryNoise
    codec: VectorCodec
    schedule: tuple[tuple[int, ...], ...]  # the cohort of every time it is put

    @property
    def layout_digest(self) -> str:
        """Return the hash of what is sent."""
        layout = repr((self.query.name, self.query.size)).encode() + self.query.about.encode()
        return hashlib.sha256(layout + self.codec.digest()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a plan has to name of one kind of message, and what its sum is opened by."""

    mechanism: str
    layout: str
    codec: VectorCodec
    schedule: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Bind the run file to what follows from it.

    Guarantee: a function of the run file, the backbone and public sizes: each party computes it for itself
    and compares digests; nothing in it is a row, a ledger or a key.
    """

    config: RunConfig
    owners: tuple[str, ...]  # name of every site, by index
    public_client_size: int  # declared or public number of examples of one client
    layout: Layout  # name and shape of every trained tensor, in the order of the vector
    algorithm: Algorithm
    strategy: Strategy
    mechanism: Mechanism
    codec: VectorCodec
    schedule: tuple[tuple[int, ...], ...]  # the cohort of every private round
    device: str
    compression: Compression
    first: Tensor = field(compare=False, repr=False)  # float32 [d], where compression reads it; else empty
    questions: Mapping[str, Question] = field(default_factory=dict)  # by name; learning is none of them
    sheet: AnswerSheet | None = None  # where owners send answers on public rows, no change of a model

    def message(self, query: str) -> Message:
        """Return what a kind of message is under: learning, or a question of this run.

        Raises:
          KeyError: nobody agreed on such a question.
        """
        if query == LEARN and self.learns:
            return Message(
                mechanism=self.mechanism_digest,
                layout=self.layout_digest,
                codec=self.codec,
                schedule=self.schedule,
            )
        question = self.questions[query]
        return Message(
            mechanism=question.mechanism.digest(),
            layout=question.layout_digest,
            codec=question.codec,
            schedule=question.schedule,
        )

    def answer_events(self) -> dict[str, Event]:
        """Return what one answer to each question is charged as."""
        return {name: asked.mechanism.event(release=name) for name, asked in self.questions.items()}

    def answers_planned(self, *, held_back: bool) -> tuple[Event, ...]:
        """Return what one owner pays at most for answers, of rows learned from or of those held back."""
        return tuple(
            question.mechanism.event(release=name)
            for name, question in self.questions.items()
            if question.item.held_back == held_back
            for _ in range(answers_paid(self.config, question.item.answers))
        )

    def asked(self, query: str, state: ServerState) -> tuple[int, ...]:
        """Return which of a question's choices the round after a state is about; nothing where it is all."""
        question = self.questions.get(query)
        if question is None or question.query.asks is None:
            return ()
        return question.query.asks(state)

    @property
    def learns(self) -> bool:
        """Tell whether the run takes steps at all."""
        return any(item.query == LEARN for item in agenda.agenda(self.config))

    def learns_in(self, site: int) -> Callable[[int], bool]:
        """Return what tells whether a site's rows are read in a round of learning."""
        by_turns = self.mechanism.client_level

        def tell(round: int) -> bool:
            return by_turns is None or by_turns.learns(site, round)

        return tell

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return every kind of message of this run."""
        return ((LEARN,) if self.learns else ()) + tuple(self.questions)

    @property
    def has_dp_guarantee(self) -> bool:
        """Tell whether the run guarantees anything: a privacy unit, and noise that nobody can replay."""
        return self.config.privacy.unit != "none" and self.config.privacy.noise == "system"

    @property
    def minimum_survivors(self) -> int:
        """Return the fewest clients whose sum may be opened."""
        return compatibility.minimum_survivors(self.config)

    def groups_of(self, plan: RoundPlan) -> tuple[tuple[int, ...], ...]:
        """Return the groups whose sums a round opens; the whole cohort where there is one sum."""
        return groups_of(self.config, plan.cohort, query=plan.query, turn=plan.turn)

    def own_part(self, plan: RoundPlan, site: int) -> RoundPlan:
        """Return a plan as it is about the one group a site of its cohort is in."""
        for group in self.groups_of(plan):
            if site in group:
                return replace(plan, cohort=group)
        raise ProtocolError

    def observed(
        self, plan: RoundPlan, observer: Observer, point: Point, sites: tuple[int, ...], *, own: int = -1
    ) -> RecordedObservation:
        """Describe what an observer saw of a round; `own` is the site whose own update it is, or -1."""
        return RecordedObservation(
            round=plan.round,
            observer=observer,
            point=point,
            sites=sites,
            step=plan.step,
            named=not self.strategy.merges_into_base and self.sheet is None,
            own=own,
        )

    def fewest_groups(self, query: str) -> int:
        """Return how many sums a round must open to be one."""
        if query == LEARN:
            return fewest_groups(self.config)
        return max(1, -(-2 * self.config.protection.groups // 3))

    @property
    def layout_digest(self) -> str:
        """Return the hash of names, shapes and codec of what is sent, and of how it is compressed."""
        content = repr(self.layout).encode() + self.codec.digest()
        if self.sheet is not None:
            content += repr(self.sheet).encode()
        if self.config.compression.kind != "none":
            content += self.compression.digest().encode() + vector_fingerprint(self.first).encode()
        return hashlib.sha256(content).hexdigest()

    def public_state(self, plan: RoundPlan, broadcast: Tensor) -> PublicState:
        """Return what the compression of a round depends on; `broadcast` is float32 [d]."""
        moved = self.first
        if self.compression.follows:
            moved = broadcast.detach().cpu() - self.first
        return PublicState(round=plan.round, moved=moved)

    def restored(self, opened: RoundSum, plan: RoundPlan, broadcast: Tensor) -> RoundSum:
        """Return an opened sum of updates as what it stands for: a sum of changes, before compression."""
        if self.config.compression.kind == "none":
            return opened
        values = self.compression.restore(torch.from_numpy(opened.values), self.public_state(plan, broadcast))
        return replace(opened, values=values.numpy())

    @property
    def mechanism_digest(self) -> str:
        """Return the hash of everything that decides epsilon."""
        return self.mechanism.digest()
