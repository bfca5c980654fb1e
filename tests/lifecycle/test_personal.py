"""Models that stay at home: what they are, that nothing is sent or charged, and where they are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from attacks.membership import confidences
from defenses.dp import Ledger
from defenses.random_source import RandomSource
from defenses.secagg.masks import RingVector
from ffm_secure import api
from ffm_secure.config.federated import shared_objections
from ffm_secure.engines import simulation
from ffm_secure.engines.own_models import FOLDER, make_own_models
from ffm_secure.errors import ConfigError, PlanRefused
from ffm_secure.lifecycle.personal import AtHome, learned_at_home
from ffm_secure.lifecycle.personal_prior import prior_at_home
from ffm_secure.lifecycle.personal_steps import few_steps, head_at_home
from ffm_secure.queries.base import head_of
from ffm_secure.records import RoundPlan
from ffm_secure.report.release import released
from ffm_secure.site.personal import MARK
from ffm_secure.site.noise_memory import NoiseMemory
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.tasks.encoded import Encoded
from tests.federation.helpers import RECORD, SECAGG, finish, make, prepared, table, train

OWN = {"kind": "mean_regularised", "steps": 3, "batch_size": 16, "learning_rate": 0.1, "pull": 0.5}
STEP = {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 0.1}
PRIVATE = {**RECORD, "noise": "system"}


class Recording(SiteTrainer):
    """A site's trainer that keeps what would be sealed."""

    __slots__ = ("sealed",)

    def run_round(
        self,
        data: SiteData,
        plan: RoundPlan,
        start: torch.Tensor,
        source: RandomSource,
        noise: NoiseMemory | None = None,
    ) -> RingVector:
        vector = super().run_round(data, plan, start, source, noise)
        self.sealed.append((plan.round, data.index, np.asarray(vector).tobytes()))
        return vector


def sealed_vectors(folder: Path, **sections: Any) -> tuple[list[Any], simulation.Simulation]:
    """Run a federation, make own models where asked, seal once more; return every vector that was sealed."""
    config = make(**sections)
    ready = simulation.build(prepared(config), folder)
    plain = simulation._trainer(ready.prepared, ready.states, 0)
    recording = Recording(spec=plain.spec, trainable=plain.trainable, task=plain.task, states=plain.states)
    recording.sealed = []
    ready.courier.trainers.replace([recording])
    untrained = ready.trainable.flatten().cpu()
    result = finish(ready, folder)
    make_own_models(ready, result, untrained)
    for site in ready.sites:  # what a site would seal next, had the run one round more
        plan = RoundPlan(
            run_id=ready.server.run_id, round=9, cohort=(0, 1, 2, 3), fingerprint="", mechanism="", turn=0
        )
        recording.run_round(site.data, plan, result.state.vector, site.source(plan))
    return recording.sealed, ready


@pytest.mark.parametrize("strategy", ["average", pytest.param("fedsa", marks=pytest.mark.slow)])
def test_what_is_sealed_is_equal_to_the_bit_with_and_without_own_models(
    tmp_path: Path, strategy: str
) -> None:
    sections = {
        "federation": {"rounds": 1, "lifecycle": STEP, "strategy": {"kind": strategy}},
        "privacy": RECORD,
        "protection": SECAGG,
    }
    without, first = sealed_vectors(tmp_path / "without", **sections)
    beside, second = sealed_vectors(tmp_path / "with", personal=OWN, **sections)
    assert len(without) == 8
    assert without == beside
    charged = [len(ready.ledger.entries()) for ready in (first, second)]
    assert charged[0] == charged[1] > 0


@dataclass(frozen=True, kw_only=True)
class Finished:
    folder: Path
    result: api.Result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("own")
    config = make(
        task={"split": {"kind": "dirichlet", "alpha": 0.3, "min_size": 20}},
        federation={"rounds": 1, "lifecycle": STEP},
        privacy=PRIVATE,
        protection=SECAGG,
        personal=OWN,
    )
    result = api.place(config, base=Path.cwd(), runs=folder).start()
    return Finished(folder=folder / "test", result=result)


