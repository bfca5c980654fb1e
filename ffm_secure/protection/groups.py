"""One round with a sum of its own for every group of a cohort; a group that fails closes its sum alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from defenses.errors import ProtocolError
from ffm_secure.protection.base import AggregationResult, ServerRound
from ffm_secure.records import RoundPlan


class OpensGroups:
    """Open a round over groups as one round of the protection for each."""

    def open_round(self, plan: RoundPlan) -> ServerRound:
        """Begin a round among the cohort of a plan."""
        raise NotImplementedError

    def open_groups(self, plan: RoundPlan, groups: Sequence[tuple[int, ...]]) -> ServerRound:
        """Begin a round with a sum of its own for every group of the cohort."""
        rounds = []
        for group in groups:
            rounds.append(self.open_round(replace(plan, cohort=group)))
        return GroupedServerRound(groups, rounds)


class GroupedServerRound:
    """Carry the rounds of all groups side by side, stage by stage.

    Guarantee: each group runs the protocol of a cohort of its own, with its own threshold; nothing of one
    group's session enters another's.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]], rounds: Sequence[ServerRound]) -> None:
        self._rounds = tuple(rounds)
        self._failed: set[int] = set()
        self._of: dict[int, int] = {}
        for number, group in enumerate(groups):
            for site in group:
                self._of[site] = number
        self.stages: Sequence[str] = self._rounds[0].stages

    def messages(self, stage: str) -> Mapping[int, bytes]:
        """Return what goes out at a stage, in all groups that are left.

        Raises:
          ProtocolError: no group is left.
        """
        going_out: dict[int, bytes] = {}
        for number, group in enumerate(self._rounds):
            if number in self._failed:
                continue
            try:
                going_out.update(group.messages(stage))
            except ProtocolError:
                self._failed.add(number)
        if len(self._failed) == len(self._rounds):
            raise ProtocolError
        return going_out

    def receive(self, stage: str, site: int, reply: bytes | memoryview) -> None:
        """Give one site's answer to the round of its group."""
        self._rounds[self._of[site]].receive(stage, site, reply)

    def open_sum(self, lost: Mapping[int, str]) -> AggregationResult:
        """Open the sum of every group that is left."""
        groups, dropped = [], dict(lost)
        for group in self._rounds:
            groups.append(group.open_sum(lost))
            dropped.update(groups[-1].dropped)
        reasons = sorted({group.aborted for group in groups if group.aborted})
        return AggregationResult(
            ring_sum=None,
            survivors=tuple(sorted(site for group in groups for site in group.survivors)),
            dropped=dropped,
            aborted="; ".join(reasons),
            bytes_up=sum(group.bytes_up for group in groups),
            bytes_down=sum(group.bytes_down for group in groups),
            groups=tuple(groups),
        )
