"""Averaging LoRA: each rule against the dense mean of the clients' weights,
and what plain averaging misses.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from defenses.dp.per_sample import PerSampleEngine
from ffm_secure.config import run_file as config
from ffm_secure.config.compatibility import LORA_RULES
from ffm_secure.config.run_file import Strategy
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.registry import STRATEGIES
from ffm_secure.strategies import build, merges_into_base
from ffm_secure.strategies.lora_rules import LoraRule
from ffm_secure.trainable import TrainableModel, attach, replicate
from tests.federation.helpers import RECORD, SECAGG, make, train
from tests.trainable.test_trainable import backbone_of, losses, prepare, same_length, shake

CLIENTS = 3
EXACT = [kind for kind in LORA_RULES if STRATEGIES.load(kind).exact]


def lora_for(kind: str, name: str = "tiny-bert", **options: Any) -> tuple[TrainableModel, LoraRule]:
    spec = {"kind": "lora", "rank": 3, **options, "folded": merges_into_base(Strategy(kind=kind))}
    task = "text_classification"
    backbone = load_backbone(f"builtin:{name}", kind=task, labels=3, base=Path(), seed=5)
    trainable = attach(backbone, spec, task_kind=task, seed=3)
    strategy: Any = build(Strategy(kind=kind), trainable, seed=4)
    shake(trainable)
    return trainable, strategy


def dense(rule: LoraRule, vector: torch.Tensor) -> torch.Tensor:
    """Return every adapted weight as the model uses it: what it was, plus the product; then the head."""
    parts = []
    for item in rule.adapters:
        weight = rule.view(vector, item.weight) if item.weight else 0.0
        parts.append((weight + rule.product(vector, item)).reshape(-1))
    return torch.cat([*parts, rule.pick(vector, rule.head)])


def client_changes(rule: Any, vector: torch.Tensor, step: int, seed: int) -> list[torch.Tensor]:
    """Draw what three clients changed, in the tensors the rule trains."""
    stream = torch.Generator().manual_seed(seed)
    changes = []
    for _ in range(CLIENTS):
        change = torch.zeros_like(vector)
        names = rule.trains(step)
        rule.put(change, names, 0.1 * torch.randn(rule.count(names), generator=stream))
        changes.append(change)
    return changes


def one_round(strategy: Any, state: Any, changes: list[torch.Tensor]) -> Any:
    messages = [strategy.message(state.vector, change, state.round) for change in changes]
    assert {len(message) for message in messages} == {strategy.size(len(state.vector))}
    return strategy.step_by_mean(state, torch.stack(messages).double().mean(0))


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_aggregate_is_the_mean_of_the_clients_weights(kind: str, name: str) -> None:
    trainable, rule = lora_for(kind, name)
    state = rule.start(trainable.flatten())
    for step in range(3):
        changes = client_changes(rule, state.vector, step, seed=step)
        wanted = torch.stack([dense(rule, state.vector + change) for change in changes]).mean(0)
        before, state = state, one_round(rule, state, changes)
        assert (dense(rule, state.vector) - wanted).abs().max() < 1e-5
        assert (dense(rule, state.vector) - dense(rule, before.vector)).abs().max() > 1e-3
    assert state.round == 3


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_a_b_at_home_times_the_mean_a_is_the_mean_of_its_products(name: str) -> None:
    """FedSA: the model of every client is the mean over all clients' A of what its own B makes of them."""
    trainable, rule = lora_for("fedsa", name)
    state = rule.start(trainable.flatten())
    changes = client_changes(rule, state.vector, 0, seed=1)
    after = one_round(rule, state, changes)
    mean_head = torch.stack([rule.pick(state.vector + change, rule.head) for change in changes]).mean(0)
    torch.testing.assert_close(rule.pick(after.vector, rule.head), mean_head, atol=1e-6, rtol=1e-5)
    for own in changes:
        kept = rule.pick(state.vector + own, rule.b)
        crossed, model = [], after.vector.clone()
        for place, part in zip(rule.home, kept.split([p.stop - p.start for p in rule.home]), strict=True):
            model[place] = part
        for other in changes:
            mixed = model.clone()
            for a in rule.a:
                mixed[rule.places[a]] = (state.vector + other)[rule.places[a]]
            crossed.append(rule.products(mixed))
        torch.testing.assert_close(rule.products(model), torch.stack(crossed).mean(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(rule.pick(after.vector, rule.b), rule.pick(state.vector, rule.b))


def test_plain_averaging_misses_the_mean() -> None:
    """The control: averaging A and B apart is biased, and by more than any rule's rounding."""
    trainable, rule = lora_for("ffa")
    plain = build(Strategy(kind="average"), trainable)
    vector = trainable.flatten()
    stream = torch.Generator().manual_seed(1)
    changes = [0.1 * torch.randn(vector.shape, generator=stream) for _ in range(CLIENTS)]
    wanted = torch.stack([dense(rule, vector + change) for change in changes]).mean(0)
    state = plain.step_by_mean(plain.start(vector), torch.stack(changes).double().mean(0))
    assert (dense(rule, state.vector) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("kind", LORA_RULES)
def test_every_rule_is_linear_in_what_is_sent(kind: str) -> None:
    """The server needs the sum alone: the same mean, the same next model, whoever sent what."""
    trainable, rule = lora_for(kind)
    assert rule.linear
    state = rule.start(trainable.flatten())
    first, second, third = (
        rule.message(state.vector, change, 0) for change in client_changes(rule, state.vector, 0, seed=2)
    )
    mean = torch.stack([first, second, third]).double().mean(0)
    other = torch.stack([first + second, third, torch.zeros_like(first)]).double().mean(0)
    torch.testing.assert_close(
        rule.step_by_mean(state, mean).vector, rule.step_by_mean(state, other).vector, atol=1e-6, rtol=1e-6
    )


def test_what_travels() -> None:
    sizes = {}
    for kind in LORA_RULES:
        trainable, rule = lora_for(kind)
        a, b, head = rule.count(rule.a), rule.count(rule.b), rule.count(rule.head)
        weights = rule.count([item.weight for item in rule.adapters if item.weight])
        sizes[kind] = (rule.size(trainable.size), {"a": a, "b": b, "head": head, "weights": weights})
    for kind in ("ffa", "rolora", "fedsvd"):
        sent, parts = sizes[kind]
        assert sent == max(parts["a"], parts["b"]) + parts["head"]
    assert sizes["fedex"][0] == sum(sizes["fedex"][1].values())
    assert sizes["fedsa"][0] == sizes["fedsa"][1]["a"] + sizes["fedsa"][1]["head"]
    assert sizes["flora"][0] == sizes["flora"][1]["weights"] + sizes["flora"][1]["head"]


def test_fedsvd_leaves_orthonormal_rows_even_where_b_is_zero() -> None:
    trainable, rule = lora_for("fedsvd")
    vector = trainable.flatten()
    for item in rule.adapters[:1]:
        rule.view(vector, item.b).zero_()
    state = rule.step_by_mean(rule.start(vector), torch.zeros(rule.size(0), dtype=torch.float64))
    for item in rule.adapters:
        a = rule.view(state.vector, item.a)
        torch.testing.assert_close(a @ a.t(), torch.eye(len(a)), atol=1e-5, rtol=0.0)


def test_fedsvd_refuses_a_rank_larger_than_a_module_before_anything_is_charged(tmp_path: Path) -> None:
    """The keys and values of this model are 32 x 64: a product has at most 32 singular values."""
    trainable, rule = lora_for("fedsvd", "tiny-llama", rank=32)
    state = rule.start(trainable.flatten())
    changes = client_changes(rule, state.vector, 0, seed=1)
    wanted = torch.stack([dense(rule, state.vector + change) for change in changes]).mean(0)
    assert (
        dense(rule, one_round(rule, state, changes).vector) - wanted
    ).abs().max() < 1e-4 * wanted.abs().max()
    with pytest.raises(ModelError, match=r"rank = 33 .* 32 x 64, .* lower the rank to 32"):
        lora_for("fedsvd", "tiny-llama", rank=33)
    lora_for("ffa", "tiny-llama", rank=33)  # the control: the other rules take any rank
    task = {"kind": "text_classification", "data": "builtin:clinic_notes?size=60&validation=20", "clients": 4}
    made = make(
        task=task,
        model={"name": "builtin:tiny-llama", "trainable": {"kind": "lora", "rank": 64}},
        federation={"strategy": {"kind": "fedsvd"}},
        privacy=RECORD,
    )
    with pytest.raises(ModelError, match="rank = 64"):
        train(made, tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_flora_takes_clients_of_different_ranks() -> None:
    trainable, rule = lora_for("flora", ranks=(1, 3))
    state = one_round(
        rule, rule.start(trainable.flatten()), client_changes(rule, trainable.flatten(), 0, seed=3)
    )
    change = client_changes(rule, state.vector, 1, seed=4)[0]
    for client, rank in ((0, 1), (1, 3), (2, 1)):
        mask = rule.mask(client)
        assert mask is not None
        local = mask * (state.vector + change)
        for item in rule.adapters:
            assert torch.linalg.matrix_rank(rule.product(local, item)) == rank
        assert torch.equal(
            local[rule.places[rule.head[0]]], (state.vector + change)[rule.places[rule.head[0]]]
        )


@pytest.mark.parametrize("kind", [kind for kind in LORA_RULES if kind != "fedsa"])
def test_a_public_phase_leaves_the_same_model_to_broadcast(kind: str) -> None:
    """FLoRA folds what the server learned and starts anew, with another A each time;
    the other rules change nothing.
    """
    trainable, rule = lora_for(kind)
    vector = trainable.flatten()
    first, again, later = (rule.after_public(vector, phase) for phase in (3, 3, 4))
    torch.testing.assert_close(dense(rule, first), dense(rule, vector), atol=1e-6, rtol=1e-5)
    assert torch.equal(first, again)
    if kind == "flora":
        assert rule.pick(vector, rule.b).any()
        assert not rule.pick(first, rule.b).any()
        assert not torch.equal(rule.pick(first, rule.a), rule.pick(later, rule.a))
    else:
        assert torch.equal(first, vector)


@pytest.mark.parametrize("kind", [kind for kind in LORA_RULES if kind != "fedsa"])
def test_two_changes_are_compared_as_the_model_feels_them(kind: str) -> None:
    """The cosine of a public and a private change against that of the
    dense weights and the head before and after.
    """
    trainable, rule = lora_for(kind)
    start = one_round(
        rule, rule.start(trainable.flatten()), client_changes(rule, trainable.flatten(), 0, seed=1)
    )
    start = one_round(rule, start, client_changes(rule, start.vector, 1, seed=2))
    changes = client_changes(rule, start.vector, start.round, seed=3)
    public = replace(start, vector=rule.after_public(start.vector + changes[0], 3))
    private = one_round(rule, public, changes)
    seen = [(start.vector, public.vector), (public.vector, private.vector)]
    kept = [rule.moved(before, after) for before, after in seen]
    moved = [dense(rule, after.double()) - dense(rule, before.double()) for before, after in seen]
    wanted = float(torch.nn.functional.cosine_similarity(*moved, dim=0))
    assert rule.cosine(*kept) == pytest.approx(wanted, abs=1e-4)
    assert rule.cosine(kept[1], kept[1]) == pytest.approx(1.0)
    assert wanted > 0.1, "one of the three clients learned what the server learned"
    plain = float(torch.nn.functional.cosine_similarity(*(after - before for before, after in seen), dim=0))
    if kind in ("fedsvd", "flora"):
        assert abs(plain - wanted) > 0.03, "the factors themselves were turned or drawn anew"
    if kind == "rolora":
        other = one_round(rule, private, client_changes(rule, private.vector, private.round, seed=4))
        assert rule.cosine(kept[0], rule.moved(private.vector, other.vector)) is None, (
            "B was trained there, A here"
        )


@pytest.mark.parametrize(
    ("kind", "wider"), [("ffa", True), ("fedsvd", True), ("fedex", True), ("flora", False)]
)
def test_chance_reaches_beyond_the_reports_floor_under_rules_with_fewer_directions(
    kind: str, wider: bool
) -> None:
    trainable, rule = lora_for(kind)
    start = one_round(
        rule, rule.start(trainable.flatten()), client_changes(rule, trainable.flatten(), 0, seed=1)
    ).vector
    cosines = []
    for draw in range(40):
        ends = [start]  # the second phase begins where the first one ended
        for phase, change in enumerate(client_changes(rule, start, 0, seed=draw)[:2]):
            ends.append(rule.after_public(ends[-1] + change, 2 * draw + phase))
        cosines.append(abs(rule.cosine(*(rule.moved(*pair) for pair in pairwise(ends)))))
    floor = 2 / len(start) ** 0.5
    reached = torch.tensor(cosines).quantile(0.95).item()
    assert (reached > 1.2 * floor) == wider, (reached, floor)


def test_rules_need_factors() -> None:
    trainable, _, _ = prepare("tiny-bert", "text_classification", {"kind": "head"})
    with pytest.raises(ModelError, match=r"needs model\.trainable\.kind = 'lora'"):
        build(Strategy(kind="ffa"), trainable)
    assert set(LORA_RULES) == {"ffa", "rolora", "fedsvd", "fedex", "flora", "fedsa"}
    with pytest.raises(config.ConfigError, match="different ranks need"):
        make(model={"name": "builtin:tiny-vit", "trainable": {"kind": "lora", "ranks": [2, 4]}})


@pytest.mark.parametrize(
    ("kind", "trainable", "rounds"),
    [
        ("rolora", {"kind": "lora", "rank": 2}, 2),
        ("flora", {"kind": "lora", "ranks": [1, 2]}, 1),
        pytest.param("ffa", {"kind": "lora", "rank": 2}, 1, marks=pytest.mark.slow),
        pytest.param("fedsvd", {"kind": "lora", "rank": 2}, 2, marks=pytest.mark.slow),
        pytest.param("fedex", {"kind": "lora", "rank": 2}, 1, marks=pytest.mark.slow),
        pytest.param("average", {"kind": "lora_xs", "rank": 4}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_under_noise_and_masks(
    kind: str, trainable: dict[str, Any], rounds: int, tmp_path: Path
) -> None:
    lifecycle = {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1}
    made = make(
        model={"name": "builtin:tiny-vit", "trainable": trainable},
        federation={"rounds": rounds, "cohort": 4, "lifecycle": lifecycle, "strategy": {"kind": kind}},
        privacy=RECORD,
        protection=SECAGG,
    )
    built, trained = train(made, tmp_path)
    assert [len(record.survivors) for record in trained.records] == [4] * rounds
    assert built.epsilon() <= made.privacy.epsilon
    start = attach(
        built.prepared.backbone,
        {**trainable, "folded": merges_into_base(Strategy(kind=kind))},
        task_kind="image_classification",
        seed=made.seed,
    )
    moved = {
        name: not torch.equal(value, start.tensors()[name])
        for name, value in _named(built.trainable, trained.state.vector).items()
    }
    still = {"ffa": ".lora_A.", "flora": ".lora_B."}.get(kind, "nothing")
    assert all(changed != (still in name) for name, changed in moved.items())
    if kind == "rolora":
        assert built.spec.codec.size < built.trainable.size


def _named(trainable: TrainableModel, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    trainable.load_vector(vector)
    return trainable.tensors()


# --- a core between frozen factors --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_a_core_starts_as_the_backbone_and_trains_per_sample(name: str, tmp_path: Path) -> None:
    kind = "text_classification"
    trainable, task, encoded = prepare(name, kind, {"kind": "lora_xs", "rank": 4})
    backbone = backbone_of(name, kind)
    with torch.no_grad():
        plain = task.losses(backbone.model, task.batch(encoded, range(4), device="cpu"))
    torch.testing.assert_close(losses(trainable, task, encoded).detach(), plain)
    assert all(shape == (4, 4) for n, shape in trainable.layout if "lora_core" in n)
    shake(trainable)
    assert torch.equal(losses(replicate(trainable), task, encoded), losses(trainable, task, encoded))
    parameters = list(trainable.parameters.values())
    wanted = [
        torch.autograd.grad(losses(trainable, task, encoded, [row]).sum(), parameters) for row in range(4)
    ]
    with PerSampleEngine(trainable.model, parameters=trainable.parameters) as engine:
        found = engine.per_sample(lambda: losses(trainable, task, encoded))
    for place, key in enumerate(trainable.parameters):
        slow = torch.stack([gradients[place] for gradients in wanted])
        assert (found[key] - slow).norm() <= 2e-6 * (1 + slow.norm())
    trainable.export(tmp_path, "base")
    loaded = PeftModel.from_pretrained(backbone.model, str(tmp_path)).eval()
    with torch.inference_mode():
        theirs, own = (model(**same_length(trainable.backbone)).logits for model in (loaded, trainable.model))
    torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-4)
    again, _, _ = prepare(name, kind, {"kind": "lora_xs", "rank": 4})
    again.import_(tmp_path)
    assert torch.equal(again.flatten(), trainable.flatten())
