"""Models for texts and pictures: the part for texts, its configuration and where its tensors lie."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ffm_secure.foreign import Configuration

# Where the text part of a composite checkpoint keeps its tensors, and what the text model alone calls them.
_TEXT_PART = {
    "^model.language_model": "model",
    "^model.text_model": "model",
    "^language_model.model": "model",
    "^language_model.lm_head": "lm_head",
}


def text_part(config: Configuration, kind: str, folder: str) -> tuple[Configuration, dict[str, str]]:
    """Choose the text part of a model for texts and pictures where a text task asks for it, with the names of
    its tensors.
    """
    part = getattr(config, "text_config", None)
    if kind.startswith("image") or part is None or getattr(config, "vision_config", None) is None:
        return config, {}
    if config.tie_word_embeddings and not part.tie_word_embeddings and not _stores_head(Path(folder)):
        part.tie_word_embeddings = True  # the whole says that its head is the embedding, the part does not
    return part, dict(_TEXT_PART)


def _stores_head(folder: Path) -> bool:
    """Tell whether a folder holds a head of its own; where that cannot be told, that it does."""
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return True
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                names = list(stored.keys())
        except (OSError, SafetensorError):
            return True
        if any(name.endswith("lm_head.weight") for name in names):
            return True
    return False
