"""Four sites over NVFlare, with mutual TLS on loopback: the contract of all couriers, and its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import desk, folders
from ffm_secure.engines.nvflare.courier import NVFlareCourier, Patience
from ffm_secure.errors import FfmError
from ffm_secure.transport.courier import Lost
from ffm_secure.transport.stages import PLAN
from ffm_secure.transport.local_socket import wait_until
from tests.engines.machine_federation import RUN, MachineFederation
from tests.engines.nvflare_federation import NAMES, Machines, enrol
from tests.engines.courier_contract import (
    ALL,
    CourierContract,
    CourierLossContract,
    by_site,
    content,
)

ROOT = Path(__file__).resolve().parents[2]


class NVFlareFederation(MachineFederation[NVFlareCourier]):
    notice = 20.0
    machines: Machines


@pytest.fixture(scope="module")
def federation(machines: Machines) -> Iterator[NVFlareFederation]:
    federation = NVFlareFederation(machines)
    try:
        federation.open()
        yield federation
    finally:
        federation.close()


class TestNVFlare(CourierContract):
    pass


@pytest.mark.slow
class TestNVFlareLosses(CourierLossContract):
    pass


def replies_of(federation: NVFlareFederation, stage: str = "echo") -> set[int]:
    """Return who answers."""
    replies = by_site(federation.courier, stage, dict.fromkeys(ALL, b"x"))
    return {site for site, reply in replies.items() if not isinstance(reply.content, Lost)}


def processes_naming(folder: Path) -> list[int]:
    """Return every process but this one whose command names a folder."""
    numbers = [int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()]
    return [number for number in numbers if str(folder) in command_of(number) and number != os.getpid()]


def command_of(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    assert wait_until(condition, seconds, 0.3), f"not within {seconds:g} s"


def test_a_service_that_starts_again_is_reached_by_the_same_job(federation: NVFlareFederation) -> None:
    jobs = federation.courier.jobs_begun
    federation.doors[3].close()
    assert replies_of(federation) == {0, 1, 2}
    federation.doors[3] = federation.serve(3)
    wait_for(lambda: replies_of(federation) == set(ALL), 10.0)
    assert federation.courier.jobs_begun == jobs


def test_everything_in_the_folders_is_its_owners_alone(federation: NVFlareFederation) -> None:
    open_to_others = [path for path in federation.machines.folder.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert len(list(federation.machines.folder.rglob("*"))) > 50


def open_files(number: int) -> list[str]:
    """Return what a process has open, by name."""
    names = []
    for place in Path(f"/proc/{number}/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(place))
    return names


def test_no_process_of_the_coordinator_has_a_file_of_a_site_open(federation: NVFlareFederation) -> None:
    folder = federation.machines.folder
    of_coordinator = processes_naming(folder / "coordinator")
    assert len(of_coordinator) >= 2  # the server and its job
    files = [name for number in of_coordinator for name in open_files(number) if str(folder) in name]
    assert files
    assert all(name.startswith(str(folder / "coordinator")) for name in files)


def test_nothing_of_a_message_stays_on_a_disk(federation: NVFlareFederation) -> None:
    mark = b"a row that nobody else may see"
    assert content(by_site(federation.courier, "echo", {0: mark * 1000})[0]) == mark * 1000
    files = [path for path in federation.machines.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if mark in path.read_bytes()]
    assert max(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.slow
def test_a_fall_of_the_server_costs_answers_and_not_the_run(federation: NVFlareFederation) -> None:
    server = federation.machines.server
    assert server is not None
    fallen = server.number
    os.kill(fallen, signal.SIGKILL)
    wait_for(lambda: server.number != fallen, 20.0)
    wait_for(lambda: replies_of(federation) == set(ALL), 120.0)


@pytest.mark.slow
def test_a_fall_of_the_jobs_process_costs_answers_and_not_the_run(federation: NVFlareFederation) -> None:
    jobs = [
        number
        for number in processes_naming(federation.machines.folder)
        if "runner_process" in command_of(number)
    ]
    assert jobs
    for number in jobs:
        os.kill(number, signal.SIGKILL)
    wait_for(lambda: not set(jobs) & set(processes_naming(federation.machines.folder)), 20.0)
    wait_for(lambda: replies_of(federation) == set(ALL), 90.0)


@pytest.mark.slow
def test_rounds_go_on_while_relays_fall(federation: NVFlareFederation) -> None:
    """In twelve plans every third loses a site's relay in its middle; nobody else's answer is ever lost."""
    for number in range(12):
        falls = number % 3 == 0
        victim = number // 3
        wait_for(lambda: replies_of(federation, PLAN) == set(ALL), 90.0)
        if falls:
            threading.Timer(0.3, federation.kill, (victim,)).start()
        replies = by_site(
            federation.courier, "slow", dict.fromkeys(ALL, b"00000001"), deadline=time.time() + 60.0
        )
        lost = {site for site, reply in replies.items() if isinstance(reply.content, Lost)}
        assert lost == ({victim} if falls else set())
        if falls:
            federation.revive(victim)


@pytest.mark.slow
def test_a_machine_that_freezes_costs_its_own_answer(federation: NVFlareFederation) -> None:
    """Its connections stay open and nothing moves in them, as behind a dead link; then it thaws."""
    frozen = processes_naming(federation.machines.engine_folder(NAMES[2]))
    assert len(frozen) >= 2  # the relay and its job
    messages = dict.fromkeys(ALL, b"00000002")
    for number in frozen:
        os.kill(number, signal.SIGSTOP)
    try:
        began = time.monotonic()
        replies = by_site(federation.courier, "slow", messages, deadline=time.time() + 120.0)
    finally:
        for number in frozen:
            os.kill(number, signal.SIGCONT)
    assert isinstance(replies[2].content, Lost)
    assert all(content(replies[site]) == b"00000002" for site in ALL if site != 2)
    assert time.monotonic() - began < 2.0 + federation.notice
    wait_for(lambda: replies_of(federation, PLAN) == set(ALL), 90.0)


@pytest.mark.slow
@pytest.mark.parametrize("trick", ["another class", "code"])
def test_a_job_with_another_class_or_with_code_runs_nowhere(
    federation: NVFlareFederation, trick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is allowed; what its job brings is not."""
    federation.courier.close()
    marker = federation.machines.folder / "code ran"
    plain = folders.write_job

    def crafted(folder: Path, *, sites: Sequence[str], run: str) -> Path:
        job = plain(folder, sites=sites, run=run)
        if trick == "code":
            custom = job / "app" / "custom"
            custom.mkdir()
            (custom / "trick.py").write_text(
                f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
                "from ffm_secure.engines.nvflare.site_side import RelayExecutor\n"
                "class Trick(RelayExecutor):\n    pass\n"
            )
        path = job / "app" / "config" / "config_fed_client.json"
        other = "trick.Trick" if trick == "code" else "nvflare.app_common.np.np_trainer.NPTrainer"
        path.write_text(path.read_text().replace(folders.EXECUTOR, other))
        return job

    monkeypatch.setattr(desk, "write_job", crafted)
    hostile = federation.machines.courier(RUN, Patience(start=15.0, join=10.0))
    try:
        with pytest.raises(FfmError, match="missing: north, south, east, west"):
            hostile.open(smallest=1, seconds=25.0)
    finally:
        hostile.close()
        monkeypatch.undo()
        federation.restart()
    assert not marker.exists()
    assert replies_of(federation) == set(ALL)


