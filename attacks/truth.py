"""The private data behind an observation: read by scoring alone, never by an attack (a test enforces it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Hold what the client really trained on; None where a kind of data does not exist.

    `sequences` are token ids without padding, `images` is (n, channels, height, width), `facts` are token spans that
    name personal facts as (sequence index, start, stop), `members` says for each audited candidate whether it was
    used. What guessing goes by: `vocabulary`, the number of token ids, and `others`, texts of the same kind that were not used.
    """

    sequences: tuple[tuple[int, ...], ...] | None = None
    images: Tensor | None = None
    inputs: Tensor | None = None
    labels: tuple[int, ...] | None = None
    classes: int | None = None
    facts: tuple[tuple[int, int, int], ...] = ()
    members: tuple[bool, ...] | None = None
    vocabulary: int | None = None
    others: tuple[tuple[int, ...], ...] = ()
    properties: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "properties", MappingProxyType(dict(self.properties)))


def load_truth(path: Path) -> Truth:
    """Read what a client trained on from a safetensors file.

    It may hold token_ids (n, t) with an attention_mask of the same shape, images (n, c, h, w), and labels (n,).

    Raises: ValueError naming the file and what is wrong.
    """
    known = ("token_ids", "attention_mask", "images", "labels")
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    unknown = sorted(set(tensors) - set(known))
    if unknown or not tensors:
        raise ValueError(f"{path}: holds {unknown or 'nothing'}, known tensors are {list(known)}")
    ids, mask, labels = tensors.get("token_ids"), tensors.get("attention_mask"), tensors.get("labels")
    sequences = None
    if ids is not None:
        kept = ids == ids if mask is None else mask.bool()
        sequences = tuple(tuple(row[keep].tolist()) for row, keep in zip(ids, kept, strict=True))
    flat = tuple(int(label) for label in labels.tolist()) if labels is not None and labels.ndim == 1 else None
    return Truth(sequences=sequences, images=tensors.get("images"), labels=flat)
