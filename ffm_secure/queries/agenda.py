"""What a run asks its owners, in which order: a pure function of the run file and of the records so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import LEARN, RoundRecord
from ffm_secure.registry import LIFECYCLES

# of a run's epsilon, what a start or a finish may cost that names none of its own
QUARTER, EIGHTH = 0.25, 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One kind of question, how often it is put, and what it may cost."""

    query: str  # "learn", or a query of the registry
    asks: int  # cohorts that are asked, one a round
    epsilon: float = 0.0  # most that all asks of one owner cost, spare ones included; 0 for learning
    held_back: bool = False  # asked of the rows that are never learned from
    answers: int = 1  # most answers of one owner, without spare ones


def agenda(config: RunConfig) -> tuple[Item, ...]:
    """Return what is asked, in order."""
    lifecycle, privacy = config.federation.lifecycle, config.privacy
    last: tuple[Item, ...] = ()
    if config.evaluation.rows == "held_back":
        epsilon = config.evaluation.epsilon
        last = (Item(query="evaluation", asks=cohorts(config), epsilon=epsilon, held_back=True),)
    if LIFECYCLES.has(lifecycle.kind, "one_shot"):
        again = LIFECYCLES.has(lifecycle.kind, "asks_again")
        only = Item(
            query=lifecycle.kind,
            asks=config.federation.rounds,
            epsilon=privacy.epsilon,
            answers=compatibility.participation_cap(config) if again else 1,
        )
        return (only, *last)
    items = []
    if lifecycle.start != "none":
        epsilon = lifecycle.start_epsilon or QUARTER * privacy.epsilon
        items.append(Item(query=lifecycle.start, asks=cohorts(config), epsilon=epsilon))
    items.append(Item(query=LEARN, asks=config.federation.rounds))
    if lifecycle.finish != "none":
        epsilon = lifecycle.finish_epsilon or EIGHTH * privacy.epsilon
        items.append(Item(query=lifecycle.finish, asks=cohorts(config), epsilon=epsilon))
    return (*items, *last)


def cohorts(config: RunConfig) -> int:
    """Return how many whole cohorts the owners make: so often a question is put that each may answer once."""
    return max(1, config.task.clients // config.federation.cohort)


def queries(config: RunConfig) -> tuple[Item, ...]:
    """Return what is asked beside learning."""
    return tuple(item for item in agenda(config) if item.query != LEARN)


def rounds(config: RunConfig) -> int:
    """Return how many rounds a run has where none is lost."""
    return sum(item.asks for item in agenda(config))


def before_learning(config: RunConfig) -> int:
    """Return how many rounds of questions come before the first round of learning."""
    asks = 0
    for item in agenda(config):
        if item.query == LEARN:
            break
        asks += item.asks
    return asks


def spread_rounds(config: RunConfig, wanted: int) -> frozenset[int]:
    """Return so many rounds of learning: the first, the last, and others evenly between."""
    learning = config.federation.rounds
    first, count = 1 + before_learning(config), min(wanted, learning)
    if count < 2:
        return frozenset(range(first, first + count))
    return frozenset(first + round(step * (learning - 1) / (count - 1)) for step in range(count))


def last_round(config: RunConfig) -> int:
    """Return the highest number a round may have: spares pay for lost questions put again."""
    return rounds(config) + config.privacy.spare_rounds * len(queries(config))


def stage_of(config: RunConfig, turn: int) -> int:
    """Return the stage of a stream that a cohort's turn falls into; 0 where all rows are there at once.

    Every stage has as many turns, of learning or of a head's question.
    """
    stages = compatibility.stages(config)
    return min(stages - 1, turn * stages // max(1, config.federation.rounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the next round is about, and the place of its cohort in the question's own schedule."""

    item: Item
    turn: int


class Done(Protocol):
    """What counts of a round that is over; a `RoundRecord` has it."""

    @property
    def query(self) -> str:
        """Return what was asked."""

    @property
    def phase(self) -> str:
        """Return whose rows were read."""

    @property
    def aborted(self) -> str:
        """Return why the sum stayed closed; empty where it was opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A round that has no record yet."""

    query: str
    phase: str
    aborted: str = ""


def next_turn(config: RunConfig, records: Sequence[Done]) -> Turn | None:
    """Return what the next round is about; None where the run is over.

    Guarantee: a query is put to every cohort once, and again only where its sum stayed closed, at most
    `privacy.spare_rounds` times in all; a round of learning that was lost counts as one, as ever.
    """
    for item in agenda(config):
        asked = [record for record in records if record.query == item.query]
        if item.query == LEARN:
            if len(asked) < item.asks:
                return Turn(item=item, turn=sum(record.phase == "private" for record in asked))
            continue
        answered = sum(not record.aborted for record in asked)
        if answered < item.asks and len(asked) < item.asks + config.privacy.spare_rounds:
            return Turn(item=item, turn=answered)
    return None


def learned(records: Sequence[RoundRecord]) -> tuple[RoundRecord, ...]:
    """Return the rounds of learning."""
    return tuple(record for record in records if record.query == LEARN)
