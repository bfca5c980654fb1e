"""The private data behind an observation: read by scoring alone, never by an attack (a test enforces it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Hold what the client really trained on; None where a kind of data does not exist.

    `sequences` are token ids without padding, `images` is (n, channels, height, width), `facts` are token
    spans that name personal facts as (sequence index, start, stop), `members` says for each audited candidate
    whether it was used. What guessing goes by: `vocabulary`, the number of token ids, and `others` and
    `other_labels`, texts of the same kind that were not used and their labels.
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
    other_labels: tuple[int, ...] = ()
    properties: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "properties", MappingProxyType(dict(self.properties)))


_KNOWN = ("token_ids", "attention_mask", "images", "labels")
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_truth(path: Path) -> Truth:
    """Read what a client trained on from a safetensors file.

    It may hold token_ids (n, t), whole numbers, with an attention_mask of the same shape, images (n, c, h,
    w), finite numbers, and labels (n,), whole numbers.

    Raises: ValueError naming the file and all that is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a safetensors file that can be read: it is no file")
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from None
    unknown = sorted(set(tensors) - set(_KNOWN))
    if unknown or not tensors:
        raise ValueError(f"{path}: holds {unknown or 'nothing'}, known tensors are {list(_KNOWN)}")
    if problems := _problems(tensors):
        raise ValueError(f"{path}: {'; '.join(problems)}")
    ids, mask, labels = tensors.get("token_ids"), tensors.get("attention_mask"), tensors.get("labels")
    sequences = None
    if ids is not None:
        if mask is None:
            counted = torch.ones_like(ids, dtype=torch.bool)
        else:
            counted = mask.bool()
        sequences = tuple(tuple(row[keep].tolist()) for row, keep in zip(ids, counted, strict=True))
    flat = None
    if labels is not None:
        flat = tuple(labels.tolist())
    return Truth(sequences=sequences, images=tensors.get("images"), labels=flat)


def _problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    ids, mask, images = tensors.get("token_ids"), tensors.get("attention_mask"), tensors.get("images")
    for name, axes in (("token_ids", ("n", "t")), ("labels", ("n",))):
        problems += _not_whole(name, tensors[name], axes) if name in tensors else []
    if mask is not None and (ids is None or mask.shape != ids.shape):
        beside = "there are none"
        if ids is not None:
            beside = f"theirs is {tuple(ids.shape)}"
        problems.append(
            f"attention_mask has the shape {tuple(mask.shape)}, must have that of token_ids: {beside}"
        )
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        problems.append("attention_mask must hold 0 and 1 alone")
    if images is not None:
        if images.ndim != 4 or images.dtype not in _REAL:
            problems.append(
                f"images is {_what(images)}, must hold floating-point numbers of shape (n, c, h, w)"
            )
        elif not bool(torch.isfinite(images).all()):
            problems.append("images must hold finite numbers")
    counts = {}
    for name, tensor in tensors.items():
        if name != "attention_mask" and tensor.ndim:
            counts[name] = len(tensor)
    if len(set(counts.values())) > 1 or 0 in counts.values():
        problems.append(f"the numbers of records are {counts}, must be one number from 1")
    return problems


def _not_whole(name: str, tensor: Tensor, axes: tuple[str, ...]) -> list[str]:
    real = tensor.is_floating_point() or tensor.is_complex()
    if real or tensor.dtype is torch.bool or tensor.ndim != len(axes):
        return [f"{name} is {_what(tensor)}, must hold whole numbers of shape ({', '.join(axes)})"]
    values = tensor.long()  # the least of small unsigned numbers is not implemented
    if values.numel() and int(values.min()) < 0:
        return [f"{name} holds {int(values.min())}, must hold whole numbers from 0"]
    return []


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
