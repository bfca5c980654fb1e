"""Inputs are unmixed from a first layer's gradient, alone or summed over clients; too many fill the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion import aggregate
from attacks.metrics import match_one_to_one, psnr, similarity_matrix
from tests.attacks.models import digits, image_loss, mlp, observe, observe_sum

BUDGET = Budget(steps=120_000, iterations=200, restarts=2)


def batch(count: int) -> dict[str, Tensor]:
    images, labels = digits()
    return {"images": images[20 : 20 + count], "labels": labels[20 : 20 + count]}


def quality(seen: Observation, count: int) -> float:
    found = aggregate.cocktail_party().run(seen, mlp(width=128), Prior(), BUDGET, 0)
    assert found.applicable, found.reason
    truth = batch(count)["images"]
    table = similarity_matrix(
        [item.value.flatten() for item in found.items], [image.flatten() for image in truth], psnr
    )
    return sum(table[row, column] for row, column in match_one_to_one(table)) / count


@pytest.mark.parametrize(("count", "least"), [(1, 60.0), (2, 25.0), (4, 16.0)])
def test_sources_are_unmixed(count, least) -> None:
    # The mean digit reaches 12 dB; over six seeds the attack reaches 200, 105 and 30 to 48 dB.
    knowledge = Knowledge(image_shape=(1, 8, 8), batch_size=count)
    assert quality(observe(mlp(width=128), batch(count), image_loss, knowledge=knowledge), count) > least


def test_a_sum_of_clients_is_one_larger_mixture() -> None:
    parts = [{key: value[i : i + 2] for key, value in batch(4).items()} for i in (0, 2)]
    summed = observe_sum(mlp(width=128), parts, image_loss, batch_size=2)
    summed = Observation(
        kind="sum",
        tensors=summed.tensors,
        contributors=2,
        metadata=summed.metadata,
        knowledge=Knowledge(image_shape=(1, 8, 8)),
    )
    alone = observe(mlp(width=128), batch(4), image_loss)
    channels = [seen.tensors["1.weight"].double() for seen in (summed, alone)]
    rows = [torch.linalg.svd(channel, full_matrices=False).Vh[:4] for channel in channels]
    assert torch.linalg.matrix_norm(rows[0] @ rows[1].T, ord=-2) > 0.999, "the mixtures span the same inputs"
    assert quality(summed, 4) > 14.0


def test_true_directions_with_wrong_scale_and_sign_are_put_right_by_the_bias() -> None:
    model = mlp(width=128)
    seen = observe(model, batch(4), image_loss).tensors
    truth = batch(4)["images"].flatten(1).double()
    wrong = truth * torch.tensor([2.0, -0.5, 1.0, -3.0])[:, None]
    assert torch.allclose(aggregate.rescaled(wrong, seen["1.weight"], seen["1.bias"]), truth, atol=1e-4)


def test_contrast_is_zero_for_gaussian_values_and_positive_for_pixels() -> None:
    gaussian = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(aggregate.contrast(gaussian)) < 1e-5
    assert float(aggregate.contrast(batch(1)["images"].flatten(1).double())) > 1e-4
    assert float(aggregate.likeness(torch.cat([gaussian, -gaussian]))) == pytest.approx(1.0)


def test_more_inputs_than_the_layer_holds_are_refused() -> None:
    images, labels = digits()
    seen = observe(mlp(width=128), {"images": images[:100], "labels": labels[:100]}, image_loss)
    found = aggregate.cocktail_party().run(seen, mlp(width=128), Prior(), BUDGET, 0)
    assert not found.applicable or len(found.items) < 64
