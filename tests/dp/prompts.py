"""Soft prompts, encoded prompts, generated prompts,
prefixes and deep prompts around any of the tiny models.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from defenses.dp.expanded import expanded_normal
from tests.dp.models import WIDTH, build

VIRTUAL, LAYERS = 3, 2
CACHED = ("bert", "roberta", "gpt2", "llama", "qwen", "t5")  # the others keep no keys and values


class Virtual(nn.Module):
    """Virtual tokens `[batch, VIRTUAL, WIDTH]`:
    learned, encoded from learned constants, or made of the input itself.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "generator":
            self.net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, VIRTUAL * WIDTH))
            return
        self.constants = expanded_normal(VIRTUAL, WIDTH, std=0.5, generator=torch.Generator().manual_seed(0))
        self.net = (
            nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH)) if kind == "p_tuning" else None
        )

    def forward(self, summary: Tensor) -> Tensor:
        if not hasattr(self, "constants"):
            return self.net(summary).reshape(-1, VIRTUAL, WIDTH)
        constants = self.constants(len(summary))
        return constants if self.net is None else self.net(constants)


class Prompted(nn.Module):
    """A frozen model of some architecture behind virtual tokens."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.virtual = build(name).requires_grad_(False), Virtual(kind)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        if "pixel_values" in batch:
            return self._see(batch["pixel_values"])
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        words = self.body.get_input_embeddings()(ids)
        summary = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        joined = torch.cat([self.virtual(summary), words], dim=1)
        longer = torch.cat([mask.new_ones(len(ids), VIRTUAL), mask], dim=1)
        logits = self.body(inputs_embeds=joined, attention_mask=longer, **batch).logits
        own = logits.ndim == 3 and "decoder_input_ids" not in batch
        return SimpleNamespace(logits=logits[:, VIRTUAL:] if own else logits)

    def _see(self, pixels: Tensor) -> SimpleNamespace:
        def insert(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :1], self.virtual(tokens.mean(1)), tokens[:, 1:]], dim=1)

        handle = self.body.vit.embeddings.register_forward_hook(insert)
        try:
            return SimpleNamespace(logits=self.body(pixel_values=pixels).logits)
        finally:
            handle.remove()


class Prefixed(nn.Module):
    """A frozen model that finds learned keys and values of earlier tokens in every layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body, self.name = build(name).requires_grad_(False), name
        self.heads = 1 if name in ("llama", "qwen") else 2
        shape = (LAYERS, 2, self.heads, VIRTUAL, 8)
        self.prefix = expanded_normal(*shape, std=0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> Any:
        own = self.prefix(len(input_ids))
        cache: Any = DynamicCache([(own[:, layer, 0], own[:, layer, 1]) for layer in range(LAYERS)])
        if self.name == "t5":
            cache = EncoderDecoderCache(cache, DynamicCache())
            return self.body(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **rest
            )
        longer = torch.cat([attention_mask.new_ones(len(input_ids), VIRTUAL), attention_mask], dim=1)

        def hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": longer, "past_key_values": cache}

        handle = self.body.base_model.register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            return self.body(input_ids=input_ids, **rest)
        finally:
            handle.remove()


class DeepPrompted(Prompted):
    """Learned virtual tokens replaced before every layer: what stands for a prefix where no keys are kept."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "prompt")
        self.deeper = expanded_normal(
            LAYERS - 1, VIRTUAL, WIDTH, std=0.5, generator=torch.Generator().manual_seed(1)
        )

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        first = 1 if "pixel_values" in batch else 0
        later = self.deeper(len(next(iter(batch.values()))))
        lists = [
            part for part in self.body.modules() if isinstance(part, nn.ModuleList) and len(part) == LAYERS
        ]

        def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            return (
                torch.cat([hidden[:, :first], later[:, 0], hidden[:, first + VIRTUAL :]], dim=1),
                *args[1:],
            )

        with ExitStack() as hooks:
            hooks.callback(lists[0][1].register_forward_pre_hook(replace).remove)
            return super().forward(**batch)
