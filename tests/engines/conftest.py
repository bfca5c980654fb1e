"""One federation's machines for all tests of an engine: starting them costs more than any test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.engines.nvflare_federation import NAMES, Machines, enrol

if TYPE_CHECKING:
    from tests.engines.flower_federation import FlowerMachines


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Start a server and four relays; they wait for services and jobs."""
    if importlib.util.find_spec("nvflare") is None:
        pytest.skip("the extra 'nvflare' is not installed")
    started = enrol(tmp_path_factory.mktemp("nvflare"), NAMES)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def flower_machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerMachines]:
    """Start a server, its gate and four relays; they wait for services and runs."""
    if importlib.util.find_spec("flwr") is None:
        pytest.skip("the extra 'flower' is not installed")
    from tests.engines import flower_federation

    started = flower_federation.enrol(tmp_path_factory.mktemp("flower"), NAMES)
    try:
        started.start()
        yield started
    finally:
        started.stop()
