"""A site keeps what left it in some rounds, and attacks it itself; nothing of it is anywhere else."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.truth import load_truth
from defenses.secagg import ring
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.config.federated import run_digest
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.protection.base import UPLOAD
from ffm_secure.site.own_record import RECORDS, open_record, record_folder
from ffm_secure.site.site_file import SelfAudit
from ffm_secure.site.truth import truth_path
from ffm_secure.storage.observations import read_observations
from ffm_secure.transport import envelope
from ffm_secure.transport.stages import PLAN, split_acceptances, split_plan
from tests.federation.helpers import call
from tests.parties.helpers import NAMES, PLAIN, Federation
from tests.parties.overheard import Overheard, recorded_run

OPEN = {"kind": "none", "threshold": 3}


def kept_by(federation: Federation, name: str) -> Path:
    return record_folder(federation.site(name), run_digest(federation.config))


def broadcasts(federation: Federation, overheard: Overheard) -> list[torch.Tensor]:
    """Return the models that were sent to the first site, in order."""
    key = Headquarters(place=federation.place / "coordinator").key().public_key
    vectors = []
    for stage, site, message in overheard.carried:
        if (stage, site) == (PLAN, 0):
            _, inner = split_acceptances(envelope.unseal(message, key).content)
            vectors.append(torch.from_numpy(np.frombuffer(split_plan(inner)[1], dtype="<f4").copy()))
    return vectors


@pytest.fixture(scope="module")
def in_the_clear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Overheard]:
    return recorded_run(tmp_path_factory.mktemp("clear"), privacy=PLAIN, protection=OPEN)


def test_what_is_kept_is_what_left(in_the_clear: tuple[Federation, Overheard]) -> None:
    federation, overheard = in_the_clear
    folder = kept_by(federation, "east")
    model = load_model(federation.config, folder, read_facts(folder))
    sent = []
    for answer in overheard.answers[(UPLOAD, 2)]:
        vector = ring.unpack(memoryview(answer)[1 + 64 :], model.spec.codec.modulus_bits)
        sent.append(model.spec.codec.open(vector, round=1, survivors=(2,)).values)
    own = [
        (description, tensors["values"].numpy())
        for description, tensors in read_observations(folder / "observations")
        if description.own == 2
    ]
    assert [(item.round, item.observer, item.point) for item, _ in own] == [
        (1, "server", "raw"),
        (2, "server", "raw"),
    ]
    for (_, values), expected in zip(own, sent, strict=True):
        assert np.array_equal(values, expected)
        assert np.abs(values).max() > 0


def test_the_change_that_everybody_sees_is_kept_too(in_the_clear: tuple[Federation, Overheard]) -> None:
    federation, overheard = in_the_clear
    first, second = broadcasts(federation, overheard)
    everything = list(read_observations(kept_by(federation, "north") / "observations"))
    changes = [(item, tensors) for item, tensors in everything if item.observer == "client"]
    assert [item.round for item, _ in changes] == [1], "after its last round a site sees no model any more"
    assert torch.equal(changes[0][1]["values"], second - first)
    assert torch.equal(changes[0][1]["broadcast"], first)


def test_the_rows_behind_it_are_kept_at_home_alone(in_the_clear: tuple[Federation, Overheard]) -> None:
    federation, _ = in_the_clear
    for name in NAMES:
        truth = load_truth(truth_path(kept_by(federation, name) / "home", name, 1))
        assert truth.sequences
        for path in (federation.site(name) / RECORDS).rglob("*"):
            wanted = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert not list((federation.place / "coordinator").rglob(f"{RECORDS}/*"))
    assert not list((federation.place / "coordinator").rglob("round-*-server*"))


def test_masked_updates_are_kept_as_everybody_together_could_see_them(
    masked_record: tuple[Federation, Overheard],
) -> None:
    federation, _ = masked_record
    everything = list(read_observations(kept_by(federation, "west") / "observations"))
    assert [(item.round, item.observer, item.point, item.sites) for item, _ in everything] == [
        (1, "client", "aggregated", (0, 1, 2, 3)),
        (1, "colluding_server", "noised", (3,)),
        (2, "colluding_server", "noised", (3,)),
    ]


def test_without_being_asked_a_site_keeps_nothing(
    in_the_clear: tuple[Federation, Overheard], tmp_path: Path
) -> None:
    federation, _ = in_the_clear
    folder = kept_by(federation, "north")
    model = load_model(federation.config, folder, read_facts(folder))
    task: Any = None  # nothing is encoded where nothing is kept
    assert open_record(federation.config, model, task, SelfAudit(), tmp_path / "no") is None
    assert not (tmp_path / "no").exists()
    shutil.copytree(federation.site("north"), tmp_path / "north", ignore=lambda *_: {RECORDS})
    ended = call("site", "audit", str(tmp_path / "north"))
    assert ended.returncode == 5
    assert "say record.rounds = 3 in site.toml before a run begins" in ended.stderr


@pytest.mark.slow
def test_a_full_disk_costs_the_record_and_not_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffm_secure.storage import observations

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(observations, "replace_folder", full)
    federation, _ = recorded_run(tmp_path, privacy=PLAIN, federation={"rounds": 1})
    assert not list(read_observations(kept_by(federation, "north") / "observations"))
    log = (federation.site("north") / "site.log").read_text()
    assert "round 1 was not kept for an audit: No space left on device" in log


@pytest.mark.slow
def test_an_audit_of_what_left_finds_what_was_not_protected(
    in_the_clear: tuple[Federation, Overheard], tmp_path: Path
) -> None:
    federation, _ = in_the_clear
    ended = call("site", "audit", str(federation.site("east")), "--json", "--out", str(tmp_path / "audit"))
    assert ended.returncode == 0, ended.stderr
    findings = json.loads(ended.stdout)["findings"]
    assert {item["source"] for item in findings} == {"recorded"}
    assert [item for item in findings if item["verdict"] == "leaked" and item["observer"] == "server"]
    assert (tmp_path / "audit" / "internal.html").is_file()
