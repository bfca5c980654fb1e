"""What an attacker needs: to read a certificate, change it, and sign it anew with every key there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.statement import Predicate, Statement
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.errors import RecordError
from ffm_secure.transport.roster import key_words


def certificate(folder: Path) -> bytes:
    return (folder / "certificate.json").read_bytes()


def everything(folder: Path) -> Materials:
    return Materials(folder=folder, ledger=folder / "ledger.sqlite")


def broken(content: bytes, beside: Materials) -> list[str]:
    """Return the claims that do not hold; the bytes themselves where they are no certificate."""
    try:
        result = verify(content, beside)
    except RecordError:
        return ["certificate"]
    return [check.claim for check in result.checks if not check.holds]


def statement_of(content: bytes) -> Statement:
    return Statement.from_bytes(Envelope.from_bytes(content).payload)


def resigned(statement: Statement) -> bytes:
    """Sign a statement with fresh keys for everybody: what somebody can do who holds every key."""
    keys = [Identity.generate(RandomSource.system()) for _ in statement.predicate.signers]
    signers = []
    for signer, key in zip(statement.predicate.signers, keys, strict=True):
        signers.append(replace(signer, public_key=key_words(key.public_key)))
    predicate = replace(statement.predicate, signers=tuple(signers))
    envelope = Envelope(payload=replace(statement, predicate=predicate).to_bytes())
    for key in keys:
        envelope = envelope.signed_by(key)
    return envelope.to_bytes()


def with_predicate(statement: Statement, predicate: Predicate) -> bytes:
    return resigned(replace(statement, predicate=predicate))


def forged(content: bytes, **changes: Any) -> bytes:
    """Change parts of what a certificate states and sign it with fresh keys for everybody."""
    statement = statement_of(content)
    return with_predicate(statement, replace(statement.predicate, **changes))