@pytest.mark.slow
def test_a_run_that_nobody_allowed_starts_nowhere(federation: NVFlareFederation) -> None:
    federation.courier.close()
    other = federation.machines.courier("cd" * 32, Patience(start=15.0))
    try:
        with pytest.raises(FfmError, match="missing: north, south, east, west"):
            other.open(smallest=1, seconds=20.0)
        assert other.sites() == frozenset()
    finally:
        other.close()
        federation.restart()


@pytest.mark.slow
def test_nothing_outlives_those_who_started_it(tmp_path: Path) -> None:
    """The process that started everybody is killed: no server, relay or job of it is left after a while."""
    pytest.importorskip("nvflare", reason="the extra 'nvflare' is not installed")
    machines = enrol(tmp_path, NAMES)
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.engines.nvflare_federation import Machines, NAMES\n"
        "from ffm_secure.engines.nvflare.site_service import serve\n"
        "machines = Machines(folder=Path(sys.argv[1]), sites=NAMES)\n"
        "doors = [serve(machines.engine_folder(n), lambda s, m: m, lambda r: True) for n in NAMES]\n"
        "machines.start()\ncourier = machines.courier('ab' * 32)\n"
        "courier.open(smallest=4, seconds=90)\nprint('open', flush=True)\ntime.sleep(600)\n"
    )
    words = [sys.executable, "-c", program, str(machines.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "open\n"
        assert len(processes_naming(tmp_path)) >= 1 + 1 + 1 + 4 + 4  # with jobs at the server and every site
        starter.kill()
    wait_for(lambda: processes_naming(tmp_path) == [], 40.0)
