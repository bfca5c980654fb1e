"""Pictures scored against the texts of their classes, by models such as CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import ModelTokenizer
from ffm_secure.models.backbone import Backbone
from ffm_secure.models.dual_encoder import fills_places
from ffm_secure.tasks.base import TaskData, logits
from ffm_secure.tasks.encoded import Encoded
from ffm_secure.tasks.image import ImageClassification


class ImageTextClassification(ImageClassification):
    """Assign to a picture the class whose text fits it best.

    Before anything is trained this is the zero-shot answer of the model. Class names are public: they are
    written into `task.class_text` and belong to the input of every picture.
    """

    kind = "image_text_classification"

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        tokenizer = backbone.tokenizer
        assert tokenizer is not None, "a model that reads texts has a tokenizer"
        places = backbone.max_positions if fills_places(backbone.config) else None
        self.class_texts = class_tokens(
            tokenizer, texts_of(data, backbone.class_text, self.kind), max_length=max_length, places=places
        )

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Build `pixel_values` float32 [B, C, S, S], `class_texts` int64 [B, K, T] and `labels` [B]."""
        batch = super().batch(encoded, indices, device=device, generator=generator)
        texts = self.class_texts.to(device)
        return {**batch, "class_texts": texts.expand(len(batch["labels"]), *texts.shape)}


class ImageTextContrastive(ImageTextClassification):
    """Draw pictures and the texts of their classes together, and apart from those of the others in the batch.

    Assumes: no bound on a single picture is asked for; what one picture contributes depends on its company,
    so the plan refuses it under the record and the person unit.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.3; pictures of one class as one target: Yang et
    al. 2022, arXiv:2204.03610, equations 2 and 3.
    """

    kind = "image_text_contrastive_classification"

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return for every picture the mean of both directions over the batch, float32 [B], in nats."""
        labels = batch["labels"]
        pairs = logits(model, batch).float()[:, labels]  # [b, j]: picture b against the text of picture j
        same = (labels[:, None] == labels[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        to_texts = -(target * pairs.log_softmax(dim=1)).sum(dim=1)
        to_pictures = -(target * pairs.t().log_softmax(dim=1)).sum(dim=1)
        return (to_texts + to_pictures) / 2.0


def texts_of(data: TaskData, class_text: str, kind: str) -> tuple[str, ...]:
    """Write every class name into the text of its class.

    Raises:
      ModelError: the classes have no names that say anything, two have the same, or no name is asked for.
    """
    names = tuple(name.strip() for name in data.label_names)
    problems = []
    if not names or any(name.lstrip("+-").isdigit() for name in names):
        problems.append("classes are told apart by their names, and these have numbers alone")
    if len({name.casefold() for name in names}) < len(names) or not all(names):
        problems.append("two classes have the same name, or one has none")
    if class_text.count("{}") != 1:
        problems.append(f"task.class_text = {class_text!r} must name the class once, as {{}}")
    if problems:
        raise ModelError(f"{kind}: {'; '.join(problems)}; set task.class_names or task.class_text")
    return tuple(class_text.replace("{}", name) for name in names)


def class_tokens(
    tokenizer: ModelTokenizer, texts: Sequence[str], *, max_length: int, places: int | None
) -> Tensor:
    """Return the tokens of the class texts, int64 [K, T], padded to the longest or to `places`.

    Raises:
      ModelError: a text is longer than `max_length` tokens; nothing is cut off a class in silence.
    """
    rows: list[list[int]] = [list(tokenizer(text)["input_ids"]) for text in texts]
    limit = max_length if places is None else min(max_length, places)
    for text, row in zip(texts, rows, strict=True):
        if len(row) > limit:
            raise ModelError(
                f"task.max_length = {max_length}: the text of a class has {len(row)} tokens and at most "
                f"{limit} are read ({text[:60]!r}); raise it, or shorten task.class_text or the name"
            )
    width = places or max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), int(tokenizer.pad_token_id), dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    return tokens
