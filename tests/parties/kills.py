"""Kills among machines where the local engine, given the same run with simulated losses, loses its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from ffm_secure.config.run_file import Dropout, RunConfig
from ffm_secure.engines.local import _is_over, lost_clients
from ffm_secure.federation import NullCallback
from ffm_secure.records import RoundPlan, RoundRecord
from ffm_secure.transport.courier import Courier, Reply
from ffm_secure.transport.stages import BEGIN, EVALUATE, JOIN, PLAN
from tests.parties.helpers import notes_run

ROUNDS = 4
OF_MASKS = ("train", "share", "upload", "confirm", "unmask")
OF_ALL = ("train", "upload")
_OUTSIDE = {JOIN, PLAN, BEGIN, EVALUATE}


def runs_with_losses(
    protection: Mapping[str, Any], privacy: Mapping[str, Any]
) -> tuple[RunConfig, RunConfig]:
    """Return a run with at least three simulated losses, never two in a round, and the same without any."""
    plain = notes_run(privacy=privacy, protection=protection, federation={"rounds": ROUNDS})
    stages = OF_MASKS if plain.protection.kind == "secagg" else OF_ALL
    for seed in count(1):
        losing = _with(plain, Dropout(rate=0.3, stages=stages), seed)
        losses = [lost_clients(losing, number, range(4)) for number in range(1, 1 + ROUNDS)]
        places = [stage for lost in losses for stage in lost.values()]
        if max(map(len, losses)) == 1 and len(places) >= 3 and len(set(places)) >= min(3, len(stages)):
            return losing, _with(plain, Dropout(), seed)
    raise AssertionError


def _with(config: RunConfig, dropout: Dropout, seed: int) -> RunConfig:
    return replace(config, seed=seed, federation=replace(config.federation, dropout=dropout))


@dataclass
class Kills(NullCallback):
    """Kill a site when the stage at which it is lost is about to go out; start it again after the round."""

    losing: RunConfig
    kill: Callable[[int], None]
    start: Callable[[int], None]
    round: int = 0
    down: list[int] = field(default_factory=list)
    killed: int = 0

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """Note which round it is."""
        self.round = plan.round

    def before(self, stage: str) -> None:
        """Kill whoever is lost from this stage on."""
        if stage in _OUTSIDE:
            return
        for site, lost in lost_clients(self.losing, self.round, range(4)).items():
            if site not in self.down and _is_over(lost, stage):
                self.kill(site)
                self.down.append(site)
                self.killed += 1

    def round_finished(self, record: RoundRecord) -> None:
        """Start them again."""
        while self.down:
            self.start(self.down.pop())


class Killing:
    """Carry as another courier does, and kill before a stage goes out."""

    def __init__(self, courier: Courier, kills: Kills) -> None:
        self._courier, self._kills = courier, kills

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        self._kills.before(stage)
        yield from self._courier.send(stage, messages)

    def seconds_at_sites(self) -> float:
        return 0.0

    def close(self) -> None:
        self._courier.close()
