"""FFM pre-training: who is next, what is spent, what is shown, and the same after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffm_secure.display.progress import round_line
from ffm_secure.config import compatibility
from ffm_secure.config import run_file as config
from ffm_secure.config.run_file import Controller, Lifecycle, RunConfig
from ffm_secure.engines import simulation
from ffm_secure.errors import DataError, Interrupted, PlanRefused
from ffm_secure.federation import NullCallback
from ffm_secure.lifecycle.base import ServerPhase
from ffm_secure.lifecycle.finetune import PlainGradient
from ffm_secure.lifecycle.pretrain import PreTrain, fixed, gain_per_cost, next_phase, plateau, rate
from ffm_secure.models.backbone import load_backbone
from ffm_secure.records import RoundRecord
from ffm_secure.report.markup import phase_column
from tests.federation.helpers import RECORD, finish, make, prepared, train


def record(number: int, phase: str, loss: float, **values: Any) -> RoundRecord:
    base = RoundRecord(
        round=number,
        phase=phase,
        cohort=(0, 1) if phase == "private" else (),
        survivors=(0, 1) if phase == "private" else (),
        loss=loss,
        metric=0.0,
        metric_name="accuracy",
        epsilon_spent=0.0,
        bytes_up=0,
        bytes_down=0,
        seconds=1.0,
        client_seconds=0.0,
    )
    return replace(base, **values)


def history(phases: str, losses: list[float]) -> tuple[RoundRecord, ...]:
    names = {"u": "public", "r": "private"}
    return tuple(
        record(i + 1, names[letter], loss)
        for i, (letter, loss) in enumerate(zip(phases, losses, strict=True))
    )


# --- controllers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("public", "private"), [(1, 1), (2, 1), (1, 3), (0, 1), (2, 0)])
def test_a_fixed_ratio_repeats(public: int, private: int) -> None:
    spec, past, seen = Controller(kind="fixed", public=public, private=private), (), ""
    for number in range(12):
        phase = fixed(past, spec)
        seen += "u" if phase == "public" else "r"
        past = (*past, record(number + 1, phase, 1.0))
    assert seen == (("u" * public + "r" * private) * 12)[:12]


@pytest.mark.parametrize(
    ("phases", "losses", "expected"),
    [
        ("", [], "public"),
        ("u", [2.0], "public"),  # too soon
        ("uu", [2.0, 2.0], "public"),  # nothing is known from before
        ("uuu", [2.0, 1.8, 1.6], "public"),  # it falls
        ("uuu", [2.0, 2.0, 2.0], "private"),  # it stands still
        ("uuu", [2.0, 1.8, 2.0], "public"),  # one bad evaluation does not turn the switch
        ("uuur", [2.0, 2.0, 2.0, 2.5], "private"),  # a source is kept for two phases at least
        ("uuurr", [2.0, 2.0, 2.0, 2.5, 2.4], "public"),
        ("uuurr", [2.0, 2.0, 2.0, 1.9, 1.7], "private"),
        ("uuurr", [2.0, 2.0, 2.0, 1.999, 1.995], "public"),  # less than one percent is no progress
    ],
)
def test_plateau_switches_late_and_not_by_noise(phases: str, losses: list[float], expected: str) -> None:
    assert plateau(history(phases, losses), Controller(kind="plateau", patience=2, margin=0.01)) == expected


def test_gain_per_cost_takes_what_helps_most_for_its_price() -> None:
    spec = Controller(kind="gain_per_cost", cost="seconds", window=1, retry=3)
    assert gain_per_cost((), spec) == "public"
    assert gain_per_cost(history("u", [2.0]), spec) == "private"
    past = history("uru", [2.0, 1.8, 1.7])
    assert rate(past, "private", spec) == pytest.approx(0.2)
    assert rate(past, "public", spec) == pytest.approx(0.1)
    assert gain_per_cost(past, spec) == "private"
    dear = (past[0], replace(past[1], seconds=10.0), past[2])
    assert gain_per_cost(dear, spec) == "public", "the same gain for ten times the seconds"
    assert gain_per_cost(history("urrrr", [2.0, 1.8, 1.6, 1.4, 1.2]), spec) == "public", (
        "the other is tried again"
    )


def test_gain_per_phase_takes_what_gained_most_whatever_it_sends_or_spends() -> None:
    spec = Controller(kind="gain_per_cost", cost="phases", window=1, retry=3)
    past = history("uru", [2.0, 1.8, 1.7])
    assert gain_per_cost(past, spec) == "private"
    dear = (past[0], replace(past[1], seconds=10.0, bytes_up=10**9, epsilon_spent=7.0), past[2])
    assert gain_per_cost(dear, spec) == "private"
    assert gain_per_cost(history("uru", [2.0, 2.1, 1.9]), spec) == "public", "what rose is repaired"


def test_gain_per_epsilon_prefers_what_spends_nothing_while_it_gains() -> None:
    spec = Controller(kind="gain_per_cost", cost="epsilon", window=1)
    past = (
        record(1, "public", 2.0, epsilon_spent=0.0),
        record(2, "private", 1.5, epsilon_spent=1.0),
        record(3, "public", 1.4, epsilon_spent=1.0),
    )
    assert gain_per_cost(past, spec) == "public"
    assert gain_per_cost((*past, record(4, "public", 1.5, epsilon_spent=1.0)), spec) == "private"


def played(controller: dict[str, Any], gains: dict[str, float], rounds: int, **private: Any) -> str:
    """Let a controller choose while each source lowers the loss by a fixed number a phase;
    `private` is a private record's cost.
    """
    spec, past, loss = Controller(kind="gain_per_cost", **controller), (), 10.0
    for number in range(rounds):
        phase = gain_per_cost(past, spec)
        loss -= gains[phase]
        past = (*past, record(number + 1, phase, loss, **(private if phase == "private" else {})))
    return "".join("u" if item.phase == "public" else "r" for item in past)


@pytest.mark.parametrize("cost", ["epsilon", "bytes"])
def test_what_costs_nothing_does_not_keep_a_run_from_a_source_that_gains(cost: str) -> None:
    """A public gain of a millionth a phase, for nothing, against a private one of 0.2;
    public phases are only tried again.
    """
    spent = {
        "bytes_up": 100,
        "epsilon_spent": 3.0,
    }  # of the largest spender: the same after each of these phases
    mostly_public, mostly_private = ("ur" + "uuuur" * 6)[:30], ("urur" + "rrrur" * 6)[:30]
    assert played({"cost": cost}, {"public": 1e-6, "private": 0.2}, 30, **spent) == mostly_private
    others: dict[str, tuple[dict[str, Any], float, float]] = {
        "a free gain of two percent comes first": ({}, 0.2, 0.4),
        "with 0 any free gain comes first": ({"least_gain": 0.0}, 1e-6, 0.2),
        "a private source that does harm is only tried again": ({}, 1e-6, -0.1),
    }
    for why, (options, public, private) in others.items():
        phases = played({"cost": cost, **options}, {"public": public, "private": private}, 30, **spent)
        assert phases == mostly_public, why


def test_a_private_phase_costs_one_charge_whoever_has_spent_most() -> None:
    spec = Controller(kind="gain_per_cost", cost="epsilon", window=2)
    losses = [2.0, 1.8, 1.6]
    past = tuple(
        record(number + 1, "private", loss, epsilon_spent=epsilon)
        for number, (loss, epsilon) in enumerate(zip(losses, [5.8, 5.8, 8.0], strict=True))
    )
    assert rate(past, "private", spec) == pytest.approx(0.2)
    assert rate(past[:2], "private", spec) == pytest.approx(0.2), (
        "the largest epsilon stood still, yet a cohort was charged"
    )


@pytest.mark.parametrize("most", [0, 1, 3])
def test_private_rounds_never_exceed_what_the_noise_was_calibrated_for(most: int) -> None:
    spec = Lifecycle(
        kind="pretrain",
        batch_size=4,
        learning_rate=0.1,
        local_steps=1,
        controller=Controller(public=1, private=2),
    )
    past: tuple[RoundRecord, ...] = ()
    for number in range(9):
        past = (*past, record(number + 1, next_phase(past, spec, private_rounds=most), 1.0))
    assert sum(item.phase == "private" for item in past) == most


# --- runs ---------------------------------------------------------------------------------------------------


def pretraining(
    *,
    rounds: int = 4,
    controller: dict[str, Any] | None = None,
    privacy: dict[str, Any] | None = None,
    **more: Any,
) -> RunConfig:
    lifecycle = {
        "kind": "pretrain",
        "local_steps": 1,
        "batch_size": 8,
        "learning_rate": 0.1,
        "public_examples": 100,
        "controller": controller or {"kind": "fixed", "public": 1, "private": 1},
        **more,
    }
    return make(
        federation={"rounds": rounds, "cohort": 4, "lifecycle": lifecycle},
        privacy=privacy or {"unit": "none", "reason": "test data"},
    )


@pytest.mark.parametrize(
    ("public", "private", "rounds"), [(1, 1, 5), (2, 1, 7), (1, 3, 6), (3, 2, 4), (1, 0, 3)]
)
def test_the_plan_counts_private_rounds_as_the_controller_plays_them(
    public: int, private: int, rounds: int
) -> None:
    made = pretraining(rounds=rounds, controller={"kind": "fixed", "public": public, "private": private})
    past: tuple[RoundRecord, ...] = ()
    for number in range(rounds):
        past = (*past, record(number + 1, fixed(past, made.federation.lifecycle.controller), 1.0))
    assert compatibility.private_rounds(made) == sum(item.phase == "private" for item in past)


def test_only_private_phases_spend_and_a_stopped_run_ends_the_same(tmp_path: Path) -> None:
    made = pretraining(privacy=RECORD)
    built, whole = train(made, tmp_path / "whole")
    assert [item.phase for item in whole.records] == ["public", "private", "public", "private"]
    assert [len(item.cohort) for item in whole.records] == [0, 4, 0, 4]
    assert [item.bytes_up > 0 for item in whole.records] == [False, True, False, True]
    entries = [entry for entry in built.ledger.entries() if entry.kind == "reserve"]
    assert sorted({entry.round for entry in entries}) == [2, 4]
    assert len(entries) == 8
    assert built.epsilon() <= made.privacy.epsilon
    assert built.mechanism.event("x") is not None
    assert [item.alignment is None for item in whole.records] == [True, False, False, False]
    assert all(-1.0 <= item.alignment <= 1.0 for item in whole.records if item.alignment is not None)

    class Stop(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            if record.round == 2:
                raise KeyboardInterrupt

    part = simulation.build(prepared(made), tmp_path / "part")
    with pytest.raises(Interrupted):
        finish(part, tmp_path / "part", callback=Stop())
    _, resumed = train(made, tmp_path / "part")
    assert torch.equal(resumed.state.vector, whole.state.vector)
    assert [item.phase for item in resumed.records] == [item.phase for item in whole.records]
    assert [item.alignment for item in resumed.records] == [item.alignment for item in whole.records]
    phase, agreement = phase_column(whole.records, trained=40_000)
    assert (phase.field, agreement.field) == ("phase", "alignment")
    assert "by chance within ±0.01" in agreement.heading
    assert "public phase" in round_line(whole.records[0], rounds=4, budget=8.0)


def test_decisions_do_not_change_when_private_raw_losses_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very same run with every client's own loss multiplied: the same phases, the same model."""
    made = pretraining(controller={"kind": "plateau", "patience": 1, "margin": 0.3}, rounds=5)
    _, plain = train(made, tmp_path / "plain")
    original = PlainGradient.loss
    monkeypatch.setattr(PlainGradient, "loss", lambda self: 7.0 * original(self))
    _, changed = train(made, tmp_path / "changed")
    phases = [item.phase for item in plain.records]
    assert phases == [item.phase for item in changed.records]
    assert set(phases) == {"public", "private"}
    assert torch.equal(plain.state.vector, changed.state.vector)


