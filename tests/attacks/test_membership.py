"""Membership scores: clear without noise, as theory allows with it, and on released models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import Budget, Observation, Prior, membership
from attacks import steps
from attacks.inversion.channels import capture_inputs
from attacks.inversion.example_gradients import gradients_of_each
from attacks.membership import Candidates, candidate_loss, example_gradients, logits_and_targets
from attacks.metrics import auc
from attacks.registry import build
from tests.attacks import models

QUICK = Budget.quick()
IMAGES, LABELS = models.digits()


def candidates(start: int, stop: int) -> dict[str, torch.Tensor]:
    return {"images": IMAGES[start:stop], "labels": LABELS[start:stop]}


def test_example_gradients_average_to_the_batch_gradient():
    model = models.mlp()
    names = tuple(name for name, _ in model.named_parameters())
    rows = example_gradients(model, candidates(0, 5), names)
    batch = models.gradient(model, candidates(0, 5), models.image_loss)
    assert torch.allclose(rows.mean(0), torch.cat([batch[name].flatten() for name in names]), atol=1e-6)


@pytest.mark.parametrize("asked", ["attention", "classifier", "embeddings"])
def test_gradients_of_texts_in_one_pass_are_those_one_by_one(asked: str) -> None:
    """Of embeddings no layer says what each text adds, so they take a pass each; the others share one."""
    model, ids = models.bert().double(), models.sentences(6, 7, 1000)
    names = tuple(name for name, _ in model.named_parameters() if asked in name and "LayerNorm" not in name)
    batch = {"token_ids": ids, "labels": torch.arange(6) % 2}
    rows = example_gradients(model, batch, names)
    for index, row in enumerate(rows):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        wanted = [model.get_parameter(name).requires_grad_(True) for name in names]
        slopes = torch.autograd.grad(candidate_loss(model, one), wanted)
        torch.testing.assert_close(row, torch.cat([slope.flatten() for slope in slopes]))


class Twice(nn.Module):
    """A model that goes through the weight of its one layer a second time, past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) @ self.layer.weight


