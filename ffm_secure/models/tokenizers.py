"""Load the tokenizer beside a model, or say how one is written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ffm_secure.errors import ModelError
from ffm_secure.foreign import ModelTokenizer

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
