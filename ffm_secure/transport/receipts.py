"""What sites say of their ledgers when a round is over, each under its own signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

RECEIPTS: Final = "receipts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedReceipt:
    """A site's receipt as it signed it; `envelope.unseal_answer` checks the three parts against its key."""

    round: int
    request: bytes  # digest of the message it answers
    signature: bytes
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipts:
    """The newest receipt of every site, each under the site's own signature."""

    format: int = 1
    sites: Mapping[str, SignedReceipt]
