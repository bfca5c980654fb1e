"""One hash for everything that decides epsilon in a mechanism."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def digest_of(kind: str, values: Mapping[str, object]) -> str:
    """Return the hash of a mechanism's kind and fields, for whoever has to agree on it."""
    text = json.dumps({"version": 1, "kind": kind, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
