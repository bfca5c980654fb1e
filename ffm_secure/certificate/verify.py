"""Check a certificate offline: signatures, files, ledgers, and every epsilon from its events."""

from __future__ import annotations

import math
from dataclasses import dataclass

from defenses.errors import DefenseError
from ffm_secure.certificate.check import Check, Materials, refused
from ffm_secure.certificate.contents import check_contents, number, parsed
from ffm_secure.certificate.envelope import Envelope, key_id
from ffm_secure.certificate.files import check_files
from ffm_secure.certificate.ledgers import check_ledger
from ffm_secure.certificate.reported import REPORT, check_report
from ffm_secure.certificate.statement import Signer, Statement
from ffm_secure.transport.roster import read_key

__all__ = ["Check", "Materials", "Verification", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Hold every check of a certificate, what could not be checked for want of materials, and what came
    after it.
    """

    kind: str
    run: str
    certified: str
    checks: tuple[Check, ...]
    not_given: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Tell whether every check holds."""
        return all(check.holds for check in self.checks)


def verify(content: bytes, materials: Materials) -> Verification:
    """Check everything that can be checked without the data, without a model library and without a network.

    Guarantee: a certificate whose bytes differ anywhere from those that were signed does not hold.

    Raises:
      RecordError: the bytes are no certificate.
    """
    envelope = Envelope.from_bytes(content)
    statement = Statement.from_bytes(envelope.payload)
    not_given: list[str] = []
    notes: list[str] = []
    checks = [*_signatures(envelope, statement, materials), *check_contents(statement)]
    checks += check_files(statement, envelope.payload, materials, not_given)
    changed = {check.claim for check in checks if not check.holds}
    if materials.folder is not None and REPORT not in changed:
        checks += check_report(statement, materials.folder)
    if materials.ledger is not None:
        checks += check_ledger(statement.predicate, materials.ledger, materials.owner, notes)
    else:
        not_given.append("a ledger: that its entries are still there was not checked (--ledger)")
    if materials.cross_check:
        checks += _cross_checks(statement, not_given)
    if not materials.trust:
        not_given.append("keys: that they belong to the parties they name was not checked (--trust)")
    return Verification(
        kind=statement.kind,
        run=statement.predicate.run,
        certified=statement.predicate.certified,
        checks=tuple(checks),
        not_given=tuple(not_given),
        notes=(*notes, *_silent(statement, materials)),
    )


def _signatures(envelope: Envelope, statement: Statement, materials: Materials) -> list[Check]:
    signers = statement.predicate.signers
    keys = [_public_key(signer.public_key) for signer in signers]
    checks = []
    for signer, valid in zip(signers, envelope.valid(keys), strict=True):
        known = not materials.trust or materials.trust.get(signer.public_key) == signer.name
        detail = "signed" if valid else "no valid signature"
        if valid and not known:
            detail = "signed, by a key that is not among the trusted for this name"
        if signer.simulated:
            detail += ", simulated key"
        checks.append(Check(claim=f"signature of {_party(signer)}", holds=valid and known, detail=detail))
    expected = {key_id(key) for key in keys}
    if any(signature.key_id not in expected for signature in envelope.signatures):
        checks.append(refused("signers", "a key has signed that the certificate does not name"))
    return checks


def _party(signer: Signer) -> str:
    return "operator" if signer.role == "operator" else f"owner {signer.name}"


def _public_key(words: str) -> bytes:
    """Return a key as bytes; none, under which nothing verifies, where nobody should use it."""
    try:
        return read_key(words)
    except ValueError:
        return b""


def _silent(statement: Statement, materials: Materials) -> list[str]:
    """Name the trusted who have no part in this certificate: one of them may have been left out."""
    keys = {signer.public_key for signer in statement.predicate.signers}
    return [
        f"{name}: trusted, and no party of this certificate"
        for key, name in materials.trust.items()
        if key not in keys
    ]


def _cross_checks(statement: Statement, not_given: list[str]) -> list[Check]:
    """Compute epsilon with a second accountant, where it is installed."""
    from ffm_secure.certificate import second_accountant

    if not second_accountant.is_there():
        return [refused("second accountant", "dp-accounting is not installed")]
    checks = []
    for owner in statement.predicate.owners:
        claim = f"second accountant, {owner.owner}"
        try:
            other = second_accountant.epsilon(parsed(owner.events), statement.predicate.delta)
        except (DefenseError, ValueError, ArithmeticError, RecursionError):
            checks.append(refused(claim, "holds something that is no event"))
            continue
        if other is None:
            not_given.append(f"{owner.owner}: dp-accounting knows no such mechanism, or nothing is promised")
            continue
        close = other <= owner.epsilon * 1.02 + 1e-3 and owner.epsilon <= other * 1.02 + 1e-3
        holds = close and math.isfinite(owner.epsilon)
        checks.append(Check(claim=claim, holds=holds, detail=f"{number(other)} by dp-accounting"))
    return checks
