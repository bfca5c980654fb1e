"""What carries bytes between the server and the sites, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

Deadline = Callable[[bytes], float]
"""Read off a message when its answer comes too late, in seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """No answer came: the stage, or the reason, by which the record of the round names it."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one site answered."""

    site: int
    content: bytes | memoryview | Lost


class Courier(Protocol):
    """Carry one stage's messages to sites and their answers back, as they come.

    Guarantee: every site that was written to is answered for once, with its bytes or as lost; an engine
    computes no more than a few answers ahead of the reader, so memory does not grow with the cohort.
    """

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        """Send each site its message; yield each answer."""

    def seconds_at_sites(self) -> float:
        """Return the wall seconds sites have spent learning since this was last asked."""

    def close(self) -> None:
        """Let go of threads, processes and connections."""


class MachineCourier(Courier, Protocol):
    """A courier to sites that run by themselves, and may be away.

    Guarantee: a site that refuses, dies or is slow is lost to that stage alone, and an answer after the
    deadline is none; a site that comes back is reached by the next plan. The suite that every engine joins is
    `tests/engines/courier_contract.py`.
    """

    def sites(self) -> frozenset[int]:
        """Return the sites that can be written to now."""

    def send(
        self, stage: str, messages: Mapping[int, bytes], deadline: float | None = None
    ) -> Iterator[Reply]:
        """Send each site its message; yield each answer.

        `deadline` is in seconds since 1970; without one, the messages' own deadlines hold.
        """
