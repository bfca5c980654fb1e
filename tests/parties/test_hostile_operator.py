"""The operator says who is in: a stranger it lets in, who works with the coordinator, sees sums alone."""

from __future__ import annotations


import numpy as np

from defenses.secagg import ring
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.config.federated import run_digest
from ffm_secure.protection.base import UPLOAD
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.own_record import record_folder
from ffm_secure.site.policy import objections
from ffm_secure.storage.observations import read_observations
from tests.federation.helpers import call
from tests.parties.helpers import NAMES, SEEDED, Federation, log_of, notes_run
from tests.parties.overheard import Overheard

MASKS = {"kind": "secagg", "threshold": 3}
STRANGER = 3


def sealed(federation: Federation, name: str) -> np.ndarray:
    """Return what a site put into the sum, as it kept it for itself: [d]."""
    folder = record_folder(federation.site(name), run_digest(federation.config))
    own = [tensors for item, tensors in read_observations(folder / "observations") if item.own >= 0]
    return own[0]["values"].numpy()


def test_every_site_sees_who_is_on_the_roster(masked_record: tuple[Federation, Overheard]) -> None:
    federation, _ = masked_record
    status = call("site", "status", str(federation.site("north"))).stdout
    for words in (log_of(federation, "north"), status):
        assert "roster 1: north, south, east, west" in words


def test_a_stranger_and_the_coordinator_see_sums_alone(masked_record: tuple[Federation, Overheard]) -> None:
    """They hold every upload, and of the opened sum they can take the stranger's own part: three are left."""
    federation, overheard = masked_record
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


def test_a_policy_counts_with_strangers(masked_record: tuple[Federation, Overheard]) -> None:
    """A site that counts with one stranger refuses a run in which two would be left alone with it."""
    own = SiteFolder(place=masked_record[0].site("north")).read()
    config = notes_run(privacy=SEEDED, protection={**MASKS, "colluding": 0})
    (objection,) = objections(config, own, sites=4)
    assert objection.startswith("protection.colluding = 0: policy.colluders = 1")
    counting = notes_run(privacy=SEEDED, protection=MASKS)
    assert objections(counting, own, sites=4) == ()
