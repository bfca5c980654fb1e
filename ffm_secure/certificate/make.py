"""Make a certificate of a run and sign it: by the operator, and by every data owner over its own ledger."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure.certificate.attested import collect_attestations
from ffm_secure.certificate.collect import (
    LEDGER,
    FinishedRun,
    open_verified,
    read_run,
    simulated_owners,
    statement_of_run,
)
from ffm_secure.certificate.contents import check_contents
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.ledgers import check_ledger
from ffm_secure.certificate.statement import OPERATOR, Signer, Statement
from ffm_secure.errors import PlanRefused
from ffm_secure.storage.durable import write_atomic
from ffm_secure.transport.receipts import RECEIPTS
from ffm_secure.transport.roster import FederationRoster, key_words


_RELEASED = (  # columns of a ledger that leave with a certificate
    "sequence", "kind", "time", "owner", "unit", "run", "round", "release", "event", "spent", "epsilon",
    "delta",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """Hold a new certificate and the names of the parties whose signatures are still to come."""

    content: bytes
    kind: str
    waiting: tuple[str, ...]


def certify(
    folder: Path,
    *,
    operator: Identity | None,
    owners: Mapping[str, str],
    clock: Callable[[], float] = time.time,
) -> Certified:
    """Return the certificate of a run on one machine; what goes with it is written beside its report.

    `owners` gives the public key of every owner, who then signs by itself. Without it every owner is a
    simulated one: its key is made here, signs, is marked as simulated in what it signs, and is forgotten.
    Guarantee: it says that it is of a simulation, whoever has the keys: one machine held every row.

    Raises:
      PlanRefused: the run cannot be certified; every reason is told.
    """
    if is_federation(folder):
        raise PlanRefused([f"{folder}: is a coordinator's run; its sites attest what their ledgers hold"])
    run = read_run(folder)
    evidence = simulated_owners(run)
    names = tuple(owner.owner for owner in evidence)
    _require_all(names, owners, operator)
    keys: dict[str, Identity] = {}
    signers = [_operator(operator, keys)]
    for name in names:
        if name in owners:
            signers.append(Signer(role="owner", name=name, public_key=owners[name]))
            continue
        keys[name] = Identity.generate(RandomSource.system())
        public = key_words(keys[name].public_key)
        signers.append(Signer(role="owner", name=name, public_key=public, simulated=True))
    documents = {LEDGER: _exported_ledger(run)}
    statement, beside = statement_of_run(
        run, evidence, signers, kind="simulation", now=_day(clock), documents=documents
    )
    _write(folder, beside)
    envelope = Envelope(payload=statement.to_bytes())
    for key in ([operator] if operator is not None else []) + list(keys.values()):
        envelope = envelope.signed_by(key)
    waiting = [name for name in names if name in owners]
    return Certified(content=envelope.to_bytes(), kind="simulation", waiting=tuple(waiting))


def is_federation(folder: Path) -> bool:
    """Tell whether a run directory is a coordinator's, whose sites were machines of their own."""
    return (folder / RECEIPTS).is_file()


def certify_federation(
    folder: Path,
    *,
    attestations: Sequence[bytes],
    roster: FederationRoster,
    operator_key: bytes,
    operator: Identity | None,
    clock: Callable[[], float] = time.time,
) -> Certified:
    """Return the certificate of a coordinator's run from what its sites have attested; they sign it next.

    Raises:
      PlanRefused: the run cannot be certified; every reason is told.
    """
    if not is_federation(folder):
        raise PlanRefused([f"{folder}: is no coordinator's run: it has no receipts of sites"])
    if operator is not None and operator.public_key != operator_key:
        raise PlanRefused(["the key that would sign is not the operator's, who signed the roster"])
    run = read_run(folder)
    evidence = collect_attestations(run, attestations, roster)
    keys = dict(zip(roster.names, roster.keys, strict=True))
    signers = [Signer(role="operator", name=OPERATOR, public_key=key_words(operator_key))]
    for owner in evidence:
        public = key_words(keys[owner.owner])
        signers.append(Signer(role="owner", name=owner.owner, public_key=public))
    now = _day(clock)
    statement, beside = statement_of_run(
        run, evidence, signers, kind="federation", now=now, roster=roster.digest
    )
    _write(folder, beside)
    envelope = Envelope(payload=statement.to_bytes())
    waiting = [owner.owner for owner in evidence]
    if operator is None:
        waiting.insert(0, OPERATOR)
    else:
        envelope = envelope.signed_by(operator)
    return Certified(content=envelope.to_bytes(), kind="federation", waiting=tuple(waiting))


