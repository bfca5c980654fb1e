"""What a loaded model must not do: look at later tokens, or answer a text by the padding beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration

if TYPE_CHECKING:
    from ffm_secure.models.backbone import Backbone


def refuse_if_it_sees_the_future(name: str, backbone: Backbone) -> None:
    """Refuse an encoder posing as a causal model: its perplexity would be meaningless."""
    tokens = torch.arange(1, 7).unsqueeze(0) % backbone.config.vocab_size
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % backbone.config.vocab_size
    with torch.inference_mode():
        before, after = (backbone.model(input_ids=ids).logits[0, :-1].float() for ids in (tokens, changed))
    if not torch.allclose(before, after, atol=1e-3, rtol=1e-3):
        raise ModelError(
            f"model.name = {name!r}: its predictions look at later tokens, so it is no causal language "
            "model; use task.kind = 'masked_lm'"
        )


def refuse_if_padding_matters(name: str, backbone: Backbone) -> None:
    """Refuse a model whose answer to a text changes with the padding beside it: a sample's loss would depend
    on its company.
    """
    pad, config = backbone.config.pad_token_id, backbone.config
    words = [token for token in range(min(40, config.vocab_size)) if token not in _marks(config)][-4:]
    if isinstance(config.eos_token_id, list):
        end = config.eos_token_id[0]
    else:
        end = config.eos_token_id
    alone = torch.tensor([words + ([end] if config.is_encoder_decoder and end is not None else [])])
    padded = torch.cat((alone, torch.full((1, 5), pad)), dim=1)
    mask = (torch.arange(padded.shape[1]) < alone.shape[1]).long()[None]
    try:
        with torch.inference_mode():
            before = backbone.model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
            after = backbone.model(input_ids=padded, attention_mask=mask).logits
    except Exception:  # what cannot run at all is refused with its reason when something to train is attached
        return
    if after.ndim == 3:
        after = after[:, : alone.shape[1]]
    if not torch.allclose(before.float(), after.float(), atol=1e-2, rtol=1e-2):
        raise ModelError(
            f"model.name = {name!r}: {backbone.architecture} answers a text differently when others in its "
            "batch are longer, so no bound on one record's influence holds; choose an architecture that "
            "masks padding (BERT, RoBERTa, Llama, GPT-2, ...)"
        )


def _marks(config: Configuration) -> set[int | None]:
    """Collect the tokens that begin, end or pad a text."""
    marks: set[int | None] = set()
    for part in ("pad", "bos", "eos", "sep", "cls"):
        token = getattr(config, f"{part}_token_id", None)
        marks |= set(token) if isinstance(token, list) else {token}
    return marks