@pytest.mark.parametrize("kind", ["masked_lm", pytest.param("causal_lm", marks=pytest.mark.slow)])
def test_from_scratch_takes_the_architecture_alone_and_learns(kind: str, tmp_path: Path) -> None:
    name = {"masked_lm": "tiny-bert", "causal_lm": "tiny-gpt2"}[kind]
    teacher = load_backbone(f"builtin:{name}", kind=kind, labels=None, base=Path(), seed=50)
    teacher.model.save_pretrained(tmp_path / "checkpoint")
    teacher.tokenizer.save_pretrained(tmp_path / "checkpoint")
    lifecycle = {
        "kind": "pretrain",
        "local_steps": 8,
        "batch_size": 16,
        "learning_rate": 0.5,
        "public_examples": 60,
    }
    data = "builtin:clinic_notes?size=240&validation=40"

    def made(weights: str, seed: int = 3) -> RunConfig:
        return make(
            seed=seed,
            task={"kind": kind, "data": data, "clients": 2, "max_length": 16, "evaluation_examples": 40},
            model={"name": str(tmp_path / "checkpoint"), "weights": weights, "trainable": {"kind": "full"}},
            federation={"rounds": 2, "cohort": 2, "lifecycle": lifecycle},
        )

    starts = [prepared(made(*words)) for words in (("checkpoint",), ("random",), ("random",), ("random", 4))]
    _, drawn, again, other = (start.trainable.flatten() for start in starts)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other), "the seed draws the weights"
    assert starts[0].trainable.layout == starts[1].trainable.layout, "the architecture is kept"
    words = max(starts[0].trainable.layout, key=lambda item: torch.Size(item[1]).numel())[0]
    first, second = (start.trainable.tensors()[words].flatten() for start in starts[:2])
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, dim=0))) < 0.1, (
        "no weight is taken over"
    )

    built, trained = train(made("random"), tmp_path / "run")
    before = built.server.evaluate(drawn).loss
    assert [record.phase for record in trained.records] == ["public", "private"]
    assert trained.records[0].loss < before - 0.3, "a public phase learns"
    assert trained.records[1].loss < trained.records[0].loss, "and a private one goes on"


