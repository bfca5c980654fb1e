"""Crafted adapters, LoRA factors, prompt pools and decoders hand over text and images;
honest broadcasts do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from attacks import Budget, Observation, Prior
from attacks.inversion import active_adapters, active_text
from attacks.metrics import auc, exact_sequence_rate, match_one_to_one, psnr, similarity_matrix
from tests.attacks.models import (
    add_lora,
    digits,
    gpt2,
    image_loss,
    observe,
    observe_sum,
    sentences,
    text_loss,
    vit,
)

BUDGET = Budget(steps=60_000, iterations=10, restarts=1)


class Adapted(nn.Module):
    """A feed-forward layer with a ReLU bottleneck behind it."""

    def __init__(self, base: nn.Module, width: int, rank: int) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.base(inputs)
        return hidden + self.up(torch.relu(self.down(hidden)))


def adapted_vit(rank: int = 64) -> nn.Module:
    """Return a frozen vision transformer for 1 x 8 x 8 images with one trained adapter."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config).eval().requires_grad_(False)
    model.vit.layers[0].mlp = Adapted(model.vit.layers[0].mlp, 64, rank)
    return model


DOWN, UP = "vit.layers.0.mlp.down", "vit.layers.0.mlp.up"


def recovered(found, truth: Tensor) -> float:
    assert found.applicable, found.reason
    if not found.items:
        return 0.0
    table = similarity_matrix(list(found.of("image")), list(truth), psnr)
    return sum(table[row, column] > 30 for row, column in match_one_to_one(table)) / len(truth)


def test_crafted_adapters_hand_over_images_from_one_client_and_from_a_sum() -> None:
    images, labels = digits()
    crafted = active_adapters.craft_adapter_leak(adapted_vit(), images[:600], down=DOWN, up=UP)
    parts = [{"images": images[i : i + 2], "labels": labels[i : i + 2]} for i in (700, 900)]
    alone = active_adapters.adapter_leak().run(
        observe(crafted, parts[0], image_loss), crafted, Prior(), BUDGET, 0
    )
    assert recovered(alone, images[700:702]) == 1.0
    summed = active_adapters.adapter_leak().run(
        observe_sum(crafted, parts, image_loss), crafted, Prior(), BUDGET, 0
    )
    assert recovered(summed, torch.cat([images[700:702], images[900:902]])) >= 0.5


def test_honest_adapters_are_not_read() -> None:
    images, labels = digits()
    model = adapted_vit()
    found = active_adapters.adapter_leak().run(
        observe(model, {"images": images[:2], "labels": labels[:2]}, image_loss), model, Prior(), BUDGET, 0
    )
    assert not found.applicable
    assert "not a crafted" in found.reason


def encoder(heads: int = 8, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config).eval()


def test_crafted_lora_hands_over_twice_as_many_tokens_as_its_rank() -> None:
    ids = sentences(1, 16, 500)
    model = add_lora(encoder(), 8, ("value",))
    crafted = active_adapters.craft_lora_leak(model)
    seen = observe(crafted, {"input_ids": ids, "labels": torch.tensor([1])}, text_loss)
    found = active_adapters.lora_leak().run(seen, crafted, Prior(), BUDGET, 0)
    assert found.of("sequence")[0].tolist() == ids[0].tolist()
    honest = active_adapters.lora_leak().run(
        observe(model, {"input_ids": ids, "labels": torch.tensor([1])}, text_loss), model, Prior(), BUDGET, 0
    )
    assert not honest.applicable


class Pool(nn.Module):
    """A prompt pool: each query adds the prompts of its two nearest
    keys to the input of a frozen classifier.
    """

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keys = nn.Parameter(keys, requires_grad=False)
        self.prompts = nn.Parameter(0.1 * torch.randn(len(keys), 3, keys.shape[1]))
        self.head = nn.Linear(keys.shape[1], 10).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        queries = inputs.flatten(1)
        chosen = (
            (nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(self.keys, dim=1).T)
            .topk(2)
            .indices
        )
        return self.head(queries + self.prompts[chosen].sum((1, 2)))


def test_planted_slots_of_a_prompt_pool_tell_who_took_part() -> None:
    images, labels = digits()
    targets = images[1000:1008]
    keys, slots = active_adapters.craft_prompt_keys(
        torch.randn(24, 64, generator=torch.Generator().manual_seed(0)),
        targets.flatten(1),
        images[:600].flatten(1),
    )
    assert slots.tolist() == list(range(8))
    model = Pool(keys)
    batch = torch.cat([images[1200:1208], targets[:4]])
    seen = observe(
        model, {"images": batch, "labels": torch.cat([labels[1200:1208], labels[1000:1004]])}, image_loss
    )
    seen = Observation(kind="gradient", tensors=seen.tensors, broadcast={"keys": keys})
    found = active_adapters.prompt_membership().run(
        seen, None, Prior(candidates={"queries": targets.flatten(1)}), BUDGET, 0
    )
    scores = found.of("scores")[0]
    assert auc(scores[:4].numpy(), scores[4:].numpy()) >= 0.9


def test_crafted_decoder_hands_over_whole_sentences_of_a_batch() -> None:
    model = gpt2(vocabulary=500, width=128, layers=2)
    crafted = active_text.craft_decepticon(
        model, torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(1))
    )
    ids = sentences(4, 8, 500)
    seen = observe(crafted, {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}, text_loss)
    found = active_text.decepticon().run(seen, crafted, Prior(), BUDGET, 0)
    assert found.applicable, found.reason
    true = {(place, int(token)) for row in ids for place, token in enumerate(row)}
    pairs = {tuple(pair) for pair in found.of("placed_tokens")[0].tolist()}
    assert pairs <= true
    assert len(pairs) / len(true) >= 0.85
    assert exact_sequence_rate([text.tolist() for text in found.of("sequence")], ids.tolist()) >= 0.25


def test_crafted_encoder_hands_over_tokens_with_their_places() -> None:
    crafted = active_text.craft_encoder_bins(
        encoder(), torch.randint(3, 500, (64, 8), generator=torch.Generator().manual_seed(1))
    )
    ids = sentences(4, 8, 500)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}
    found = active_text.encoder_bins().run(observe(crafted, batch, text_loss), crafted, Prior(), BUDGET, 0)
    assert found.applicable, found.reason
    true = {(place, int(token)) for row in ids for place, token in enumerate(row)}
    pairs = {tuple(pair) for pair in found.of("placed_tokens")[0].tolist()}
    assert pairs <= true
    assert len(pairs) / len(true) >= 0.7
    honest = observe(encoder(), batch, text_loss)
    assert not active_text.encoder_bins().run(honest, encoder(), Prior(), BUDGET, 0).applicable


def test_honest_decoder_is_not_read() -> None:
    model = gpt2(vocabulary=500, width=128, layers=2)
    seen = observe(model, {"input_ids": sentences(2, 8, 500), "labels": torch.tensor([0, 1])}, text_loss)
    found = active_text.decepticon().run(seen, model, Prior(), BUDGET, 0)
    assert not found.applicable


def test_crafting_leaves_the_honest_model_alone() -> None:
    model = vit(size=8, patch=4, width=96, layers=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.vit.layers[0].mlp = Adapted(model.vit.layers[0].mlp, 96, 40)
    active_adapters.craft_adapter_leak(model, torch.rand(50, 3, 8, 8), down=DOWN, up=UP)
    after = dict(model.named_parameters())
    assert all(
        torch.equal(value, after[name.replace("mlp.", "mlp.base.") if "layers.0.mlp" in name else name])
        for name, value in before.items()
    )
