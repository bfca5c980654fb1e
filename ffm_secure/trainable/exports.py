"""What a run leaves for others:
files that transformers and PEFT load by themselves and that answer the same.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType
from torch import Tensor

from ffm_secure import record_codec
from ffm_secure.errors import ModelError, RecordError
from ffm_secure.foreign import LibraryModel, ModelOutput
from ffm_secure.models.backbone import AUTO, Backbone, fingerprint, quiet
from ffm_secure.records import Layout, ModelExport
from ffm_secure.registry import TASKS
from ffm_secure.trainable.base import TrainableModel
from ffm_secure.trainable.complete import SOFT, complete_model, soft_prompt, with_prompt_words
from ffm_secure.trainable.lora import TASK_TYPES, FoldedLora
from ffm_secure.trainable.prefix import attending, cache_shape
from ffm_secure.trainable.prompt import PROMPT, peft_sizes
from ffm_secure.trainable.targets import has_own_head

_LONGEST = 8192  # tokens of a text, as in the run file

# PEFT's only kind of model that takes prompts and leaves the output as it is serves masked language models.
PROMPTED_TASKS = {**TASK_TYPES, "masked_lm": TaskType.FEATURE_EXTRACTION}
FORMAT = 1
BASE, MODEL, RECORD = "base", "model", "export.json"


def export(
    trainable: TrainableModel,
    folder: Path,
    base_model: str,
    *,
    max_length: int,
    text_columns: tuple[str, ...] = (),
    layout: Layout = "text",
) -> ModelExport:
    """Write the trained part, and beside it whatever stock libraries need to compute what it computes.

    In `base/` lie the configuration (label names, padding) and, where the base has no name anyone can load,
    its weights. In `model/` lies a complete model, where an adapter on the base would not answer the same.

    Guarantee: what the record names as `adapter`, `model` or `whole` gives the logits of `trainable` to 1e-5
    in float32.
    """
    backbone, builtin = trainable.backbone, base_model.startswith("builtin:")
    if builtin:
        named = BASE
    else:
        named = base_model
    trainable.export(folder, named)
    form, virtual = _form(trainable), 0
    with quiet():
        if form == "adapter":
            virtual = _write_prompt_adapter(trainable, folder, named)
        if form == "adapter":
            _write_base(backbone, folder / BASE, weights=builtin)
        if form == "model":
            _write_complete(trainable, folder / MODEL, max_length=max_length)
        write_preparation(backbone, folder, max_length=max_length)
    record = ModelExport(
        form=form,
        auto_class=AUTO[backbone.kind],
        task=backbone.kind,
        trainable=trainable.kind,
        base_model=base_model,
        base_fingerprint=fingerprint(dict(backbone.model.named_parameters())),
        base_inside=builtin,
        dtype=str(next(iter(backbone.model.parameters())).dtype).removeprefix("torch."),
        max_length=max_length,
        virtual=virtual,
        labels=_labels(backbone),
        text_columns=text_columns,
        layout=layout,
        class_text=backbone.class_text if TASKS.has(backbone.kind, "class_texts") else "",
        key_mapping=dict(backbone.key_mapping),
    )
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")
    return record


def read_record(folder: Path) -> ModelExport:
    """Read the record of an export.

    Raises:
      ModelError: there is none, or it is damaged.
    """
    try:
        record = record_codec.from_json(ModelExport, record_codec.read_regular(folder / RECORD), RECORD)
    except (OSError, RecordError) as error:
        raise ModelError(
            f"{folder / RECORD}: cannot be read; run `ffm-secure run` again to write it"
        ) from error
    texts = 0 if record.task.startswith("image") else 1
    sound = record.task in TASKS.kinds and len(record.text_columns) >= texts
    if not sound or not 1 <= record.max_length <= _LONGEST:
        raise ModelError(f"{folder / RECORD}: is damaged; run `ffm-secure run` again to write it")
    return record


def _form(trainable: TrainableModel) -> Literal["adapter", "model", "whole", "own"]:
    """Choose how stock libraries compute a trained model."""
    backbone, kind = trainable.backbone, trainable.kind
    averages = has_own_head(backbone)
    reads_last = hasattr(backbone.model, "score") or backbone.kind == "causal_lm"
    if backbone.kind.startswith("image_text") and kind in ("context", "class_context", "head"):
        return "own"
    if kind == "prompt_generator" or (averages and kind in ("prefix", "deep_prompt")):
        return "own"
    if kind == "deep_prompt":
        if reads_last:
            return "adapter"
        return "own"
    if averages or isinstance(trainable, FoldedLora):
        return "model"
    if kind == "full":
        return "whole"
    if kind in SOFT and backbone.kind.endswith("classification"):
        return (
            "model"  # PEFT hands a classifier neither the last word of a padded text nor the second of a pair
        )
    return "adapter"


def _write_prompt_adapter(trainable: TrainableModel, folder: Path, base_model: str) -> int:
    """Write the PEFT form of prompts that have none of their own, and count the outputs a language model's
    prompt adds.
    """
    kind, task = trainable.kind, trainable.backbone.kind
    if kind == "deep_prompt":
        write_prefix(trainable, _as_prefix(trainable), folder, base_model)
    if kind == "prefix" and task == "masked_lm":
        write_prefix(trainable, trainable.parameters[PROMPT], folder, base_model)
    if kind not in SOFT or task == "text_classification":
        return 0
    if task == "sequence_to_sequence":  # what goes in front of the prompt adds nothing to the answer
        return 0
    prompt = soft_prompt(trainable)
    length, width = prompt.shape
    if task == "masked_lm":
        sizes = peft_sizes(trainable.backbone, width)
        config = PromptTuningConfig(task_type=PROMPTED_TASKS[task], num_virtual_tokens=length, **sizes)
        trainable.write_prompt(folder, base_model, config, prompt)  # type: ignore[attr-defined]
    return int(length)


def write_prefix(trainable: TrainableModel, rows: Tensor, folder: Path, base_model: str) -> None:
    """Write keys and values [length, 2 layers heads width] as a PEFT prefix."""
    heads, width = cache_shape(trainable.backbone)
    config = PrefixTuningConfig(
        task_type=PROMPTED_TASKS[trainable.backbone.kind],
        num_virtual_tokens=len(rows),
        encoder_hidden_size=heads * width,
        **{**peft_sizes(trainable.backbone, heads * width), "num_attention_heads": heads},
    )
    trainable.write_prompt(folder, base_model, config, rows)  # type: ignore[attr-defined]


def _as_prefix(trainable: TrainableModel) -> Tensor:
    """Write a deep prompt as the keys and values each layer makes of it, [length, 2 layers heads width].

    That is all later tokens feel of it, and none of it depends on the text.
    """
    length = trainable.model.length  # type: ignore[union-attr]
    parts = []
    for pair in _cache_of(trainable):
        for part in pair:
            parts.append(part[0, :, :length].transpose(0, 1))
    return torch.stack(parts, dim=1).reshape(int(length), -1)  # type: ignore[arg-type]


def _cache_of(trainable: TrainableModel) -> list[tuple[Tensor, Tensor]]:
    """Run one word behind a prompt and return the keys and values [1, heads, length + 1, width] of every
    layer.
    """
    caches: list[Any] = []
    model: LibraryModel = trainable.model
    body = attending(model.model)

    def remember(
        module: LibraryModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
    ) -> None:
        caches.append(output.past_key_values)

    handle = body.register_forward_hook(remember, with_kwargs=True)
    word = torch.ones((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(input_ids=word, attention_mask=torch.ones_like(word))
    finally:
        handle.remove()
    return [(layer.keys, layer.values) for layer in caches[0].layers]


def _write_base(backbone: Backbone, folder: Path, *, weights: bool) -> None:
    """Write the configuration the adapter was trained under, and the weights where nobody else has them."""
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        backbone.model.save_pretrained(folder)  # type: ignore[operator]
    else:
        backbone.config.save_pretrained(folder)


def _write_complete(trainable: TrainableModel, folder: Path, *, max_length: int) -> None:
    model = complete_model(trainable)
    model.save_pretrained(folder)
    backbone, prompted = trainable.backbone, 0
    if trainable.kind in SOFT and backbone.tokenizer is not None:
        prompted = int(trainable.model.length)  # type: ignore[arg-type]
    write_preparation(backbone, folder, max_length=max_length, prompted=prompted)


def write_preparation(backbone: Backbone, folder: Path, *, max_length: int, prompted: int = 0) -> None:
    """Write what turns texts or pictures into numbers: the tokenizer, with the length texts are cut to, or
    the normalisation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if backbone.tokenizer is not None:
        tokenizer = copy.deepcopy(backbone.tokenizer)
        if prompted:
            tokenizer = with_prompt_words(tokenizer, prompted)
        tokenizer.model_max_length, tokenizer.padding_side = max_length + prompted, "right"
        tokenizer.save_pretrained(folder)
    if backbone.image_size is not None and backbone.normalisation is not None:
        table = picture_table(backbone)
        (folder / "preprocessor_config.json").write_text(json.dumps(table, indent=2) + "\n")


def picture_table(backbone: Backbone) -> dict[str, Any]:
    """Return how pictures are prepared, in the words of transformers: resized bilinearly to a square, scaled,
    normalised.
    """
    assert backbone.normalisation is not None
    side = backbone.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": backbone.channels == 3,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": True,
        "image_mean": list(backbone.normalisation.mean),
        "image_std": list(backbone.normalisation.std),
    }


def _labels(backbone: Backbone) -> tuple[str, ...]:
    if not TASKS.has(backbone.kind, "classifies"):
        return ()
    names = backbone.config.id2label
    return tuple(str(names[number]) for number in range(len(names)))
