"""Decoders with rotary positions and grouped heads: whole sentences, repeats and last tokens included."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import peft
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attacks import Budget, Prior
from attacks.command import load_model
from attacks.inversion.channels import Channel, spectrum_of
from attacks.inversion.last_tokens import with_last_tokens
from attacks.inversion.subspace import study
from attacks.registry import build
from tests.attacks import models

START = 1


def column(folder: Path, name: str) -> list[str]:
    return pq.read_table(folder / "validation.parquet")[name].to_pylist()


def grouped(*, tied: bool = True, vocabulary: int = 400, seed: int = 0) -> LlamaForCausalLM:
    """Return a LLaMA of width 48 whose keys and values have half as many heads as its queries."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def wordy(count: int, length: int, vocabulary: int, *, seed: int = 0) -> torch.Tensor:
    """Return sentences that start alike and repeat few words, as texts do."""
    draw = random.Random(seed)
    words = draw.sample(range(3, vocabulary), 3 * length // 4 + 2)
    common = words[:3]
    rows = [
        [START, *(draw.choice([*words, *common, *common]) for _ in range(length - 1))] for _ in range(count)
    ]
    return torch.tensor(rows)


def sentences_of(model, ids, *, name: str = "span", **changes):
    seen = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    if changes:
        seen = seen.replace_tensors({n: changes["change"](t) for n, t in seen.tensors.items()})
    result = build(name).run(seen, model, Prior(), Budget.quick(), 0)
    return {tuple(value.tolist()) for value in result.of("sequence")}, result


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("count", "length"), [(1, 16), (1, 40), (3, 14)])
def test_every_sentence_is_read_whole_whatever_repeats(tied: bool, count: int, length: int) -> None:
    model, ids = grouped(tied=tied), wordy(count, length, 400)
    assert len(set(ids.flatten().tolist())) < ids.numel() / 1.3
    found, result = sentences_of(model, ids)
    assert found == {tuple(row) for row in ids.tolist()}
    assert result.confidence == 1.0
    assert set(result.of("token_set")[0].tolist()) == set(ids.flatten().tolist())


def test_grouped_keys_are_full_and_what_they_hide_is_read_all_the_same() -> None:
    """The old rule dropped full keys and values, and no query holds a first token:
    no sentence could start.
    """
    model, ids = grouped(), models.sentences(3, 14, 400)
    ids[:, 0] = START
    seen = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    key = seen.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert int(torch.linalg.matrix_rank(key.double(), rtol=1e-6)) == key.shape[0] == 24
    assert sentences_of(model, ids)[0] == {tuple(row) for row in ids.tolist()}


def test_as_many_beginnings_as_dimensions_are_not_claimed() -> None:
    model, ids = grouped(), wordy(6, 14, 400)
    _, result = sentences_of(model, ids, name="span_exact")
    assert not any(item.confidence > 0.99 for item in result.items if item.kind == "sequence")


def test_noise_is_no_sentence() -> None:
    generator = torch.Generator().manual_seed(0)
    model, ids = grouped(), wordy(1, 12, 400)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * tensor.std()

    assert sentences_of(model, ids, change=noise)[1].confidence <= 0.5


@pytest.mark.parametrize("first_step", [True, False])
def test_an_adapter_shows_whole_sentences_below_its_rank(first_step: bool) -> None:
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=first_step
    )
    model, ids = peft.get_peft_model(grouped(), config).eval(), wordy(1, 7, 400, seed=2)
    found, _ = sentences_of(model, ids)
    assert tuple(ids[0, :-1].tolist()) in found  # no head was trained, so that the last token stays unseen


def test_a_layer_that_hardly_sees_another_token_does_not_pass_for_one_that_sees_its_own_alone() -> None:
    model = grouped()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-6
    ids = wordy(1, 12, 400)
    seen = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    alone = {spectrum.channel for spectrum in study(seen, copy.deepcopy(model)).alone}
    assert alone == {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}


def test_the_last_token_is_claimed_only_where_it_explains_the_head() -> None:
    model, ids = grouped(), wordy(2, 9, 400)
    seen = models.observe(model, {"input_ids": ids, "labels": ids}, models.text_loss)
    private = copy.deepcopy(model).double()
    right = [tuple(row[:-1]) for row in ids.tolist()]
    assert with_last_tokens(seen, private, right) == tuple(map(tuple, ids.tolist()))
    wrong = [(*right[0][:-1], (right[0][-1] + 1) % 400), right[1]]
    assert with_last_tokens(seen, private, wrong) is None
    assert with_last_tokens(seen, private, right[:1]) is None


def test_a_clean_gap_is_the_last_one_above_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([1.0, 0.5, 1e-2, 1e-2, 1e-5, 1e-5], dtype=torch.float64)
    gradient = (left * scale) @ right.T
    noisy = gradient + 1e-9 * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    span = spectrum_of(Channel(name="x", gradient=noisy.float(), bias=None)).clean_span()
    assert span is not None
    assert span.rank == 6
    full = torch.randn(20, 20, generator=generator)
    assert spectrum_of(Channel(name="x", gradient=full, bias=None)).clean_span() is None


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "data", "count", "length"),
    [
        ("llama_stories260k", "gsm8k", 1, 16),
        ("llama_stories260k", "enron_sentences", 4, 16),
        ("llama_tinystories_char_936k", "enron_sentences", 1, 64),
        ("llama_tinystories_char_936k", "enron_sentences", 2, 32),
    ],
)
def test_trained_models_give_every_natural_sentence_away(shared: Path, name, data, count, length) -> None:
    place = shared / "models" / name
    model, tokenizer = load_model(place), AutoTokenizer.from_pretrained(place)
    texts = column(shared / "data" / data, {"gsm8k": "question"}.get(data, "text"))
    for seed in range(3):
        draw, rows = random.Random(1000 + seed), []
        while len(rows) < count:
            ids = tokenizer(draw.choice(texts))["input_ids"]
            ids = ids if ids[0] == START else [START, *ids]
            rows += [ids[:length]] if len(ids) >= length else []
        found, _ = sentences_of(model, torch.tensor(rows))
        assert found == {tuple(row) for row in rows}


@pytest.mark.assets
def test_a_trained_model_behind_an_adapter_gives_its_input_away(shared: Path) -> None:
    place = shared / "models" / "llama_stories260k"
    tokenizer = AutoTokenizer.from_pretrained(place)
    texts = column(shared / "data" / "gsm8k", "question")
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    for seed in range(4):
        ids = torch.tensor([tokenizer(random.Random(2000 + seed).choice(texts))["input_ids"][:6]])
        model = peft.get_peft_model(load_model(place), config).eval()
        assert tuple(ids[0, :-1].tolist()) in sentences_of(model, ids)[0]
