"""What is trained and sent: everything, the head, LoRA adapters, prompts of several kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import Backbone
from ffm_secure.registry import TRAINABLES
from ffm_secure.trainable.base import TrainableModel, replicate
from ffm_secure.trainable.rehearsal import rehearse, rehearse_per_sample
from ffm_secure.trainable.start import start_from

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

    `spec` is the table `[model.trainable]`: `kind` and the options of that kind; options of other kinds are
    not read.

    Guarantee: the model has run with what is trained, and a gradient reached every tensor of it (`rehearse`
    says where not).
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
    try:
        trainable: TrainableModel = TRAINABLES.load(str(kind))(backbone, spec, task_kind=task_kind, seed=seed)
    except (AttributeError, NotImplementedError) as error:  # what this kind needs the architecture lacks
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"model.trainable.kind = {kind!r}: {backbone.architecture} has no place for it ({reason}); use "
            "lora or full"
        ) from error
    rehearse(trainable)
    return trainable


__all__ = ["TRAINABLES", "TrainableModel", "attach", "rehearse_per_sample", "replicate", "start_from"]
