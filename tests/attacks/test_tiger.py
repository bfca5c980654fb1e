"""Soft tokens descending to row spaces:
exact without noise, past the span under mild noise, nothing at noise one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Reconstruction
from attacks.inversion.channels import Channel, spectrum_of
from attacks.inversion.tiger import noise_in, target_of
from attacks.metrics import exact_sequence_rate, token_set_score
from attacks.registry import build
from tests.attacks import models

LENGTH, WIDTH, VOCABULARY = 6, 64, 300


def make(kind: str) -> torch.nn.Module:
    if kind == "encoder":
        return models.bert(vocabulary=VOCABULARY, width=WIDTH, length=16)
    return models.gpt2(
        vocabulary=VOCABULARY, width=WIDTH, length=16, classes=2 if kind == "decoder" else None, tied=False
    )


def client(kind: str, count: int = 1, seed: int = 1) -> tuple[torch.nn.Module, torch.Tensor, Observation]:
    """Return a model, its client's texts, and the update without token rows,
    so that the whole vocabulary is open.
    """
    model, ids = make(kind), models.sentences(count, LENGTH, VOCABULARY, seed=seed)
    labels = ids if kind == "language model" else torch.arange(count) % 2
    knowledge = Knowledge(batch_size=count, sequence_length=LENGTH)
    seen = models.observe(model, {"input_ids": ids, "labels": labels}, models.text_loss, knowledge=knowledge)
    rows = ("wte", "word_embeddings", "lm_head")
    kept = {name: value for name, value in seen.tensors.items() if not any(part in name for part in rows)}
    return model, ids, seen.replace_tensors(kept)


def run(name: str, seen: Observation, model: torch.nn.Module, iterations: int = 400) -> Reconstruction:
    return build(name).run(seen, model, Prior(), Budget(steps=60_000, iterations=iterations, restarts=1), 0)


def share(found: Reconstruction, ids: torch.Tensor) -> float:
    tokens = {token for value in found.of("sequence") + found.of("token_set") for token in value.tolist()}
    return token_set_score(tokens, ids.flatten().tolist()).f1


@pytest.mark.parametrize("kind", ["encoder", "decoder", "language model"])
def test_a_clean_update_is_read_word_for_word(kind: str) -> None:
    model, ids, seen = client(kind)
    found = run("tiger", seen, model)
    wanted = ids[:, :-1] if kind == "language model" else ids  # a last token is only predicted
    assert exact_sequence_rate([value.tolist() for value in found.of("sequence")], wanted.tolist()) == 1.0
    assert found.confidence > 0.7
    assert found.knowledge_used == ("batch_size", "sequence_length")


def test_the_number_of_sentences_need_not_be_known() -> None:
    model, ids, seen = client("decoder")
    found = run("tiger", replace(seen, knowledge=Knowledge(sequence_length=LENGTH)), model)
    assert found.items[0].value.tolist() == ids[0].tolist()
    assert found.knowledge_used == ("sequence_length",)


def test_an_adaptive_optimiser_is_refused() -> None:
    model, ids, _ = client("decoder")
    batch = {"input_ids": ids, "labels": torch.tensor([1])}
    seen = models.observe_delta(model, [batch], models.text_loss, learning_rate=1e-3, optimiser="adamw")
    found = run("tiger", seen, model)
    assert not found.applicable
    assert "adamw" in found.reason


def test_several_sentences_are_told_apart() -> None:
    model, ids, seen = client("encoder", count=2)
    found = run("tiger", seen, model)
    assert share(found, ids) > 0.8
    assert len(found.items) == 2


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_mild_noise_ends_the_span_before_it_ends_the_descent(kind: str) -> None:
    model, ids, seen = client(kind)
    noised = models.noised(seen, 1e-3)
    assert share(run("span", noised, model), ids) < 0.2
    found = run("tiger", noised, model)
    assert share(found, ids) > 0.5
    assert found.confidence < 0.8


def test_noise_one_leaves_nothing_and_shuffled_entries_nothing_to_be_sure_of() -> None:
    model, ids, seen = client("encoder")
    at_one = run("tiger", models.noised(seen, 1.0), model)
    assert not at_one.items
    assert at_one.reason
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)
        for name, value in seen.tensors.items()
    }
    found = run("tiger", seen.replace_tensors(shuffled), model, iterations=40)
    assert share(found, ids) < 0.3
    assert found.confidence < 0.4


def test_the_update_of_other_texts_is_not_mistaken_for_ours() -> None:
    model, ids, _ = client("decoder")
    _, others, seen = client("decoder", seed=9)
    found = run("tiger", seen, model)
    assert share(found, ids) < 0.3 < share(found, others)


def test_targets_stand_out_of_noise_and_know_their_members() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(60, 3, generator=generator).double(),
        torch.randn(3, 40, generator=generator).double(),
    )
    noise = 0.05 * torch.randn(60, 40, generator=generator).double()
    clean, blurred = (
        spectrum_of(Channel(name="x", gradient=gradient, bias=None))
        for gradient in (left @ right, left @ right + noise)
    )
    assert noise_in(clean, 0.0) == 0.0
    assert noise_in(blurred, 0.0) == pytest.approx(0.05, rel=0.25)
    for spectrum in (clean, blurred):
        target = target_of(spectrum, noise_in(spectrum, 0.0))
        assert target is not None
        assert (
            int((target.weights > 0.5).sum()) == 3
        )  # noise alone reaches the edge, but no weight to speak of
        assert float(target.distance(right).max()) < 0.1
        assert float(target.distance(torch.randn(50, 40, generator=generator).double()).mean()) > 0.8
    only_noise = spectrum_of(Channel(name="x", gradient=noise, bias=None))
    covered = target_of(only_noise, 0.05)
    assert covered is None or float(covered.weights.max()) < 0.2
