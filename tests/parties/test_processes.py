"""Four sites in four processes of their own: the local engine's numbers, with kills between the stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.dp import Ledger
from ffm_secure.config.run_file import RunConfig
from ffm_secure.federation import NullCallback
from ffm_secure.records import RoundRecord
from tests.federation.helpers import train
from tests.parties.helpers import NAMES, PLAIN, SEEDED, Federation, found, notes_run, run
from tests.parties.kills import Killing, Kills, runs_with_losses
from tests.parties.machines import Machines
from tests.parties.test_parity import protection


@contextmanager
def four_machines(federation: Federation) -> Iterator[Machines]:
    machines = Machines({number: federation.site(name) for number, name in enumerate(NAMES)})
    try:
        machines.start()
        yield machines
    finally:
        machines.close()


def three_rounds(kind: str, privacy: dict[str, Any]) -> RunConfig:
    return notes_run(privacy=privacy, protection=protection(kind), federation={"rounds": 3})


def rounds_charged(federation: Federation, name: str) -> list[int]:
    with Ledger.open(federation.site(name) / "ledger.sqlite", create=False) as ledger:
        ledger.verify()
        return [entry.round for entry in ledger.entries() if entry.kind == "reserve"]


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [("secagg", SEEDED), pytest.param("none", PLAIN, marks=pytest.mark.slow)],
    ids=["masks and seeded noise", "in the clear without a unit"],
)
def test_four_processes_equal_the_local_engine(kind: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    config = three_rounds(kind, privacy)
    local = train(config, tmp_path / "local")[1]
    federation = found(tmp_path, config)
    with four_machines(federation) as machines:
        there = run(federation, machines)
    assert torch.equal(there.state.vector, local.state.vector)
    assert [(item.survivors, item.loss) for item in there.records] == [
        (item.survivors, item.loss) for item in local.records
    ]


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [PLAIN, SEEDED], ids=["no unit", "seeded noise"])
@pytest.mark.parametrize("kind", ["none", "secagg", "bfv", "ckks"])
def test_every_protection_in_four_processes(kind: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    test_four_processes_equal_the_local_engine(kind, privacy, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [PLAIN, SEEDED], ids=["no unit", "seeded noise"])
@pytest.mark.parametrize("kind", ["none", "secagg", "bfv", "ckks"])
def test_kills_where_the_local_engine_loses_sites(kind: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    if kind in ("bfv", "ckks"):
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    settings = {**protection(kind), **({"colluding": 0} if kind == "secagg" else {})}
    losing, config = runs_with_losses(settings, privacy)
    local = train(losing, tmp_path / "local")[1]
    federation = found(tmp_path, config, policy={"colluders": 0})
    with four_machines(federation) as machines:
        kills = Kills(
            losing=losing,
            kill=lambda site: machines.machines[site].kill(),
            start=lambda site: machines.machines[site].start(),
        )
        there = run(federation, Killing(machines, kills), callback=kills)
    assert kills.killed >= 3
    assert torch.equal(there.state.vector, local.state.vector)
    assert [item.survivors for item in there.records] == [item.survivors for item in local.records]


def test_a_killed_site_is_lost_to_its_round_and_takes_part_in_the_next(tmp_path: Path) -> None:
    """West dies between sharing its keys and uploading in round 1, and is started again."""
    # Four sites that share among each other can lose one where no other works with the coordinator.
    masks = {"kind": "secagg", "threshold": 3, "colluding": 0}
    config = notes_run(privacy=SEEDED, protection=masks, federation={"rounds": 3})
    federation = found(tmp_path, config, policy={"colluders": 0})
    with four_machines(federation) as machines:
        west = machines.machines[3]
        killed: list[str] = []

        def kill_once(stage: str) -> None:
            if stage == "upload" and not killed:
                killed.append(stage)
                west.kill()

        class Restart(NullCallback):
            def round_finished(self, record: RoundRecord) -> None:
                if record.round == 1:
                    west.start()

        machines.before = kill_once
        there = run(federation, machines, callback=Restart())
    assert killed
    assert [item.survivors for item in there.records] == [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert there.records[0].dropped == {3: "upload"}
    assert [item.aborted for item in there.records] == ["", "", ""]
    assert rounds_charged(federation, "west") == [1, 2, 3], "what was reserved stays reserved"
