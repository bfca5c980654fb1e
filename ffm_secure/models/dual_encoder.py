"""Models with a tower for pictures and one for texts: a picture is scored against the texts of classes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, LibraryModel, ModelOutput

TEXT_SIDE = ("text_model", "text_projection")
RESIDUAL = "class_residual"  # a head beside the towers, where one is trained
_NEEDED = ("get_text_features", "get_image_features", "text_model", "vision_model", "logit_scale")


class _ScoresPictures:
    """What a dual encoder of transformers becomes where it classifies: the same modules, other answers."""

    def forward(
        self, pixel_values: Tensor, class_texts: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutput:
        """Return logits [B, K] of pictures [B, C, S, S] and, for each of them, the tokens of K class texts
        [B, K, T]: the cosine of every pair, times the model's own scale.

        Guarantee: the scores of a picture depend on its pixels and its texts alone.
        Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.2.
        """
        model: LibraryModel = self
        trained = any(p.requires_grad for side in text_side(model) for p in side.parameters())
        return scores(model, pixel_values, class_vectors(model, class_texts, per_sample=trained))

    def get_input_embeddings(self) -> nn.Module:
        """Refuse: what comes in is a picture, and class texts are public."""
        raise NotImplementedError


def as_picture_classifier(name: str, model: nn.Module) -> nn.Module:
    """Let a dual encoder answer with the scores of the classes; modules, tensors and names stay as they are.

    Raises:
      ModelError: it has not both towers.
    """
    missing = [part for part in _NEEDED if not hasattr(model, part)]
    if missing:
        raise ModelError(
            f"model.name = {name!r}: {type(model).__name__} has no {missing[0]}; pictures are scored against "
            "texts by models such as CLIP and SigLIP"
        )
    kind = type(model)
    model.__class__ = type(kind.__name__, (_ScoresPictures, kind), {"__module__": kind.__module__})
    return model


def text_side(model: LibraryModel) -> tuple[nn.Module, ...]:
    """Return the modules that texts go through."""
    return tuple(cast(nn.Module, getattr(model, side)) for side in TEXT_SIDE if hasattr(model, side))


def text_embeddings(model: LibraryModel) -> nn.Module:
    """Return the module that looks up the words of the texts."""
    return cast(nn.Module, model.text_model.get_input_embeddings())


def class_vectors(model: LibraryModel, class_texts: Tensor, *, per_sample: bool) -> Tensor:
    """Return the vectors of unit length of the class texts [B, K, T], [B, K, d].

    Where nothing on the text side is trained, equal texts are read once, [1, K, d]. Elsewhere every picture
    has texts of its own, so that its gradient is its own.
    """
    count, classes, length = class_texts.shape
    if not (per_sample and torch.is_grad_enabled()) and bool((class_texts == class_texts[:1]).all()):
        count, class_texts = 1, class_texts[:1]
    note_texts(model, classes)
    answer = model.get_text_features(input_ids=class_texts.reshape(count * classes, length))
    return _unit(_vector(answer)).view(count, classes, -1)


def scores(model: LibraryModel, pixel_values: Tensor, vectors: Tensor) -> ImageClassifierOutput:
    """Score pictures [B, C, S, S] against the class vectors [B or 1, K, d]."""
    pictures = _unit(_vector(model.get_image_features(pixel_values=pixel_values)))
    cosines = (vectors * pictures.unsqueeze(1)).sum(dim=-1)
    if hasattr(model, RESIDUAL):
        cosines = cosines + getattr(model, RESIDUAL)(pictures)
    return ImageClassifierOutput(logits=cosines * model.logit_scale.exp())


def note_texts(model: LibraryModel, classes: int) -> None:
    """Note how many texts belong to one picture, for the modules that were hooked by `by_picture`."""
    for side in text_side(model):
        for module in side.modules():
            if "texts_of_a_sample" in module.__dict__:
                module.__dict__["texts_of_a_sample"] = classes


def by_picture(model: nn.Module) -> None:
    """Let the linear modules of the text side see the texts of one picture as one sample."""
    if not isinstance(model, _ScoresPictures):
        return
    for side in text_side(model):
        inside: set[nn.Module] = set()
        for module in side.modules():
            if module in inside or not _is_linear(module):
                continue
            inside |= set(module.modules())
            module.__dict__["texts_of_a_sample"] = 1
            module.register_forward_pre_hook(_texts_together)
            module.register_forward_hook(_texts_apart)


def _is_linear(module: nn.Module) -> bool:
    """Tell a linear module, or one that PEFT put in its place."""
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def _texts_together(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = args
    module.__dict__["was_shape"] = hidden.shape
    samples = hidden.shape[0] // module.__dict__["texts_of_a_sample"]
    return (hidden.reshape(samples, -1, hidden.shape[-1]), *rest)


def _texts_apart(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.reshape(*module.__dict__["was_shape"][:-1], output.shape[-1])


def text_limit(config: Configuration) -> int | None:
    """Return how many tokens a class text may have; None where the model says nothing."""
    limit = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def fills_places(config: Configuration) -> bool:
    """Tell whether texts are padded to all places of the model, because the last one is read (SigLIP)."""
    return str(config.model_type).startswith("siglip")


def _vector(answer: ModelOutput | Tensor) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    return cast(Tensor, answer.pooler_output)


def _unit(vectors: Tensor) -> Tensor:
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths
