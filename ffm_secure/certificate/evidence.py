"""The evidence folder: everything an officer files, and a table of what each duty can point to in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffm_secure.certificate.collect import LEDGER, MODEL, REPORTS
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.statement import Predicate, Statement
from ffm_secure.errors import StoreError
from ffm_secure.foreign import JsonValue
from ffm_secure.storage.durable import create_folder, write_atomic

CERTIFICATE, MAPPING, ANNEX, STATEMENT = "certificate.json", "mapping.md", "dpia_annex.md", "statement.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Say which field of which file supports one duty; never that the duty is met."""

    text: str  # where the duty stands
    duty: str
    file: str
    field: str  # names joined by dots; a star is every entry of a list
    what: str


TABLE = (
    Support(
        text="GDPR Art. 5(2)",
        duty="accountability",
        file=STATEMENT,
        field="predicate.owners.*.ledger_head",
        what="the head of every owner's ledger, signed by its owner",
    ),
    Support(
        text="GDPR Art. 25",
        duty="data protection by design",
        file=STATEMENT,
        field="predicate.run_file",
        what="protection, privacy unit, noise and budget, fixed before training",
    ),
    Support(
        text="GDPR Art. 30",
        duty="records of processing",
        file=STATEMENT,
        field="predicate.rounds.*.cohort",
        what="every round, how many owners were asked and answered",
    ),
    Support(
        text="GDPR Art. 32",
        duty="security of processing",
        file=STATEMENT,
        field="predicate.not_protected.*",
        what="what each observer sees, and which collusion breaks the protection",
    ),
    Support(
        text="GDPR Art. 35",
        duty="impact assessment",
        file=STATEMENT,
        field="predicate.statements.*.epsilon",
        what="a bound on what the result reveals of one unit, for each observer",
    ),
    Support(
        text="EDPB Opinion 28/2024",
        duty="extraction shown to be unlikely by tests",
        file=STATEMENT,
        field="predicate.audit.*.verdict",
        what="attacks that were run, each with its verdict",
    ),
    Support(
        text="AI Act Annex IV",
        duty="technical documentation",
        file="report.json",
        field="plan.trains",
        what="what was trained, with which settings and software",
    ),
    Support(
        text="AI Act Art. 10",
        duty="data governance",
        file=STATEMENT,
        field="predicate.declared_public.*",
        what="what was taken to be public",
    ),
    Support(
        text="AI Act Art. 12",
        duty="record keeping",
        file=STATEMENT,
        field="predicate.transcript",
        what="a digest of the records of all rounds",
    ),
    Support(
        text="AI Act Art. 15",
        duty="accuracy and robustness",
        file="report.json",
        field="metric_final",
        what="accuracy on public rows, beside that of guessing",
    ),
    Support(
        text="NIST SP 800-226",
        duty="stating a differential privacy guarantee",
        file=STATEMENT,
        field="predicate.statements.*.unit",
        what="unit, neighbouring relation, mechanism and accountant beside every epsilon",
    ),
)


def write_evidence(run: Path, certificate: Path, out: Path) -> tuple[Path, ...]:
    """Write the evidence folder of a certified run and return its files.

    Guarantee: the folder is new; every row of the mapping table points at a field that is there, and a row
    whose field is empty says so. The statement lies beside the certificate in readable form; only the
    certificate is signed.

    Raises:
      StoreError: the folder exists, or a file of the run is missing.
    """
    if out.exists():
        raise StoreError(f"{out}: exists; name a new folder")
    envelope = Envelope.from_bytes(certificate.read_bytes())
    statement = Statement.from_bytes(envelope.payload)
    create_folder(out)
    for name in (*REPORTS, LEDGER):
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    shutil.copytree(run / MODEL, out / MODEL)
    readable = json.dumps(json.loads(envelope.payload), indent=1, sort_keys=True) + "\n"
    texts = {
        CERTIFICATE: envelope.to_bytes().decode(),
        STATEMENT: readable,
        ANNEX: annex(statement),
    }
    for name, text in texts.items():
        write_atomic(out / name, text.encode())
    write_atomic(out / MAPPING, mapping(out).encode())
    return tuple(sorted(path for path in out.rglob("*") if path.is_file()))


def mapping(folder: Path) -> str:
    """Write the table of duties and what supports them, from the files of an evidence folder."""
    lines = [
        "# What supports which duty",
        "",
        "Each row points at a field of a file in this folder. It supports a duty; whether the duty is",
        "met is for people to judge.",
        "",
        "| text | duty | file | field | what is there | entries |",
        "|---|---|---|---|---|---|",
    ]
    for row in TABLE:
        entries = len(values_at(folder / row.file, row.field))
        count = str(entries) if entries else "none in this run"
        lines.append(f"| {row.text} | {row.duty} | {row.file} | {row.field} | {row.what} | {count} |")
    return "\n".join(lines) + "\n"


def values_at(file: Path, field: str) -> tuple[JsonValue, ...]:
    """Return every value a field of a JSON file leads to; a star stands for every entry of a list.

    Raises:
      StoreError: a name on the way is not there.
    """
    whole = json.loads(file.read_text(encoding="utf-8"))
    return tuple(_walk(whole, field.split("."), f"{file.name}: {field}"))


def _walk(value: JsonValue, names: Sequence[str], where: str) -> Iterator[JsonValue]:
    if not names:
        yield value
        return
    first, *rest = names
    if first == "*" and isinstance(value, list):
        for entry in value:
            yield from _walk(entry, rest, where)
        return
    if not isinstance(value, dict) or first not in value:
        raise StoreError(f"{where}: is not there")
    yield from _walk(value[first], rest, where)


def annex(statement: Statement) -> str:
    """Write the annex of an impact assessment from what a certificate states."""
    predicate = statement.predicate
    lines = [
        f"# Annex to the impact assessment: {predicate.run}",
        "",
        f"Kind: {statement.kind}. Status: {predicate.status}. Rounds: {len(predicate.rounds)}.",
        "",
        "## What is promised, and to whom",
        "",
        *_promises(predicate),
        "",
        "## What is not protected",
        "",
        *_bullets(predicate.not_protected),
        "",
        "## What was taken to be public",
        "",
        *_bullets(predicate.declared_public or ("nothing was declared",)),
        "",
        "## What was attacked",
        "",
        *_attacks(predicate),
        "",
        "## Who signs",
        "",
        *_signers(predicate),
    ]
    return "\n".join(lines) + "\n"


def _promises(predicate: Predicate) -> list[str]:
    lines = ["| observer | epsilon | delta | unit | neighbouring | accountant |", "|---|---|---|---|---|---|"]
    for one in predicate.statements:
        row = (one.observer, f"{one.epsilon:.4g}", f"{one.delta:g}", one.unit, one.adjacency, one.accountant)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _attacks(predicate: Predicate) -> list[str]:
    if not predicate.audit:
        return ["This run was not audited."]
    counts: dict[str, int] = {}
    for finding in predicate.audit:
        counts[finding.verdict] = counts.get(finding.verdict, 0) + 1
    lines = [predicate.audit_sentence, ""] if predicate.audit_sentence else []
    return [*lines, *_bullets([f"{verdict}: {count}" for verdict, count in sorted(counts.items())])]


def _signers(predicate: Predicate) -> list[str]:
    lines = []
    for signer in predicate.signers:
        mark = " (simulated key, binds nobody)" if signer.simulated else ""
        lines.append(f"{signer.role} {signer.name}: {signer.public_key}{mark}")
    return _bullets(lines)


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]
