"""Start from an adapter that exists: of an earlier run, or written by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffm_secure.errors import ModelError
from ffm_secure.record_codec import read_json
from ffm_secure.trainable.base import PEFT_CONFIG, TrainableModel

# Variants of LoRA that compute something else from the same tensors.
_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")


def start_from(trainable: TrainableModel, folder: Path) -> None:
    """Set what is trained to what an adapter folder holds.

    Raises:
      ModelError: no such folder, tensors of other names or shapes, or numbers that would be read differently
        here.
    """
    where = f"model.adapter = {str(folder)!r}"
    if not folder.is_dir():
        raise ModelError(
            f"{where}: no such folder; give the adapter/ of a run or what PEFT's save_pretrained wrote"
        )
    if trainable.kind == "lora" and (problem := _differs(trainable, folder)):
        raise ModelError(f"{where}: {problem}")
    try:
        trainable.import_(folder)
    except ModelError as error:
        raise ModelError(
            f"{where}: {error}; take the trainable and the labels it was trained with"
        ) from error


def _differs(trainable: TrainableModel, folder: Path) -> str:
    """Return what PEFT's own description says of the factors that is not so here; empty where all agrees."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        return ""
    try:
        table: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        return f"{PEFT_CONFIG} cannot be read ({error})"
    odd = []
    for name in _VARIANTS:
        if table.get(name):
            odd.append(name)
    if odd:
        return f"it was trained with {odd[0]}, which is not supported here; train it anew"
    stored = float(table.get("lora_alpha", 0)) / max(1, int(table.get("r", 1)))
    scaling = set()
    for item in trainable.adapters:
        scaling.add(item.scaling)
    if scaling and scaling != {stored}:
        return (
            f"its alpha / rank is {stored:g}, here it is {max(scaling):g}; set model.trainable.alpha "
            "and rank as it has them"
        )
    return ""
