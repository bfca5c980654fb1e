"""An exported model answers elsewhere what it answers here, without anything of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.exports import BOUND, Outcome, all_cases, measure, page
from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone, load_backbone
from ffm_secure.models.builtin import MeanPoolClassifier, tiny_tokenizer
from ffm_secure.models.stock_mean import as_stock_classifier
from ffm_secure.trainable import attach
from ffm_secure.trainable.complete import with_prompt_words
from ffm_secure.trainable.exports import export, read_record

QUICK = (
    ("bert", "text_classification", "lora"),
    ("bert", "text_classification", "head"),
    ("bert", "text_classification", "prompt"),
    ("roberta", "masked_lm", "prompt"),
    ("llama", "text_classification", "full"),
    ("llama", "text_classification", "p_tuning"),
    ("gpt2", "causal_lm", "lora_xs"),
    ("gpt2", "causal_lm", "deep_prompt"),
    ("gemma", "causal_lm", "prefix"),
    ("t5", "text_classification", "lora"),
    ("t5", "sequence_to_sequence", "lora"),
    ("bart", "sequence_to_sequence", "prompt"),
    ("vit", "image_classification", "lora"),
    ("vit", "image_classification", "prompt"),
)


def refused_or_equal(outcomes: list[Outcome]) -> None:
    apart = {o.case.title: o.difference for o in outcomes if (o.difference or 0.0) > BOUND}
    assert not apart


def test_stock_libraries_answer_what_the_run_answers(tmp_path: Path) -> None:
    """A pair of each form; twelve architectures and more with every trainable run in the slow test."""
    cases = [case for case in all_cases() if (case.model, case.task, case.spec["kind"]) in QUICK]
    cases = [case for case in cases if not case.spec.get("folded")]
    assert len(cases) == len(QUICK)
    outcomes = measure(cases, tmp_path)
    refused_or_equal(outcomes)
    assert all(outcome.difference is not None for outcome in outcomes)
    assert {outcome.form for outcome in outcomes} == {"adapter", "model", "whole"}
    table = page(
        outcomes + [Outcome(case=case, refusal="not run") for case in all_cases() if case not in cases]
    )
    assert "14 exports loaded" in table


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({case.model for case in all_cases()}))
def test_every_trainable_of_every_architecture_answers_the_same_elsewhere(model: str, tmp_path: Path) -> None:
    refused_or_equal(measure([case for case in all_cases() if case.model == model], tmp_path))


# --- the mean-pooling head ----------------------------------------------------------------------------------


def mean_pool_classifier(width: int = 48, heads: int = 4, vocabulary: int = 100) -> MeanPoolClassifier:
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=64,
        num_labels=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MeanPoolClassifier(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.classifier.weight.normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize("width, heads", [(48, 4), (50, 2)])
def test_plain_bert_computes_the_masked_mean(width: int, heads: int) -> None:
    model = mean_pool_classifier(width, heads)
    stock = as_stock_classifier(model)
    tokens = torch.randint(0, 100, (6, 20), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20)[None] < torch.tensor([1, 2, 7, 13, 19, 20])[:, None]).long()
    segments = (torch.arange(20)[None] > 5).long().expand(6, -1)
    with torch.inference_mode():
        wanted = model(input_ids=tokens, attention_mask=mask, token_type_ids=segments).logits
        answer = stock(input_ids=tokens, attention_mask=mask, token_type_ids=segments).logits
        unmasked = stock(input_ids=tokens).logits
    torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)
    assert type(stock) is transformers.BertForSequenceClassification
    assert (unmasked - wanted).abs().max() > 1e-3, "the mask matters"


@pytest.mark.parametrize(
    "spec", [{"kind": "lora", "rank": 2}, {"kind": "lora_xs", "rank": 2}, {"kind": "head"}], ids=str
)
def test_no_adapter_of_a_mean_pooling_head_loads_on_another_head(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT would put it on BERT's own head without a word and answer something else."""
    backbone = sentence_encoder(tmp_path / "encoder")
    trainable = attach(backbone, spec, task_kind="text_classification", seed=1)
    trainable.load_vector(trainable.flatten() + 0.05)
    record = export(trainable, tmp_path / "out", "encoder", max_length=16)
    assert record.form == "model"
    assert not list((tmp_path / "out").glob("adapter_*"))
    again = attach(sentence_encoder(tmp_path / "encoder"), spec, task_kind="text_classification", seed=1)
    again.import_(tmp_path / "out")
    assert torch.equal(again.flatten(), trainable.flatten())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "model"
    ).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.inference_mode():
        wanted = trainable.model(input_ids=tokens, attention_mask=mask).logits
        answer = loaded(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)


def sentence_encoder(folder: Path) -> Backbone:
    if not folder.is_dir():
        tokenizer = tiny_tokenizer()
        mean_pool_classifier(vocabulary=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    backbone = load_backbone(str(folder), kind="text_classification", labels=4, base=folder, seed=1)
    assert isinstance(backbone.model, MeanPoolClassifier)
    return backbone


# --- the prompt as words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [False, True])
def test_a_tokenizer_puts_the_prompt_in_front(segments: bool, tmp_path: Path) -> None:
    plain = tiny_tokenizer(segments=segments)
    with_prompt_words(plain, 3).save_pretrained(tmp_path)
    prompted: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    front = [len(plain), len(plain) + 1, len(plain) + 2]
    assert prompted("a good day")["input_ids"] == front + plain("a good day")["input_ids"]
    pair = prompted("a good day", "no")
    assert pair["input_ids"] == front + plain("a good day", "no")["input_ids"]
    if segments:
        assert pair["token_type_ids"] == [0, 0, 0, *plain("a good day", "no")["token_type_ids"]]


@pytest.mark.parametrize("text", ["", "not json", "{}", '{"format": 9}'])
def test_a_damaged_record_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read"):
        read_record(tmp_path)


RECORD_OF_A_CLASSIFIER = {
    "format": 1,
    "form": "adapter",
    "auto_class": "AutoModelForSequenceClassification",
    "task": "text_classification",
    "trainable": "head",
    "base_model": "x",
    "base_fingerprint": "0" * 64,
    "base_inside": True,
    "dtype": "float32",
    "max_length": 16,
    "labels": ["a", "b"],
    "text_columns": ["text"],
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": [{}, {}]},
        {"labels": [None, "b"]},
        {"labels": "ab"},
        {"max_length": "16"},
        {"max_length": -1},
        {"max_length": 2**63},
        {"text_columns": []},
        {"text_columns": [["text"]]},
        {"task": "x\x1b[2J"},
        {"task": {}},
        {"dtype": None},
        {"virtual": "0"},
    ],
)
def test_a_record_that_says_nonsense_is_refused_before_a_model_is_built(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "export.json"
    file.write_text(json.dumps(RECORD_OF_A_CLASSIFIER))
    assert read_record(tmp_path).labels == ("a", "b")
    file.write_text(json.dumps({**RECORD_OF_A_CLASSIFIER, **wrong}))
    with pytest.raises(ModelError, match=r"cannot be read|is damaged"):
        read_record(tmp_path)
