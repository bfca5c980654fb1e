"""A site's end of a federation of machines: bytes in, bytes out, whatever carries them."""

from __future__ import annotations

from typing import Protocol


class SiteSession(Protocol):
    """Answer a coordinator's messages for one data owner.

    Guarantee: safe to call from any thread. A message out of turn, past its deadline, of another coordinator
    or for another site is refused; the same bytes again are answered with the same bytes. A refusal is the
    constant `ffm_secure.transport.envelope.REFUSAL`, and its reason is in the site's own log; nothing that a
    message holds makes `handle` raise.
    """

    def handle(self, stage: str, message: bytes) -> bytes:
        """Answer one message of a stage."""

    def close(self) -> None:
        """Let go of the site's folder, its ledger and its log."""
