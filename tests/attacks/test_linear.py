"""The bias trick and SPEAR on the first layer, and adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import Budget, Knowledge, Prior
from attacks.inversion.linear import agreeing
from attacks.metrics import match_one_to_one, psnr, similarity_matrix
from attacks.registry import build
from tests.attacks import models

BUDGET = Budget(steps=60_000, iterations=200, restarts=1)


def network(width: int, *, double: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, width), nn.ReLU(), nn.Linear(width, 10)).eval()
    return model.double() if double else model


def pictures(count: int, *, double: bool = False) -> torch.Tensor:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return (
        2 * images.double() - 1 if double else images
    )  # centred, as clients feed them, in the tests of SPEAR


def recover(name: str, count: int, width: int, *, double: bool = False, noise: float = 0.0):
    model, images = network(width, double=double), pictures(count, double=double)
    batch = {"images": images, "labels": torch.arange(count) % 10}
    knowledge = Knowledge(batch_size=count, image_shape=(3, 16, 16))
    observation = models.observe(model, batch, models.image_loss, knowledge=knowledge)
    if noise:
        observation = models.noised(observation, noise)
    result = build(name).run(observation, model, Prior(), BUDGET, 0)
    table = similarity_matrix(result.of("image"), list(images.float()), psnr)
    return sorted(
        (table[a, b] for a, b in match_one_to_one(table)), reverse=True
    ) if result.items else [], result


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_bias_trick_is_exact_on_small_batches(count):
    values, result = recover("linear_readout", count, 256)
    assert len(values) == count
    assert min(values) > 100.0
    assert result.confidence > 0.9


@pytest.mark.parametrize(("count", "exact"), [(8, 4), (16, 1)])
def test_the_bias_trick_gets_part_of_a_larger_batch(count, exact):
    values, result = recover("linear_readout", count, 256)
    assert sum(value > 60.0 for value in values) >= exact
    sure = [item for item in result.items if item.confidence >= 0.75]
    assert len(sure) < count, "mixtures must not be claimed"


@pytest.mark.parametrize("count", [2, 4, 6, 8, 10])
def test_spear_recovers_whole_batches(count):
    values, result = recover("spear", count, 200, double=True)
    assert len(values) == count
    assert min(values) > 100.0
    assert result.confidence > 0.95


def test_spear_says_when_its_answer_does_not_fit_the_layer():
    values, result = recover("spear", 4, 200, noise=0.1)
    assert not values or result.confidence < 0.5


def test_spear_needs_a_relu():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 50), nn.Tanh(), nn.Linear(50, 10))
    batch = {"images": pictures(2), "labels": torch.tensor([0, 1])}
    result = build("spear").run(models.observe(model, batch, models.image_loss), model, Prior(), BUDGET, 0)
    assert not result.applicable
    assert "ReLU" in result.reason


def test_a_sum_over_clients_is_a_larger_batch():
    model, images = network(256), pictures(4)
    clients = [{"images": images[i : i + 2], "labels": torch.tensor([i, i + 1])} for i in (0, 2)]
    observation = models.observe_sum(model, clients, models.image_loss, batch_size=2)
    observation = observation.replace_tensors(observation.tensors)
    result = build("linear_readout").run(observation, model, Prior(), BUDGET, 0)
    found = torch.stack(result.of("inputs")).reshape(-1, 3, 16, 16)
    table = similarity_matrix(list(found), list(images), psnr)
    assert min(table[a, b] for a, b in match_one_to_one(table)) > 60.0


def test_noise_ends_both():
    for name in ("linear_readout", "spear"):
        values, _ = recover(name, 2, 256, noise=1.0)
        assert max(values, default=0.0) < 12.0


def test_agreement_groups_copies_and_nothing_else():
    values = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-6], [5.0, 5.0]])
    assert [size for _, size in agreeing(values)] == [2, 1]


class Bottleneck(nn.Module):
    """Tokens through an embedding, a bottleneck adapter, and a mean:
    what a frozen backbone with one adapter looks like.
    """

    def __init__(self, vocabulary: int = 200, width: int = 48, narrow: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        return self.head((hidden + self.up(torch.relu(self.down(hidden)))).mean(1))


def test_an_adapter_in_front_of_attention_gives_tokens_away():
    model, ids = Bottleneck(), torch.tensor([[17, 60, 133, 9]])

    def loss(network, batch):
        return nn.functional.cross_entropy(network(batch["input_ids"]), batch["labels"])

    observation = models.observe(model, {"input_ids": ids, "labels": torch.tensor([1])}, loss)
    result = build("adapter_readout").run(observation, model, Prior(), BUDGET, 0)
    found = set(result.of("token_set")[0].tolist())
    assert found
    assert found <= set(ids[0].tolist())
