"""Which tokens were there: rows of the embedding, AdamW's decay, tied heads, sums and noise."""

from __future__ import annotations

import copy

import pytest
import torch

from attacks import Budget, Observation, Prior
from attacks.command import load_model
from attacks.inversion.optimisers import LocalSteps, common_ratio, scheduled, untouched
from attacks.inversion.tokens import beside_a_head, noise_per_entry, split_scores
from attacks.metrics import token_set_score
from attacks.registry import build
from tests.attacks import models

QUICK = Budget.quick()


def found(observation, model, ids):
    result = build("token_presence").run(observation, model, Prior(), QUICK, 0)
    return (
        token_set_score(result.of("token_set")[0].tolist(), ids.flatten().tolist()) if result.items else None
    )


def classify(ids):
    return {"input_ids": ids, "labels": torch.arange(len(ids)) % 2}


@pytest.mark.parametrize("make", [models.bert, models.gpt2])
@pytest.mark.parametrize("count", [1, 16])
def test_the_set_is_exact_whatever_the_batch(make, count):
    model, ids = make(vocabulary=1000, width=64), models.sentences(count, 8, 1000)
    score = found(models.observe(model, classify(ids), models.text_loss), model, ids)
    assert (score.precision, score.recall) == (1.0, 1.0)


def test_a_secure_sum_shows_the_union():
    model, ids = models.gpt2(vocabulary=500, width=32), models.sentences(20, 6, 500)
    score = found(
        models.observe_sum(model, [classify(row[None]) for row in ids], models.text_loss), model, ids
    )
    assert (score.precision, score.recall) == (1.0, 1.0)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_deltas_show_it_too_once_decay_is_taken_out(optimiser, steps):
    model, ids = models.gpt2(vocabulary=500, width=32), models.sentences(4, 8, 500)
    observation = models.observe_delta(
        model,
        [classify(ids)] * steps,
        models.text_loss,
        learning_rate=1e-3,
        optimiser=optimiser,
        weight_decay=0.01,
    )
    moved = (observation.tensors["transformer.wte.weight"].norm(dim=1) > 0).sum()
    assert moved == 500, "decay should have moved every row, else this test proves nothing"
    score = found(observation, model, ids)
    assert (score.precision, score.recall) == (1.0, 1.0)


def language(ids):
    return {"input_ids": ids, "labels": ids}


def peaked(sharpness: float):
    """Return a language model with a tied head whose predictions are as sure as a trained one's."""
    model = models.gpt2(vocabulary=500, width=64, classes=None, tied=True)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(sharpness)
    return model


@pytest.mark.parametrize("count", [1, 4, 8, 20])  # the last has more tokens than the layer is wide
def test_a_tied_head_hides_nothing(count):
    model, ids = models.gpt2(classes=None, tied=True), models.sentences(count, 8, 2000)
    observation = models.observe(model, language(ids), models.text_loss)
    assert bool((observation.tensors["transformer.wte.weight"].norm(dim=1) > 0).all())
    score = found(observation, model, ids)
    assert score.precision == 1.0
    assert score.recall > 0.99


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_a_tied_head_with_sure_predictions_hides_little(sharpness):
    model, ids = peaked(sharpness), models.sentences(4, 8, 500)
    clients = [language(row[None]) for row in ids]
    for observation in (
        models.observe(model, language(ids), models.text_loss),
        models.observe_sum(model, clients, models.text_loss),
        models.observe_delta(model, [language(ids)] * 2, models.text_loss, learning_rate=0.01),
        models.observe_delta(model, [language(ids)], models.text_loss, learning_rate=0.01, optimiser="adamw"),
    ):
        score = found(observation, model, ids)
        assert score.precision > 0.9
        assert score.recall > 0.6


@pytest.mark.parametrize("told", [False, True])
def test_rows_of_noise_beside_a_tied_head_show_nothing(told):
    for seed in range(20):
        rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(seed)).double()
        assert beside_a_head(rows, noise=1.0 if told else 0.0) is None


@pytest.mark.assets
def test_a_trained_model_with_a_tied_head_shows_its_words(shared):
    model = load_model(shared / "models" / "llama_stories260k")
    ids = models.sentences(4, 8, 512)
    score = found(models.observe(model, language(ids), models.text_loss), model, ids)
    assert score.precision > 0.9
    assert score.recall > 0.7


def test_noise_hides_tokens_step_by_step():
    model, ids = models.gpt2(), models.sentences(1, 8, 2000)
    clean = models.observe(model, classify(ids), models.text_loss)
    recalls = []
    for multiplier in (0.0, 1e-3, 1e-2, 1e-1, 1.0):
        score = found(models.noised(clean, multiplier), model, ids)
        assert score is None or score.precision > 0.8
        recalls.append(score.recall if score else 0.0)
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[:2] == [1.0, 1.0]
    assert recalls[-2:] == [0.0, 0.0]


def test_a_frozen_embedding_is_not_applicable():
    model, ids = models.gpt2(), models.sentences(1, 8, 2000)
    full = models.observe(model, classify(ids), models.text_loss)
    rest = full.replace_tensors({name: value for name, value in full.tensors.items() if "wte" not in name})
    result = build("token_presence").run(rest, model, Prior(), QUICK, 0)
    assert not result.applicable
    assert "not trained" in result.reason


