"""The report beside a certificate: it says of the run what the certificate says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffm_secure import record_codec
from ffm_secure.certificate.check import Check, refused
from ffm_secure.certificate.contents import TOLERANCE, read_run_file
from ffm_secure.certificate.statement import (
    FindingEvidence,
    Predicate,
    RoundEvidence,
    Statement,
    canonical,
    one_line,
    parse_object,
)
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import FfmError
from ffm_secure.records import PrivacyStatement, RoundRecord, RunSummary
from ffm_secure.record_codec import read_regular

REPORT = "report.json"


def check_report(statement: Statement, folder: Path) -> list[Check]:
    """Hold report.json to the statement; that it is the certified file is another check."""
    claim = f"{REPORT} and the certificate"
    if not (folder / REPORT).is_file():
        return []
    try:
        report = read_report(folder / REPORT)
    except (FfmError, OSError, UnicodeDecodeError):
        return [refused(claim, "is no report that this version reads")]
    wrong = differences(statement.predicate, report)
    if wrong:
        return [refused(claim, f"differ in {', '.join(wrong)}")]
    return [Check(claim=claim, holds=True, detail="name, run file, rounds, statements and audit agree")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Hold a run's report, and the digest of its rounds as they are written there."""

    summary: RunSummary
    transcript: str  # SHA-256 over the records of all rounds, one a line, each in its canonical form


def read_report(path: Path) -> Report:
    """Read a run's report.

    Raises:
      RecordError, OSError, UnicodeDecodeError: it is none.
    """
    text = read_regular(path).decode()
    summary = record_codec.from_json(RunSummary, text, str(path))
    table = parse_object(text.encode(), str(path))
    digest, rounds = hashlib.sha256(), table["rounds"]
    assert isinstance(rounds, list)
    for record in rounds:
        assert isinstance(record, dict)
        digest.update(canonical({"format": record_codec.FORMAT, **record}) + b"\n")
    return Report(summary=summary, transcript=digest.hexdigest())


def differences(predicate: Predicate, report: Report) -> list[str]:
    """Name everything in which a report and a certificate contradict each other."""
    summary = report.summary
    lower = summary.audit.epsilon_lower if summary.audit else None
    agree = {
        "name": summary.name == predicate.run and summary.status == predicate.status,
        "run file": _same_run(read_run_file(predicate), dict(summary.config)),
        "rounds": round_evidence(summary.rounds) == predicate.rounds
        and report.transcript == predicate.transcript,
        "statements": _not_above(summary.statements, predicate.statements),
        "audit": finding_evidence(summary) == predicate.audit and lower == predicate.epsilon_lower,
        "what is not protected": not_protected(summary) == predicate.not_protected,
        "what is public": declared_public(summary) == predicate.declared_public,
    }
    return [name for name, same in agree.items() if not same]


def _same_run(config: RunConfig | None, table: dict[str, Any]) -> bool:
    try:
        return config is not None and run_file.from_table(table) == config
    except (FfmError, RecursionError):
        return False


def round_evidence(rounds: Sequence[RoundRecord]) -> tuple[RoundEvidence, ...]:
    """Return how many were asked and answered in every round."""
    evidence = []
    for record in rounds:
        counted = RoundEvidence(
            round=record.round,
            cohort=len(record.cohort),
            survivors=len(record.survivors),
            aborted=one_line(record.aborted),
        )
        evidence.append(counted)
    return tuple(evidence)


def finding_evidence(summary: RunSummary) -> tuple[FindingEvidence, ...]:
    """Return every attack of the audit, without anything it recovered."""
    if summary.audit is None:
        return ()
    evidence = []
    for finding in summary.audit.findings:
        short = FindingEvidence(
            observer=finding.observer,
            attack=one_line(finding.attack),
            point=finding.point,
            verdict=finding.verdict,
            measure=one_line(finding.measure),
            score=finding.score,
            control=finding.control,
            baseline=finding.baseline,
            source=finding.source,
            round=finding.round,
        )
        evidence.append(short)
    return tuple(evidence)


def not_protected(summary: RunSummary) -> tuple[str, ...]:
    """Return what each observer sees, and what breaks the protection."""
    lines = []
    for observer, what in sorted(summary.plan.reveals.items()):
        lines.append(f"{observer.replace('_', ' ')} sees {what}")
    return tuple(one_line(line) for line in (*lines, summary.plan.breaks, *summary.stamps))


def declared_public(summary: RunSummary) -> tuple[str, ...]:
    """Return what the run takes to be public."""
    lines = [text for text in summary.plan.warnings if text.startswith("taken to be public")]
    return tuple(one_line(line) for line in lines)


def _not_above(reported: Sequence[PrivacyStatement], certified: Sequence[PrivacyStatement]) -> bool:
    """A report was written when the run ended; the ledger may have grown since, and never shrunk."""
    words = ("observer", "delta", "unit", "adjacency")
    if len(reported) != len(certified):
        return False
    for old, new in zip(reported, certified, strict=True):
        if any(getattr(old, word) != getattr(new, word) for word in words):
            return False
        if old.epsilon > new.epsilon + TOLERANCE:
            return False
    return True
