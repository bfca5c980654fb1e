"""A relay that runs alone knows its name from its folder, and says whether the service is there."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import relay, worker_process
from ffm_secure.engines.nvflare.folders import SITE_SOCKET
from ffm_secure.engines.nvflare.running import serve_site
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.errors import StoreError
from ffm_secure.engines.nvflare import enrolment
from ffm_secure.engines.nvflare.enrolment import COORDINATOR
from ffm_secure.transport.local_socket import ask, wait_until
from tests.engines.nvflare_federation import identities


def test_its_name_is_its_certificates(tmp_path: Path) -> None:
    people = identities(("operator", COORDINATOR, "north"))
    now = datetime.datetime.now(datetime.UTC)
    enrolment.create_authority(tmp_path / "operator", "wards", now=now)
    keys = {name: identity.public_key for name, identity in people.items()}
    sign = people["operator"].sign
    for name in (COORDINATOR, "north"):
        if name == COORDINATOR:
            asked = enrolment.request_coordinator(tmp_path / name, ("localhost", 7), people[name].sign)
        else:
            asked = enrolment.request_site(tmp_path / name, name, people[name].sign)
        _, approved = enrolment.approve(
            tmp_path / "operator", asked.read_bytes(), keys=keys, sign=sign, now=now
        )
        enrolment.accept(tmp_path / name, approved, name=name, operator=people["operator"].public_key)
    assert relay.name_of(tmp_path / "north" / "nvflare") == "site-north"
    with pytest.raises(StoreError, match="site enrol"):
        relay.name_of(tmp_path / COORDINATOR / "nvflare")


def test_its_check_follows_the_service(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffm_secure.engines.nvflare.relay", "--check", str(tmp_path)]
    assert not relay.is_served(tmp_path)
    assert subprocess.run(command, check=False).returncode == 1
    door = serve(tmp_path, lambda stage, message: message, lambda run: True)
    assert relay.is_served(tmp_path)
    assert subprocess.run(command, check=False).returncode == 0
    door.close()


def test_a_folder_that_was_not_enrolled_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffm_secure.engines.nvflare.relay", str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 5
    assert "site enrol" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_service_without_a_relay_starts_none_and_answers(tmp_path: Path) -> None:
    engine = tmp_path / "nvflare"
    engine.mkdir()
    stop = threading.Event()
    serving = threading.Thread(
        target=serve_site,
        args=(tmp_path, "north", lambda stage, message: message + b"!", lambda run: run == "known"),
        kwargs={"should_stop": stop.is_set, "with_relay": False},
    )
    serving.start()
    try:
        assert wait_until(lambda: relay.is_served(engine), 10.0)
        words = {"ask": "answer", "stage": "any"}
        assert ask(engine / SITE_SOCKET, words, b"heard", seconds=5.0) == ({"answered": True}, b"heard!")
        for run, allowed in (("known", True), ("unknown", False)):
            heading, _ = ask(engine / SITE_SOCKET, {"ask": "allowed", "run": run}, seconds=5.0)
            assert heading == {"allowed": allowed}
        assert not (engine / "output.txt").exists()
    finally:
        stop.set()
        serving.join(10.0)
    assert not relay.is_served(engine)


def test_a_jobs_process_ends_with_its_relay_however_early_that_is_killed(tmp_path: Path) -> None:
    number = tmp_path / "number"
    child = (
        "import os, sys, time; from ffm_secure.engines.nvflare.worker_process import end_with; "
        "end_with(int(sys.argv[1])); open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(99)"
    )
    parent = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]]); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", parent, child, str(number)]) as left:
        assert wait_until(lambda: number.is_file() and bool(number.read_text()), 60.0)
        left.kill()
    orphan = Path("/proc") / number.read_text()
    assert wait_until(lambda: _has_ended(orphan), 30.0)


def test_a_site_starts_its_jobs_that_way() -> None:
    constants = pytest.importorskip("nvflare.apis.fl_constant", reason="the extra 'nvflare' is not installed")
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.job_launcher_spec import JobProcessArgs
    from nvflare.utils.job_launcher_utils import get_client_job_args

    from ffm_secure.engines.nvflare.site_side import SiteLauncher

    context, told = FLContext(), dict.fromkeys(get_client_job_args(), ("-x", "y"))
    told[JobProcessArgs.EXE_MODULE] = ("-m", worker_process.ENGINES)
    context.set_prop(constants.FLContextKey.JOB_PROCESS_ARGS, told)
    words = SiteLauncher().get_command({}, context).split()
    assert words[:3] == [sys.executable, "-m", "ffm_secure.engines.nvflare.worker_process"]


def _has_ended(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
