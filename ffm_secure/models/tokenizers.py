"""The tokenizer beside a model: loaded, or said how one is written there, and given one padding token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ffm_secure.errors import ModelError
from ffm_secure.foreign import Configuration, ModelTokenizer

_WRITE_TOKENIZER = (
    "write the model's own beside it: AutoTokenizer.from_pretrained(ITS NAME).save_pretrained(FOLDER)"
)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "*spm*", "added_tokens.json")


def load_tokenizer(name: str, folder: str, options: dict[str, Any]) -> ModelTokenizer:
    """Load the tokenizer beside a model.

    Raises:
      ModelError: the folder holds none.
    """
    local = Path(folder).is_dir()
    if local and not any(any(Path(folder).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"model.name = {name!r}: the folder holds no tokenizer; {_WRITE_TOKENIZER}")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a half-copied tokenizer makes the library throw
        if not local:
            raise
        files = sorted({path.name for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern)})
        raise ModelError(
            f"model.name = {name!r}: its tokenizer cannot be loaded from {', '.join(files)} "
            f"({type(error).__name__}); a file is missing or damaged: {_WRITE_TOKENIZER}"
        ) from error


def name_marks(config: Configuration) -> None:
    """Say of the marks a configuration knows nothing of that there are none."""
    for mark in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not hasattr(config, mark):
            setattr(config, mark, None)


def settle_padding(name: str, tokenizer: ModelTokenizer, config: Configuration, model: nn.Module) -> None:
    """Give tokenizer and model one padding token; padding is masked, so any token of the vocabulary will do.

    The tokenizer's own wins, then a valid one of the configuration: a classifier that looks for the last word
    before the padding would otherwise take padded places for words, and a text's answer would depend on its
    company.
    """
    if tokenizer.pad_token_id is None:
        stated = config.pad_token_id
        valid = isinstance(stated, int) and 0 <= stated < len(tokenizer)
        known = None
        if valid:
            known = tokenizer.convert_ids_to_tokens(stated)
        choices = [known, tokenizer.eos_token, tokenizer.unk_token, *tokenizer.convert_ids_to_tokens([0, 1])]
        # such classifiers look for the end of a text
        padding_token = None
        if config.is_encoder_decoder:
            padding_token = tokenizer.eos_token
        tokenizer.pad_token = next(choice for choice in choices if choice and choice != padding_token)
    config.pad_token_id = tokenizer.pad_token_id
    rows = _embedded(model)
    if rows is not None and len(tokenizer) > rows:
        raise ModelError(
            f"model.name = {name!r}: the tokenizer knows {len(tokenizer)} tokens but the model embeds "
            f"{rows}; tokenizer and weights do not belong together: take the tokenizer the model came with, "
            "or call model.resize_token_embeddings(len(tokenizer)) and save both again"
        )


def _embedded(model: nn.Module) -> int | None:
    """Count the tokens a model has a vector for; None where it looks none up, as those that hash letters."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
