"""A run starts from an adapter that exists, its own or PEFT's, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import load_backbone
from ffm_secure.trainable import attach, start_from

SPEC = {"kind": "lora", "rank": 2, "alpha": 4.0}


def fresh(spec: dict[str, object] | None = None, labels: int = 3):
    backbone = load_backbone(
        "builtin:tiny-bert", kind="text_classification", labels=labels, base=Path(), seed=5
    )
    return attach(backbone, SPEC if spec is None else spec, task_kind="text_classification", seed=3)


def plain_adapter(folder: Path, **options: object) -> torch.Tensor:
    """Write what PEFT alone writes, and return its answer to four words."""
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=3, base=Path(), seed=5)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]} | options
    model = get_peft_model(backbone.model, LoraConfig(task_type=TaskType.SEQ_CLS, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    return answer


def test_an_adapter_of_peft_answers_the_same_here(tmp_path: Path) -> None:
    wanted = plain_adapter(tmp_path)
    trainable = fresh()
    start_from(trainable, tmp_path)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        answer = trainable.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(answer, wanted, atol=1e-6, rtol=1e-5)


def test_an_adapter_of_a_run_is_taken_bit_for_bit(tmp_path: Path) -> None:
    earlier = fresh()
    earlier.load_vector(earlier.flatten() + 0.25)
    earlier.export(tmp_path, "base")
    trainable = fresh()
    start_from(trainable, tmp_path)
    assert torch.equal(trainable.flatten(), earlier.flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 8}, r"alpha / rank is 4, here it is 2; set model.trainable.alpha"),
        ({"r": 4, "lora_alpha": 8}, r"do not fit this model .*; take the trainable and the labels"),
        ({"use_dora": True}, "use_dora, which is not supported"),
        ({"target_modules": ["query"]}, "do not fit this model"),
    ],
)
def test_an_adapter_that_would_answer_differently_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    plain_adapter(tmp_path, **options)
    trainable = fresh()
    before = trainable.flatten()
    with pytest.raises(ModelError, match=message):
        start_from(trainable, tmp_path)
    assert torch.equal(trainable.flatten(), before)


def test_missing_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        start_from(fresh(), tmp_path / "absent")
    plain_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        start_from(fresh(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    with pytest.raises(ModelError, match="take the trainable and the labels"):
        start_from(fresh(labels=4), tmp_path)
