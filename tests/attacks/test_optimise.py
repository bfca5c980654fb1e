"""One gradient-matching engine: distances, the parameter mask, images, text, every kind of partial update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attacks import Budget, Knowledge, Observation, Prior
from attacks.inversion import embeddings, matching
from attacks.inversion.kinks import SeenRectifier, see_kinks
from attacks.inversion.optimise import Settings, misfit, share_only, solve
from attacks.inversion.priors import class_features, patch_seams, total_variation
from attacks.metrics import match_one_to_one, positional_accuracy, psnr, similarity_matrix
from tests.attacks.models import (
    Prompted,
    add_lora,
    bert,
    cnn,
    digits,
    gradient,
    image_loss,
    noised,
    observe,
    sentences,
    text_loss,
    vit,
)


def budget(iterations: int, restarts: int = 1) -> Budget:
    return Budget(steps=300_000, iterations=iterations, restarts=restarts)


# -------------------------------------------------------------------------------------------------- distances


def pair(seed: int = 0) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)], (
        torch.randn(4, 3, generator=generator),
        torch.randn(5, generator=generator),
    )


@pytest.mark.parametrize(
    "kind", ["cosine", "cosine per tensor", "squared", "squared and absolute", "whitened"]
)
def test_distances_are_zero_at_the_truth_and_positive_elsewhere(kind) -> None:
    ours, target = pair()
    assert float(misfit(list(target), target, kind=kind)) == pytest.approx(0.0, abs=1e-6)
    assert float(misfit(ours, target, kind=kind)) > 0.1


def test_cosine_equals_its_definition_and_ignores_scale() -> None:
    ours, target = pair()
    first, second = torch.cat([x.flatten() for x in ours]), torch.cat([x.flatten() for x in target])
    slow = 1 - torch.dot(first, second) / (first.norm() * second.norm())
    assert float(misfit(ours, target, kind="cosine")) == pytest.approx(float(slow), rel=1e-5)
    rescaled = [7 * x for x in ours]
    assert float(misfit(rescaled, target, kind="cosine")) == pytest.approx(float(slow), rel=1e-5)


def test_squared_fits_the_scale_only_when_it_is_unknown() -> None:
    _, target = pair()
    doubled = [2 * x for x in target]
    assert float(misfit(doubled, target, kind="squared")) == pytest.approx(1.0, rel=1e-5)
    assert float(misfit(doubled, target, kind="squared", scaled=False)) == pytest.approx(0.0, abs=1e-6)


def test_cosine_of_nearly_equal_updates_does_not_round_to_zero() -> None:
    _, target = pair()
    near = [x + 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in target]
    assert 1e-12 < float(misfit(near, target, kind="cosine")) < 1e-9


def test_tensors_that_are_zero_are_left_out_of_the_mask() -> None:
    model = add_lora(bert(), 4, ("query", "value"), zero_b=True)
    seen = observe(model, {"input_ids": sentences(1, 8, 1000), "labels": torch.tensor([0])}, text_loss)
    names, _, scaled = share_only(model, seen)
    assert scaled
    assert names
    assert all("lora_B" in name for name in names)  # with B = 0 the gradient of A is exactly zero
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(names)


def test_priors_match_their_definitions() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert float(total_variation(image)) == pytest.approx(1.0 + 4.0)
    assert float(patch_seams(image, (2, 2))) == pytest.approx(4.0 + 1.0)
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([0.5, -0.5])
    wanted, usable = class_features(weight, bias, torch.tensor([1, 0]))
    assert torch.allclose(wanted, torch.tensor([[-6.0, 8.0], [2.0, 4.0]]))
    assert usable.tolist() == [True, False]


# ----------------------------------------------------------------------------------------------------- images


def picture(index: int = 0, count: int = 1) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[index : index + count], labels[index : index + count]


def seen_images(model: nn.Module, images: Tensor, labels: Tensor, *, told: bool = True) -> Observation:
    knowledge = Knowledge(
        image_shape=tuple(images.shape[1:]), labels=tuple(labels.tolist()) if told else None
    )
    return observe(
        model, {"images": images, "labels": labels}, image_loss, knowledge=knowledge, batch_size=len(images)
    )


def mean_psnr(found, truth: Tensor) -> float:
    images = found.of("image")
    table = similarity_matrix(list(images), list(truth), psnr)
    return sum(table[row, column] for row, column in match_one_to_one(table)) / len(truth)


def test_seeing_kinks_changes_neither_outputs_nor_gradients() -> None:
    images, labels = picture(3, 4)
    plain, seen = cnn(), see_kinks(cnn(), 1.0)
    assert torch.equal(plain(images), seen(images))
    batch = {"images": images, "labels": labels}
    before, after = gradient(plain, batch, image_loss), gradient(seen, batch, image_loss)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_seen_kink_states_how_fast_units_switch() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    rates = []
    for rectifier in (nn.ReLU(), SeenRectifier(0.3)):
        shift = torch.zeros((), requires_grad=True)
        (switched,) = torch.autograd.grad(rectifier(values + shift).mean(), shift, create_graph=True)
        rates.append(float(torch.autograd.grad(switched, shift)[0]))
    assert rates[0] == 0.0  # plain differentiation leaves the switching out
    assert rates[1] == pytest.approx(
        1 / math.sqrt(2 * math.pi), rel=0.15
    )  # the density of the values at zero


@pytest.mark.parametrize("attack", [matching.inverting_gradients, matching.modern_inversion])
def test_cosine_matching_recovers_an_image(attack) -> None:
    images, labels = picture(3)
    model = cnn()
    found = attack().run(seen_images(model, images, labels), model, Prior(), budget(200), 0)
    grey = psnr(torch.full_like(images[0], float(images.mean())), images[0])
    assert mean_psnr(found, images) > max(25.0, grey + 10)
    assert found.confidence > 0.95


def test_labels_are_inferred_when_not_told() -> None:
    images, labels = picture(4)
    model = cnn()
    found = matching.modern_inversion().run(
        seen_images(model, images, labels, told=False), model, Prior(), budget(120), 0
    )
    assert found.of("labels")[0].tolist() == labels.tolist()
    assert mean_psnr(found, images) > 20.0


def test_noise_of_a_usable_budget_brings_images_to_the_baseline() -> None:
    images, labels = picture(3)
    model, attack = cnn(), matching.inverting_gradients()
    clear = seen_images(model, images, labels)
    grey = psnr(torch.full_like(images[0], 0.5), images[0])
    quality = [
        mean_psnr(attack.run(noised(clear, z), model, Prior(), budget(120), 0), images)
        for z in (0.0, 1e-2, 1.0)
    ]
    assert quality[0] > quality[1] > quality[2]
    assert quality[2] < grey + 3.0


def sigmoid_lenet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    for value in model.parameters():
        nn.init.uniform_(value, -0.5, 0.5)
    return model.eval()


def test_dlg_needs_restarts_and_restarts_pick_the_run_that_fits() -> None:
    images, labels = picture(5)
    model = sigmoid_lenet(0)
    seen = seen_images(model, images, labels)
    found = matching.idlg().run(seen, model, Prior(), budget(25, restarts=4), 0)
    assert mean_psnr(found, images) > 30.0
    joint = matching.dlg().run(
        seen_images(model, images, labels, told=False), model, Prior(), budget(25, restarts=4), 0
    )
    assert joint.of("labels")[0].tolist() == labels.tolist()


def test_solve_is_deterministic_by_seed() -> None:
    images, labels = picture(3)
    model = cnn()
    problem = matching.image_problem(seen_images(model, images, labels), model, Prior(), 0)
    runs = [solve(problem, Settings(), budget(5), seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].inputs, runs[1].inputs)
    assert not torch.equal(runs[0].inputs, runs[2].inputs)


def test_batch_norm_prior_is_used_where_there_is_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    ).eval()
    images, labels = picture(3)
    found = matching.grad_inversion().run(
        seen_images(model, images, labels), model, Prior(), budget(40, 2), 0
    )
    assert found.applicable
    assert len(found.of("image")) == 1


def test_vision_transformer_with_fused_attention_can_be_attacked() -> None:
    model = vit(size=8, patch=4, width=96, layers=1)
    model.config._attn_implementation = "sdpa"
    images = digits()[0][3:4].expand(-1, 3, -1, -1).contiguous()
    seen = seen_images(model, images, torch.tensor([1]))
    found = matching.grad_vit().run(seen, model, Prior(), budget(150), 0)
    assert found.applicable
    assert mean_psnr(found, images) > 15.0


def test_a_patch_as_large_as_the_picture_can_be_attacked() -> None:
    """The gradient of such a picture lies in memory in another order, which L-BFGS does not take."""
    model, images = (
        vit(size=8, patch=8, width=96, layers=1),
        digits()[0][3:4].expand(-1, 3, -1, -1).contiguous(),
    )
    seen = seen_images(model, images, torch.tensor([1]))
    assert matching.grad_vit().run(seen, model, Prior(), budget(3), 0).applicable


# ------------------------------------------------------------------------------------------------------- text


def attacked_text(
    model: nn.Module,
    count: int,
    iterations: int,
    *,
    attack=None,
    drop: tuple[str, ...] = (),
    noise: float = 0.0,
):
    ids, labels = sentences(count, 8, 1000), torch.arange(count) % 2
    knowledge = Knowledge(labels=tuple(labels.tolist()), sequence_length=8)
    seen = observe(
        model, {"input_ids": ids, "labels": labels}, text_loss, knowledge=knowledge, batch_size=count
    )
    seen = seen.replace_tensors(
        {name: value for name, value in seen.tensors.items() if not name.endswith(drop)}
    )
    seen = noised(seen, noise) if noise else seen
    found = (attack or embeddings.text_matching()).run(seen, model, Prior(), budget(iterations), 0)
    assert found.applicable, found.reason
    table = similarity_matrix([x.tolist() for x in found.of("sequence")], ids.tolist(), positional_accuracy)
    return sum(table[row, column] for row, column in match_one_to_one(table)) / count, found


EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")


def test_full_update_without_embeddings_gives_every_token() -> None:
    accuracy, found = attacked_text(bert(), 2, 120, drop=EMBEDDINGS)
    assert accuracy == 1.0
    assert found.confidence > 0.99


@pytest.mark.parametrize("zero_b", [False, True])
def test_lora_update_beyond_its_rank_gives_every_token(zero_b) -> None:
    accuracy, _ = attacked_text(add_lora(bert(), 8, ("query", "value"), zero_b=zero_b), 1, 150)
    assert accuracy >= 0.875


def test_soft_prompts_alone_give_the_text_away() -> None:
    accuracy, found = attacked_text(Prompted(bert(), 8), 1, 500)
    assert accuracy >= 0.94
    assert found.details["tensors"] == 1


def test_noise_of_a_usable_budget_hides_the_text() -> None:
    accuracy, _ = attacked_text(add_lora(bert(), 8, ("query", "value"), zero_b=False), 1, 60, noise=1.0)
    assert accuracy <= 0.125


def test_token_embedding_alone_is_refused_with_the_reason() -> None:
    model = bert()
    ids = sentences(1, 8, 1000)
    seen = observe(model, {"input_ids": ids, "labels": torch.tensor([0])}, text_loss, batch_size=1)
    only = seen.replace_tensors(
        {name: value for name, value in seen.tensors.items() if name.endswith("word_embeddings.weight")}
    )
    found = embeddings.text_matching().run(
        Observation(
            kind="gradient",
            tensors=only.tensors,
            metadata=only.metadata,
            knowledge=Knowledge(labels=(0,), sequence_length=8),
        ),
        model,
        Prior(),
        budget(5),
        0,
    )
    assert not found.applicable
    assert "token embedding" in found.reason


def test_the_callers_model_is_left_alone() -> None:
    model = cnn()
    before = {name: value.clone() for name, value in model.named_parameters()}
    images, labels = picture(3)
    matching.modern_inversion().run(seen_images(model, images, labels), model, Prior(), budget(3), 0)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(value.requires_grad for value in model.parameters())
    assert gradient(model, {"images": images, "labels": labels}, image_loss)
