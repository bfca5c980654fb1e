"""What an algorithm is: what a site does in a round, what the server does by itself, and whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ffm_secure.aggregation.base import Aggregate
from ffm_secure.config.run_file import Lifecycle, RunConfig
from ffm_secure.lifecycle.finetune import GradientRule, ModelUpdate, finetune
from ffm_secure.records import RoundRecord
from ffm_secure.strategies.base import ServerState, Strategy
from ffm_secure.tasks.base import Task
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.trainable.base import TrainableModel

Phase = Literal["public", "private"]
History = Sequence[RoundRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRound:
    """What a site brings to its part of a round: the broadcast model, and a rule that yields private
    gradients.
    """

    trainable: TrainableModel
    start: Tensor  # float32 [d]
    spec: Lifecycle
    rule: GradientRule
    mask: Tensor | None = None  # [d]; 0 where this site's numbers stay at zero


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSheet:
    """What owners send where they send no change of a model: a probability a class for every public row."""

    rows: int
    classes: int
    digest: str  # of the public rows

    @property
    def size(self) -> int:
        """Return how many numbers are sent."""
        return self.rows * self.classes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPhase:
    """What the server brings to a phase of its own: public rows, never a private one."""

    config: RunConfig
    trainable: TrainableModel
    task: Task
    public: Encoded | None
    round: int
    device: str


class Algorithm:
    """Say what is done in a round. Fine-tuning is the plain case: sites learn, the server has no phase of its
    own.

    A kind of its own is one file with a subclass, and one line in `registry.LIFECYCLES`.
    Guarantee: what a site does reaches the private rows through `SiteRound.rule` alone, which is charged;
    what the server does reads public rows alone.
    """

    kind: ClassVar[str] = "finetune"
    reads_public_rows: ClassVar[bool] = False

    def next_phase(self, history: History, config: RunConfig) -> Phase:
        """Return whose turn the next round is."""
        return "private"

    def learn(self, site_round: SiteRound) -> ModelUpdate:
        """Do a site's part of a round."""
        return finetune(
            trainable=site_round.trainable,
            start=site_round.start,
            spec=site_round.spec,
            rule=site_round.rule,
            mask=site_round.mask,
        )

    def sheet(self, rows: int, classes: int | None, digest: str) -> AnswerSheet | None:
        """Return what is answered about so many public rows, where answers are sent instead of changes."""
        return None

    def broadcast(self, state: ServerState) -> Tensor:
        """Return the vector that goes down to the sites, float32: the global one."""
        return state.vector

    def step(
        self, phase: ServerPhase, strategy: Strategy, state: ServerState, aggregate: Aggregate
    ) -> ServerState:
        """Return the state after a round whose sums were opened: what the strategy makes of it."""
        return strategy.step(state, aggregate)

    def learn_in_public(self, phase: ServerPhase, state: ServerState) -> Tensor:
        """Do the server's own phase: return the vector [d] after it."""
        raise NotImplementedError(f"{self.kind} has no phase of the server's own")

    def remember(
        self, strategy: Strategy, before: ServerState, after: ServerState, phase: Phase
    ) -> ServerState:
        """Keep beside the server's state what the next decision or record needs."""
        return after

    def alignment(self, strategy: Strategy, state: ServerState) -> float | None:
        """Return the cosine between the newest public and the newest private change, where there are both."""
        return None

    def describe(self, config: RunConfig, public_rows: int) -> str:
        """Return a line for the plan; nothing where there is nothing to say."""
        return ""
