"""What a coordinator's people are told while a run waits: who is missing or refuses, and who can mend it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from ffm_secure.coordinator.sealed_courier import Watch
from ffm_secure.transport.stages import JOIN

_WORDS: Final = {
    "refused": "refuses; its people see why with: ffm-secure site log FOLDER",
    "silent": "does not answer: its service is not started, not connected, or slower than [deadlines] allow",
    "improper": "answered with another key than the one on the roster; ask the operator who that is",
}


@dataclass(slots=True, kw_only=True)
class SpokenWatch:
    """Hand everything on to another watch, and say once what is new about a site."""

    inner: Watch
    say: Callable[[str], None]
    _stage: str = ""
    _round: int = 0
    _last: dict[str, str] = field(default_factory=dict)

    def opened(self, stage: str, round: int, sites: Collection[str], deadline: float) -> None:
        """Note which stage is open."""
        self._stage, self._round = stage, round
        self.inner.opened(stage, round, sites, deadline)

    def answered(self, site: str, outcome: str) -> None:
        """Say what has become of a site, if it was not so before."""
        self.inner.answered(site, outcome)
        before = self._last.get(site, "answered")
        if outcome == before or (outcome == "answered" and self._stage != JOIN):
            return
        self._last[site] = outcome
        place = f"round {self._round}, {self._stage}"
        self.say(f"{place}: {site} {_WORDS.get(outcome, 'takes part again')}")
