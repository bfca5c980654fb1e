"""Data sets from the Hugging Face hub: the one module that may use a network, and only when a run file names
one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ffm_secure.errors import DataError
from ffm_secure.foreign import LibraryObject

CONNECT_SECONDS = 10.0


def load_hub(name: str, path: Path) -> tuple[Any, Any | None]:
    """Download the train and validation parts of a hub data set as Arrow tables; offline is an error, never a
    wait.

    Guarantee: no code from the hub runs (data files only), and no usage statistics are sent.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    missing = f"data = {name!r}: there is no {path}, and as a Hugging Face data set it "
    try:
        import datasets
        from huggingface_hub import HfApi

        repository, _, configuration = name.partition(":")
        HfApi().dataset_info(repository, timeout=CONNECT_SECONDS)
    except (
        Exception
    ) as error:  # name resolution, proxies, HTTP and offline mode all fail in ways of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(
            f"{missing}cannot be reached ({reason}); check the name and the network, or use a local folder"
        ) from error
    try:
        parts = datasets.load_dataset(repository, configuration or None)
        train = parts["train"]
        validation = next((parts[key] for key in ("validation", "valid", "val", "dev") if key in parts), None)
        return as_arrow(train), None if validation is None else as_arrow(validation)
    except Exception as error:  # as above, plus data sets that need a loading script, which are refused
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{missing}cannot be loaded ({reason}); download it and give the folder") from error


def as_arrow(part: LibraryObject) -> LibraryObject:
    """Give the rows as one Arrow table that carries the class names the way parquet files do."""
    table = part.with_format("arrow")[:]
    return table.replace_schema_metadata(part.features.arrow_schema.metadata)
