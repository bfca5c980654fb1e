"""The client-side check refuses every crafted broadcast of the active suite and accepts honest models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attacks.inversion import active, active_adapters, active_text
from defenses.broadcast_check import (
    Limits,
    broadcast_digest,
    check_broadcast,
    layout_of,
    longest_monotone_run,
    parallel_share,
)
from tests.attacks.models import (
    add_lora,
    bert,
    cnn,
    digits,
    gpt2,
    image_loss,
    llama,
    mlp,
    sentences,
    text_loss,
    vit,
)
from tests.attacks.test_active_peft import DOWN, UP, Pool, adapted_vit, encoder


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def refused(crafted: nn.Module, honest: nn.Module, **options) -> set[str]:
    """Return the rules that refuse a crafted broadcast, judged against the honest layout."""
    return {
        reason.rule for reason in check_broadcast(weights(crafted), layout_of(weights(honest)), **options)
    }


def public() -> Tensor:
    return digits()[0][:300]


def trained(model: nn.Module, loss, batch, steps: int = 30, rate: float = 0.05) -> nn.Module:
    """Return a copy trained for some steps."""
    client = copy.deepcopy(model)
    wanted = [value for value in client.parameters() if value.requires_grad]
    optimiser = torch.optim.SGD(wanted, lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(client, batch).backward()
        optimiser.step()
    return client


def pictures(count: int = 64) -> dict[str, Tensor]:
    images, labels = digits()
    return {"images": images[:count], "labels": labels[:count]}


def texts(vocabulary: int = 500) -> dict[str, Tensor]:
    return {"input_ids": sentences(8, 8, vocabulary, distinct=False), "labels": torch.arange(8) % 2}


HONEST = {
    "mlp": lambda: mlp(),
    "cnn": lambda: cnn(),
    "mlp trained": lambda: trained(mlp(), image_loss, pictures()),
    "cnn trained": lambda: trained(cnn(), image_loss, pictures()),
    "vit": lambda: vit(),
    "bert": lambda: bert(),
    "bert trained": lambda: trained(bert(), text_loss, texts()),
    "gpt2": lambda: gpt2(),
    "llama": lambda: llama(),
    "lora with B = 0": lambda: add_lora(bert(), 8, ("query", "value"), zero_b=True),
    "lora trained": lambda: trained(add_lora(bert(), 8, ("query", "value"), zero_b=True), text_loss, texts()),
    "adapted": lambda: adapted_vit(),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name) -> None:
    model = HONEST[name]()
    assert check_broadcast(weights(model), layout_of(weights(model))) == []


def test_a_round_of_training_is_no_jump_and_frozen_tensors_stay() -> None:
    for model, loss, batch in (
        (cnn(), image_loss, pictures()),
        (add_lora(bert(), 8, ("query",)), text_loss, texts()),
    ):
        before, after = weights(model), weights(trained(model, loss, batch))
        frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
        assert check_broadcast(after, layout_of(before), before, frozen=frozen) == []


def blank_block() -> nn.Module:
    """Return the imprinted architecture with ordinary weights."""
    return active.Imprinted(active.ImprintBlock(64, 64), mlp())


def low_rank() -> nn.Module:
    return add_lora(encoder(), 8, ("value",))


def small_gpt2() -> nn.Module:
    return gpt2(vocabulary=500)


CRAFTED = {
    "imprint, cumulative": (
        lambda: active.craft_imprint(mlp(), public(), bins=64),
        blank_block,
        "parallel rows",
    ),
    "imprint, sparse": (
        lambda: active.craft_imprint(mlp(), public(), bins=64, kind="sparse"),
        blank_block,
        "parallel rows",
    ),
    "loki": (lambda: active.craft_loki(mlp(), public(), bins=16, clients=4)[1], blank_block, "parallel rows"),
    "class fishing": (lambda: active.craft_fishing(mlp(), 3), mlp, "zeroed block"),
    "feature fishing": (
        lambda: active.craft_feature_fishing(mlp(), 3, feature=0, threshold=0.5),
        mlp,
        "zeroed block",
    ),
    "suppression": (lambda: active.craft_suppression(mlp()), mlp, "zeroed block"),
    "adapter leak": (
        lambda: active_adapters.craft_adapter_leak(adapted_vit(), public(), down=DOWN, up=UP),
        adapted_vit,
        "identity block",
    ),
    "lora leak": (lambda: active_adapters.craft_lora_leak(low_rank()), low_rank, "extreme scale"),
    "decepticon": (
        lambda: active_text.craft_decepticon(small_gpt2(), torch.randint(3, 500, (32, 8))),
        small_gpt2,
        "parallel rows",
    ),
    "encoder bins": (
        lambda: active_text.craft_encoder_bins(encoder(), torch.randint(3, 500, (32, 8))),
        encoder,
        "parallel rows",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_models_are_refused_by_their_marks_alone(name) -> None:
    crafted, honest, rule = CRAFTED[name]
    assert rule in refused(crafted(), honest())


def test_an_imprint_block_nobody_agreed_on_is_another_architecture() -> None:
    reasons = check_broadcast(
        weights(active.craft_imprint(mlp(), public(), bins=64)), layout_of(weights(mlp()))
    )
    assert {reason.rule for reason in reasons} == {"layout"}
    assert "imprint.rows.weight" in {reason.tensor for reason in reasons}


def test_what_looks_ordinary_is_refused_only_with_memory() -> None:
    honest = mlp()
    trap = active.craft_trap(honest, public())
    assert refused(trap, honest) == set()
    assert "large jump" in refused(trap, honest, previous=weights(honest))
    assert "digest" in refused(trap, honest, expected_digest=broadcast_digest(weights(honest)))
    pool = Pool(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))
    planted = copy.deepcopy(pool)
    keys, _ = active_adapters.craft_prompt_keys(
        pool.keys.detach(), public()[:8].flatten(1), public().flatten(1)
    )
    planted.keys.data.copy_(keys)
    changed = refused(planted, pool, previous=weights(pool), frozen=("keys",))
    assert "frozen tensor changed" in changed


def test_values_that_are_not_finite_are_refused() -> None:
    model = mlp()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    assert refused(model, mlp()) == {"not finite"}


def test_digest_depends_on_names_shapes_and_values() -> None:
    first = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert broadcast_digest(first) == broadcast_digest(dict(reversed(first.items())))
    others = (
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1).double()},
        {"a": torch.full((2, 3), 1e-9), "b": torch.ones(1)},
    )
    assert len({broadcast_digest(first), *(broadcast_digest(other) for other in others)}) == 5


def test_helpers_match_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 16, generator=generator)
    rows[3] = -2.0 * rows[7]
    unit = nn.functional.normalize(rows, dim=1)
    slow = float((((unit @ unit.T).abs() - torch.eye(12)) > 1 - 1e-5).any(1).double().mean())
    assert parallel_share(rows) == pytest.approx(slow) == pytest.approx(2 / 12)
    assert longest_monotone_run(torch.tensor([3.0, 1.0, 2.0, 4.0, 4.0, 0.0])) == 3
    assert longest_monotone_run(torch.zeros(9)) == 1


def test_limits_can_be_set() -> None:
    model = active.craft_fishing(mlp(), 3)
    assert refused(model, mlp(), limits=Limits(zero_share=1.0, scale=1e9, parallel_share=1.0)) == set()


@pytest.mark.assets
def test_real_trained_models_pass(shared) -> None:
    from safetensors.torch import load_file

    for path in sorted(shared.glob("models/*/model.safetensors")):
        tensors = load_file(str(path))
        assert check_broadcast(tensors, layout_of(tensors)) == [], path.parent.name
