"""Let a model that reads one text and writes another run on the first alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attacks.foreign import Configuration

_GIVEN = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_STARTS = ("decoder_start_token_id", "bos_token_id", "pad_token_id")


def writes(model: nn.Module) -> bool:
    """Tell whether a model is an encoder-decoder that answers in words."""
    config: Configuration = getattr(model, "config", None)
    words = getattr(model, "get_output_embeddings", lambda: None)()
    return bool(getattr(config, "is_encoder_decoder", False)) and words is not None


def answer_itself(model: nn.Module) -> nn.Module:
    """Let the model write what it reads where nobody says what else; attacks ask about one text alone."""
    model.register_forward_pre_hook(_fill_in, with_kwargs=True)
    return model


def _fill_in(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tokens = kwargs.get("input_ids")
    if tokens is None or any(kwargs.get(name) is not None for name in _GIVEN):
        return args, kwargs
    config: Configuration = getattr(model, "config", None)
    stated = [getattr(config, name, None) for name in _STARTS]
    start = next((token for token in stated if isinstance(token, int) and token >= 0), 0)
    shifted = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)
    return args, {**kwargs, "decoder_input_ids": shifted}
