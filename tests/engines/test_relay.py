"""A relay that runs alone knows its name from its folder, and says whether the service is there."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import relay
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
