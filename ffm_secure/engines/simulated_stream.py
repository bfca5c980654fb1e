"""The stages of a stream in a simulation: what public rows say of them, and which blocks of an owner pay."""

from __future__ import annotations

from collections.abc import Sequence

from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data import stream
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.engines.simulated_data import SimulatedData
from ffm_secure.errors import DataError
from ffm_secure.privacy.mechanism import Mechanism, replay_of
from ffm_secure.server.public_stages import PublicStages
from ffm_secure.site.stage_accounts import StageAccounts


def public_stages(
    config: RunConfig, dataset: Dataset, evaluated: Examples, *, classes: int
) -> PublicStages | None:
    """Return what public rows say of the stages of a stream; None without one. `evaluated` are the rows that
    a run is evaluated on.

    Raises:
      DataError: a stage has no public row, so that its classes are not known.
    """
    table, public = config.task.stream, dataset.validation
    if not table.order:
        return None
    stages = stream.stages_of(public, table, dataset)
    present = stream.classes_by_stage(public.labels, stages, count=len(table.order), classes=classes)
    of_row = stream.stages_of(evaluated, table, dataset)
    for place, name in enumerate(table.order):
        if not (of_row == place).any():
            raise DataError(
                f"task.stream.order: none of the {len(evaluated)} public rows that are evaluated is of the "
                f"stage {name!r}, whose classes and accuracy are read there; give some, or raise "
                "task.evaluation_examples"
            )
    return PublicStages(names=table.order, of_row=of_row, classes=present)


def stage_accounts(
    data: SimulatedData, mechanism: Mechanism, owner: int, blocks: Sequence[tuple[int, ...]]
) -> StageAccounts | None:
    """Return one owner's blocks by stage, out of those of `SimulatedData.stage_names`; None without any."""
    if data.stages is None:
        return None
    config, count = data.config, compatibility.stages(data.config)
    own = blocks[2 * count * owner : 2 * count * (owner + 1)]
    replay, event = replay_of(mechanism), None
    if replay is not None:
        event = replay.event(release="replay of one round")
    return StageAccounts(
        passing=tuple(own[0::2]),
        staying=tuple(own[1::2]),
        turns=config.federation.rounds // count,
        replay=event,
    )
