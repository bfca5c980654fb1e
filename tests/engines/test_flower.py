"""Four sites over Flower, with mutual TLS on loopback: the contract of all couriers, and its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from ffm_secure.engines.flower import superlink
from ffm_secure.engines.flower.courier import FlowerCourier
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Lost
from tests.engines.machine_federation import RUN, MachineFederation
from tests.engines.courier_contract import (
    ALL,
    CourierContract,
    CourierLossContract,
    by_site,
    content,
)
from tests.engines.flower_federation import FlowerMachines, enrol
from tests.engines.nvflare_federation import NAMES
from tests.engines.test_nvflare import open_files, processes_naming, wait_for

ROOT = Path(__file__).resolve().parents[2]


class FlowerFederation(MachineFederation[FlowerCourier]):
    notice = 40.0
    machines: FlowerMachines


@pytest.fixture(scope="module")
def federation(flower_machines: FlowerMachines) -> Iterator[FlowerFederation]:
    federation = FlowerFederation(flower_machines)
    try:
        federation.open()
        yield federation
    finally:
        federation.close()


class TestFlower(CourierContract):
    pass


@pytest.mark.slow
class TestFlowerLosses(CourierLossContract):
    pass


def replies_of(federation: FlowerFederation, stage: str = "echo") -> set[int]:
    """Return who answers."""
    replies = by_site(federation.courier, stage, dict.fromkeys(ALL, b"x"))
    return {site for site, reply in replies.items() if not isinstance(reply.content, Lost)}


def test_a_service_that_starts_again_is_reached_in_the_same_run(federation: FlowerFederation) -> None:
    runs = federation.courier.runs_begun
    federation.doors[3].close()
    assert replies_of(federation) == {0, 1, 2}
    federation.doors[3] = federation.serve(3)
    wait_for(lambda: replies_of(federation) == set(ALL), 20.0)
    assert federation.courier.runs_begun == runs


def test_everything_in_the_folders_is_its_owners_alone(federation: FlowerFederation) -> None:
    open_to_others = [path for path in federation.machines.folder.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert len(list(federation.machines.folder.rglob("*"))) > 50


def test_no_process_of_the_coordinator_has_a_file_of_a_site_open(federation: FlowerFederation) -> None:
    folder = federation.machines.folder
    of_coordinator = processes_naming(folder / "coordinator")
    assert len(of_coordinator) >= 2  # the server and the gate
    files = [name for number in of_coordinator for name in open_files(number) if str(folder) in name]
    assert files
    assert all(name.startswith(str(folder / "coordinator")) for name in files)


def test_nothing_of_a_message_stays_on_a_disk(federation: FlowerFederation) -> None:
    mark = b"a row that nobody else may see"
    assert content(by_site(federation.courier, "echo", {0: mark * 1000})[0]) == mark * 1000
    files = [path for path in federation.machines.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if mark in path.read_bytes()]
    assert max(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.slow
def test_a_fall_of_the_server_costs_answers_and_not_the_run(federation: FlowerFederation) -> None:
    server = federation.machines.server
    assert server is not None
    fallen = server.number
    os.kill(fallen, signal.SIGKILL)
    wait_for(lambda: server.number != fallen, 20.0)
    wait_for(lambda: replies_of(federation) == set(ALL), 120.0)


@pytest.mark.slow
def test_a_fall_of_the_gate_costs_answers_and_not_the_run(federation: FlowerFederation) -> None:
    gate = federation.machines.gate
    assert gate is not None
    fallen = gate.number
    os.kill(fallen, signal.SIGKILL)
    wait_for(lambda: gate.number != fallen, 20.0)
    wait_for(lambda: replies_of(federation) == set(ALL), 60.0)


@pytest.mark.slow
def test_a_run_that_nobody_allowed_is_joined_by_nobody(federation: FlowerFederation) -> None:
    handled = [sum(site.handled.values()) for site in federation.sites.values()]
    federation.courier.close()
    other = federation.machines.courier("cd" * 32)
    try:
        with pytest.raises(FfmError, match=r"missing: north \(has not allowed this run\), south"):
            other.open(smallest=1, seconds=15.0)
        assert other.sites() == frozenset()
    finally:
        other.close()
        federation.restart()
    assert [sum(site.handled.values()) for site in federation.sites.values()] == handled


@pytest.mark.slow
def test_a_run_that_brings_code_is_joined_by_nobody(
    federation: FlowerFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is allowed; its bundle is another than the empty one."""
    from ffm_secure.engines.flower import bundle

    federation.courier.close()
    words = bundle._WORDS.replace("1.0.0", "1.0.1")
    monkeypatch.setattr(bundle, "_WORDS", words)
    monkeypatch.setattr(superlink, "bundle", bundle.bundle)
    other = federation.machines.courier(RUN)
    try:
        with pytest.raises(FfmError, match="has not allowed this run"):
            other.open(smallest=1, seconds=15.0)
    finally:
        other.close()
        monkeypatch.undo()
        federation.restart()
    assert replies_of(federation) == set(ALL)


@pytest.mark.slow
def test_nothing_outlives_those_who_started_it(tmp_path: Path) -> None:
    """The process that started everybody is killed: no server, gate or relay of it is left after a while."""
    machines = enrol(tmp_path, NAMES)
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.engines.flower_federation import FlowerMachines\n"
        "from tests.engines.nvflare_federation import NAMES\n"
        "FlowerMachines(folder=Path(sys.argv[1]), sites=NAMES).start()\n"
        "print('open', flush=True)\ntime.sleep(600)\n"
    )
    words = [sys.executable, "-c", program, str(machines.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "open\n"
        assert len(processes_naming(tmp_path)) >= 1 + 1 + 1 + 4
        starter.kill()
    wait_for(lambda: processes_naming(tmp_path) == [], 20.0)
