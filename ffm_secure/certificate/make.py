"""Make a certificate of a run and sign it: by the operator, and by every data owner over its own ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.ledger_file import Head
from defenses.errors import DefenseError
from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.certificate.collect import LEDGER, collect, export_ledger, owners_of
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.statement import Kind, Signer, Statement
from ffm_secure.errors import PlanRefused
from ffm_secure.storage.durable import write_atomic
from ffm_secure.transport.roster import key_words

OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """Hold a new certificate and the names of the owners whose signatures are still to come."""

    content: bytes
    waiting: tuple[str, ...]


def certify(folder: Path, *, operator: Identity | None, owners: Mapping[str, str]) -> Certified:
    """Return the certificate of a run; its ledger is exported beside its report, as ledger.csv.

    `owners` gives the public key of every owner, who then signs by itself. Without it every owner is a
    simulated one: its key is made here, signs, is marked as simulated in what it signs, and is forgotten.

    Raises:
      PlanRefused: the run cannot be certified; every reason is told.
    """
    names = owners_of(folder)
    _require_all(names, owners)
    keys: dict[str, Identity] = {}
    signers = [_operator(operator, keys)]
    for name in names:
        if name in owners:
            signers.append(Signer(role="owner", name=name, public_key=owners[name]))
            continue
        keys[name] = Identity.generate(RandomSource.system())
        signers.append(
            Signer(role="owner", name=name, public_key=key_words(keys[name].public_key), simulated=True)
        )
    write_atomic(folder / LEDGER, export_ledger(folder).encode())
    simulated = any(signer.simulated for signer in signers)
    kind: Kind = "simulation" if simulated else "federation"
    envelope = Envelope(payload=collect(folder, signers, kind=kind).to_bytes())
    if operator is not None:
        envelope = envelope.signed_by(operator)
    for key in keys.values():
        envelope = envelope.signed_by(key)
    waiting = [name for name in names if name in owners]
    return Certified(content=envelope.to_bytes(), waiting=tuple(waiting))


def countersign(content: bytes, key: Identity, *, ledger: Path | None) -> tuple[bytes, str]:
    """Return the certificate with one more signature, and the name of the party that signed.

    Guarantee: an owner with its ledger at hand signs only over a head that this ledger holds.

    Raises:
      PlanRefused: the certificate names no such key, or its ledger says something else.
    """
    envelope = Envelope.from_bytes(content)
    statement = Statement.from_bytes(envelope.payload)
    own = key_words(key.public_key)
    signer = next((held for held in statement.predicate.signers if held.public_key == own), None)
    if signer is None:
        raise PlanRefused(["the certificate names no party with this key"])
    if signer.role == "owner" and ledger is not None:
        _require_head(statement, signer.name, ledger)
    return envelope.signed_by(key).to_bytes(), signer.name


def _operator(operator: Identity | None, keys: dict[str, Identity]) -> Signer:
    if operator is not None:
        return Signer(role="operator", name=OPERATOR, public_key=key_words(operator.public_key))
    keys[OPERATOR] = Identity.generate(RandomSource.system())
    return Signer(
        role="operator", name=OPERATOR, public_key=key_words(keys[OPERATOR].public_key), simulated=True
    )


def _require_all(names: tuple[str, ...], owners: Mapping[str, str]) -> None:
    """Refuse keys of some owners only: a certificate is signed by all of them or simulated for all."""
    if not owners:
        return
    missing = [
        f"owner {name!r}: has no key; a certificate needs every owner" for name in names if name not in owners
    ]
    foreign = [f"owner {name!r}: took no part in this run" for name in owners if name not in names]
    if missing or foreign:
        raise PlanRefused([*missing, *foreign])


def _require_head(statement: Statement, name: str, path: Path) -> None:
    evidence = next(held for held in statement.predicate.owners if held.owner == name)
    try:
        with Ledger.open(path, create=False) as ledger:
            ledger.verify(Head(sequence=evidence.ledger_entries, hash=evidence.ledger_head))
    except DefenseError:
        raise PlanRefused([f"{path}: does not hold what the certificate says of {name}'s ledger"]) from None
