"""Collect what a certificate says from a run directory and the ledger it charged."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from defenses.dp import Entry, Ledger
from defenses.dp.accountant import composed
from defenses.dp.ledger_entries import EVERYBODY
from defenses.errors import ParameterError, TamperedError
from ffm_secure import record_codec
from ffm_secure.certificate.statement import (
    TENSORS,
    CountedEvent,
    FindingEvidence,
    Kind,
    OwnerEvidence,
    Predicate,
    RoundEvidence,
    Signer,
    Statement,
    Subject,
)
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import PlanRefused, StoreError
from ffm_secure.records import ModelExport, PrivacyStatement, RunSummary
from ffm_secure.site.ledger_place import ledger_path
from ffm_secure.storage.durable import file_digest
from ffm_secure.storage.run_directory import Store

MODEL, LEDGER = "adapter", "ledger.csv"
REPORTS = ("report.html", "details.html", "report.json")
R = TypeVar("R", RunSummary, ModelExport)


def collect(folder: Path, signers: Sequence[Signer], *, kind: Kind) -> Statement:
    """Return what a certificate of a finished run states; nothing is written.

    Guarantee: the ledger was verified, every owner of the run has an account in it, and the noise came from
    no seed. The statements count what later runs took from the same rows, too.

    Raises:
      PlanRefused: the run cannot be certified; every reason is told.
      StoreError: the directory is no run, or is damaged.
    """
    store = Store.read(folder)
    config = store.config()
    summary = _read(RunSummary, folder / "report.json")
    owners = _owners(folder, config, summary)
    predicate = Predicate(
        run=summary.name,
        run_id=_run_id(store),
        status=summary.status,
        run_file=run_file.dump(run_file.from_table(dict(summary.config))),
        unit=config.privacy.unit,
        delta=_delta(config),
        statements=_statements(summary, owners),
        owners=owners,
        rounds=_rounds(summary),
        transcript=file_digest(folder / "rounds.jsonl"),
        audit=_findings(summary),
        audit_sentence=summary.audit.sentence if summary.audit else "",
        epsilon_lower=summary.audit.epsilon_lower if summary.audit else None,
        declared_public=tuple(
            text for text in summary.plan.warnings if text.startswith("taken to be public")
        ),
        not_protected=_not_protected(summary),
        software=dict(sorted(summary.software.items())),
        lock=lock_digest(),
        signers=tuple(signers),
    )
    return Statement(kind=kind, subjects=_subjects(folder), predicate=predicate)


def owners_of(folder: Path) -> tuple[str, ...]:
    """Return the owners that the ledger of a run knows from it, in order of their names."""
    config = Store.read(folder).config()
    with _open_verified(folder, config) as ledger:
        return tuple(sorted(_charges_by_owner(ledger, _run_id(Store.read(folder)))))


def lock_digest() -> str:
    """Return the SHA-256 over name and version of every installed distribution, one a line, sorted."""
    versions = set()
    for distribution in importlib.metadata.distributions():
        versions.add(f"{distribution.metadata['Name'].lower()}=={distribution.version}")
    return hashlib.sha256("\n".join(sorted(versions)).encode()).hexdigest()


def export_ledger(folder: Path) -> str:
    """Return the rows of a run's ledger as CSV, once every one of them was verified."""
    with _open_verified(folder, Store.read(folder).config()) as ledger:
        return ledger.export("csv")


def _run_id(store: Store) -> str:
    resumed = store.resume()
    if resumed is None:
        raise StoreError(f"{store.folder}: no round of this run is finished; there is nothing to certify")
    return resumed[2].hex()


def _delta(config: RunConfig) -> float:
    return config.privacy.delta if config.privacy.unit != "none" else 1e-5


def _account_unit(config: RunConfig) -> str:
    return config.privacy.unit if config.privacy.unit != "none" else "record"


def _open_verified(folder: Path, config: RunConfig) -> Ledger:
    path = ledger_path(config.privacy, folder)
    if path is None or not path.is_file():
        raise PlanRefused([f"{folder}: its ledger is not there, and without it nothing can be stated"])
    try:
        ledger = Ledger.open(path, create=False)
        try:
            ledger.verify()
        except BaseException:
            ledger.close()
            raise
    except TamperedError:
        raise PlanRefused([f"{path}: is not authentic, and nothing can be stated from it"]) from None
    return ledger


def _charges_by_owner(ledger: Ledger, run_id: str) -> dict[str, list[Entry]]:
    charges: dict[str, list[Entry]] = {}
    for entry in ledger.entries():
        if entry.kind == "reserve" and entry.run == run_id and entry.owner != EVERYBODY:
            charges.setdefault(entry.owner, []).append(entry)
    return charges


