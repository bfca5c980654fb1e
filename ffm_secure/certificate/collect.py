"""Collect what a certificate says from a run directory and the evidence of its owners."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.ledger_copies import ledger_as_of
from defenses.dp.ledger_file import Head
from defenses.errors import DefenseError, TamperedError
from ffm_secure import record_codec
from ffm_secure.certificate.contents import (
    TOLERANCE,
    WITHOUT_UNIT,
    check_contents,
    number,
    parsed,
    worst_of,
)
from ffm_secure.certificate.documents import ANNEX, MAPPING, annex, mapping
from ffm_secure.certificate.ledgers import charges_of, owner_evidence
from ffm_secure.certificate.reported import (
    REPORT,
    Report,
    declared_public,
    differences,
    finding_evidence,
    not_protected,
    read_report,
    round_evidence,
)
from ffm_secure.certificate.statement import (
    BASE,
    FILE,
    MODEL,
    TENSORS,
    Kind,
    OwnerEvidence,
    Predicate,
    Signer,
    Statement,
    Subject,
    one_line,
)
from ffm_secure.config import run_file
from ffm_secure.config.run_file import Audit, Document, RunConfig, Speed
from ffm_secure.config.schema import to_table
from ffm_secure.errors import PlanRefused, StoreError
from ffm_secure.privacy.statements import statements_of
from ffm_secure.records import ModelExport, PrivacyStatement, RunSummary
from ffm_secure.report.release import without_paths
from ffm_secure.site.ledger_place import ledger_path
from ffm_secure.storage.durable import file_digest
from ffm_secure.storage.run_directory import Store
from ffm_secure.record_codec import read_regular

LEDGER = "ledger.csv"
REPORTS = ("report.html", "details.html", REPORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """Hold what a run directory says of itself, every part of it held to the others."""

    folder: Path
    config: RunConfig
    run_id: str
    report: Report

    @property
    def summary(self) -> RunSummary:
        """Return what the report says."""
        return self.report.summary

    @property
    def delta(self) -> float:
        """Return the delta at which owners' events are composed."""
        return WITHOUT_UNIT if self.config.privacy.unit == "none" else self.config.privacy.delta

    @property
    def answered(self) -> frozenset[int]:
        """Return the owners, by number, whose updates or answers are in some sum."""
        sites: set[int] = set()
        for record in self.summary.rounds:
            sites.update(record.survivors)
        return frozenset(sites)


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
      PlanRefused: its report does not say what the directory holds, or its noise came from a seed.
      StoreError: the directory is no run, or is damaged.
    """
    store = Store.read(folder)
    config, resumed = store.config(), store.resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round of this run is finished; there is nothing to certify")
    _, records, run_id = resumed
    try:
        report = read_report(folder / REPORT)
    except OSError as error:
        raise StoreError(
            f"{folder / REPORT}: cannot be read: {error.strerror}; finish the run first"
        ) from None
    summary = report.summary
    reasons = [f"{folder}: {stamp}" for stamp in summary.stamps]
    if config.privacy.noise == "seeded" and not reasons:
        reasons.append(f"{folder}: the privacy noise of this run came from a seed")
    reported = run_file.from_table(dict(summary.config))
    if shaping(config) != shaping(reported) or summary.rounds != records:
        reasons.append(
            f"{folder / REPORT}: does not say what the run directory holds; write it again: "
            f"ffm-secure run {folder / 'run.toml'}"
        )
    if reasons:
        raise PlanRefused(reasons)
    return FinishedRun(folder=folder, config=config, run_id=run_id.hex(), report=report)


def simulated_owners(run: FinishedRun) -> tuple[OwnerEvidence, ...]:
    """Return what the ledger of a simulation says of each of its owners, in the order of their names.

    Guarantee: the ledger was verified, holds what it held when the report was written, and knows every owner
    that answered.

    Raises:
      PlanRefused: it is not so; every reason is told.
    """
    reasons = []
    with open_verified(run) as ledger:
        charges = charges_of(ledger, run.run_id)
        if not charges:
            reasons.append(f"{run.folder}: the ledger holds no charge of this run")
        if len(charges) < len(run.answered):
            reasons.append(
                f"{run.folder}: {len(run.answered)} owners answered, and the ledger knows {len(charges)} "
                "of this run"
            )
        if reasons:
            raise PlanRefused(reasons)
        owners = []
        for name in sorted(charges):
            owners.append(owner_evidence(ledger, name, charges[name], run.config.privacy.unit, run.delta))
    _require_report_of_ledger(run)
    return tuple(owners)


def _require_report_of_ledger(run: FinishedRun) -> None:
    """Refuse a report that states less than the ledger held when it was written."""
    path, unit = _ledger_of(run), run.config.privacy.unit
    head = Head(sequence=run.summary.ledger_entries, hash=run.summary.ledger_head)
    try:
        with ledger_as_of(path, head) as then:
            charges = charges_of(then, run.run_id)
            owners = [owner_evidence(then, name, charges[name], unit, run.delta) for name in sorted(charges)]
    except DefenseError:
        raise PlanRefused([f"{run.folder / REPORT}: names a head that the ledger never had"]) from None
    spent = max((owner.epsilon for owner in owners), default=math.inf)
    for statement in run.summary.statements:
        if statement.epsilon < spent - TOLERANCE or statement.epsilon <= 0.0:
            raise PlanRefused(
                [
                    f"{run.folder / REPORT}: states epsilon {number(statement.epsilon)} towards "
                    f"{statement.observer}, and the ledger held {number(spent)} then"
                ]
            )


def statement_of_run(
    run: FinishedRun,
    owners: Sequence[OwnerEvidence],
    signers: Sequence[Signer],
    *,
    kind: Kind,
    now: str,
    roster: str = "",
    documents: Mapping[str, bytes] | None = None,
) -> tuple[Statement, Mapping[str, bytes]]:
    """Return what a certificate of a run states, and the documents that stand beside it, by name; nothing is
    written. `documents` are certified, too.

    Raises:
      PlanRefused: what was collected does not hold together; every reason is told.
      StoreError: a file of the run is missing.
    """
    summary = run.summary
    predicate = Predicate(
        run=summary.name,
        run_id=run.run_id,
        certified=now,
        status=summary.status,
        run_file=run_file.dump(run_file.from_table(dict(summary.config))),
        unit=run.config.privacy.unit,
        delta=run.delta,
        statements=_statements(run, owners),
        owners=tuple(owners),
        rounds=round_evidence(summary.rounds),
        transcript=run.report.transcript,
        audit=finding_evidence(summary),
        audit_sentence=one_line(summary.audit.sentence) if summary.audit else "",
        epsilon_lower=summary.audit.epsilon_lower if summary.audit else None,
        declared_public=declared_public(summary),
        not_protected=not_protected(summary),
        software=dict(sorted(summary.software.items())),
        lock=lock_digest(),
        roster=roster,
        signers=tuple(signers),
    )
    beside = {
        **(documents or {}),
        ANNEX: annex(kind, predicate).encode(),
        MAPPING: mapping(predicate, run.folder / REPORT).encode(),
    }
    statement = Statement(kind=kind, subjects=_subjects(run.folder, beside), predicate=predicate)
    _require_sound(statement, run.report)
    return statement, beside


def _require_sound(statement: Statement, report: Report) -> None:
    reasons = [f"{check.claim}: {check.detail}" for check in check_contents(statement) if not check.holds]
    contradictions = differences(statement.predicate, report)
    if contradictions:
        reasons.append(f"report and certificate would differ in {', '.join(contradictions)}")
    if reasons:
        raise PlanRefused(reasons)
    Statement.from_bytes(statement.to_bytes())


def lock_digest() -> str:
    """Return the SHA-256 over name and version of every installed distribution, one a line, sorted."""
    versions = set()
    for distribution in importlib.metadata.distributions():
        versions.add(f"{distribution.metadata['Name'].lower()}=={distribution.version}")
    return hashlib.sha256("\n".join(sorted(versions)).encode()).hexdigest()


def open_verified(run: FinishedRun) -> Ledger:
    """Open the ledger that a simulation charged, once every row of it was verified.

    Raises:
      PlanRefused: it is not there, or not authentic.
    """
    path = _ledger_of(run)
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


def _ledger_of(run: FinishedRun) -> Path:
    path = ledger_path(run.config.privacy, run.folder)
    if path is None or not path.is_file():
        raise PlanRefused([f"{run.folder}: its ledger is not there, and without it nothing can be stated"])
    return path


def shaping(config: RunConfig) -> RunConfig:
    """Return a run file as a report holds it, without folders of a machine and what shapes no result."""
    table = without_paths(to_table(config))
    assert isinstance(table, dict)
    return replace(run_file.from_table(table), speed=Speed(), audit=Audit(), document=Document())


def _statements(run: FinishedRun, owners: Sequence[OwnerEvidence]) -> tuple[PrivacyStatement, ...]:
    """State epsilon from the events, with what the ledger holds by now where that is more than the report."""
    if not owners:
        return ()
    worst = worst_of(owners)
    reported = {statement.observer: statement.epsilon for statement in run.summary.statements}
    statements = []
    for statement in statements_of(run.config, parsed(worst.events), run.delta):
        before = reported.get(statement.observer, math.inf)
        if statement.finite and before < statement.epsilon - TOLERANCE:
            note = f"{before:.4g} at the end of the run; later runs on the same rows are counted"
            statement = replace(statement, note="; ".join(filter(None, [statement.note, note])))
        statements.append(statement)
    return tuple(statements)


def _subjects(folder: Path, documents: Mapping[str, bytes]) -> tuple[Subject, ...]:
    """Return every file of the exported model, the tensors of its base, and what is written beside them."""
    model = folder / MODEL
    if not model.is_dir():
        raise StoreError(f"{folder}: holds no exported model ({MODEL}/); export it before it is certified")
    subjects = []
    for path in sorted(model.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path}: is a link; put the file itself there")
        if path.is_file():
            subjects.append(_file_subject(path, path.relative_to(folder).as_posix()))
    for name in REPORTS:
        if (folder / name).is_file():
            subjects.append(_file_subject(folder / name, name))
    for name, content in documents.items():
        subjects.append(Subject(name=name, digest={FILE: hashlib.sha256(content).hexdigest()}))
    base = _base(model)
    if base is not None:
        subjects.append(base)
    return tuple(subjects)


def _file_subject(path: Path, name: str) -> Subject:
    return Subject(name=name, digest={FILE: file_digest(path)})


def _base(model: Path) -> Subject | None:
    path = model / "export.json"
    if not path.is_file():
        return None
    export = record_codec.from_json(ModelExport, read_regular(path), str(path))
    return Subject(name=f"{BASE}{export.base_model}", digest={TENSORS: export.base_fingerprint})
