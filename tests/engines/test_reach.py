"""A port that is taken, and a coordinator that does not answer, are said in words."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from ffm_secure.engines.nvflare import reach
from ffm_secure.engines.nvflare.reach import coordinator_words, require_port
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
