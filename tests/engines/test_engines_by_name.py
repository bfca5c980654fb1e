"""What a person reads who asks for an engine that is not installed, or that there is none of."""

from __future__ import annotations

import importlib

import pytest

from ffm_secure.cli import machine_engines
from ffm_secure.errors import ConfigError, FfmError


@pytest.mark.parametrize(
    ("name", "package", "words"),
    [
        ("nvflare", "nvflare", r"install it with: pip install 'ffm-secure\[nvflare\]'"),
        ("flower", "flwr", r"in an environment of its own, with: pip install 'ffm-secure\[flower\]'"),
    ],
)
def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    name: str, package: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(FfmError, match=f"the engine {name} needs {package}; .*{words}"):
        machine_engines.running(name)


def test_an_engine_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="must be one of nvflare, flower"):
        machine_engines.running("pigeons")


def test_one_enrolment_serves_both_engines() -> None:
    assert machine_engines.enrolment("flower") is machine_engines.enrolment("nvflare")
