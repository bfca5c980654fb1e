"""One small private run with real noise, certified once for all tests here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ffm_secure.api import Run
from ffm_secure.certificate.make import certify
from tests.federation.helpers import RECORD, SECAGG, make

PRIVATE = {**RECORD, "noise": "system"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run, which no test may change."""
    runs = tmp_path_factory.mktemp("certified")
    Run(make(privacy=PRIVATE, protection=SECAGG), runs=runs).start()
    folder = runs / "test"
    (folder / "certificate.json").write_bytes(certify(folder, operator=None, owners={}).content)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "test"))
