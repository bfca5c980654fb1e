"""Discrete search: moves are permutations, the beam stays in the bag,
and each attack reads what plain matching cannot.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from attacks import Budget, Knowledge, Prior
from attacks.inversion import embeddings, optimise, text
from attacks.metrics import match_one_to_one, positional_accuracy, similarity_matrix
from tests.attacks.models import bert, observe, sentences, text_loss


def chain(vocabulary: int, seed: int = 0):
    """Return a language model in which every token has one likely successor, and that successor table."""
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))

    def log_probabilities(tokens: Tensor) -> Tensor:
        table = torch.full((*tokens.shape, vocabulary), 0.2 / vocabulary)
        table.scatter_(-1, successor[tokens][..., None], 0.8)
        return table.log()

    return log_probabilities, successor


def walk(successor: Tensor, first: int, length: int) -> Tensor:
    tokens = [first]
    while len(tokens) < length:
        tokens.append(int(successor[tokens[-1]]))
    return torch.tensor(tokens)


def accuracy(found, ids: Tensor) -> float:
    assert found.applicable, found.reason
    table = similarity_matrix([x.tolist() for x in found.of("sequence")], ids.tolist(), positional_accuracy)
    return sum(table[row, column] for row, column in match_one_to_one(table)) / len(ids)


@given(
    length=strategies.integers(1, 12), pinned=strategies.integers(0, 2), seed=strategies.integers(0, 10**6)
)
@settings(max_examples=60, deadline=None)
def test_moves_are_permutations_that_keep_pinned_places(length, pinned, seed) -> None:
    order = text.random_move(length, torch.Generator().manual_seed(seed), pinned=min(pinned, length))
    assert sorted(order.tolist()) == list(range(length))
    assert order[: min(pinned, length)].tolist() == list(range(min(pinned, length)))


def test_beam_finds_the_likely_sentence_inside_the_bag() -> None:
    language_model, successor = chain(50)
    truth = walk(successor, 7, 6)
    bag = torch.unique(torch.cat([truth, torch.tensor([1, 2, 3])]))
    beams = text.beam_search(language_model, bag, 6, first=7)
    assert beams[0][0].tolist() == truth.tolist()
    assert all(set(beam.tolist()) <= set(bag.tolist()) for beam, _ in beams)


def test_cover_uses_different_sentences() -> None:
    beams = [(torch.tensor([1, 2]), -1.0), (torch.tensor([2, 1]), -1.1), (torch.tensor([3, 4]), -5.0)]
    assert text.cover(beams, torch.tensor([1, 2, 3, 4]), 2).tolist() == [[1, 2], [3, 4]]


EMBEDDINGS = ("position_embeddings.weight", "token_type_embeddings.weight")


def observed(
    model: nn.Module, ids: Tensor, *, keep_words: bool, dropout: float | None = None, train: bool = False
):
    labels = torch.arange(len(ids)) % 2
    knowledge = Knowledge(labels=tuple(labels.tolist()), sequence_length=ids.shape[1], dropout=dropout)
    torch.manual_seed(1)
    model.train(train)
    seen = observe(
        model, {"input_ids": ids, "labels": labels}, text_loss, knowledge=knowledge, batch_size=len(ids)
    )
    model.eval()
    drop = EMBEDDINGS if keep_words else (*EMBEDDINGS, "word_embeddings.weight")
    return seen.replace_tensors(
        {name: value for name, value in seen.tensors.items() if not name.endswith(drop)}
    )


def test_reorder_finds_the_order_of_known_tokens_by_the_update_alone() -> None:
    model, ids = bert(vocabulary=200), sentences(1, 6, 200)
    problem, frame = embeddings.text_problem(observed(model, ids, keep_words=False), model, Prior(), 0)
    judge = text.Judge(
        problem=problem, frame=frame, settings=embeddings.COSINE, unit=1.0, targets=torch.tensor([[1.0, 0.0]])
    )
    generator = torch.Generator().manual_seed(0)
    shuffled = ids[:, torch.randperm(6, generator=generator)]
    deadline = Budget(steps=60_000, iterations=1, restarts=1).start()
    tokens, orders, score = text.reorder(judge, shuffled, moves=250, generator=generator, deadline=deadline)
    assert tokens.tolist() == ids.tolist()
    assert shuffled.gather(1, orders).tolist() == ids.tolist()
    assert score < judge.score(shuffled)


@pytest.mark.slow
def test_lamp_reads_a_batch_without_embedding_gradients() -> None:
    language_model, successor = chain(200)
    ids = torch.stack([walk(successor, first, 6) for first in (5, 60)])
    model = bert(vocabulary=200)
    seen = observed(model, ids, keep_words=False)
    found = text.lamp().run(
        seen,
        model,
        Prior(language_model=language_model),
        Budget(steps=120_000, iterations=150, restarts=1),
        0,
    )
    assert accuracy(found, ids) >= 0.5  # chance is 1 in 197
    assert "prior.language_model" in found.knowledge_used


def test_film_reads_sentences_from_the_bag() -> None:
    language_model, successor = chain(200)
    ids = torch.stack([walk(successor, first, 6) for first in (5, 60)])
    model = bert(vocabulary=200)
    seen = observed(model, ids, keep_words=True)
    found = text.film().run(
        seen, model, Prior(language_model=language_model), Budget(steps=120_000, iterations=60, restarts=1), 0
    )
    assert accuracy(found, ids) >= 0.5
    without = text.film().run(
        observed(model, ids, keep_words=False),
        model,
        Prior(language_model=language_model),
        Budget(steps=20_000, iterations=5, restarts=1),
        0,
    )
    assert not without.applicable


def dropping(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=16,
        num_labels=2,
        hidden_dropout_prob=rate,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config).eval()


@pytest.mark.slow
def test_grab_reads_text_through_dropout() -> None:
    model, ids = dropping(0.2), sentences(1, 6, 300)
    seen = observed(model, ids, keep_words=False, dropout=0.2, train=True)
    found = text.grab().run(seen, model, Prior(), Budget(steps=120_000, iterations=250, restarts=1), 0)
    assert accuracy(found, ids) >= 0.5


def test_with_the_true_masks_the_true_words_explain_the_update_and_without_they_do_not() -> None:
    model, ids = dropping(0.2), sentences(1, 6, 300)
    clean = embeddings.text_problem(observed(model, ids, keep_words=False, dropout=0.2), model, Prior(), 0)[0]
    rates = dict.fromkeys(text.dropout_shapes(clean), 0.2)
    generator = torch.Generator().manual_seed(0)
    shapes = text.dropout_shapes(clean)
    dropped = {name: (torch.rand(shape, generator=generator) < 0.2) for name, shape in shapes.items()}
    with text.masked_dropout(model, {name: (~gone).float() / 0.8 for name, gone in dropped.items()}):
        seen = observed(model, ids, keep_words=False, dropout=0.2)
    problem, frame = embeddings.text_problem(seen, model, Prior(), 0)
    wide = text.with_masks(problem, shapes, rates)
    # A mask variable of plus or minus ten is an entry kept or dropped; zero is the mean.
    signs = torch.cat([torch.where(dropped[name], -10.0, 10.0).flatten() for name in shapes])
    truth = frame.rows[ids].flatten()
    targets = torch.tensor([[1.0, 0.0]])

    def misfit(masks: Tensor) -> float:
        ours, _ = optimise.update_of(wide, torch.cat([truth, masks]), targets, keep_graph=False)
        return float(optimise.misfit(ours, wide.target, kind="cosine per tensor"))

    assert misfit(signs) < 1e-4
    assert misfit(torch.zeros_like(signs)) > 1e-2


def test_grab_is_not_applicable_without_dropout() -> None:
    model, ids = bert(vocabulary=200), sentences(1, 6, 200)
    found = text.grab().run(
        observed(model, ids, keep_words=False),
        model,
        Prior(),
        Budget(steps=5_000, iterations=2, restarts=1),
        0,
    )
    assert not found.applicable


@pytest.mark.parametrize("attack", [text.lamp, text.film, text.grab])
def test_image_models_are_refused_not_crashed(attack) -> None:
    from tests.attacks.models import digits, image_loss, mlp

    images, labels = digits()
    seen = observe(mlp(), {"images": images[:1], "labels": labels[:1]}, image_loss, batch_size=1)
    found = attack().run(
        seen, mlp(), Prior(language_model=chain(10)[0]), Budget(steps=5_000, iterations=2, restarts=1), 0
    )
    assert not found.applicable
