"""Draw texts from a language model that a run trained, many behind one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ffm_secure.trainable.predictor import Predictor

_TOGETHER = 32  # texts of one pass


def sample(
    predictor: Predictor, prompt: str, count: int, *, longest: int, temperature: float, seed: int
) -> list[str]:
    """Return so many texts drawn behind a prompt, each at most `longest` tokens; the prompt is left out.

    Guarantee: a function of the exported model, so it costs no epsilon beyond what the model did, however
    many are drawn and whatever is done to them.
    Assumes: the prompt leaves room in the model's positions; `Predictor.room_behind` says how much.
    """
    generator = torch.Generator().manual_seed(seed)
    start = predictor.prompt_tokens(prompt)
    texts: list[str] = []
    for first in range(0, count, _TOGETHER):
        rows = torch.tensor([start] * min(_TOGETHER, count - first))
        grown = _grown(predictor, rows, longest=longest, temperature=temperature, generator=generator)
        for row in grown[:, len(start) :].tolist():
            texts.append(predictor.words_of(row))
    return texts


def _grown(
    predictor: Predictor, rows: Tensor, *, longest: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Return rows [n, t] with tokens drawn behind them: at most `longest`, and none behind a text's end."""
    end = predictor.end_token
    running = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(longest):
        with torch.inference_mode():
            scores = predictor.trainable.model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[
                :, -1
            ]
        chances = (scores.double() / temperature).softmax(dim=1)
        tokens = torch.multinomial(chances, 1, generator=generator)[:, 0]
        tokens[~running] = end
        rows = torch.cat([rows, tokens[:, None]], dim=1)
        running &= tokens != end
        if not bool(running.any()):
            break
    return rows
