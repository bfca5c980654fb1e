"""What a verifier computes anew: digests of files, and the epsilon of events."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from defenses.dp import Accountant, Event, NonPrivateEvent
from ffm_secure.errors import StoreError

_BLOCK = 1 << 20  # bytes read at a time


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
      StoreError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def composed(events: Sequence[tuple[Event, int]], delta: float) -> float:
    """Return what events cost together at delta, each as often as it says."""
    accountant = Accountant()
    for event, count in events:
        if isinstance(event, NonPrivateEvent):
            return math.inf
        accountant.compose(event, count)
    return accountant.epsilon(delta).epsilon if events else 0.0
