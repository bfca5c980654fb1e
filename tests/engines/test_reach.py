"""A port that is taken, and a coordinator that does not answer, are said in words."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import processes, reach
from ffm_secure.engines.nvflare.folders import write_server_resources
from ffm_secure.engines.nvflare.processes import Process
from ffm_secure.engines.nvflare.reach import coordinator_words, require_listening, require_port
from ffm_secure.errors import StoreError


def folder_for(place: Path, name: str, target: str) -> Path:
    path = place / "startup" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"servers": [{"service": {"target": target}}]}))
    return place


def test_a_port_that_another_program_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_FREED", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = folder_for(tmp_path, "fed_server.json", f"localhost:{port}")
        with pytest.raises(StoreError, match=f"port {port} of this machine is in use"):
            require_port(server)
    require_port(server)


def test_whether_the_coordinator_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        folder_for(tmp_path / "nvflare", "fed_client.json", f"127.0.0.1:{port}")
        assert coordinator_words(tmp_path) == f"coordinator: 127.0.0.1:{port} answers"
    assert "does not answer (Connection refused); it does while a run is under way" in coordinator_words(
        tmp_path
    )


def test_a_folder_without_an_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="enrol again"):
        coordinator_words(tmp_path)


def test_a_server_that_ends_at_once_is_named_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_PAUSE", 0.0)
    server = folder_for(tmp_path, "fed_server.json", "localhost:9")
    process = Process([sys.executable, "-S", "-c", "raise SystemExit('no such file')"], server)
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        with pytest.raises(StoreError, match=r"ends as soon as it is started: no such file; .*output\.txt"):
            require_listening(server, lambda: process.falls)


def test_a_server_that_listens_is_waited_for_no_longer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = folder_for(tmp_path, "fed_server.json", f"localhost:{listener.getsockname()[1]}")
        began = time.monotonic()
        require_listening(server, lambda: 0, seconds=30.0)
    assert time.monotonic() - began < 15.0


def test_a_folder_named_from_here_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server" / "local").mkdir(parents=True)
    write_server_resources(Path("server"))
    words = json.loads((tmp_path / "server" / "local" / "resources.json").read_bytes())
    assert words["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] == str(
        tmp_path / "server" / "snapshots"
    )
    stores = [item["args"] for item in words["components"] if item["id"] == "job_manager"]
    assert stores[0]["uri_root"] == str(tmp_path / "server" / "jobs")
