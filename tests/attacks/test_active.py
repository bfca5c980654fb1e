"""A malicious broadcast makes exact copies of inputs cross the wire, alone and in sums;
an honest one does not.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks import Attack, Budget, Knowledge, NotApplicable, Observation, Prior
from attacks.inversion import active
from attacks.metrics import match_one_to_one, psnr, similarity_matrix
from tests.attacks.models import cnn, digits, gradient, image_loss, mlp, noised, observe, observe_sum

BUDGET = Budget(steps=60_000, iterations=50, restarts=1)
SHAPE = Knowledge(image_shape=(1, 8, 8))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return public images, and private images with labels."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:900]], labels[order[:900]], images[order[900:]], labels[order[900:]]


def random_direction() -> Tensor:
    return active.measurement(64, "random")


def exact_share(
    attack: Attack, observation: Observation, model: torch.nn.Module, truth: Tensor, floor: float = 40.0
) -> float:
    """Return the share of true images that a one-to-one matching finds above a PSNR."""
    found = attack.run(observation, model, Prior(), BUDGET, 0)
    assert found.applicable, found.reason
    if not found.items:
        return 0.0
    table = similarity_matrix(
        [item.value.flatten() for item in found.items], [image.flatten() for image in truth], psnr
    )
    return sum(table[row, column] > floor for row, column in match_one_to_one(table)) / len(truth)


def answers(models, data, batch: int) -> Observation:
    """Return the sum of the clients' gradients, each on its own broadcast."""
    _, _, images, labels = data
    parts = [
        gradient(
            model,
            {"images": images[i * batch : (i + 1) * batch], "labels": labels[i * batch : (i + 1) * batch]},
            image_loss,
        )
        for i, model in enumerate(models)
    ]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    return Observation(
        kind="sum", tensors=total, contributors=len(parts), metadata={"summand": "gradient"}, knowledge=SHAPE
    )


@pytest.mark.parametrize("kind", ["cumulative", "sparse"])
@pytest.mark.parametrize(
    ("clients", "batch", "least"), [(1, 8, 1.0), (1, 32, 0.96), (1, 64, 0.87), (8, 8, 0.87)]
)
def test_imprint_reads_inputs_and_a_sum_is_just_a_larger_batch(data, kind, clients, batch, least) -> None:
    model = active.craft_imprint(mlp(), data[0], bins=512, kind=kind, direction=random_direction())
    seen = answers([model] * clients, data, batch)
    share = exact_share(active.imprint(), seen, model, data[2][: clients * batch])
    assert share >= least


def test_the_same_images_leak_from_one_client_or_from_the_sum_of_eight(data) -> None:
    model = active.craft_imprint(mlp(), data[0], bins=512, direction=random_direction())
    alone = exact_share(active.imprint(), answers([model], data, 64), model, data[2][:64])
    summed = exact_share(active.imprint(), answers([model] * 8, data, 8), model, data[2][:64])
    assert alone == summed < 1.0


def test_imprint_leaves_the_honest_model_useful(data) -> None:
    honest, batch = cnn(), data[2][:16]
    crafted = active.craft_imprint(honest, data[0], bins=64, scale=1e-3)
    with torch.no_grad():
        assert torch.allclose(honest(batch), crafted(batch), atol=5e-2)


def test_own_bins_for_each_client_keep_a_sum_apart(data) -> None:
    shared = active.craft_imprint(mlp(), data[0], bins=32, kind="sparse", direction=random_direction())
    own = active.craft_loki(mlp(), data[0], bins=32, clients=16, direction=random_direction())
    together = exact_share(active.imprint(), answers([shared] * 16, data, 4), shared, data[2][:64])
    apart = exact_share(active.imprint(), answers(own, data, 4), own[0], data[2][:64])
    assert apart > 0.75
    assert apart > together + 0.3


def test_imprint_falls_with_noise(data) -> None:
    model = active.craft_imprint(mlp(), data[0], bins=256, direction=random_direction())
    seen = answers([model], data, 8)
    shares = [
        exact_share(active.imprint(), noised(seen, z, clip_norm=1e9), model, data[2][:8], 25.0)
        for z in (0.0, 1e-17, 1e-3)
    ]
    assert shares[0] == 1.0
    assert shares[0] >= shares[1] >= shares[2]
    assert shares[2] == 0.0


def test_imprint_is_not_read_from_an_honest_model(data) -> None:
    seen = observe(mlp(), {"images": data[2][:8], "labels": data[3][:8]}, image_loss, knowledge=SHAPE)
    found = active.imprint().run(seen, mlp(), Prior(), BUDGET, 0)
    assert not found.applicable
    assert "parallel rows" in found.reason


def test_trap_weights_beat_the_honest_layer_several_times(data) -> None:
    batch = {"images": data[2][:100], "labels": data[3][:100]}
    shares = []
    for model in (mlp(width=256), active.craft_trap(mlp(width=256), data[0])):
        seen = observe(model, batch, image_loss, batch_size=100, knowledge=SHAPE)
        shares.append(exact_share(active.trap_weights(), seen, model, data[2][:100]))
    assert shares[0] < 0.1
    assert shares[1] > 0.35


def test_class_fishing_lands_one_image_out_of_a_sum(data) -> None:
    _, _, images, labels = data
    target, others = images[labels == 3][:1], images[labels != 3][:41]
    batch = torch.cat([others, target])
    names = torch.cat([labels[labels != 3][:41], torch.tensor([3])])
    model = active.craft_fishing(mlp(), 3)
    parts = [{"images": x, "labels": y} for x, y in zip(batch.split(14), names.split(14), strict=True)]
    assert exact_share(active.fishing(), observe_sum(model, parts, image_loss), model, target) == 1.0
    honest = active.fishing().run(observe_sum(mlp(), parts, image_loss), mlp(), Prior(), BUDGET, 0)
    assert not honest.applicable


def test_feature_fishing_isolates_one_of_several_images_of_a_class(data) -> None:
    _, _, images, labels = data
    same = images[labels == 3][:6]
    model = mlp()
    with torch.no_grad():
        features = model[:3](same)
    feature = int(features.std(0).argmax())
    edge = float(features[:, feature].sort().values[-2:].mean())
    crafted = active.craft_feature_fishing(model, 3, feature=feature, threshold=edge, sharpness=1e4)
    seen = observe(crafted, {"images": same, "labels": torch.full((6,), 3)}, image_loss)
    assert exact_share(active.fishing(), seen, crafted, same[features[:, feature].argmax()][None]) == 1.0


def test_silencing_the_others_breaks_secure_aggregation(data) -> None:
    images = data[2]
    model = mlp()
    quiet = active.craft_suppression(model)
    seen = answers([model] + [quiet] * 4, data, 1)
    assert exact_share(active.model_inconsistency(), seen, model, images[:1]) == 1.0
    everyone = answers([model] * 5, data, 4)
    assert exact_share(active.model_inconsistency(), everyone, model, images[:20]) < 0.3


def test_unsummed_refuses_a_sum_with_more_than_one_awake_client(data) -> None:
    with pytest.raises(NotApplicable, match="exactly one"):
        active.unsummed(answers([mlp()] * 3, data, 2), ("1.weight",), suppressed=1)
