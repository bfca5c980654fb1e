"""Image classification: pictures as bytes at the model's size, normalised when a batch is built."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Cells
from ffm_secure.models.backbone import Backbone
from ffm_secure.tasks.base import Classification, Columns, TaskData, as_indices
from ffm_secure.tasks.encoded import Encoded, EncodedImages

_CHUNK = 512


class ImageClassification(Classification):
    """Assign one of a fixed set of labels to a picture."""

    kind = "image_classification"

    def __init__(
        self, backbone: Backbone, data: TaskData, *, max_length: int = 64, fixed_length: bool = False
    ) -> None:
        super().__init__(backbone, data, max_length=max_length, fixed_length=fixed_length)
        if backbone.image_size is None or backbone.normalisation is None:
            raise ModelError(f"image_classification: the model {backbone.source} takes no pictures")
        if data.image_column is None:
            raise ModelError("image_classification: the data has no picture column")
        self.image_column = data.image_column
        self.side, self.channels = backbone.image_size, backbone.channels
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (backbone.normalisation.mean, backbone.normalisation.std)
        )

    def encode(self, examples: Columns) -> EncodedImages:
        """Resize pictures uint8 [n, H, W, channels] to the model's side, bilinear with antialiasing."""
        column = examples.column(self.image_column)
        pixels = torch.empty((len(column), self.channels, self.side, self.side), dtype=torch.uint8)
        for start in range(0, len(column), _CHUNK):
            stop = min(start + _CHUNK, len(column))
            pixels[start:stop] = self._fit(np.asarray(column[start:stop]))
        return EncodedImages(pixels=pixels, labels=self.labels(examples))

    def batch(
        self, encoded: Encoded, indices: ArrayLike, *, device: str, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Build `pixel_values` float32 [B, C, S, S] and `labels` [B]."""
        assert isinstance(encoded, EncodedImages)
        chosen = torch.from_numpy(as_indices(indices))
        pixels = (encoded.pixels[chosen].float() / 255.0 - self.mean) / self.std
        labels = torch.from_numpy(encoded.labels)[chosen]
        return {"pixel_values": pixels.to(device), "labels": labels.to(device)}

    def _fit(self, pictures: Cells) -> Tensor:
        if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
            raise ModelError(
                f"pictures are {pictures.dtype} {list(pictures.shape)}; they must be uint8 [n, H, W, C]"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(pictures))
        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(1)
        else:
            tensor = tensor.permute(0, 3, 1, 2)
        if tensor.shape[1] != self.channels:
            grey = tensor.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
            tensor = grey.expand(-1, self.channels, -1, -1)
        if tuple(tensor.shape[2:]) != (self.side, self.side):
            size = (self.side, self.side)
            tensor = nn.functional.interpolate(tensor.float(), size=size, mode="bilinear", antialias=True)
            tensor = tensor.round().clamp(0, 255).to(torch.uint8)
        return tensor
