"""Learned context vectors of class texts, one set for all classes or one for each, and a head beside the
texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from defenses.dp.expanded import ExpandedParameter
from ffm_secure.errors import ModelError
from ffm_secure.foreign import LibraryModel, ModelOutput, ModelTokenizer
from ffm_secure.models.backbone import Backbone
from ffm_secure.models.dual_encoder import (
    RESIDUAL,
    class_vectors,
    fills_places,
    scores,
    text_embeddings,
    text_limit,
)
from ffm_secure.trainable.base import OWN_TENSORS, TrainableModel, read_tensors, sharing_copy, write_own

CONTEXT = "context"
_SPREAD = 0.02  # standard deviation of context vectors that stand for no word, as in the paper


class ContextModel(nn.Module):
    """Put learned vectors where the words before a class name stand, and score pictures against the texts.

    Source: Zhou et al. 2022, arXiv:2109.01134, section 3.2; one context for all classes, or one for each.
    """

    def __init__(self, model: LibraryModel, context: Tensor, *, begins: int, replaced: int) -> None:
        super().__init__()
        self.model, self.begins, self.replaced = model, begins, replaced
        self.context = ExpandedParameter(context)
        self.config = model.config

    @property
    def length(self) -> int:
        """Return the number of context vectors of a class."""
        return int(self.context.value.shape[-2])

    def forward(self, pixel_values: Tensor, class_texts: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Return logits [B, K] of pictures [B, C, S, S] and class texts [B, K, T]."""
        classes = class_texts.shape[1]

        def insert(module: nn.Module, args: tuple[Tensor, ...], words: Tensor) -> Tensor:
            vectors = self.context(len(words) // classes)
            if vectors.dim() == 3:  # one context for all classes
                vectors = vectors.unsqueeze(1).expand(-1, classes, -1, -1)
            vectors = vectors.reshape(len(words), self.length, -1).to(words.dtype)
            behind = self.begins + self.length
            return torch.cat((words[:, : self.begins], vectors, words[:, behind:]), dim=1)

        handle = text_embeddings(self.model).register_forward_hook(insert)
        try:
            vectors = class_vectors(self.model, self._spliced(class_texts), per_sample=True)
        finally:
            handle.remove()
        return scores(self.model, pixel_values, vectors)

    def _spliced(self, class_texts: Tensor) -> Tensor:
        """Make room for the context [B, K, T - replaced + length]; what stands there is never looked at."""
        before, behind = class_texts[..., : self.begins], class_texts[..., self.begins + self.replaced :]
        room = class_texts[..., :1].expand(*class_texts.shape[:-1], self.length)
        spliced = torch.cat((before, _ordinary(room, class_texts), behind), dim=-1)
        full = fills_places(self.config)
        places = class_texts.shape[-1] if full else text_limit(self.config) or spliced.shape[-1]
        fitting, cut = spliced[..., :places], spliced[..., places:]
        if bool((cut != class_texts[..., -1:]).any()):
            raise ModelError(
                f"model.trainable.length = {self.length}: a class text has {spliced.shape[-1]} tokens with "
                f"the context and the model reads {places}; lower the length, or shorten the class names"
            )
        if not full:
            return fitting
        missing = places - fitting.shape[-1]
        return torch.cat((fitting, class_texts[..., -1:].expand(*fitting.shape[:-1], missing)), dim=-1)


def _ordinary(room: Tensor, class_texts: Tensor) -> Tensor:
    """Fill the room with a word that ends no text: models look for the first end, or for the largest
    number.
    """
    return torch.full_like(room, int(class_texts.min()))


class Context(TrainableModel):
    """Context vectors of class texts; every weight of the model stays as it is."""

    kind = "context"

    def export(self, folder: Path, base_model_name: str) -> None:
        """Write our own versioned files: no stock library has a place for context vectors."""
        write_own(folder, {"kind": self.kind, "task": self.backbone.kind}, self.parameters, base_model_name)

    def import_(self, folder: Path) -> None:
        """Read what `export` wrote."""
        self.load_tensors(read_tensors(folder, OWN_TENSORS))


class ClassContext(Context):
    """Context vectors of every class."""

    kind = "class_context"


class ClassResidual(Context):
    """What is added to the text vector of every class before pictures are scored against it.

    Source: Yu et al. 2023, arXiv:2211.10277, section 3.3.
    """

    kind = "head"


def attach_context(backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int) -> Context:
    """Train `length` context vectors that all classes share; they start as the words of `task.class_text`."""
    return _attached(Context, backbone, spec, seed, classes=0)


def attach_class_context(
    backbone: Backbone, spec: Mapping[str, Any], *, task_kind: str, seed: int
) -> Context:
    """Train `length` context vectors for every class; all start as the words of `task.class_text`."""
    return _attached(ClassContext, backbone, spec, seed, classes=int(backbone.config.num_labels))


def _attached(
    kind: type[Context], backbone: Backbone, spec: Mapping[str, Any], seed: int, *, classes: int
) -> Context:
    """Put context vectors before the class names: [length, d], or [classes, length, d] for each its own."""
    start, begins, replaced, line = _start(backbone, spec, seed)
    whose = f"each of {classes} classes" if classes else "all classes"
    context = start.repeat(classes, 1, 1) if classes else start
    model = ContextModel(sharing_copy(backbone.model), context, begins=begins, replaced=replaced)
    return kind(
        backbone=backbone,
        model=model,
        parameters={CONTEXT: model.context.value},
        description=[f"{len(start)} context vectors for {whose}: {context.numel():,} numbers", line],
    )


def attach_residual(backbone: Backbone) -> ClassResidual:
    """Train one vector for every class, added to that of its text; all start at zero."""
    model = sharing_copy(backbone.model)
    width = int(model.config.projection_dim if hasattr(model, "visual_projection") else backbone.hidden_size)
    dtype = next(backbone.model.parameters()).dtype
    residual = nn.Linear(width, int(backbone.config.num_labels), bias=False, dtype=dtype)
    nn.init.zeros_(residual.weight)
    model.add_module(RESIDUAL, residual)
    size = residual.weight.numel()
    return ClassResidual(
        backbone=backbone,
        model=model,
        parameters={f"{RESIDUAL}.{name}": value for name, value in residual.named_parameters()},
        description=[f"a vector beside the text of every class, which starts at zero: {size:,} numbers"],
    )


def _start(backbone: Backbone, spec: Mapping[str, Any], seed: int) -> tuple[Tensor, int, int, str]:
    """Return where context vectors start [length, d], where they begin, how many tokens they replace, and a
    line that says so.
    """
    tokenizer = backbone.tokenizer
    assert tokenizer is not None, "a model that reads texts has a tokenizer"
    before = backbone.class_text.partition("{}")[0]
    begins, words = _words_before(tokenizer, before)
    length, limit = int(spec.get("length", 16)), backbone.max_positions
    if length < 1 or (limit is not None and length > limit - 4):
        raise ModelError(
            f"model.trainable.length = {length}: must be from 1 to {(limit or 5) - 4}, so that a class name "
            "fits behind it"
        )
    table = cast(nn.Embedding, text_embeddings(backbone.model)).weight.detach()
    stream = torch.Generator().manual_seed(seed)
    start = torch.randn((length, table.shape[1]), generator=stream) * _SPREAD
    used = words[-length:]
    if used:
        start[length - len(used) :] = table[torch.tensor(used)].float()
    description = f"the last {len(used)} start as words of task.class_text" if used else "drawn at random"
    return start, begins, len(words), description


def _words_before(tokenizer: ModelTokenizer, before: str) -> tuple[int, list[int]]:
    """Return how many marks open a text, and the tokens of what stands before the class name.

    Raises:
      ModelError: these words run into the class name, so that they are no tokens of their own.
    """
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    begins = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    words = list(tokenizer(before.strip(), add_special_tokens=False)["input_ids"]) if before.strip() else []
    sample = list(tokenizer(f"{before}a")["input_ids"])
    runs_on = bool(before) and not before[-1].isspace()
    if runs_on or sample[begins : begins + len(words)] != words:
        raise ModelError(
            f"task.class_text: what stands before the name ({before!r}) must end in a space, so that it is "
            "words of its own"
        )
    return begins, words
