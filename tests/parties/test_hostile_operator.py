"""The operator says who is in: a stranger it lets in, who works with the coordinator, sees sums alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from defenses.secagg import ring
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.config.federated import run_digest
from ffm_secure.protection.base import UPLOAD
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.own_record import record_folder
from ffm_secure.site.policy import objections
from ffm_secure.site.site_file import SelfAudit
from ffm_secure.storage.observations import read_observations
from tests.federation.helpers import call
from tests.parties.helpers import NAMES, SEEDED, Federation, found, log_of, notes_run, open_all, run
from tests.parties.test_self_audit import Overheard

MASKS = {"kind": "secagg", "threshold": 3}
STRANGER = 3


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Overheard]:
    """Run one round in which west is the operator's own, and keep all that the coordinator gets."""
    config = notes_run(privacy=SEEDED, protection=MASKS, federation={"rounds": 1})
    federation = found(tmp_path_factory.mktemp("operator"), config, record=SelfAudit(rounds=1))
    overheard = Overheard(open_all(federation))
    try:
        run(federation, overheard)
    finally:
        overheard.close()
    return federation, overheard


def sealed(federation: Federation, name: str) -> np.ndarray:
    """Return what a site put into the sum, as it kept it for itself: [d]."""
    folder = record_folder(federation.site(name), run_digest(federation.config))
    own = [tensors for item, tensors in read_observations(folder / "observations") if item.own >= 0]
    return own[0]["values"].numpy()


def test_every_site_sees_who_is_on_the_roster(ran: tuple[Federation, Overheard]) -> None:
    federation, _ = ran
    assert "roster 1: north, south, east, west" in log_of(federation, "north")
    assert (
        "roster 1: north, south, east, west" in call("site", "status", str(federation.site("north"))).stdout
    )


def test_a_stranger_and_the_coordinator_see_sums_alone(ran: tuple[Federation, Overheard]) -> None:
    """They hold every upload, and of the opened sum they can take the stranger's own part: three are left."""
    federation, overheard = ran
    folder = record_folder(federation.site("north"), run_digest(federation.config))
    codec = load_model(federation.config, folder, read_facts(folder)).spec.codec
    updates = [sealed(federation, name) for name in NAMES]
    for site in range(STRANGER):
        packed = ring.packed_bytes(codec.length, codec.modulus_bits)
        masked = overheard.answers[(UPLOAD, site)][0][-packed:]
        numbers = ring.signed(ring.unpack(masked, codec.modulus_bits), codec.modulus_bits)[ring.HEADER :]
        assert numbers.shape == updates[site].shape
        assert abs(np.corrcoef(numbers, updates[site])[0, 1]) < 0.2, "an upload that shows the update"
    rest = sum(updates) - updates[STRANGER]
    for site in range(STRANGER):
        assert abs(np.corrcoef(rest, updates[site])[0, 1]) < 0.95, "a sum that is one site's update"


def test_a_policy_counts_with_strangers(tmp_path: Path) -> None:
    """A site that counts with one stranger refuses a run in which two would be left alone with it."""
    federation = found(tmp_path, notes_run(privacy=SEEDED, protection={**MASKS, "colluding": 0}))
    own = SiteFolder(place=federation.site("north")).read()
    refused = objections(federation.config, own, sites=4)
    assert refused == ("protection.colluding = 0: policy.colluders = 1",)
