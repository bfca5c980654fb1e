"""A site's word on what its ledger holds of a run: signed by the site, collected by whoever certifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from defenses.dp import Ledger
from defenses.errors import ProtocolError
from defenses.signatures import verify_signature
from ffm_secure import record_codec
from ffm_secure.certificate.collect import FinishedRun
from ffm_secure.certificate.contents import TOLERANCE
from ffm_secure.certificate.ledgers import charges_of, owner_evidence
from ffm_secure.certificate.statement import OwnerEvidence
from ffm_secure.errors import PlanRefused, RecordError, StoreError
from ffm_secure.records import Receipt
from ffm_secure.transport import envelope
from ffm_secure.transport.envelope import Sign
from ffm_secure.transport.receipts import RECEIPTS, Receipts
from ffm_secure.transport.roster import FederationRoster
from ffm_secure.record_codec import read_regular

_WORDS: Final = b"ffm-secure attestation 1"
_ROUND_BY_ROUND: Final = 1e-3  # a receipt is composed round by round, which reads a little higher


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """Say what one site's ledger holds of the rows it used in a run."""

    format: int = 1
    run_id: str
    unit: str
    delta: float
    evidence: OwnerEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedAttestation:
    """An attestation as its site signed it."""

    format: int = 1
    content: bytes
    signature: bytes


def attest(ledger: Ledger, name: str, run_id: str, *, unit: str, delta: float, sign: Sign) -> bytes:
    """Return what a site's ledger says of a run, signed by the site.

    Raises:
      StoreError: the ledger holds no charge of this run.
      TamperedError: it is not authentic.
    """
    ledger.verify()
    charges = charges_of(ledger, run_id).get(name, [])
    if not charges:
        raise StoreError(f"the ledger of {name} holds no charge of this run")
    evidence = owner_evidence(ledger, name, charges, unit, delta)
    words = Attestation(run_id=run_id, unit=unit, delta=delta, evidence=evidence)
    content = record_codec.canonical_bytes(words)
    signed = SignedAttestation(content=content, signature=sign(_WORDS + content))
    return record_codec.canonical_bytes(signed) + b"\n"


def collect_attestations(
    run: FinishedRun, contents: Sequence[bytes], roster: FederationRoster
) -> tuple[OwnerEvidence, ...]:
    """Return the evidence of every site, in the order of their names.

    Guarantee: each is signed by the site of that name, about this run, and not below the receipt that the
    site gave while it ran; every site that answered a round, or gave a receipt, is there.

    Raises:
      PlanRefused: it is not so; every reason is told.
    """
    keys = dict(zip(roster.names, roster.keys, strict=True))
    receipts, problems = _receipts(run, keys), list[str]()
    evidence: dict[str, OwnerEvidence] = {}
    for place, content in enumerate(contents, start=1):
        try:
            words = _read(content, keys)
        except (ProtocolError, RecordError):
            problems.append(f"attestation {place}: is damaged, or not signed by a site of the roster")
            continue
        problem = _problem(run, words, receipts.get(words.evidence.owner))
        if words.evidence.owner in evidence:
            problem = f"{words.evidence.owner}: attests twice"
        if problem:
            problems.append(problem)
        evidence[words.evidence.owner] = words.evidence
    needed = {roster.names[site] for site in run.answered if site < len(roster.names)} | set(receipts)
    for name in sorted(needed - set(evidence)):
        problems.append(f"{name}: has not attested; at the site: ffm-secure site attest FOLDER RUN.toml")
    if problems:
        raise PlanRefused(problems)
    return tuple(evidence[name] for name in sorted(evidence))


def _read(content: bytes, keys: dict[str, bytes]) -> Attestation:
    """Read an attestation that the site it names has signed.

    Raises:
      ProtocolError, RecordError: it is none.
    """
    signed = record_codec.from_bytes(SignedAttestation, content.strip(), "an attestation")
    words = record_codec.from_bytes(Attestation, signed.content, "an attestation")
    if words.evidence.owner not in keys:
        raise ProtocolError
    verify_signature(keys[words.evidence.owner], signed.signature, _WORDS + signed.content)
    return words


def _problem(run: FinishedRun, words: Attestation, receipt: Receipt | None) -> str:
    name, evidence = words.evidence.owner, words.evidence
    if words.run_id != run.run_id:
        return f"{name}: attests another run"
    if (words.unit, words.delta) != (run.config.privacy.unit, run.delta):
        return f"{name}: attests another unit or another delta"
    if receipt is None:
        return ""
    grown = evidence.ledger_entries > receipt.entries
    same = (evidence.ledger_entries, evidence.ledger_head) == (receipt.entries, receipt.head)
    if not grown and not same:
        return f"{name}: attests an older ledger than its receipt names"
    least = receipt.epsilon * (1 - _ROUND_BY_ROUND) - TOLERANCE
    if math.isfinite(receipt.epsilon) and evidence.epsilon < least:
        return f"{name}: attests less than its receipt states"
    return ""


def _receipts(run: FinishedRun, keys: dict[str, bytes]) -> dict[str, Receipt]:
    """Return the receipts that lie in a run, each checked against its site's key.

    Raises:
      PlanRefused: one is no word of its site.
    """
    path = run.folder / RECEIPTS
    receipts = {}
    try:
        stored = record_codec.from_bytes(Receipts, read_regular(path).strip(), str(path))
        for name, signed in stored.sites.items():
            answer = envelope.ANSWER + signed.signature + signed.content
            content = envelope.unseal_answer(answer, signed.request, keys.get(name, b""))
            receipts[name] = record_codec.from_bytes(Receipt, bytes(content), "a receipt")
    except (OSError, RecordError, ProtocolError):
        raise PlanRefused([f"{path}: is damaged, or a receipt in it is not its site's"]) from None
    return receipts
