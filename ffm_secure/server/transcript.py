"""What the observers outside a site see of a round, handed to the store as it is seen; off unless the run
file asks for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from defenses.errors import ProtocolError
from defenses.secagg import ring
from ffm_secure.config.run_file import RunConfig
from ffm_secure.queries import agenda
from ffm_secure.records import LEARN, Observer, Point, RoundPlan, RoundSum
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.storage.observations import ObservationStore

OF_THE_SERVER: tuple[Observer, ...] = ("server", "colluding_server")
"""Who sees what reaches the server; colluders' own updates are taken off when the observation is read."""


def recorded_rounds(config: RunConfig) -> frozenset[int]:
    """Return the rounds that are kept: the first, the last, and others evenly between."""
    wanted = config.audit.record_rounds if config.audit.observers else 0
    return agenda.spread_rounds(config, wanted)


@dataclass(slots=True, kw_only=True)
class Transcript:
    """Keep what the server, the other clients and the public see.

    Guarantee: nothing is kept that did not cross the wire: uploads where they are in the clear, sums where
    they are opened, models as they are broadcast.
    """

    spec: RunSpec
    store: ObservationStore
    rounds: frozenset[int]
    observers: Collection[str]
    _start: Tensor | None = field(default=None)

    def begin(self, plan: RoundPlan, vector: Tensor) -> None:
        """Note the broadcast of a round."""
        learns = plan.phase == "private" and plan.query == LEARN
        self._start = vector if plan.round in self.rounds and learns else None

    def upload(self, plan: RoundPlan, site: int, reply: bytes | memoryview) -> None:
        """Keep an upload that anybody can read: only without protection is it a client's own update."""
        if self._start is None or self.spec.config.protection.kind != "none":
            return
        codec = self.spec.codec
        try:
            vector = ring.unpack(reply, codec.modulus_bits)
            opened = codec.open(vector, round=plan.round, survivors=(site,))
        except ProtocolError:
            return  # what is refused is no update
        opened = self.spec.restored(opened, plan, self._start)
        for observer in OF_THE_SERVER:
            self._keep(plan, observer, opened, point=self._own_point(), own=site)

    def opened(self, plan: RoundPlan, opened: RoundSum, *, group: int = -1) -> None:
        """Keep an opened sum; in the clear it adds nothing to the uploads."""
        if self._start is not None and self.spec.config.protection.kind != "none":
            opened = self.spec.restored(opened, plan, self._start)
            for observer in OF_THE_SERVER:
                self._keep(plan, observer, opened, point="aggregated", group=group)

    def stepped(self, plan: RoundPlan, opened: RoundSum, after: Tensor) -> None:
        """Keep the change from one broadcast model to the next: what another client sees."""
        same = self._start is not None and self._start.shape == after.shape
        if self._start is None or not same or "client" not in self.observers:
            return
        description = self.spec.observed(plan, "client", "aggregated", opened.survivors)
        self.store.write(description, after - self._start, broadcast=self._start)

    def released(self, start: Tensor, final: Tensor, survivors: tuple[int, ...], last: RoundPlan) -> None:
        """Keep the change from the public start to the released model: what the public sees."""
        if "public" in self.observers and self.rounds:
            description = self.spec.observed(last, "public", "aggregated", survivors)
            self.store.write(description, final - start, broadcast=start)

    def _own_point(self) -> Point:
        if self.spec.mechanism.noise_multiplier:
            return "noised"
        return "raw"

    def _keep(
        self,
        plan: RoundPlan,
        observer: Observer,
        opened: RoundSum,
        *,
        point: Point,
        own: int = -1,
        group: int = -1,
    ) -> None:
        if observer not in self.observers:
            return
        description = self.spec.observed(plan, observer, point, opened.survivors, own=own)
        description = replace(description, group=group)
        self.store.write(description, torch.from_numpy(opened.values), broadcast=self._start)
