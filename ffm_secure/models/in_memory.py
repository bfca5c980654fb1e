"""A model that is in memory already, written down once so that a run with it can be continued, audited and
exported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import transformers

from ffm_secure.errors import ModelError
from ffm_secure.models.backbone import fingerprint, quiet

# What writing a model notes in its configuration, which says nothing about what the model is.
_NOTED = frozenset(("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldModel:
    """Hold a model of the transformers library, and what it reads texts with."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None

    def folder(self, under: Path) -> Path:
        """Return the folder that these weights and this configuration have; writes nothing."""
        digest = hashlib.sha256(fingerprint(self.model.state_dict()).encode())
        stated = {}
        for name, value in self.model.config.to_dict().items():
            if name not in _NOTED:
                stated[name] = value
        digest.update(json.dumps(stated, sort_keys=True, default=str).encode())
        if self.tokenizer is not None:
            digest.update(repr((type(self.tokenizer).__name__, len(self.tokenizer))).encode())
        return under / digest.hexdigest()[:16]

    def store(self, folder: Path) -> None:
        """Write model and tokenizer as safetensors into a folder, whole or not at all; one that is there
        stays.
        """
        if folder.is_dir():
            return
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        unfinished.mkdir(parents=True, mode=0o700)
        try:
            with quiet():
                self.model.save_pretrained(unfinished)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(unfinished)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def held_model(model: object, tokenizer: object) -> HeldModel:
    """Hold a model that was given from Python.

    Raises:
      ModelError: it is no model of transformers, or the tokenizer is none.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(
            f"model = {type(model).__name__}: must be a PreTrainedModel of transformers; "
            "others are named in model.name"
        )
    if tokenizer is not None and not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ModelError(f"tokenizer = {type(tokenizer).__name__}: must be a tokenizer of transformers")
    return HeldModel(model=model, tokenizer=tokenizer)
