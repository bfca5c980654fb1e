"""What stays with a client: the same after an interruption, never in the sum,
never taken from another run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ffm_secure.config import compatibility
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.simulation import Simulation
from ffm_secure.errors import Interrupted, PlanRefused, StoreError
from ffm_secure.federation import NullCallback, TrainingResult
from ffm_secure.records import RoundPlan
from ffm_secure.site.client_state import ClientStateStore
from tests.federation.helpers import CLIENT, RECORD, SECAGG, finish, make, prepared, train


def shared_a(**sections: Any) -> RunConfig:
    federation = {
        "rounds": 4,
        "cohort": 4,
        "dropout": {"rate": 0.3, "stages": ["train", "unmask"]},
        "lifecycle": {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": 0.1},
        "strategy": {"kind": "fedsa"},
    }
    base: dict[str, Any] = {
        "task": {"clients": 5},
        "privacy": RECORD,
        "protection": {**SECAGG, "colluding": 0},
    }
    return make(**{**base, "federation": federation, **sections})


def models(built: Simulation, trained: TrainingResult) -> list[torch.Tensor]:
    """Return every client's own model at the end."""
    last = len(trained.records) + 1
    return [built.own_vector(site.data.index, trained.state.vector, before=last) for site in built.sites]


class Stop(NullCallback):
    """Interrupt a run after some clients of its third round have learned, and written what they keep."""

    round = 0

    def round_started(self, plan: RoundPlan, total: int) -> None:
        self.round = plan.round

    def client_finished(self, done: int, total: int) -> None:
        if self.round == 3 and done == 2:
            raise KeyboardInterrupt


def test_an_interrupted_round_begins_from_what_clients_had_before_it(tmp_path: Path) -> None:
    made = shared_a()
    built, whole = train(made, tmp_path / "whole")
    part = simulation.build(prepared(made), tmp_path / "part")
    with pytest.raises(Interrupted):
        finish(part, tmp_path / "part", callback=Stop())
    ahead = [path.name for path in (tmp_path / "part" / "home").rglob("*.safetensors")]
    assert ahead.count("round-000003.safetensors") == 2, "two clients are a round ahead of the server"
    again, resumed = train(made, tmp_path / "part")
    assert torch.equal(resumed.state.vector, whole.state.vector)
    for mine, theirs in zip(models(again, resumed), models(built, whole), strict=True):
        assert torch.equal(mine, theirs)

    rule = built.prepared.strategy
    initial = prepared(made).trainable.flatten()
    assert torch.equal(rule.pick(whole.state.vector, rule.b), rule.pick(initial, rule.b)), (
        "the server has no B"
    )
    assert not torch.equal(rule.pick(whole.state.vector, rule.a), rule.pick(initial, rule.a))
    assert built.spec.codec.size == rule.count((*rule.a, *rule.head)), "and nobody sends one"
    own = [rule.pick(model, rule.b) for model in models(built, whole)]
    assert not torch.equal(own[0], own[1])

    lost = [(r.round, c) for r in whole.records for c, stage in r.dropped.items() if stage == "train"]
    assert lost, "the seed loses nobody, so this test shows nothing"
    for number, client in lost:
        assert not (
            built.states.folder / built.states.owners[client] / f"round-{number:06d}.safetensors"
        ).exists()
        before, after = (
            built.own_vector(client, whole.state.vector, before=number + late) for late in (0, 1)
        )
        assert torch.equal(before, after), "who was lost keeps what it had"


def test_a_client_that_lost_its_numbers_is_not_silently_begun_anew(tmp_path: Path) -> None:
    made = shared_a(federation={"rounds": 1, "cohort": 4, "strategy": {"kind": "fedsa"}}, privacy=NONE)
    built, trained = train(made, tmp_path)
    victim = built.states.folder / built.states.owners[trained.records[0].survivors[0]]
    path = victim / "round-000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(StoreError, match="is damaged"):
        train(made, tmp_path)
    shutil.rmtree(victim)
    with pytest.raises(StoreError, match="is missing"):
        train(made, tmp_path)


NONE = {"unit": "none", "reason": "test data"}


def test_files_of_another_run_and_of_later_rounds_are_not_read(tmp_path: Path) -> None:
    home = ClientStateStore(folder=tmp_path, owners=("a", "b"), places=(slice(1, 3), slice(4, 5)))
    vector, one, other = torch.arange(6.0), b"\1" * 16, b"\2" * 16
    home.save(0, vector + 10, run_id=one, round=2)
    assert torch.equal(
        home.load(0, vector, run_id=one, before=3), torch.tensor([0.0, 11.0, 12.0, 3.0, 14.0, 5.0])
    )
    for client, run_id, before in ((0, one, 2), (0, other, 3), (1, one, 3)):
        assert torch.equal(home.load(client, vector, run_id=run_id, before=before), vector)
    for number in range(3, 9):
        home.save(0, vector + number, run_id=one, round=number)
    assert [path.name[6:12] for path in sorted((tmp_path / "a").iterdir())] == ["000006", "000007", "000008"]
    home.save(0, vector - 1, run_id=one, round=7)  # the round is played again
    assert torch.equal(
        home.load(0, vector, run_id=one, before=8), torch.tensor([0.0, 0.0, 1.0, 3.0, 3.0, 5.0])
    )
    with pytest.raises(StoreError, match="this run keeps 2"):
        ClientStateStore(folder=tmp_path, owners=("a",), places=(slice(0, 2),)).load(
            0, vector, run_id=one, before=8
        )


def test_what_cannot_be_sound_is_refused() -> None:
    compatibility.check(shared_a())
    with pytest.raises(PlanRefused, match="would release it"):
        compatibility.check(shared_a(privacy=CLIENT))
    learning = {
        "kind": "pretrain",
        "local_steps": 1,
        "batch_size": 8,
        "learning_rate": 0.1,
        "public_examples": 50,
    }
    with pytest.raises(PlanRefused, match="the server has none"):
        compatibility.check(
            make(federation={"rounds": 2, "cohort": 4, "lifecycle": learning, "strategy": {"kind": "fedsa"}})
        )
