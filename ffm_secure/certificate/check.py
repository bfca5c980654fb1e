"""One claim of a certificate, whether it holds, and what was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Say of one claim whether it holds, and what was seen."""

    claim: str
    holds: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Name what a verifier has beside the certificate."""

    folder: Path | None = None  # holds the certified files under their names
    model: Path | None = None  # the exported model alone
    ledger: Path | None = None
    trust: Mapping[str, str] = field(
        default_factory=dict
    )  # key, hexadecimal -> whose it is, known from elsewhere
    owner: str = ""  # whose ledger it is, where one ledger does not hold them all
    cross_check: bool = False


def refused(claim: str, detail: str) -> Check:
    """Return a claim that does not hold."""
    return Check(claim=claim, holds=False, detail=detail)
