"""The span family: exact below the width, empty at it; both LoRA factors; sums, local steps and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Deadline
from attacks.inversion.channels import Channel, cast_type, rounding_edge, spectrum_of
from attacks.inversion.span import search_encoder
from attacks.inversion.subspace import Candidates, separate, tail
from attacks.metrics import exact_sequence_rate, token_set_score
from attacks.registry import build
from tests.attacks import models

QUICK = Budget(steps=60_000, iterations=400, restarts=1)


def without_embedding(observation: Observation) -> Observation:
    """Hide the token rows, so that the span alone has to find the tokens among the whole vocabulary."""
    return observation.replace_tensors(
        {
            name: value
            for name, value in observation.tensors.items()
            if "wte" not in name and "embed" not in name
        }
    )


def classify(ids):
    return {"input_ids": ids, "labels": torch.arange(len(ids)) % 2}


def attack(name, observation, model, ids):
    result = build(name).run(observation, model, Prior(), QUICK, 0)
    sentences = [value.tolist() for value in result.of("sequence")]
    sets = result.of("token_set")
    score = token_set_score(sets[0].tolist(), ids.flatten().tolist()) if sets else None
    return exact_sequence_rate(sentences, ids.tolist()), score, len(sentences), result


def decoder(count: int, *, dtype=torch.float32, vocabulary: int = 600):
    model, ids = models.gpt2(vocabulary=vocabulary).to(dtype), models.sentences(count, 8, vocabulary)
    return model, ids, without_embedding(models.observe(model, classify(ids), models.text_loss))


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float32), (8, torch.float32), (15, torch.float64)])
def test_decoder_sentences_are_exact_below_the_width(count, dtype):
    model, ids, observation = decoder(count, dtype=dtype)
    exact, score, number, result = attack("span_exact", observation, model, ids)
    assert (exact, number) == (1.0, count)
    assert (score.precision, score.recall) == (1.0, 1.0)
    assert result.confidence > 0.99
    assert result.knowledge_used == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_width_the_exact_test_is_empty(dtype):
    model, ids, observation = decoder(16, dtype=dtype)
    exact, score, number, result = attack("span_exact", observation, model, ids)
    assert (exact, score, number) == (0.0, None, 0)
    assert result.reason


def test_at_the_width_the_outlier_test_still_finds_some_tokens():
    model, ids, observation = decoder(16)
    exact, score, _, result = attack("span", observation, model, ids)
    assert exact == 0.0
    assert score.precision > 0.9
    assert 0.2 < score.recall < 1.0
    assert result.confidence <= 0.5


@pytest.mark.parametrize(("clients", "expected"), [(5, 1.0), (15, 1.0), (16, 0.0)])
def test_a_secure_sum_is_a_larger_batch(clients, expected):
    model = models.gpt2(vocabulary=600).double()
    ids = models.sentences(clients, 8, 600)
    observation = models.observe_sum(model, [classify(row[None]) for row in ids], models.text_loss)
    exact, _, _, _ = attack("span_exact", without_embedding(observation), model, ids)
    assert exact == expected


@pytest.mark.parametrize("count", [1, 4])
def test_a_language_model_shows_all_but_the_last_token(count):
    model, ids = models.gpt2(classes=None, vocabulary=600), models.sentences(count, 8, 600)
    observation = without_embedding(
        models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    )
    assert attack("span", observation, model, ids[:, :-1])[0] == 1.0


@pytest.mark.parametrize("count", [1, 4])
def test_rotary_positions_are_searched_without_a_place(count):
    model, ids = models.llama(), models.sentences(count, 8, 500)
    observation = without_embedding(
        models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    )
    exact, score, number, _ = attack("span", observation, model, ids)  # the last from the head
    assert (exact, number) == (1.0, count)
    assert score.precision == 1.0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_encoder_sentences_are_found_by_search(count):
    model, ids = models.bert(vocabulary=500), models.sentences(count, 8, 500)
    observation = without_embedding(models.observe(model, classify(ids), models.text_loss))
    exact, _, number, _ = attack("span", observation, model, ids)
    assert (exact, number) == (1.0, count)


def test_an_encoder_too_large_to_enumerate_is_descended():
    model, ids = models.bert(vocabulary=500), models.sentences(6, 8, 500)
    observation = without_embedding(models.observe(model, classify(ids), models.text_loss))
    assert attack("span", observation, model, ids)[0] == 1.0


def test_sentences_of_different_length_are_told_apart_by_the_closing_token():
    model = models.bert(vocabulary=300, length=12)
    ids = models.sentences(2, 7, 300)
    ids[:, -1], ids[1, 4] = 2, 2
    ids[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    observation = models.observe(model, batch, models.text_loss, knowledge=Knowledge(special_tokens=(0, 2)))
    result = build("span").run(without_embedding(observation), model, Prior(), QUICK, 0)
    assert {tuple(value.tolist()) for value in result.of("sequence")} == {
        tuple(ids[0].tolist()),
        tuple(ids[1, :5].tolist()),
    }
    assert result.knowledge_used == ("special_tokens",)


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
@pytest.mark.parametrize("tokens", [4, 8, 16])
@pytest.mark.parametrize("first_step", [True, False])
def test_both_lora_laws(rank, tokens, first_step):
    """A is exact iff tokens <= r and B is not zero; B is exact iff tokens < r, already at the first step."""
    model = models.add_lora(models.gpt2(vocabulary=400), rank, ("attn.c_attn", "mlp.c_fc"), zero_b=first_step)
    count = max(1, tokens // 8)
    ids = models.sentences(count, tokens // count, 400)
    observation = models.observe(model, classify(ids), models.text_loss)
    assert not any(name.endswith("wte.weight") for name in observation.tensors)
    exact, score, _, _ = attack("span_exact", observation, model, ids)
    law = tokens < rank if first_step else tokens <= rank
    assert exact == (1.0 if law else 0.0)
    assert (score is not None and score.f1 == 1.0) == law


@pytest.mark.parametrize(
    ("rate", "epochs", "expected"), [(1e-4, 1, 1.0), (1e-3, 5, 1.0), (1e-2, 5, 1.0), (1e-1, 1, 0.5)]
)
def test_local_sgd_steps_are_tolerated(rate, epochs, expected):
    model, ids = models.gpt2(), models.sentences(4, 8, 2000)
    batches = [classify(ids[start : start + 2]) for start in (0, 2)] * epochs
    observation = models.observe_delta(model, batches, models.text_loss, learning_rate=rate)
    exact, score, _, _ = attack("span", without_embedding(observation), model, ids)
    assert exact >= expected
    assert score.precision == 1.0


def test_one_step_of_adamw_is_not_low_rank():
    model, ids = models.gpt2(vocabulary=400), models.sentences(4, 8, 400)
    observation = models.observe_delta(
        model, [classify(ids)], models.text_loss, learning_rate=1e-3, optimiser="adamw", weight_decay=0.01
    )
    result = build("span_exact").run(observation, model, Prior(), QUICK, 0)
    assert not result.items
    assert result.reason


def test_noise_hides_tokens_step_by_step():
    model, ids, clean = decoder(1)
    recalls = []
    for multiplier in (0.0, 1e-5, 1e-4, 1e-3, 1.0):
        _, score, _, _ = attack("span", models.noised(clean, multiplier), model, ids)
        assert score is None or score.precision > 0.8
        recalls.append(score.recall if score else 0.0)
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[1] > 0.8
    assert recalls[-1] == 0.0


def test_distance_equals_the_residual_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 3, generator=generator), torch.randn(3, 12, generator=generator)
    gradient = left.double() @ right.double()
    span = spectrum_of(Channel(name="x", gradient=gradient, bias=None)).span()
    assert span.rank == 3
    vector = torch.randn(12, generator=generator).double()
    fitted = right.double().T @ torch.linalg.lstsq(right.double().T, vector[:, None]).solution
    assert float(span.distance(vector)) == pytest.approx(
        float((vector - fitted[:, 0]).norm() / vector.norm()), abs=1e-6
    )


def test_strangers_alone_are_not_separated():
    generator = np.random.default_rng(0)
    separated = outlying = 0
    for codimension, rank in [(1, 7), (2, 6), (8, 120), (64, 64)] * 25:
        distances = torch.tensor(beta(codimension / 2, rank / 2).rvs(2_000, random_state=generator) ** 0.5)
        separated += separate(distances, most=rank, codimension=codimension, rank=rank) is not None
        edge = tail(distances, codimension=codimension, rank=rank)
        outlying += edge is not None and bool((distances <= edge).any())
    assert separated <= 3
    assert outlying <= 5


def test_a_search_without_any_candidate_finds_nothing() -> None:
    """Noise can leave not one place with a token that fits;
    then no sentence is proposed, and no scene is looked at.
    """
    nothing = Candidates(ids=(), threshold=1e-6, gap=1e9, exact=True)
    budget = Budget.quick()
    scene: Any = None
    assert (
        search_encoder(
            scene, nothing, lengths=(4, 8), budget=budget, deadline=Deadline(stop_at=float("inf")), seed=0
        )
        == []
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_told_and_is_noise_of_the_stated_size(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((64, 96), (200, 40)):
        exact = torch.randn(rows, columns, generator=generator)
        rounded = exact.to(dtype)
        assert cast_type(rounded) is cast_type(rounded.float()) is dtype
        assert cast_type(exact) is None
        assert rounding_edge(exact) == 0.0
        left = float(torch.linalg.matrix_norm((rounded.double() - exact.double()), 2))
        assert 0.6 * rounding_edge(rounded.float()) < left < 1.05 * rounding_edge(rounded.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [False, True])
def test_the_rank_of_a_cast_gradient_is_that_of_its_inputs(dtype: torch.dtype, stored: bool) -> None:
    """By the precision of the cast alone nearly every direction is rounding;
    as noise of known size it hides a few.
    """
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(96, 6, generator=generator), torch.randn(64, 6, generator=generator)
    gradient = (left @ right.T).to(dtype)
    gradient = gradient.float() if stored else gradient
    assert spectrum_of(Channel(name="x", gradient=gradient, bias=None)).span().rank == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_are_read_through_a_cast(dtype: torch.dtype) -> None:
    model, ids, observation = decoder(1)
    cast = observation.replace_tensors({n: t.to(dtype) for n, t in observation.tensors.items()})
    _, score, _, _ = attack("span", cast, model, ids)
    assert score is not None
    assert score.recall > 0.8
    assert score.precision > 0.8