def test_without_a_number_of_its_own_a_public_phase_takes_as_many_steps_as_a_client() -> None:
    reached = {}
    for asked in (0, 1, 2):
        ready = prepared(pretraining(public_steps=asked))
        start = ready.trainable.flatten()
        phase = ServerPhase(
            config=ready.config,
            trainable=ready.trainable,
            task=ready.task,
            public=ready.task.encode(ready.data.public),
            round=1,
            device="cpu",
        )
        reached[asked] = PreTrain().learn_in_public(phase, ready.strategy.start(start))
        assert not torch.equal(reached[asked], start), "the server learned nothing"
    assert torch.equal(reached[0], reached[1])
    assert not torch.equal(reached[1], reached[2])


def test_public_rows_are_no_longer_private(tmp_path: Path) -> None:
    made = pretraining()
    ready = prepared(made)
    whole = simulation.load_dataset(made, Path.cwd())
    assert len(ready.data.public) == 100
    assert len(ready.dataset.train) == len(whole.train) - 100
    assert sum(len(part) for part in ready.parts) == len(ready.dataset.train)
    assert "public phases of 1 steps on 100 public rows, at most 2 private rounds" in "; ".join(
        ready.trainable.description
    )


# --- rules for LoRA -----------------------------------------------------------------------------------------

