"""What left a site in some rounds, kept in its own folder for an audit of itself; nothing of it is sent."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from defenses.secagg.masks import RingVector
from ffm_secure.agreed.loaded_model import LoadedModel, write_facts
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.queries import agenda
from ffm_secure.records import LEARN, Observer, Point, RecordedObservation, RoundPlan
from ffm_secure.site.site_file import SelfAudit
from ffm_secure.site.trainer import SiteData
from ffm_secure.site.truth import TruthKeeper
from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.storage.observations import ObservationStore
from ffm_secure.tasks.base import Task

RECORDS: Final = "records"
RUN_FILE: Final = "run.toml"
OBSERVATIONS: Final = "observations"
_LOG = logging.getLogger(__name__)  # a site's own log: nothing of it is sent


@dataclass(slots=True, kw_only=True)
class OwnRecord:
    """Keep the updates that left in recorded rounds, the changes of the model that followed, and the rows.

    An update in the clear is what the server sees. One that leaves masked or encrypted is what the server and
    all other sites together could take out of the sum: the colluding server at its worst.

    Guarantee: what cannot be written is left out, and no round is lost by it.
    """

    spec: RunSpec
    rounds: frozenset[int]
    store: ObservationStore
    truth: TruthKeeper
    _before: tuple[RoundPlan, Tensor] | None = None  # the recorded round whose outcome is not known yet

    def broadcast(self, plan: RoundPlan, vector: Tensor) -> None:
        """Note the model of a new round: its change since a recorded round is what every site sees."""
        before, self._before = self._before, None
        if before is not None and not torch.equal(before[1], vector):
            earlier, start = before
            description = self.spec.observed(earlier, "client", "aggregated", earlier.cohort)
            self._write(description, vector - start, start)
        if plan.round in self.rounds and plan.query == LEARN:
            self._before = (plan, vector)

    def sent(
        self, plan: RoundPlan, start: Tensor, vector: RingVector, data: SiteData, rows: Collection[int]
    ) -> None:
        """Keep an update, before masks or encryption, and the rows it was learned from."""
        if plan.round not in self.rounds or plan.query != LEARN:
            return
        opened = self.spec.codec.open(vector, round=plan.round, survivors=(data.index,))
        opened = self.spec.restored(opened, plan, start)
        in_the_clear = self.spec.config.protection.kind == "none"
        observer: Observer = "server" if in_the_clear else "colluding_server"
        point: Point = "noised" if self.spec.mechanism.noise_multiplier else "raw"
        description = self.spec.observed(plan, observer, point, (data.index,), own=data.index)
        self._write(description, torch.from_numpy(opened.values), start)
        try:
            self.truth.keep(data.name, plan.round, data.examples, rows)
        except OSError as error:
            _LOG.warning("the rows of round %d were not kept for an audit: %s", plan.round, error.strerror)

    def _write(self, description: RecordedObservation, values: Tensor, start: Tensor) -> None:
        try:
            self.store.write(description, values, broadcast=start)
        except OSError as error:
            reason = error.strerror
            _LOG.warning("round %d was not kept for an audit: %s", description.round, reason)


def record_folder(place: Path, digest: str) -> Path:
    """Return where a site keeps what left it in the run of a run file."""
    return place / RECORDS / digest


def open_record(
    config: RunConfig, loaded: LoadedModel, task: Task, chosen: SelfAudit, folder: Path
) -> OwnRecord | None:
    """Open the record of a run; None where the site's file asks for none."""
    rounds = agenda.spread_rounds(config, chosen.rounds)
    if not rounds or not loaded.spec.learns:
        return None
    create_folder(folder)
    write_atomic(folder / RUN_FILE, run_file.dump(config).encode())
    write_facts(folder, loaded.facts)
    observations = folder / OBSERVATIONS
    used = sum(path.stat().st_size for path in observations.rglob("*") if path.is_file())
    return OwnRecord(
        spec=loaded.spec,
        rounds=rounds,
        store=ObservationStore(folder=observations, limit=chosen.mebibytes << 20, used=used),
        truth=TruthKeeper(folder=folder / "home", rounds=rounds, task=task),
    )
