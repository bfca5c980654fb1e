"""Encrypt integer vectors, add them blindly, open only their sum."""

from __future__ import annotations

from defenses.he.backends import (
    Accumulator,
    EncryptedClient,
    MaskingClient,
    PlainClient,
    SumClient,
    SumServer,
    WordAccumulator,
)
from defenses.he.engines import available
from defenses.he.keys import KeyHolder, KeyRequest
from defenses.he.parameters import Parameters, choose, describe, error_bound, lint, noise_margin_bits
from defenses.he.wire import Agreement

__all__ = [
    "Accumulator",
    "Agreement",
    "EncryptedClient",
    "KeyHolder",
    "KeyRequest",
    "MaskingClient",
    "Parameters",
    "PlainClient",
    "SumClient",
    "SumServer",
    "WordAccumulator",
    "available",
    "choose",
    "describe",
    "error_bound",
    "lint",
    "noise_margin_bits",
]