def test_pure_noise_shows_nothing():
    generator = torch.Generator().manual_seed(0)
    flagged = 0
    for _ in range(50):
        rows = torch.randn(300, 16, generator=generator)
        flagged += split_scores(rows.norm(dim=1), noise=1.0, width=16) is not None
    assert flagged == 0


OPTIMISERS = {
    "sgd": (torch.optim.SGD, {}),
    "sgd with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd with nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


def trained(model, batches, optimiser: str, *, schedule: str = "constant", decay: float = 0.01, **untold):
    """Return the delta of a client that really takes these steps, and what the server is told of them."""
    client, (kind, options) = copy.deepcopy(model), OPTIMISERS[optimiser]
    step = kind(list(client.parameters()), lr=0.01, weight_decay=decay, **options)
    before = {name: value.detach().clone() for name, value in client.named_parameters()}
    for batch, rate in zip(batches, scheduled(0.01, len(batches), schedule), strict=True):
        step.param_groups[0]["lr"] = rate
        step.zero_grad()
        models.text_loss(client, batch).backward()
        step.step()
    facts = {
        "learning_rate": 0.01,
        "weight_decay": decay,
        "local_steps": len(batches),
        "optimiser": optimiser,
    }
    facts |= {"schedule": schedule, "momentum": options.get("momentum", 0.0)}
    delta = {name: (value - before[name]).detach() for name, value in client.named_parameters()}
    told = {name: value for name, value in facts.items() if name not in untold}
    return Observation(kind="delta", tensors=delta, metadata=told, broadcast=before)


@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 4])
def test_rows_without_a_gradient_are_computed_under_every_optimiser(optimiser, schedule, steps) -> None:
    model = models.bert(vocabulary=300, width=32, length=16)
    batches = [classify(models.sentences(2, 6, 300, seed=seed)) for seed in range(steps)]
    seen = trained(model, batches, optimiser, schedule=schedule)
    moved = (seen.tensors["bert.embeddings.word_embeddings.weight"].norm(dim=1) > 0).sum()
    assert moved >= 299, "decay should have moved every row, else this test proves nothing"
    read = build("token_presence").run(seen, model, Prior(), Budget.quick(), 0).of("token_set")[0]
    assert set(read.tolist()) == {
        token for batch in batches for token in batch["input_ids"].flatten().tolist()
    }


@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
@pytest.mark.parametrize("untold", ["weight_decay", "momentum", "schedule"])
def test_decay_momentum_and_schedule_need_not_be_known(optimiser: str, untold: str) -> None:
    model = models.bert(vocabulary=300, width=32, length=16)
    batches = [classify(models.sentences(2, 6, 300, seed=seed)) for seed in range(3)]
    seen = trained(model, batches, optimiser, **{untold: None})
    read = build("token_presence").run(seen, model, Prior(), Budget.quick(), 0).of("token_set")[0]
    assert set(read.tolist()) == {
        token for batch in batches for token in batch["input_ids"].flatten().tolist()
    }


def test_the_common_ratio_is_that_of_rows_without_a_gradient() -> None:
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    steps = LocalSteps(kind="sgd", rates=(0.1, 0.05, 0.02), weight_decay=0.3, momentum=0.9)
    moved = untouched(weight, steps)
    assert torch.allclose(moved, common_ratio(moved, weight) * weight, atol=1e-6)
    touched = moved.clone()
    touched[:20] += 1.0
    assert common_ratio(touched, weight) == pytest.approx(common_ratio(moved, weight), rel=1e-5)
    bent = untouched(weight, LocalSteps(kind="adam", rates=(0.01,) * 3, weight_decay=0.3))
    assert not torch.allclose(bent, common_ratio(bent, weight) * weight, atol=1e-3)


def test_noise_of_a_delta_counts_in_the_units_of_the_gradient() -> None:
    model, ids = models.bert(vocabulary=120, width=32, length=16), models.sentences(8, 8, 120, distinct=False)
    batch = {"input_ids": ids, "labels": torch.arange(8) % 2}
    delta = models.observe_delta(model, [batch, batch], models.text_loss, learning_rate=0.01)
    hidden = models.noised(delta, 1.0)
    assert noise_per_entry(hidden) == pytest.approx(1.0 / 0.02)
    assert noise_per_entry(hidden.replace_tensors(hidden.tensors, noise_deviation=0.3)) == pytest.approx(
        0.3 / 0.02
    )
    assert not build("token_presence").run(hidden, model, Prior(), Budget.quick(), 0).items
    assert build("token_presence").run(delta, model, Prior(), Budget.quick(), 0).items


def test_beside_a_tied_head_nothing_is_read_of_more_than_a_quarter_of_the_vocabulary() -> None:
    model = models.gpt2(vocabulary=120, classes=None, tied=True)
    for count, read in ((4, True), (12, False)):
        ids = models.sentences(count, 8, 120, distinct=False)
        seen = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
        assert (len(set(ids.flatten().tolist())) < 30) == read
        assert bool(build("token_presence").run(seen, model, Prior(), Budget.quick(), 0).items) == read