def _owners(folder: Path, config: RunConfig, summary: RunSummary) -> tuple[OwnerEvidence, ...]:
    reasons = [f"{folder}: {stamp}" for stamp in summary.stamps]
    if config.privacy.noise == "seeded" and not reasons:
        reasons.append(f"{folder}: the privacy noise of this run came from a seed")
    with _open_verified(folder, config) as ledger:
        charges = _charges_by_owner(ledger, _run_id(Store.read(folder)))
        if not charges:
            reasons.append(f"{folder}: the ledger holds no charge of this run")
        asked = max((len(record.survivors) for record in summary.rounds), default=0)
        if len(charges) < asked:
            reasons.append(
                f"{folder}: {asked} owners answered a round, and the ledger knows {len(charges)} of this run"
            )
        if reasons:
            raise PlanRefused(reasons)
        return tuple(_owner(ledger, config, name, charges[name]) for name in sorted(charges))


def _owner(ledger: Ledger, config: RunConfig, name: str, charges: Sequence[Entry]) -> OwnerEvidence:
    blocks = sorted({block for charge in charges for block in charge.blocks})
    try:
        events = ledger.events_of(blocks, _account_unit(config), _delta(config))
    except ParameterError as error:
        raise StoreError(str(error)) from None
    head = ledger.head()
    counted = tuple(Counter(events).items())
    return OwnerEvidence(
        owner=name,
        epsilon=composed(counted, _delta(config)),
        events=tuple(CountedEvent(event=event.to_json(), count=count) for event, count in counted),
        ledger_entries=head.sequence,
        ledger_head=head.hash,
    )


def _statements(summary: RunSummary, owners: Sequence[OwnerEvidence]) -> tuple[PrivacyStatement, ...]:
    """Return the statements of the report, with what the ledger holds by now where that is more."""
    spent = max(owner.epsilon for owner in owners)
    statements = []
    for statement in summary.statements:
        if not statement.finite or spent <= statement.epsilon:
            statements.append(statement)
            continue
        note = f"{statement.epsilon:.4g} at the end of the run; later runs on the same rows are counted"
        statements.append(
            replace(statement, epsilon=spent, note="; ".join(filter(None, [statement.note, note])))
        )
    return tuple(statements)


def _rounds(summary: RunSummary) -> tuple[RoundEvidence, ...]:
    rounds = []
    for record in summary.rounds:
        rounds.append(
            RoundEvidence(
                round=record.round,
                cohort=len(record.cohort),
                survivors=len(record.survivors),
                aborted=record.aborted,
            )
        )
    return tuple(rounds)


def _findings(summary: RunSummary) -> tuple[FindingEvidence, ...]:
    if summary.audit is None:
        return ()
    findings = []
    for finding in summary.audit.findings:
        findings.append(
            FindingEvidence(
                observer=finding.observer,
                attack=finding.attack,
                point=finding.point,
                verdict=finding.verdict,
                measure=finding.measure,
                score=finding.score,
                control=finding.control,
                baseline=finding.baseline,
                source=finding.source,
                round=finding.round,
            )
        )
    return tuple(findings)


def _not_protected(summary: RunSummary) -> tuple[str, ...]:
    lines = [f"{observer} sees {what}" for observer, what in sorted(summary.plan.reveals.items())]
    return (*lines, summary.plan.breaks, *summary.stamps)


def _subjects(folder: Path) -> tuple[Subject, ...]:
    """Return every file of the exported model, the tensors of its base, and the report."""
    model = folder / MODEL
    if not model.is_dir():
        raise StoreError(f"{folder}: holds no exported model ({MODEL}/); export it before it is certified")
    subjects = []
    for path in sorted(model.rglob("*")):
        if path.is_file():
            subjects.append(_file_subject(path, str(path.relative_to(folder).as_posix())))
    for name in (*REPORTS, LEDGER):
        if (folder / name).is_file():
            subjects.append(_file_subject(folder / name, name))
    base = _base(model)
    if base is not None:
        subjects.append(base)
    return tuple(subjects)


def _file_subject(path: Path, name: str) -> Subject:
    return Subject(name=name, digest={"sha256": file_digest(path)})


def _base(model: Path) -> Subject | None:
    path = model / "export.json"
    if not path.is_file():
        return None
    export = _read(ModelExport, path)
    return Subject(name=f"base:{export.base_model}", digest={TENSORS: export.base_fingerprint})


def _read(kind: type[R], path: Path) -> R:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; finish the run first") from None
    return record_codec.from_json(kind, text, str(path))