def countersign(content: bytes, key: Identity, *, ledger: Path | None) -> tuple[bytes, str]:
    """Return the certificate with one more signature, and the name of the party that signed.

    Guarantee: nobody signs what contradicts itself, and an owner with its ledger at hand nothing that this
    ledger does not say.

    Raises:
      PlanRefused: the certificate names no such key, does not hold, or the ledger says something else.
    """
    envelope = Envelope.from_bytes(content)
    statement = Statement.from_bytes(envelope.payload)
    own = key_words(key.public_key)
    signer = next((held for held in statement.predicate.signers if held.public_key == own), None)
    if signer is None:
        raise PlanRefused(["the certificate names no party with this key"])
    checks = check_contents(statement)
    broken = [f"{check.claim}: {check.detail}" for check in checks if not check.holds]
    if broken:
        raise PlanRefused(["the certificate does not hold", *broken])
    if ledger is not None:
        owner = signer.name if signer.role == "owner" else ""
        _require_ledger(statement, owner, ledger)
    return envelope.signed_by(key).to_bytes(), signer.name


def _require_ledger(statement: Statement, owner: str, path: Path) -> None:
    broken = []
    for check in check_ledger(statement.predicate, path, owner, []):
        if not check.holds:
            broken.append(f"{path}: does not hold what the certificate says: {check.claim}: {check.detail}")
    if broken:
        raise PlanRefused(broken)


def _day(clock: Callable[[], float]) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock()))


def _write(folder: Path, documents: Mapping[str, bytes]) -> None:
    for name, content in documents.items():
        write_atomic(folder / name, content)


def _exported_ledger(run: FinishedRun) -> bytes:
    """Return the rows of a run's ledger as they may leave, once every one of them was verified.

    Guarantee: no number of rows, digest of rows or reason that a person wrote is in it; those are in the
    ledger, which stays with its owner.
    """
    with open_verified(run) as ledger:
        rows = csv.DictReader(io.StringIO(ledger.export("csv")))
        text = io.StringIO()
        writer = csv.DictWriter(text, _RELEASED, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def _operator(operator: Identity | None, keys: dict[str, Identity]) -> Signer:
    if operator is not None:
        return Signer(role="operator", name=OPERATOR, public_key=key_words(operator.public_key))
    keys[OPERATOR] = Identity.generate(RandomSource.system())
    public = key_words(keys[OPERATOR].public_key)
    return Signer(role="operator", name=OPERATOR, public_key=public, simulated=True)


def _require_all(names: tuple[str, ...], owners: Mapping[str, str], operator: Identity | None) -> None:
    """Refuse keys of some owners only, and one key for two parties."""
    if not owners:
        return
    problems = []
    for name in names:
        if name not in owners:
            problems.append(f"owner {name!r}: has no key; a certificate needs every owner")
    keys = list(owners.values())
    if operator is not None:
        keys.append(key_words(operator.public_key))
    for name, key in owners.items():
        if name not in names:
            problems.append(f"owner {name!r}: took no part in this run")
        if keys.count(key) > 1:
            problems.append(f"owner {name!r}: its key is another party's, too")
    if problems:
        raise PlanRefused(problems)
