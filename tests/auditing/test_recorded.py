"""What observers saw is recorded as it crossed the wire, and audited without the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.contract import Budget, Prior
from attacks.registry import build
from attacks.judge import tried
from defenses.secagg import ring
from ffm_secure.api import place
from ffm_secure.auditing.recorded import recorded
from ffm_secure.auditing.replayed import attackable
from ffm_secure.auditing.run_audit import audit_run
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.local import LocalEngine
from ffm_secure.agreed.loaded_model import load_model, read_facts
from ffm_secure.protection.base import UPLOAD
from ffm_secure.server.transcript import recorded_rounds
from ffm_secure.storage.observations import read_observations
from ffm_secure.transport.courier import Reply
from tests.federation.helpers import SECAGG, finish, table

OBSERVERS = ("public", "client", "server", "colluding_server")
ATTACK = "label_identity"


def audited(data: str, **sections: Any) -> RunConfig:
    """Return a run of two rounds over four clients whose traffic is recorded."""
    task = {
        "kind": "text_classification",
        "data": data,
        "clients": 4,
        "max_length": 16,
        "evaluation_examples": 8,
    }
    values = table(
        task=task,
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "full"}},
        federation={
            "rounds": 2,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1},
        },
        **sections,
    )
    values["audit"] = {"observers": list(OBSERVERS), "attacks": [ATTACK]}
    return run_file.from_table(values)


class Capturing(LocalEngine):
    """Keep every upload as bytes, as a debugger at the transport would."""

    def __init__(self, ready: simulation.Simulation) -> None:
        super().__init__(ready.config, ready.sites, ready.courier.trainers)
        self.uploads: list[tuple[int, bytes]] = []

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        for reply in super().send(stage, messages):
            if stage == UPLOAD and isinstance(reply.content, bytes):
                self.uploads.append((reply.site, reply.content))
            yield reply


NOTES = "builtin:clinic_notes?size=60&validation=12"


@pytest.mark.parametrize("protection", [{"kind": "none"}, SECAGG], ids=["none", "secagg"])
def test_every_observer_leaves_observations(protection: dict[str, Any], tmp_path: Path) -> None:
    config = audited(NOTES, protection=protection)
    place(config, base=tmp_path, runs=tmp_path).start()
    seen = {description.observer for description, _ in read_observations(tmp_path / "test" / "observations")}
    assert seen == set(OBSERVERS)
    for path in (tmp_path / "test" / "observations").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"


def test_what_is_recorded_is_what_crossed_the_wire(tmp_path: Path) -> None:
    """The recorded values equal the captured bytes, and the audit's score is the attack's own on them."""
    config = audited(NOTES)
    ready = simulation.build(simulation.prepare(config, tmp_path), tmp_path / "run")
    wire = Capturing(ready)
    finish(ready, tmp_path / "run", courier=wire)
    codec = ready.spec.codec
    captured = [
        (site, codec.open(ring.unpack(content, codec.modulus_bits), round=1, survivors=(site,)).values)
        for site, content in wire.uploads
    ]
    kept = {
        (description.round, description.own): tensors["values"].numpy()
        for description, tensors in read_observations(tmp_path / "run" / "observations")
        if description.observer == "server"
    }
    assert len(kept) == len(captured) == 8
    for number, (site, values) in enumerate(captured):
        assert np.array_equal(kept[1 + number // 4, site], values)

    model = load_model(config, tmp_path, read_facts(tmp_path / "run"))
    first = next(one for one in recorded(model, tmp_path / "run") if one.description.observer == "server")
    assert first.truth is not None
    attack, eyes = build(ATTACK), attackable(model)
    by_audit = tried(attack, first.observation, eyes, Prior(), Budget.named("quick"), first.truth)
    shapes = list(first.observation.tensors.items())
    parts = (
        torch.from_numpy(captured[first.description.own][1])
        .float()
        .split([tensor.numel() for _, tensor in shapes])
    )
    for (name, tensor), part in zip(shapes, parts, strict=True):
        assert torch.equal(tensor, part.view(tensor.shape)), name
    assert by_audit[1] is not None
    assert by_audit[1].value == pytest.approx(1.0), "one step of four records in the clear tells their labels"


def test_colluders_take_their_own_updates_off_the_sum(tmp_path: Path) -> None:
    config = audited(NOTES, protection={**SECAGG, "colluding": 1})
    ready = simulation.build(simulation.prepare(config, tmp_path), tmp_path / "run")
    finish(ready, tmp_path / "run")
    model = load_model(config, tmp_path, read_facts(tmp_path / "run"))
    by_observer = {
        one.description.observer: one
        for one in recorded(model, tmp_path / "run")
        if one.description.round == 1
    }
    whole, less = by_observer["server"], by_observer["colluding_server"]
    assert len(whole.description.sites) == 4
    assert len(less.description.sites) == 3
    assert less.observation.contributors == 3
    name = next(iter(whole.observation.tensors))
    assert not torch.equal(whole.observation.tensors[name], less.observation.tensors[name])


def test_the_audit_of_the_wire_needs_no_data(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = "".join(f"note number {number} of ward {number % 7},{'ab'[number % 2]}\n" for number in range(48))
    (rows / "train.csv").write_text("text,label\n" + lines)
    (rows / "validation.csv").write_text("text,label\nx,a\ny,b\n")
    run = place(audited(str(rows)), base=tmp_path, runs=tmp_path / "runs")
    run.start()
    shutil.rmtree(rows)
    audit = audit_run(run.folder, budget="quick").audit
    assert audit is not None
    assert {finding.source for finding in audit.findings} == {"recorded"}
    assert {finding.observer for finding in audit.findings} == set(OBSERVERS)
    assert "was not played again" in audit.sentence


def test_nothing_is_recorded_unless_the_run_file_asks(tmp_path: Path) -> None:
    config = run_file.from_table(table())
    assert recorded_rounds(config) == frozenset()
    place(config, base=tmp_path, runs=tmp_path).start()
    assert not list((tmp_path / "test" / "observations").iterdir())
    assert not (tmp_path / "test" / "home").exists()


def test_a_full_store_leaves_out_and_goes_on(tmp_path: Path) -> None:
    config = audited(NOTES)
    ready = simulation.build(simulation.prepare(config, tmp_path), tmp_path / "run")
    assert ready.server.transcript is not None
    ready.server.transcript.store.limit = 1
    assert finish(ready, tmp_path / "run").status == "complete"
    assert ready.server.transcript.store.left_out > 0
