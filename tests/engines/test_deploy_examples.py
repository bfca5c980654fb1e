"""What the examples of services promise: who has the rows has no network, and one port is published."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra 'nvflare'")
DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"


def services(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())["services"]


def mounts(service: dict[str, Any]) -> list[str]:
    return [str(item) for item in service["volumes"]]


def test_the_container_with_the_rows_has_no_network_and_cannot_change_them() -> None:
    service = services("compose.yml")["service"]
    assert service["network_mode"] == "none"
    rows = [item for item in mounts(service) if "ROWS" in item]
    assert len(rows) == 1
    assert rows[0].endswith(":ro")


def test_the_container_with_the_network_has_nothing_but_the_engines_folder() -> None:
    relay = services("compose.yml")["relay"]
    assert [item.endswith("/nvflare:/relay") for item in mounts(relay)] == [True]


def test_only_the_coordinator_publishes_a_port() -> None:
    assert all("ports" not in service for service in services("compose.yml").values())
    assert [item["ports"] for item in services("compose.coordinator.yml").values()] == [["8002:8002"]]


def test_every_container_is_read_only_and_without_rights() -> None:
    everybody = {**services("compose.yml"), **services("compose.coordinator.yml")}
    for name, service in everybody.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["logging"]["options"]["max-size"], name


def test_the_unit_starts_again_and_keeps_its_files_to_itself() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "ffm-secure-site.service")
    service = unit["Service"]
    assert service["Restart"] == "always"
    assert service["UMask"] == "0077"
    assert service["ReadOnlyPaths"] == "/data"
    assert service["ReadWritePaths"] == service["ExecStart"].rpartition(" ")[2]
