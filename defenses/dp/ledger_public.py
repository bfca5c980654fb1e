"""The rows that runs used as public ones: what was published without noise is never private again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from defenses.dp.ledger_blocks import Load, members_digest
from defenses.dp.records import Flags, Keys
from defenses.errors import TamperedError


class PublicBook:
    """Follow public rows through the rows of a ledger that note them, by keyed digests of what they say."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again from the first row."""
        self._digests: dict[int, str] = {}
        self._contents: Keys | None = None

    def apply(self, sequence: int, body: Mapping[str, Any]) -> None:
        """Take in a row that notes some."""
        self._digests[sequence] = body["members"]
        self._contents = None

    def hold(self, contents: Keys, load: Load) -> Flags:
        """Mark the contents, `[n]`, that were noted.

        Raises:
          TamperedError: what is stored is not what its row says.
        """
        if self._contents is None:
            stored = [self._read(number, load) for number in self._digests]
            self._contents = np.sort(np.concatenate([np.zeros(0, dtype=np.uint64), *stored]))
        places = np.searchsorted(self._contents, contents)
        result = np.zeros(len(contents), dtype=bool)
        inside = places < len(self._contents)
        result[inside] = self._contents[places[inside]] == contents[inside]
        return result

    def fresh(self, contents: Keys, load: Load) -> bytes:
        """Return the stored form of what was not noted yet, each once."""
        new = np.unique(contents[~self.hold(contents, load)])
        return new.astype("<u8").tobytes()

    def verify(self, load: Load) -> None:
        """Check every row that notes some."""
        for number in self._digests:
            self._read(number, load)

    def _read(self, number: int, load: Load) -> Keys:
        keys, links = load(number)
        if members_digest(keys, links) != self._digests[number] or len(keys) % 8:
            raise TamperedError
        return np.frombuffer(keys, dtype="<u8").astype(np.uint64, copy=False)


def public_body(keys: bytes) -> dict[str, Any]:
    """Return what a row says about contents that it notes, 8 bytes each."""
    return {"records": len(keys) // 8, "members": members_digest(keys, b"")}
