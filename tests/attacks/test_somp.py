"""Matching pursuit over sentences:
exact on batches far wider than the layer, nothing under noise or without the gradient.
"""

from __future__ import annotations

import pytest
import torch

from attacks import Budget, Knowledge, Observation, Prior
from attacks.contract import Reconstruction
from attacks.inversion import traces
from attacks.inversion.channels import observed_channels
from attacks.metrics import exact_sequence_rate
from attacks.registry import build
from attacks.scoring import score
from attacks.truth import Truth
from tests.attacks import models

LENGTH, WIDTH, VOCABULARY = 5, 32, 150
CHANNELS = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")


def language_model() -> torch.nn.Module:
    return models.gpt2(vocabulary=VOCABULARY, width=WIDTH, length=8, classes=None, tied=False)


def predict(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids}


def texts(count: int) -> torch.Tensor:
    return models.sentences(count, LENGTH, VOCABULARY, distinct=False)


def granted(count: int) -> Knowledge:
    return Knowledge(batch_size=count, sequence_length=LENGTH)


def pursue(seen: Observation, model: torch.nn.Module, *, iterations: int = 800) -> Reconstruction:
    return build("somp").run(seen, model, Prior(), Budget(steps=60_000, iterations=iterations, restarts=1), 0)


def exact(found: Reconstruction, ids: torch.Tensor) -> float:
    return exact_sequence_rate([value.tolist() for value in found.of("sequence")], ids.tolist())


@pytest.mark.parametrize("generative", [True, False])
def test_traces_hold_the_gradients_of_sentences(generative: bool) -> None:
    model = language_model() if generative else models.gpt2(vocabulary=VOCABULARY, width=WIDTH, length=8)
    ids, labels = texts(3), None if generative else torch.tensor([0, 1, 1])
    whole = models.gradient(
        model, predict(ids) if labels is None else {"input_ids": ids, "labels": labels}, models.text_loss
    )
    single = [
        models.gradient(
            model,
            predict(ids[i : i + 1])
            if labels is None
            else {"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]},
            models.text_loss,
        )
        for i in range(3)
    ]
    seen = traces.trace(model, CHANNELS, ids, labels)
    target = {name: whole[f"{name}.weight"].T for name in CHANNELS}
    flat = torch.stack(
        [torch.cat([one[f"{name}.weight"].T.flatten() for name in CHANNELS]) for one in single]
    )
    torch.testing.assert_close(traces.gram(seen), flat @ flat.T, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(traces.squared_norms(seen), flat.square().sum(1), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(traces.inner(seen, target), flat @ flat.mean(0), rtol=1e-3, atol=1e-8)
    mean = traces.combine(seen, torch.full((3,), 1 / 3))
    for name in CHANNELS:
        torch.testing.assert_close(mean[name], target[name], rtol=1e-3, atol=1e-6)


def test_filling_up_changes_no_inner_product() -> None:
    model, ids = language_model(), texts(2)
    parts = [traces.trace(model, CHANNELS, ids[:1], None), traces.trace(model, CHANNELS, ids[1:, :3], None)]
    both = traces.stacked(parts)
    torch.testing.assert_close(
        traces.squared_norms(both), torch.cat([traces.squared_norms(part) for part in parts])
    )


def test_random_sentences_are_white() -> None:
    model, ids = language_model(), texts(64)
    seen = models.observe(model, predict(ids[:2]), models.text_loss)
    channels = [observed_channels(seen, model)[name] for name in CHANNELS]
    space = traces.whiten(model.requires_grad_(True), channels, ids, None, noise=dict.fromkeys(CHANNELS, 0.0))
    inputs = space.trace(ids, None)[CHANNELS[0]][0].flatten(0, 1)
    spectrum = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    assert 0.9 < float(spectrum.median()) < 1.1
    blurred = traces.whiten(
        model, channels, ids, None, noise=dict.fromkeys(CHANNELS, 1.0)
    )  # nothing but noise: nothing to whiten
    assert float(blurred.sides[CHANNELS[0]][0].std()) < float(space.sides[CHANNELS[0]][0].std())


def test_a_batch_of_more_tokens_than_the_width_is_read_word_for_word() -> None:
    """Fifty tokens at width 32: the span is full and says nothing,
    the pursuit explains the whole gradient.
    """
    model, ids = language_model(), texts(10)
    seen = models.observe(model, predict(ids), models.text_loss, knowledge=granted(10))
    assert not build("span_exact").run(seen, model, Prior(), Budget.quick(), 0).items
    found = pursue(seen, model)
    assert exact(found, ids) == 1.0
    assert found.confidence > 0.99
    assert found.details["unexplained"] < 1e-3
    assert found.knowledge_used == ("batch_size", "sequence_length")


def test_a_secure_sum_is_a_larger_batch() -> None:
    model, ids = language_model(), texts(8)
    summed = models.observe_sum(
        model, [predict(ids[:4]), predict(ids[4:])], models.text_loss, batch_size=4, sequence_length=LENGTH
    )
    assert exact(pursue(summed, model), ids) == 1.0


def test_one_step_of_sgd_is_read_and_the_batch_size_is_estimated() -> None:
    model, ids = language_model(), texts(4)
    seen = models.observe_delta(
        model,
        [predict(ids)],
        models.text_loss,
        learning_rate=1e-2,
        knowledge=Knowledge(sequence_length=LENGTH),
    )
    found = pursue(seen, model)
    assert exact(found, ids) == 1.0
    assert len(found.items) == 4


def test_noise_and_shuffled_entries_leave_nothing() -> None:
    model, ids = language_model(), texts(4)
    seen = models.observe(model, predict(ids), models.text_loss, knowledge=granted(4))
    generator = torch.Generator().manual_seed(0)
    shuffled = seen.replace_tensors(
        {
            name: value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)
            for name, value in seen.tensors.items()
        }
    )
    for hidden in (models.noised(seen, 1.0), shuffled):
        found = pursue(hidden, model, iterations=10)
        assert exact(found, ids) == 0.0
        assert found.confidence < 0.1
        judged = score(found, Truth(sequences=tuple(tuple(row) for row in ids.tolist())))
        assert judged is None or not judged.succeeded


def test_what_does_not_fit_is_refused() -> None:
    model, ids = language_model(), texts(2)
    adaptive = models.observe_delta(
        model, [predict(ids)], models.text_loss, learning_rate=1e-3, optimiser="adamw", knowledge=granted(2)
    )
    assert "adamw" in pursue(adaptive, model).reason
    encoder = models.bert(vocabulary=VOCABULARY, width=WIDTH, length=8)
    seen = models.observe(
        encoder, {"input_ids": ids, "labels": torch.tensor([0, 1])}, models.text_loss, knowledge=granted(2)
    )
    found = pursue(seen, encoder)
    assert not found.applicable
    assert "both ways" in found.reason
