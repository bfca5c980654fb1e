"""A network trained on simulated updates reads the real one, a sign-only defence included;
strong noise stops it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from attacks import Budget, Observation, Prior
from attacks.inversion import learned
from attacks.metrics import psnr
from tests.attacks.models import digits, gradient, image_loss, mlp

BUDGET = Budget(steps=120_000, iterations=250, restarts=1)
Defence = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]


def none(sent: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    return dict(sent)


def signs(sent: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: value.sign() for name, value in sent.items()}


def private(sent: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    norm = torch.sqrt(sum(value.square().sum() for value in sent.values()))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value / norm + torch.randn(value.shape, generator=generator) for name, value in sent.items()
    }


def audited(defence: Defence, batch: int = 1) -> tuple[float, float]:
    """Return the PSNR of the attack and of the mean public image, over three targets."""
    images, labels = digits()
    model = mlp(width=32)

    def client(examples: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        return defence(gradient(model, examples, image_loss), seed)

    public = {"images": images[:1200], "labels": labels[:1200]}
    reached, naive = [], []
    for start in (1300, 1400, 1500):
        truth = images[start : start + batch]
        sent = client({"images": truth, "labels": labels[start : start + batch]}, 10**9 + start)
        seen = Observation(kind="gradient", tensors=sent, metadata={"batch_size": batch})
        found = learned.learned_inversion().run(seen, None, Prior(client=client, examples=public), BUDGET, 0)
        assert found.applicable, found.reason
        reached.append(max(psnr(image, truth[0]) for image in found.of("image")))
        naive.append(psnr(images[:1200].mean(0), truth[0]))
    return sum(reached) / 3, sum(naive) / 3


def test_undefended_and_sign_only_updates_are_read() -> None:
    for defence in (none, signs):
        reached, naive = audited(defence)
        assert reached > naive + 2.0


def test_noise_of_a_usable_budget_leaves_the_mean_image() -> None:
    reached, naive = audited(private)
    assert reached < naive + 1.0


def test_loss_does_not_depend_on_the_order_inside_a_batch() -> None:
    truth = torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0))
    assert float(learned.permuted_loss(truth[:, [2, 0, 1]], truth)) == pytest.approx(0.0)
    assert float(learned.permuted_loss(truth + 0.1, truth)) == pytest.approx(0.01, rel=1e-3)


def test_components_whiten_and_a_client_that_sends_other_tensors_is_refused() -> None:
    updates = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    features = learned.principal_components(updates, 8)(updates)
    assert torch.allclose(features.T @ features / 50, torch.eye(8), atol=1e-4)
    seen = Observation(kind="gradient", tensors={"x": torch.zeros(3)}, metadata={"batch_size": 1})
    images, labels = digits()
    prior = Prior(
        client=lambda batch, seed: {"y": torch.zeros(3)},
        examples={"images": images[:9], "labels": labels[:9]},
    )
    found = learned.learned_inversion().run(seen, None, prior, BUDGET, 0)
    assert not found.applicable