def test_every_owner_sees_three_models_and_only_the_internal_page_shows_them(run: Finished) -> None:
    personal = run.result.summary.personal
    assert [outcome.client for outcome in personal] == [f"client-{number}" for number in range(1, 5)]
    for outcome in personal:
        assert outcome.rows > 0
        assert all(0.0 <= value <= 1.0 for value in (outcome.local, outcome.shared, outcome.own))
    assert released(run.result.summary).personal == ()
    internal = (run.folder / "internal.html").read_text()
    assert "Models that stay at home" in internal
    for page in ("report.html", "details.html", "report.json"):
        assert "at home" not in (run.folder / page).read_text()
    assert json.loads((run.folder / "report.json").read_text())["personal"] == []


def test_own_models_lie_in_their_owners_folders_and_are_marked(run: Finished) -> None:
    places = sorted((run.folder / "home").glob(f"*/{FOLDER}"))
    assert len(places) == 4
    for place in places:
        assert "releases those rows" in " ".join((place / MARK).read_text().split())
    adapters = {(place / "adapter_model.safetensors").read_bytes() for place in places}
    assert len(adapters) == 4


def test_the_ledger_knows_nothing_of_own_models(run: Finished) -> None:
    with Ledger.open(run.folder / "ledger.sqlite", create=False) as ledger:
        releases = {entry.release for entry in ledger.entries() if entry.kind == "reserve"}
    assert releases == {"update"}


@pytest.fixture(scope="module")
def home() -> AtHome:
    config = make(
        task={"clients": 4, "split": {"kind": "dirichlet", "alpha": 0.5, "min_size": 20}},
        model={"name": "builtin:tiny-vit", "trainable": {"kind": "head"}},
        personal={**OWN, "batch_size": 100_000},
    )
    ready = prepared(config)
    return AtHome(
        trainable=ready.trainable,
        task=ready.task,
        rows=ready.task.encode(ready.data.rows(1)),
        start=ready.trainable.flatten(),
        spec=config.personal,
        seed=(1, 2),
        device="cpu",
        microbatch=64,
    )


def test_steps_with_a_pull_are_those_of_the_written_down_loss(home: AtHome) -> None:
    own = learned_at_home(home, pull=0.5)
    home.trainable.load_vector(home.start)
    everything = np.arange(len(home.rows))
    vector = home.start.clone()
    for _ in range(3):
        home.trainable.load_vector(vector)
        batch = home.task.evaluation_batch(home.rows, everything, "cpu")
        loss = home.task.losses(home.trainable.model, batch).mean()
        gradients = torch.autograd.grad(loss, list(home.trainable.parameters.values()))
        gradient = torch.cat([part.reshape(-1) for part in gradients])
        vector = vector - 0.1 * (gradient + 0.5 * (vector - home.start))
    assert torch.allclose(own, vector, atol=1e-5)
    assert not torch.allclose(own, few_steps(home), atol=1e-5), "the pull does something"


def test_a_prior_at_home_adds_the_logarithm_of_each_share(home: AtHome) -> None:
    head = head_of(home.trainable)
    own = prior_at_home(home)
    counts = np.bincount(home.rows.labels, minlength=head.classes)
    added = (own - home.start)[head.bias].numpy()
    expected = np.log(np.maximum(counts, 1))
    assert np.allclose(added - added.mean(), expected - expected.mean(), atol=1e-5)
    untouched = torch.ones(len(own), dtype=torch.bool)
    untouched[head.bias] = False
    assert torch.equal(own[untouched], home.start[untouched])