def test_a_weight_that_is_used_past_its_layer_is_told_by_the_sum_of_all() -> None:
    model, inputs = Twice(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def losses() -> torch.Tensor:
        return model(inputs).square().sum(1)

    assert gradients_of_each(model, ("layer.weight",), losses, 3) is None
    assert gradients_of_each(model, ("layer.bias",), losses, 3) is not None


@pytest.mark.parametrize(("multiplier", "low", "high"), [(0.0, 0.65, 1.0), (2.0, 0.0, 0.7)])
def test_the_matched_filter_finds_members_until_noise_hides_them(multiplier, low, high):
    model = models.mlp(width=32)
    areas = []
    for seed in range(3):
        chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        batch = {"images": IMAGES[chosen[:6]], "labels": LABELS[chosen[:6]]}
        observation = models.noised(models.observe(model, batch, models.image_loss), multiplier, seed=seed)
        both = {"images": IMAGES[chosen[:12]], "labels": LABELS[chosen[:12]]}
        prior = Prior(candidates=both, examples=candidates(1200, 1300))
        scores = build("matched_filter").run(observation, model, prior, QUICK, 0).of("scores")[0].tolist()
        areas.append(auc(scores[:6], scores[6:]))
    assert low <= sum(areas) / 3 <= high


def test_the_projection_residual_separates_sentences_of_a_sum():
    model, ids = models.gpt2(vocabulary=600), models.sentences(20, 8, 600)
    clients = [{"input_ids": row[None], "labels": torch.tensor([0])} for row in ids[:10]]
    observation = models.observe_sum(model, clients, models.text_loss)
    prior = Prior(candidates={"token_ids": ids, "labels": torch.zeros(20, dtype=torch.long)})
    result = build("projection_residual").run(observation, model, prior, QUICK, 0)
    scores = result.of("scores")[0].tolist()
    assert auc(scores[:10], scores[10:]) == 1.0
    assert result.confidence > 0.9


def test_the_projection_residual_says_so_at_the_width():
    model, ids = models.gpt2(vocabulary=600, width=32), models.sentences(20, 8, 600)
    batch = {"input_ids": ids[:10], "labels": torch.arange(10) % 2}
    prior = Prior(candidates={"token_ids": ids, "labels": torch.zeros(20, dtype=torch.long)})
    observation = models.observe(model, batch, models.text_loss)
    first = {name: value for name, value in observation.tensors.items() if "h.0.attn.c_attn" in name}
    result = build("projection_residual").run(observation.replace_tensors(first), model, prior, QUICK, 0)
    assert not result.items
    assert result.reason


@pytest.mark.parametrize("name", ["matched_filter", "projection_residual"])
def test_passes_over_candidates_are_made_once_for_a_model(name):
    model, ids = models.gpt2(vocabulary=600), models.sentences(20, 8, 600)
    batch = {"token_ids": ids, "labels": torch.arange(20) % 2}
    remembered = Candidates(batch)
    for first, model_of in ((0, model), (3, model), (0, models.gpt2(vocabulary=600, seed=5))):
        rows = {"input_ids": ids[first : first + 6], "labels": batch["labels"][first : first + 6]}
        observation = models.observe(model_of, rows, models.text_loss)
        costs, scores = [], []
        for candidates in (remembered, batch):
            with steps.counted():
                result = build(name).run(observation, model_of, Prior(candidates=candidates), QUICK, 0)
                costs.append(steps.so_far())
            scores.append(result.of("scores")[0])
        assert torch.equal(*scores)
        assert (costs[0] < costs[1]) == (first > 0)


def test_what_candidates_feed_to_a_channel_is_the_same_one_by_one():
    model, ids = models.gpt2(vocabulary=600).double(), models.sentences(20, 8, 600)
    batch = {"token_ids": ids, "labels": torch.zeros(20, dtype=torch.long)}
    observation = models.observe(
        model, {"input_ids": ids[:3], "labels": batch["labels"][:3]}, models.text_loss
    )
    result = build("projection_residual").run(observation, model, Prior(candidates=batch), QUICK, 0)
    spans = membership.telling_spans(observation, model)
    modules = {span.channel: model.get_submodule(span.channel) for span in spans}
    for index, score in enumerate(result.of("scores")[0].tolist()):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        inputs = capture_inputs(modules, lambda one=one: logits_and_targets(model, one))
        means = [span.distance(inputs[span.channel][0])[:-1].mean() for span in spans]
        assert score == pytest.approx(-float(torch.stack(means).mean()), abs=1e-9)


def _train(model, data, rounds):
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(rounds):
        optimiser.zero_grad()
        models.image_loss(model, data).backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("name", ["lira", "rmia"])
def test_released_models_that_memorised_give_members_away_and_others_do_not(name):
    generator = torch.Generator().manual_seed(0)
    noisy = {
        "images": IMAGES[:120],
        "labels": torch.randint(10, (120,), generator=generator),
    }  # labels to memorise
    members = {key: value[:40] for key, value in noisy.items()}
    both = {key: value[:80] for key, value in noisy.items()}
    population = {key: value[80:] for key, value in noisy.items()}
    references = tuple(
        _train(models.mlp(seed=s), {k: v[80:] for k, v in noisy.items()}, 150) for s in (1, 2, 3)
    )
    prior = Prior(candidates=both, examples=population, reference_models=references)
    areas = {}
    for label, target in (
        ("memorised", _train(models.mlp(), members, 150)),
        ("untrained", models.mlp(seed=9)),
    ):
        observation = Observation(kind="gradient", tensors={"3.bias": torch.zeros(10)})
        scores = build(name).run(observation, target, prior, QUICK, 0).of("scores")[0].tolist()
        areas[label] = auc(scores[:40], scores[40:])
    assert areas["memorised"] > 0.8
    assert 0.3 < areas["untrained"] < 0.7
