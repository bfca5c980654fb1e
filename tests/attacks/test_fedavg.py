"""Several local steps are inverted by simulating them, or by one surrogate point;
one step equals gradient matching.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks import Budget, Knowledge, Prior
from attacks.inversion import fedavg, matching
from attacks.metrics import match_one_to_one, psnr, similarity_matrix
from tests.attacks.models import cnn, digits, image_loss, observe_delta

BUDGET = Budget(steps=300_000, iterations=150, restarts=1)


def client(
    model: nn.Module, *, count: int, batch: int, epochs: int, rate: float = 0.05, optimiser: str = "sgd"
):
    """Return what is observed of a client that passes `epochs` times over its images, and the images."""
    images, labels = digits()
    images, labels = images[10 : 10 + count], labels[10 : 10 + count]
    parts = [
        {"images": images[i : i + batch], "labels": labels[i : i + batch]} for i in range(0, count, batch)
    ]
    knowledge = Knowledge(
        image_shape=(1, 8, 8), labels=tuple(labels.tolist()), local_epochs=epochs, batch_size=batch
    )
    return observe_delta(
        model, parts * epochs, image_loss, learning_rate=rate, optimiser=optimiser, knowledge=knowledge
    ), images


def quality(found, truth: Tensor) -> float:
    assert found.applicable, found.reason
    table = similarity_matrix(list(found.of("image")), list(truth), psnr)
    return sum(table[row, column] for row, column in match_one_to_one(table)) / len(truth)


def test_simulation_of_the_true_images_is_the_update() -> None:
    model = cnn()
    seen, images = client(model, count=4, batch=2, epochs=2)
    problem, run, labels = fedavg._prepare(seen, model, Prior(), 0)
    ours = fedavg.simulated_delta(problem, run, (images, images), labels)
    for name, mine in zip(problem.names, ours, strict=True):
        assert torch.allclose(mine, -seen.tensors[name], atol=1e-6)


@pytest.mark.parametrize("attack", [fedavg.unrolled, fedavg.surrogate])
def test_images_behind_several_steps_are_recovered(attack) -> None:
    model = cnn()
    seen, images = client(model, count=2, batch=1, epochs=2)
    grey = sum(psnr(torch.full_like(x, float(x.mean())), x) for x in images) / len(images)
    assert quality(attack().run(seen, model, Prior(), BUDGET, 0), images) > grey + 6.0


def test_at_large_steps_the_simulation_beats_plain_matching() -> None:
    model = cnn()
    seen, images = client(model, count=2, batch=1, epochs=2, rate=1.0)
    plain = quality(matching.inverting_gradients().run(_as_batch(seen), model, Prior(), BUDGET, 0), images)
    simulated = quality(fedavg.unrolled().run(seen, model, Prior(), BUDGET, 0), images)
    assert simulated > plain


def _as_batch(seen):
    """Grant the number of images, which plain matching calls the batch."""
    return seen.replace_tensors(seen.tensors, batch_size=2)


def test_order_of_images_inside_an_epoch_does_not_matter() -> None:
    first = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    shuffled = first[[2, 0, 1]]
    labels = torch.zeros(3, dtype=torch.long)
    assert float(fedavg.set_distance((first, shuffled))) == pytest.approx(0.0, abs=1e-12)
    assert float(fedavg.set_distance((first, first.flip(-1)))) > 1e-3
    assert torch.allclose(fedavg.merged((first, shuffled), labels), first, atol=1e-6)


def test_adaptive_optimisers_and_gradients_are_refused_with_the_reason() -> None:
    model = cnn()
    seen, _ = client(model, count=2, batch=1, epochs=1, optimiser="adamw")
    found = fedavg.unrolled().run(seen, model, Prior(), BUDGET, 0)
    assert not found.applicable
    assert "SGD" in found.reason
