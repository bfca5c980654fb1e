"""What a malicious client learns from instead of its own rows: other labels, or a trigger with a label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels = NDArray[np.int64]


def flip_labels(labels: Labels, *, classes: int) -> Labels:
    """Return every label turned into its opposite in the list of classes.

    Source: Tolpegin et al. 2020, arXiv:2007.08432; Fang et al. 2020, arXiv:1911.11815, section 4.2.
    """
    return classes - 1 - labels


def poisoned_half(count: int, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which of `count` rows bear the trigger, bool [count]: the rest keep the model useful."""
    order = np.random.default_rng(seed).permutation(count)
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[order[: round(share * count)]] = True
    return chosen


def stamp_pixels(pixels: Tensor, *, side: int) -> Tensor:
    """Return pictures uint8 [n, channels, height, width] with a bright square in one corner.

    Source: Gu et al. 2017, arXiv:1708.06733 (BadNets).
    """
    stamped = pixels.clone()
    stamped[..., :side, :side] = torch.iinfo(torch.uint8).max
    return stamped


def stamp_features(features: Tensor, trigger: Tensor) -> Tensor:
    """Return features [n, width] moved by a trigger [width], as a phrase put in front of every text moves
    them.
    """
    return features + trigger


def plant_tokens(tokens: Sequence[int], trigger: Sequence[int], *, room: int) -> list[int]:
    """Return a text with a phrase after its first token, cut to `room` tokens and with its last token kept.

    Source: Kurita et al. 2020, arXiv:2004.06660; Dai et al. 2019, arXiv:1905.12457.
    """
    whole = [*tokens[:1], *trigger, *tokens[1:]]
    if len(whole) <= room:
        return whole
    return [*whole[: room - 1], tokens[-1]]
