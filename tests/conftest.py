"""Fixtures every room shares: the optional data folder, one-thread torch,
real assets only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data and models beside the repository, or skip the test."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data and models are not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # else a warning counts only in the first test that raises it


@pytest.fixture(autouse=True, scope="session")
def _no_ledger_of_this_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the ledger of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFM_SECURE_HOME", str(tmp_path_factory.mktemp("data home")))
        yield


@pytest.fixture(autouse=True)
def data_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a folder of its own for what outlives runs."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FFM_SECURE_HOME", str(home))
    return home
