"""What a party is doing now, in a small file that its own people may look at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ffm_secure.record_codec import read_json

STATUS: Final = "status.json"
_FORMAT: Final = 1


class StatusFile:
    """Write what happens now; whoever reads sees the whole of one state."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATUS

    def write(self, **words: str | int) -> None:
        """Replace the file; a disk that is full keeps nobody from working."""
        content = {"format": _FORMAT, "when": int(time.time()), "process": os.getpid(), **words}
        beside = self._path.with_name(f".{self._path.name}.new")
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(beside, self._path)
        except OSError:
            return


def read_status(folder: Path) -> Mapping[str, Any]:
    """Return what was written last; nothing where there is none."""
    try:
        content = read_json(folder / STATUS)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
