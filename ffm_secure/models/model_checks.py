"""What a loaded model must not do: look at later tokens, or answer a text by the padding beside it; and how
its answers begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration

if TYPE_CHECKING:
    from ffm_secure.models.backbone import Backbone


def refuse_if_it_sees_the_future(name: str, backbone: Backbone) -> None:
    """Refuse an encoder posing as a causal model: its perplexity would be meaningless."""
    tokens = torch.arange(1, 7).unsqueeze(0) % backbone.config.vocab_size
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % backbone.config.vocab_size
    try:
        with torch.inference_mode():
            before, after = (
                backbone.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                for ids in (tokens, changed)
            )
    except Exception as error:  # an architecture this version of the library cannot run as it is configured
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"model.name = {name!r}: {backbone.architecture} does not run on a plain text ({reason}); choose "
            "another architecture"
        ) from error
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
    size = min(40, getattr(config, "vocab_size", None) or 40)
    words = [token for token in range(size) if token not in _marks(config)][-4:]
    if isinstance(config.eos_token_id, list):
        end = config.eos_token_id[0]
    else:
        end = config.eos_token_id
    alone = torch.tensor([words + ([end] if config.is_encoder_decoder and end is not None else [])])
    padded = torch.cat((alone, torch.full((1, 5), pad)), dim=1)
    mask = (torch.arange(padded.shape[1]) < alone.shape[1]).long()[None]
    answer = {"decoder_input_ids": alone} if backbone.kind == "sequence_to_sequence" else {}
    try:
        with torch.inference_mode():
            before = backbone.model(input_ids=alone, attention_mask=torch.ones_like(alone), **answer).logits
            after = backbone.model(input_ids=padded, attention_mask=mask, **answer).logits
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


def refuse_quantised(name: str, config: Configuration) -> None:
    """Refuse weights of a few bits: no gradient of a single sample is taken through them here.

    Raises:
      ModelError: the checkpoint says that it is quantised, with how.
    """
    parts = (config, getattr(config, "text_config", None), getattr(config, "vision_config", None))
    stated = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
    if stated is None:
        return
    table = stated
    if not isinstance(stated, dict):
        table = stated.to_dict()
    method = str(table.get("quant_method") or "bitsandbytes")
    width = ""
    for bits in (4, 8):
        if table.get(f"load_in_{bits}bit"):
            width = f", {bits} bits"
    raise ModelError(
        f"model.name = {name!r}: its weights are quantised ({method}{width}), which is not trained here; "
        "choose the model it was made from, or write its weights out with model.dequantize() and "
        "save_pretrained"
    )


def refuse_broken_weights(name: str, model: nn.Module) -> None:
    """Refuse weights that are no numbers: every answer, and every update, would be none either.

    Raises:
      ModelError: the first such tensor is named, the others are counted.
    """
    broken = []
    for key, value in model.named_parameters():
        if not bool(torch.isfinite(value.sum())):
            broken.append(key)
    if broken:
        raise ModelError(
            f"model.name = {name!r}: {len(broken)} tensors hold NaN or infinity (first: {broken[0]}); write "
            "the weights again from before they broke"
        )


def advice_without_config(folder: Path) -> str:
    """Say what a folder without config.json holds instead of a model, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return (
            "it holds an adapter of PEFT: set model.adapter to this folder, and model.name to the model it "
            "was trained on"
        )
    others = [pattern for pattern in ("*.gguf", "*.onnx", "*.ckpt", "*.pth") if any(folder.glob(pattern))]
    if others:
        return f"it holds {others[0]}, which is not read; write the model with save_pretrained"
    return "point to a transformers model"


def start_token(name: str, config: Configuration) -> int:
    """Return the token that opens what an encoder-decoder writes.

    Raises:
      ModelError: the model states none.
    """
    for stated in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, stated, None)
        if isinstance(token, int) and token >= 0:
            return token
    raise ModelError(
        f"model.name = {name!r}: nothing says with which token an answer begins; set "
        "decoder_start_token_id in its config.json"
    )


def _marks(config: Configuration) -> set[int | None]:
    """Collect the tokens that begin, end or pad a text."""
    marks: set[int | None] = set()
    for part in ("pad", "bos", "eos", "sep", "cls"):
        token = getattr(config, f"{part}_token_id", None)
        marks |= set(token) if isinstance(token, list) else {token}
    return marks


def refuse_pipes(name: str, folder: Path) -> None:
    """Refuse a folder in which a library would wait for a pipe, or read a device to its end.

    Raises:
      ModelError: with the names.
    """
    odd = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            odd.append(entry.name)
    if odd:
        raise ModelError(f"model.name = {name!r}: {', '.join(odd)}: no regular files; put the files there")