def test_a_head_at_home_leaves_everything_else_as_it_was_shared() -> None:
    config = make(personal={**OWN, "kind": "head", "pull": 0.0})
    ready = prepared(config)
    start = ready.trainable.flatten()
    home = AtHome(
        trainable=ready.trainable, task=ready.task, rows=ready.task.encode(ready.data.rows(0)), start=start,
        spec=config.personal, seed=(1,), device="cpu", microbatch=64,
    )  # fmt: skip
    own = head_at_home(home)
    head = head_of(ready.trainable)
    others = torch.ones(len(own), dtype=torch.bool)
    others[head.weight] = False
    if head.bias is not None:
        others[head.bias] = False
    assert others.any()
    assert torch.equal(own[others], start[others])
    assert not torch.equal(own[head.weight], start[head.weight])


def test_an_owner_without_rows_makes_no_model() -> None:
    ready = prepared(make(personal=OWN))
    empty = ready.task.encode(ready.data.rows(0).take([]))
    home = AtHome(
        trainable=ready.trainable, task=ready.task, rows=empty, start=ready.trainable.flatten(),
        spec=ready.config.personal, seed=(1,), device="cpu", microbatch=64,
    )  # fmt: skip
    assert torch.equal(learned_at_home(home), home.start)


def test_settings_nobody_reads_are_refused_together() -> None:
    with pytest.raises(ConfigError) as refused:
        make(personal={"kind": "prior", "steps": 3, "learning_rate": 0.1})
    assert "personal.steps" in str(refused.value)
    assert "personal.learning_rate" in str(refused.value)
    with pytest.raises(ConfigError) as missing:
        make(personal={"kind": "mean_regularised"})
    assert all(name in str(missing.value) for name in ("steps", "batch_size", "learning_rate", "pull"))


@pytest.mark.parametrize("kind", ["prior", "head"])
def test_a_language_model_has_no_head_or_prior_at_home(kind: str) -> None:
    steps = {"steps": 1, "batch_size": 8, "learning_rate": 0.1} if kind == "head" else {}
    config = make(
        task={"kind": "causal_lm", "data": "builtin:clinic_notes", "clients": 4},
        model={"name": "builtin:tiny-gpt2", "trainable": {"kind": "lora", "rank": 2}},
        personal={"kind": kind, **steps},
    )  # fmt: skip
    with pytest.raises(PlanRefused, match="personal"):
        prepared(config)


def test_sites_of_their_own_say_that_they_make_none_yet() -> None:
    config = make(personal=OWN)
    assert any("personal.kind" in reason for reason in shared_objections(config, sites=4))
    assert "personal" not in table()


@pytest.mark.slow
def test_membership_is_found_on_an_own_model_and_not_on_the_shared_one(tmp_path: Path) -> None:
    """The own model is the control: it holds its rows without noise, and the attack has to see them."""
    sections = {"federation": {"rounds": 2, "lifecycle": STEP}, "privacy": PRIVATE, "protection": SECAGG}
    ready, result = train(make(**sections), tmp_path / "run")
    site, public = ready.sites[0], ready.server.evaluation
    members, others = site.data.examples.take(range(40)), public.take(range(40))
    spec = replace(make(personal=OWN).personal, kind="few_steps", steps=400, batch_size=40, learning_rate=0.5)
    shared = result.state.vector
    home = AtHome(
        trainable=ready.trainable, task=ready.task, rows=members, start=shared,
        spec=spec, seed=(1,), device="cpu", microbatch=64,
    )  # fmt: skip

    def separation(vector: torch.Tensor) -> float:
        ready.trainable.load_vector(vector)
        scores = [membership(ready, rows) for rows in (members, others)]
        return float(roc_auc_score([1] * 40 + [0] * 40, np.concatenate(scores)))

    assert separation(few_steps(home)) > 0.75
    assert 0.3 < separation(shared) < 0.7


def membership(ready: simulation.Simulation, rows: Encoded) -> np.ndarray:
    """Return how sure the model is of the right answer, for every row: the plainest membership score."""
    batch = ready.task.evaluation_batch(rows, np.arange(len(rows)), "cpu")
    candidates = {"images": batch["pixel_values"], "labels": batch["labels"]}
    return confidences(ready.trainable.model, candidates).numpy()
