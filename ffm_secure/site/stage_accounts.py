"""What each stage of a stream charges to which rows: new ones pay for their stage, those that stay for later
ones too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from defenses.dp import Event, GaussianEvent, SampledSkellamEvent

Charged = Sequence[tuple[Event, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """One event, and the blocks of rows that pay for it."""

    event: Event
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What one kind of row has paid for in this run, and what it is to pay now."""

    before: Charged
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAccounts:
    """Hold one owner's blocks of rows by stage.

    Guarantee: a round charges every block it may draw from, at the rate it draws from it, and no other; rows
    of no reservoir pay for their own stage alone.
    """

    passing: tuple[tuple[int, ...], ...]  # of every stage: rows that no later stage reads
    staying: tuple[tuple[int, ...], ...]  # of every stage: rows of the reservoir
    turns: int  # rounds of one stage
    replay: Event | None = None  # what a round charges to rows of the reservoir in a later stage

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the blocks of all stages."""
        return _joined((*self.passing, *self.staying))

    def stage(self, turn: int) -> int:
        """Return the stage a turn falls into."""
        return min(turn // self.turns, len(self.passing) - 1)

    def payments(self, turn: int, event: Event) -> tuple[Payment, ...]:
        """Return who pays for a turn's round whose event for new rows is this."""
        stage = self.stage(turn)
        due = [Payment(event=_of_stage(event, stage), blocks=self.passing[stage] + self.staying[stage])]
        if self.replay is not None:
            reservoir = _joined(self.staying[:stage])
            due.append(Payment(event=_of_stage(self.replay, stage), blocks=reservoir))
        return tuple(payment for payment in due if payment.blocks)

    def due(self, turn: int, event: Event, charged: Charged) -> Iterator[Due]:
        """Yield what every kind of row that a turn's round may draw has paid for in this run.

        `charged` is what the owner has paid for in it, by the events that `payments` made.
        """
        stage, counts = self.stage(turn), dict(charged)
        yield Due(before=self._history(stage, event, counts), event=event)
        if self.replay is None:
            return
        for earlier in range(stage):
            if self.staying[earlier]:
                yield Due(before=self._history(earlier, event, counts), event=self.replay)

    def _history(self, arrived: int, event: Event, counts: dict[Event, int]) -> Charged:
        """Return what rows of a stage have paid for, equal events together, in whichever order stages were
        asked.
        """
        history = [(event, counts.get(_of_stage(event, arrived), 0))]
        if self.replay is not None:
            replays = 0
            for place in range(arrived + 1, len(self.passing)):
                replays += counts.get(_of_stage(self.replay, place), 0)
            history.append((self.replay, replays))
        return [(paid, count) for paid, count in history if count]


def _joined(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    blocks: list[int] = []
    for part in parts:
        blocks += part
    return tuple(blocks)


def _of_stage(event: Event, stage: int) -> Event:
    """Return an event that says of which stage it is; the price is the same."""
    if isinstance(event, GaussianEvent | SampledSkellamEvent):
        return replace(event, release=f"{event.release}, stage {stage + 1}")
    return event
