"""Tiny random models of every architecture the per-sample engine is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY, WIDTH = 4, 7, 23, 16
LENGTHS = (7, 4, 5, 2)


@dataclass(frozen=True)
class Case:
    """A model and the function that returns the losses of the samples at some indices."""

    model: nn.Module
    losses: Callable[[list[int]], Tensor]


def text_batch(seed: int = 0, *, start: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(start, VOCABULARY, (BATCH, LENGTH), generator=draw)
    mask = (torch.arange(LENGTH)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 1, 0]),
    }


def pick(batch: dict[str, Tensor], index: list[int]) -> dict[str, Tensor]:
    return {name: value[index] for name, value in batch.items()}


def classify(model: nn.Module, batch: dict[str, Tensor], index: list[int]) -> Tensor:
    part = pick(batch, index)
    labels = part.pop("labels")
    return nn.functional.cross_entropy(model(**part).logits, labels, reduction="none")


def predict_next(model: nn.Module, batch: dict[str, Tensor], index: list[int]) -> Tensor:
    part = pick(batch, index)
    part.pop("labels")
    logits = model(**part).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), part["input_ids"][:, 1:], reduction="none")
    return (loss * part["attention_mask"][:, 1:]).sum(1) / part["attention_mask"][:, 1:].sum(1)


def translate(model: nn.Module, batch: dict[str, Tensor], index: list[int]) -> Tensor:
    part = pick(batch, index)
    part.pop("labels")
    target = part["input_ids"]
    logits = model(**part, decoder_input_ids=target).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction="none").mean(1)


def see(model: nn.Module, index: list[int]) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    pixels = torch.randn(BATCH, 3, 8, 8, generator=draw)[index].to(next(model.parameters()).dtype)
    labels = torch.tensor([0, 1, 1, 0])[index]
    return nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="none")


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=24, max_position_embeddings=16)
    )  # fmt: skip


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(
        hf.RobertaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=20, pad_token_id=1)
    )  # fmt: skip


def _distilbert() -> nn.Module:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24,
                            max_position_embeddings=16)
    )  # fmt: skip


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16)
    )  # fmt: skip


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, intermediate_size=24, max_position_embeddings=16)
    )  # fmt: skip


def _qwen() -> nn.Module:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=8,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                    decoder_start_token_id=0)
    )  # fmt: skip


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=2,
        )
    )


BUILDERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (_bert, "classify"),
    "roberta": (_roberta, "classify"),
    "distilbert": (_distilbert, "classify"),
    "gpt2": (_gpt2, "next"),
    "llama": (_llama, "next"),
    "qwen": (_qwen, "next"),
    "t5": (_t5, "translate"),
    "vit": (_vit, "see"),
}
ATTENTION = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "qwen": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
}
EMBEDDING = {
    "bert": ["word_embeddings", "position_embeddings"],
    "roberta": ["word_embeddings"],
    "distilbert": ["word_embeddings"],
    "gpt2": ["wte", "wpe"],
    "llama": ["embed_tokens"],
    "qwen": ["embed_tokens"],
    "t5": ["shared"],
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name][0]()


def case(name: str, model: nn.Module) -> Case:
    """Join a (possibly adapted) model with the loss of its architecture, in eval mode: no dropout.

    The forward pass runs in float64, so that a difference from the loop is a mistake and not rounding.
    """
    model.double().eval()
    kind = BUILDERS[name][1]
    batch = text_batch()
    runs: dict[str, Callable[[list[int]], Tensor]] = {
        "classify": lambda index: classify(model, batch, index),
        "next": lambda index: predict_next(model, batch, index),
        "translate": lambda index: translate(model, batch, index),
        "see": lambda index: see(model, index),
    }
    return Case(model, runs[kind])


def wake(model: nn.Module, *, seed: int = 1) -> nn.Module:
    """Move every trainable parameter off its initial value, so that no gradient is zero by construction."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def one_by_one(subject: Case) -> dict[str, Tensor]:
    """Return per-sample gradients by the slow definition: a batch of one for each sample."""
    named = {name: value for name, value in subject.model.named_parameters() if value.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for index in range(BATCH):
        found = torch.autograd.grad(subject.losses([index]).sum(), list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
    return {name: torch.stack(values) for name, values in rows.items()}
