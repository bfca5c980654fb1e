"""One run under masks for all tests that look at what left its sites: a run costs more than any of them."""

from __future__ import annotations

import pytest

from tests.parties.helpers import SEEDED, Federation
from tests.parties.overheard import Overheard, recorded_run


@pytest.fixture(scope="session")
def masked_record(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Overheard]:
    masks = {"kind": "secagg", "threshold": 3}
    return recorded_run(tmp_path_factory.mktemp("masked"), privacy=SEEDED, protection=masks)