CLIENT_CLIPS = {"unit": "client", "epsilon": 1000.0, "delta": 0.01, "clip_norm": 0.05, "noise": "seeded"}
HARD_ON_MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "half the learning rate": {"strategy": {"learning_rate": 0.5}},
    "ranks 1 and 2": {"trainable": {"kind": "lora", "ranks": [1, 2]}},
    "a small clip": {"privacy": CLIENT_CLIPS, "protection": {"kind": "secagg", "coordinate_bound": 20.0}},
}


def by_rule(kind: str, rounds: int, changed: dict[str, Any] | None = None, **lifecycle: Any) -> RunConfig:
    changed = changed or {}
    made = pretraining(rounds=rounds, privacy=changed.get("privacy"), **lifecycle)
    strategy = replace(made.federation.strategy, kind=kind, **changed.get("strategy", {}))
    trainable = replace(made.model.trainable, **{"kind": "lora", "rank": 2, **changed.get("trainable", {})})
    protection = replace(made.protection, **changed.get("protection", {"coordinate_bound": 20.0}))
    return replace(
        made,
        model=replace(made.model, trainable=trainable),
        federation=replace(made.federation, strategy=strategy),
        protection=protection,
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind)
        for case in HARD_ON_MESSAGES
        for kind in ("flora", "fedex")
        if (case, kind) != ("ranks 1 and 2", "fedex")
    ],
)
def test_what_was_learned_in_public_survives_a_private_phase_whole(
    case: str, kind: str, tmp_path: Path
) -> None:
    """In the private phase nobody learns, so the model must stay as the public phase left it,
    whatever bounds a message.
    """
    still = {"learning_rate": 1e-12, "public_learning_rate": 0.3, "public_steps": 4}
    built, public = train(by_rule(kind, 1, HARD_ON_MESSAGES[case], **still), tmp_path / "public")
    _, private = train(by_rule(kind, 2, HARD_ON_MESSAGES[case], **still), tmp_path / "private")
    assert [item.phase for item in private.records] == ["public", "private"]
    rule: Any = built.prepared.strategy

    def dense(vector: torch.Tensor) -> torch.Tensor:
        weights = rule.pick(vector, [item.weight for item in rule.adapters])
        return torch.cat((weights + rule.products(vector), rule.pick(vector, rule.head))).double()

    start = dense(prepared(built.config).trainable.flatten())
    learned, kept = dense(public.state.vector) - start, dense(private.state.vector) - start
    assert learned.norm() > 0.1
    assert float(kept @ learned / (learned @ learned)) == pytest.approx(1.0, abs=0.01)
    if kind == "flora":
        assert not rule.pick(public.state.vector, rule.b).any(), "the adapters start anew"


