"""How long a stage may take: what the deadlines in a coordinator's messages are made of."""

from __future__ import annotations

from dataclasses import dataclass

from ffm_secure.config.schema import option
from ffm_secure.protection.base import UPLOAD
from ffm_secure.transport.stages import EVALUATE, JOIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """Hold seconds; whoever has not answered when a stage closes is lost to the round."""

    join: float = option(30.0, above=0.0, maximum=86_400.0, help="to accept a run, once a site has loaded it")
    rejoin: float = option(3.0, above=0.0, maximum=86_400.0, help="for sites that did not accept before")
    train: float = option(600.0, above=0.0, maximum=604_800.0, help="to learn from the own rows and upload")
    other: float = option(60.0, above=0.0, maximum=86_400.0, help="for every other stage")
    gather: float = option(600.0, minimum=0.0, maximum=604_800.0, help="the first round waits for everybody")
    patience: float = option(3600.0, minimum=0.0, maximum=2_592_000.0, help="a round waits for enough sites")

    def seconds(self, stage: str) -> float:
        """Return how long a stage is open."""
        if stage == JOIN:
            return self.join
        return self.train if stage in (UPLOAD, EVALUATE) else self.other
