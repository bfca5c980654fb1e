"""Who can decrypt, and which collusion breaks it: text for the plan and the report, one statement for each
backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from defenses.errors import ParameterError

Kind = Literal["plain", "masking", "bfv", "ckks", "threshold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollusionStatement:
    """State in words who reads what under one backend. No field is an epsilon: encryption gives none."""

    backend: str
    who_can_decrypt: str
    server_learns: str
    clients_learn: str
    broken_by: str
    not_protected: str


def collusion(kind: Kind, *, parties: int, fewest: int, tolerated: int = 0) -> CollusionStatement:
    """State who can decrypt with `parties` clients, sums of at least `fewest`, and `tolerated` colluding
    clients.

    `tolerated` counts the clients that may work with the server under masking or threshold encryption.

    Raises:
        ParameterError: an unknown backend or impossible counts.
    """
    if not 1 <= fewest <= parties or not 0 <= tolerated <= parties:
        raise ParameterError(
            f"parties = {parties}, fewest = {fewest}, tolerated = {tolerated}: impossible counts"
        )
    if kind not in _STATEMENTS:
        raise ParameterError(f"backend {kind!r} is unknown; known are {', '.join(sorted(_STATEMENTS))}")
    numbers = {"parties": parties, "fewest": fewest, "tolerated": tolerated, "more": tolerated + 1}
    return CollusionStatement(
        backend=kind, **{name: text.format(**numbers) for name, text in _STATEMENTS[kind].items()}
    )


_SHARED_KEY = {
    "who_can_decrypt": (
        "Each of the {parties} clients alone: symmetric encryption needs the secret key at every "
        "client. The server holds no key."
    ),
    "server_learns": "Sizes, timing and who took part. Not the updates and not their sum.",
    "clients_learn": (
        "The sum of at least {fewest} clients' updates, checked to be exactly that; one client that "
        "also sees the network reads every update."
    ),
    "broken_by": "The server together with any 1 of the {parties} clients reads every update of the run.",
    "not_protected": (
        "A client with the key can forge the sum or push any update; the sum itself may leak (no "
        "epsilon). A failed opening burns the key, so the server or any client can stop the run."
    ),
}
_STATEMENTS = {
    "plain": {
        "who_can_decrypt": "Nobody needs to: updates travel in clear.",
        "server_learns": "Every client's update.",
        "clients_learn": "The sum of at least {fewest} clients' updates.",
        "broken_by": "Nothing to break: the server alone reads every update.",
        "not_protected": "Everything but the transport.",
    },
    "masking": {
        "who_can_decrypt": (
            "Nobody reads one update; the sum of at least {fewest} of {parties} clients opens to the "
            "server when enough of them answer."
        ),
        "server_learns": "The sum, sizes, timing and who took part.",
        "clients_learn": "The sum when it is broadcast.",
        "broken_by": (
            "The server together with {more} or more clients; up to {tolerated} are tolerated, and "
            "learn the sum of the others."
        ),
        "not_protected": "The sum itself may leak (no epsilon).",
    },
    "bfv": _SHARED_KEY,
    "ckks": _SHARED_KEY,
    "threshold": {
        "who_can_decrypt": (
            "No client alone: all {parties} clients, or the configured quorum, each "
            "add a share of the decryption."
        ),
        "server_learns": "Sizes, timing, who took part, and the sum if the shares are combined there.",
        "clients_learn": "The sum of at least {fewest} clients' updates.",
        "broken_by": "The server together with {more} or more clients; up to {tolerated} are tolerated.",
        "not_protected": (
            "The sum itself may leak (no epsilon). A share must never be given twice for one ciphertext."
        ),
    },
}