def test_flora_resumes_in_a_private_phase_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    made = by_rule("flora", 4, {"privacy": RECORD})
    _, whole = train(made, tmp_path / "whole")

    class Stop(NullCallback):
        def round_finished(self, record: RoundRecord) -> None:
            if record.round == 3:
                raise KeyboardInterrupt

    part = simulation.build(prepared(made), tmp_path / "part")
    with pytest.raises(Interrupted):
        finish(part, tmp_path / "part", callback=Stop())
    _, resumed = train(made, tmp_path / "part")
    assert [item.phase for item in resumed.records] == ["public", "private", "public", "private"]
    assert torch.equal(resumed.state.vector, whole.state.vector)
    assert [item.alignment for item in resumed.records] == [item.alignment for item in whole.records]


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_explained() -> None:
    with pytest.raises(config.ConfigError, match="exactly one of them"):
        pretraining(public_examples=0)
    with pytest.raises(config.ConfigError, match="cannot both be 0"):
        pretraining(controller={"kind": "fixed", "public": 0, "private": 0})
    with pytest.raises(PlanRefused, match="gain per epsilon has no meaning"):
        compatibility.check(pretraining(controller={"kind": "gain_per_cost", "cost": "epsilon"}))
    clock = {"kind": "gain_per_cost", "cost": "seconds"}
    for privacy in (
        RECORD,
        {**RECORD, "unit": "person", "records_per_person": 2, "person_column": "patient"},
        CLIENT_CLIPS,
    ):
        with pytest.raises(
            PlanRefused, match=f"cost = 'seconds' with unit = '{privacy['unit']}'.* choose epsilon or bytes"
        ):
            compatibility.check(pretraining(controller=clock, privacy=privacy))
    compatibility.check(pretraining(controller=clock))  # without a promise the clock breaks none
    skipping = pretraining(controller={"kind": "plateau"})
    skipping = replace(skipping, federation=replace(skipping.federation, evaluate_every=2))
    with pytest.raises(PlanRefused, match="the loss of every round"):
        compatibility.check(skipping)
    with pytest.raises(DataError, match="leaves -"):
        prepared(pretraining(public_examples=1_000_000))
