"""What is trained and sent: everything, the head, LoRA adapters, prompts of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone
from ffm_secure.trainable.base import TrainableModel, replicate
from ffm_secure.trainable.full import attach_full
from ffm_secure.trainable.lora import attach_head, attach_lora, attach_lora_xs
from ffm_secure.trainable.prefix import attach_prefix
from ffm_secure.trainable.prompt import attach_prompt
from ffm_secure.trainable.prompt_kinds import attach_deep_prompt, attach_p_tuning, attach_prompt_generator
from ffm_secure.trainable.rehearsal import rehearse, rehearse_per_sample

TRAINABLES: dict[str, Callable[..., TrainableModel]] = {
    "full": attach_full,
    "head": attach_head,
    "lora": attach_lora,
    "lora_xs": attach_lora_xs,
    "prompt": attach_prompt,
    "prefix": attach_prefix,
    "p_tuning": attach_p_tuning,
    "deep_prompt": attach_deep_prompt,
    "prompt_generator": attach_prompt_generator,
}
_KEYS = {
    "kind",
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "length",
    "hidden",
    "representation",
    "ranks",
    "folded",
}


def attach(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> TrainableModel:
    """Choose what is trained. The backbone stays as it is: its frozen tensors are shared, never changed.

    `spec` is the table `[model.trainable]`: `kind` and the options of that kind; options of other kinds are not read.

    Guarantee: the model has run with what is trained, and a gradient reached every tensor of it (`rehearse` says where not).
    Raises:
      ModelError: an unknown kind or option, or one that does not work with this model.
    """
    kind = spec.get("kind")
    if kind not in TRAINABLES:
        raise ModelError(f"model.trainable.kind = {kind!r}: must be one of {', '.join(TRAINABLES)}")
    unknown = sorted(set(spec) - _KEYS)
    if unknown:
        raise ModelError(
            f"model.trainable.{unknown[0]}: unknown option; known are {', '.join(sorted(_KEYS))}"
        )
    if task_kind != backbone.kind:
        raise ModelError(f"the model was loaded for {backbone.kind}, not for {task_kind}")
    made = TRAINABLES[kind](backbone, spec, task_kind=task_kind, seed=seed)
    rehearse(made)
    return made


__all__ = ["TRAINABLES", "TrainableModel", "attach", "rehearse_per_sample", "replicate"]
