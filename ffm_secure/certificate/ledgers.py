"""What a ledger says of an owner in a run: said when a certificate is made, and again when it is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from defenses.dp import Entry, Ledger
from defenses.dp.ledger_copies import ledger_as_of, ledger_copy
from defenses.dp.ledger_entries import EVERYBODY
from defenses.dp.ledger_file import Head
from defenses.errors import DefenseError, ParameterError
from ffm_secure.certificate.check import Check, refused
from ffm_secure.certificate.contents import number, same_epsilon
from ffm_secure.certificate.statement import CountedEvent, OwnerEvidence, Predicate
from ffm_secure.errors import StoreError
from ffm_secure.site.allowance import composed

_UNREADABLE = (DefenseError, StoreError, OSError, ValueError)


def charges_of(ledger: Ledger, run_id: str) -> dict[str, list[Entry]]:
    """Return what every owner was charged in a run."""
    charges: dict[str, list[Entry]] = {}
    for entry in ledger.entries():
        if entry.kind == "reserve" and entry.run == run_id and entry.owner != EVERYBODY:
            charges.setdefault(entry.owner, []).append(entry)
    return charges


def owner_evidence(
    ledger: Ledger, name: str, charges: Sequence[Entry], unit: str, delta: float
) -> OwnerEvidence:
    """Return the history of the row that has spent most, of all rows an owner was charged for in a run.

    Raises:
      StoreError: the ledger holds no such rows.
    """
    blocks = sorted({block for charge in charges for block in charge.blocks})
    account = unit if unit != "none" else "record"
    try:
        events = ledger.events_of(blocks, account, delta)
        withdrawals = ledger.withdrawals(blocks)
    except ParameterError as error:
        raise StoreError(str(error)) from None
    head, counted = ledger.head(), tuple(Counter(events).items())
    return OwnerEvidence(
        owner=name,
        epsilon=composed(counted, delta),
        events=tuple(CountedEvent(event=event.to_json(), count=count) for event, count in counted),
        ledger_entries=head.sequence,
        ledger_head=head.hash,
        withdrawn=withdrawals[0].time[:10] if withdrawals else "",
    )


def check_ledger(predicate: Predicate, path: Path, owner: str, notes: list[str]) -> list[Check]:
    """Hold a ledger to everything that a certificate states of it; what came later goes into `notes`."""
    owners = [held for held in predicate.owners if owner in ("", held.owner)]
    if not owners or not path.is_file():
        return [refused("ledger", "is not there, or its owner is not certified")]
    try:
        with ledger_copy(path) as copy, Ledger.open(copy, create=False) as now:
            now.verify()
            return _compare(copy, now, predicate, owners, notes)
    except _UNREADABLE:
        return [refused("ledger", "not authentic, or entries were taken back")]


def _compare(
    copy: Path, now: Ledger, predicate: Predicate, owners: Sequence[OwnerEvidence], notes: list[str]
) -> list[Check]:
    charged = charges_of(now, predicate.run_id)
    missing = sorted(set(charged) - {held.owner for held in predicate.owners})
    if missing and len(owners) == len(predicate.owners):
        return [refused("ledger", f"charged {missing[0][:80]!r} in this run, who is not certified")]
    checks = [Check(claim="ledger", holds=True, detail="authentic, holds everything certified")]
    heads: dict[Head, list[OwnerEvidence]] = {}
    for held in owners:
        heads.setdefault(Head(sequence=held.ledger_entries, hash=held.ledger_head), []).append(held)
    for head, those in heads.items():
        with ledger_as_of(copy, head) as then:
            charged_then = charges_of(then, predicate.run_id)
            for held in those:
                certified, present = charged_then.get(held.owner, ()), charged.get(held.owner, ())
                checks.append(_owner(then, held, certified, len(present), predicate))
                _note_growth(now, held, present, predicate, notes)
    return checks


def _owner(
    then: Ledger, held: OwnerEvidence, charges: Sequence[Entry], present: int, predicate: Predicate
) -> Check:
    """What is certified of an owner is what its ledger stated at the certified head, event by event."""
    claim = f"ledger of {held.owner}"
    if not charges:
        return refused(claim, "held no charge of this run at the certified head")
    stated = owner_evidence(then, held.owner, charges, predicate.unit, predicate.delta)
    if _counts(stated) != _counts(held) or not same_epsilon(stated.epsilon, held.epsilon):
        return refused(
            claim, f"its events at the certified head are others: epsilon {number(stated.epsilon)}"
        )
    if stated.withdrawn != held.withdrawn:
        return refused(claim, "says something else on withdrawal")
    if present > len(charges):
        return refused(claim, f"holds {present - len(charges)} later charges of this run")
    return Check(claim=claim, holds=True, detail=f"{present:,} charges of this run, all certified")


def _counts(owner: OwnerEvidence) -> Counter[str]:
    counts: Counter[str] = Counter()
    for counted in owner.events:
        counts[counted.event] += counted.count
    return counts


def _note_growth(
    ledger: Ledger, held: OwnerEvidence, charges: Sequence[Entry], predicate: Predicate, notes: list[str]
) -> None:
    """Say what the same rows have spent since, and whether they have left."""
    if not charges:
        return
    now = owner_evidence(ledger, held.owner, charges, predicate.unit, predicate.delta)
    if not same_epsilon(now.epsilon, held.epsilon):
        notes.append(f"{held.owner}: since the certificate the same rows have spent {number(now.epsilon)}")
    if now.withdrawn and not held.withdrawn:
        notes.append(f"{held.owner}: withdrawn on {now.withdrawn}, after the certificate")
