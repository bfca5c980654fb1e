"""Least squares on position embeddings: text, standard vision transformers, and what APRIL misses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion.position import assemble, likeness, placement
from attacks.metrics import psnr, token_set_score
from attacks.registry import build
from tests.attacks import models

QUICK = Budget.quick()


def picture(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def vision(name, model, images, *, noise: float = 0.0, double: bool = True):
    if double:
        model, images = model.double(), images.double()
    batch = {"images": images, "labels": torch.arange(len(images))}
    observation = models.observe(
        model, batch, models.image_loss, knowledge=Knowledge(image_shape=(3, 32, 32))
    )
    if noise:
        generator = torch.Generator().manual_seed(1)
        observation = observation.replace_tensors(
            {
                key: value
                + noise * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator)
                for key, value in observation.tensors.items()
            }
        )
    result = build(name).run(observation, model, Prior(), QUICK, 0)
    return psnr(result.of("image")[0], images[0].float()), result


@pytest.mark.parametrize("make", [models.bert, models.gpt2])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_text_is_placed_exactly_below_the_width(make, count):
    model = make(width=128, vocabulary=2000)
    ids = models.sentences(count, 8, 2000)
    observation = models.observe(
        model, {"input_ids": ids, "labels": torch.arange(count) % 2}, models.text_loss
    )
    result = build("position_text").run(observation, model, Prior(), QUICK, 0)
    true = {(place, token) for row in ids.tolist() for place, token in enumerate(row)}
    assert set(map(tuple, result.of("placed_tokens")[0].tolist())) == true
    assert set(result.of("token_set")[0].tolist()) == set(ids.flatten().tolist())
    assert result.confidence > 0.99
    if count == 1:
        assert result.of("sequence")[0].tolist() == ids[0].tolist()


@pytest.mark.parametrize("make", [models.bert, models.gpt2])
def test_text_with_more_tokens_than_dimensions_is_placed_mostly_and_says_so(make):
    model = make(width=128, vocabulary=2000)
    ids = models.sentences(20, 8, 2000, distinct=False)
    observation = models.observe(model, {"input_ids": ids, "labels": torch.arange(20) % 2}, models.text_loss)
    result = build("position_text").run(observation, model, Prior(), QUICK, 0)
    true = {(place, token) for row in ids.tolist() for place, token in enumerate(row)}
    found = set(map(tuple, result.of("placed_tokens")[0].tolist()))
    assert len(found & true) / len(true) > 0.7
    assert result.confidence < 0.5
    assert token_set_score(result.of("token_set")[0].tolist(), ids.flatten().tolist()).f1 == 1.0


def test_several_sgd_steps_keep_the_linear_relation():
    model = models.bert(width=64, vocabulary=500)
    ids = models.sentences(2, 6, 500)
    batches = [{"input_ids": row[None], "labels": torch.tensor([label])} for label, row in enumerate(ids)] * 3
    observation = models.observe_delta(model, batches, models.text_loss, learning_rate=0.05)
    found = build("position_text").run(observation, model, Prior(), QUICK, 0).of("placed_tokens")[0]
    assert set(map(tuple, found.tolist())) == {(p, t) for row in ids.tolist() for p, t in enumerate(row)}


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (4, 0.6)])
@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_under_adam_the_signs_still_place_tokens(optimiser: str, count: int, least: float) -> None:
    model, ids = models.bert(width=256, vocabulary=500), models.sentences(count, 8, 500)
    batch = {"input_ids": ids, "labels": torch.arange(count) % 2}
    observation = models.observe_delta(
        model, [batch], models.text_loss, learning_rate=1e-3, optimiser=optimiser, weight_decay=0.01
    )
    result = build("position_text").run(observation, model, Prior(), QUICK, 0)
    found = [tuple(pair) for pair in result.of("placed_tokens")[0].tolist()]
    true = {(place, token) for row in ids.tolist() for place, token in enumerate(row)}
    assert sum(pair in true for pair in found) >= least * len(found)
    assert "signs" in result.reason
    sequences = [value.tolist() for value in result.of("sequence")]
    assert sequences == (ids.tolist() if count == 1 else [])


def test_signs_of_noise_place_no_better_than_chance_and_say_so() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, positions = (torch.randn(n, 64, generator=generator).sign() for n in (32, 8))
    assert float(likeness(positions, rows).amax(0).mean()) < 0.3


def test_momentum_and_decay_keep_the_linear_relation() -> None:
    model, ids = models.bert(width=64, vocabulary=500), models.sentences(2, 6, 500)
    client = copy.deepcopy(model)
    step = torch.optim.SGD(client.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    before = {name: value.detach().clone() for name, value in client.named_parameters()}
    for _ in range(3):
        step.zero_grad()
        models.text_loss(client, {"input_ids": ids, "labels": torch.arange(2)}).backward()
        step.step()
    change = {name: value.detach() - before[name] for name, value in client.named_parameters()}
    facts = {"learning_rate": 0.05, "local_steps": 3, "optimiser": "sgd with momentum", "weight_decay": 0.01}
    seen = Observation(kind="delta", tensors=change, broadcast=before, metadata=facts)
    found = build("position_text").run(seen, model, Prior(), QUICK, 0).of("placed_tokens")[0]
    assert set(map(tuple, found.tolist())) == {(p, t) for row in ids.tolist() for p, t in enumerate(row)}


def test_placement_solves_a_known_mixture():
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    mixture = torch.eye(5)[[3, 1, 4]]
    solved, residual = placement(mixture @ rows, rows)
    assert torch.allclose(solved, mixture.double(), atol=1e-6)
    assert residual < 1e-6


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_standard_vision_transformer_gives_one_image_back(width, layers):
    value, result = vision("position_vision", models.vit(width=width, layers=layers), picture())
    assert value > 140.0  # the limit of single-precision output
    assert result.confidence == 1.0


def test_single_precision_is_enough():
    assert vision("position_vision", models.vit(), picture(), double=False)[0] > 90.0


def test_noise_degrades_the_image_step_by_step_and_confidence_with_it():
    values = [
        vision("position_vision", models.vit(), picture(), noise=noise) for noise in (1e-6, 1e-4, 1e-2, 1e-1)
    ]
    assert [value for value, _ in values] == sorted((value for value, _ in values), reverse=True)
    assert values[0][0] > 80.0
    assert values[-1][0] < 14.0
    assert values[-1][1].confidence < 0.1


def test_two_images_do_not_come_back_and_the_residual_says_so():
    value, result = vision("position_vision", models.vit(), picture(2))
    assert value < 12.0
    assert result.confidence < 0.4
    assert "residual" in result.reason


class PlainBlocks(nn.Module):
    """A vision transformer whose blocks have neither residual nor normalisation:
    the setting of APRIL's proposition.
    """

    def __init__(
        self, *, blocks: int = 2, residual: bool = False, width: int = 64, heads: int = 2, patch: int = 16
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
            for _ in range(blocks)
        )
        self.heads, self.residual, self.head = heads, residual, nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.projection(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            shape = (len(hidden), hidden.shape[1], self.heads, -1)
            query, key, value = (
                block[name](hidden).reshape(shape).transpose(1, 2) for name in ("query", "key", "value")
            )
            weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
            mixed = (weights @ value).transpose(1, 2).flatten(2)
            hidden = mixed + hidden if self.residual else mixed
        return self.head(torch.tanh(hidden).mean(1))


def test_april_is_exact_only_without_residual():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = {}
    for residual in (False, True):
        torch.manual_seed(0)
        model = PlainBlocks(
            width=1024, residual=residual
        )  # wider than a patch has pixels, so that embedding is invertible
        batch = {"images": image.double(), "labels": torch.tensor([1])}
        model = model.double()
        observation = models.observe(
            model, batch, models.image_loss, knowledge=Knowledge(image_shape=(3, 32, 32))
        )
        scores[residual] = psnr(
            build("april").run(observation, model, Prior(), QUICK, 0).of("image")[0], image[0]
        )
        own = build("position_vision").run(observation, model, Prior(), QUICK, 0)
        assert psnr(own.of("image")[0], image[0]) > 100.0
    assert scores[False] > 60.0
    assert scores[True] < 20.0


def test_assembling_is_the_inverse_of_cutting():
    image = torch.arange(2 * 4 * 6.0).reshape(2, 4, 6)
    cut = torch.nn.functional.unfold(image[None], (2, 3), stride=(2, 3))[0].T
    assert torch.equal(assemble(cut, 2, (2, 3), (2, 2)), image)
