"""What is written beside a certificate for people: duties and what supports them, an assessment's annex."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffm_secure import record_codec
from ffm_secure.certificate.files import READABLE
from ffm_secure.certificate.statement import OPERATOR, Kind, OwnerEvidence, Predicate
from ffm_secure.errors import StoreError
from ffm_secure.foreign import JsonValue
from ffm_secure.quantities import bound
from ffm_secure.report.release import NOT_TRIED
from ffm_secure.record_codec import read_regular

MAPPING, ANNEX = "mapping.md", "dpia_annex.md"


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
        file=READABLE,
        field="predicate.owners.*.ledger_head",
        what="the head of every owner's ledger, signed by its owner",
    ),
    Support(
        text="GDPR Art. 25",
        duty="data protection by design",
        file=READABLE,
        field="predicate.run_file",
        what="protection, privacy unit, noise and budget, fixed before training",
    ),
    Support(
        text="GDPR Art. 30",
        duty="records of processing",
        file=READABLE,
        field="predicate.rounds.*.cohort",
        what="every round, how many owners were asked and answered",
    ),
    Support(
        text="GDPR Art. 32",
        duty="security of processing",
        file=READABLE,
        field="predicate.not_protected.*",
        what="what each observer sees, and which collusion breaks the protection",
    ),
    Support(
        text="GDPR Art. 35",
        duty="impact assessment",
        file=READABLE,
        field="predicate.statements.*.epsilon",
        what="a bound on what the result reveals of one unit, for each observer",
    ),
    Support(
        text="EDPB Opinion 28/2024",
        duty="extraction shown to be unlikely by tests",
        file=READABLE,
        field="predicate.audit.*.verdict",
        what="every attack, observer and point with its verdict; not leaked only beside a control that read",
    ),
    Support(
        text="AI Act Annex IV",
        duty="technical documentation",
        file="report.json",
        field="plan.trains",
        what="what was trained",
    ),
    Support(
        text="AI Act Annex IV",
        duty="technical documentation",
        file=READABLE,
        field="predicate.run_file",
        what="with which settings",
    ),
    Support(
        text="AI Act Annex IV",
        duty="technical documentation",
        file=READABLE,
        field="predicate.software",
        what="with which software, and a digest of all that was installed beside it",
    ),
    Support(
        text="AI Act Art. 10",
        duty="data governance",
        file=READABLE,
        field="predicate.declared_public.*",
        what="what was taken to be public",
    ),
    Support(
        text="AI Act Art. 12",
        duty="record keeping",
        file=READABLE,
        field="predicate.transcript",
        what="a digest of the records of all rounds",
    ),
    Support(
        text="AI Act Art. 15",
        duty="accuracy and robustness",
        file="report.json",
        field="metric_final",
        what="accuracy (or loss) on public rows after the last round",
    ),
    Support(
        text="AI Act Art. 15",
        duty="accuracy and robustness",
        file="report.json",
        field="metric_zero_round",
        what="the same before training",
    ),
    Support(
        text="NIST SP 800-226",
        duty="stating a differential privacy guarantee",
        file=READABLE,
        field="predicate.statements.*.unit",
        what="whom every epsilon protects",
    ),
    Support(
        text="NIST SP 800-226",
        duty="stating a differential privacy guarantee",
        file=READABLE,
        field="predicate.statements.*.adjacency",
        what="between which neighbours",
    ),
    Support(
        text="NIST SP 800-226",
        duty="stating a differential privacy guarantee",
        file=READABLE,
        field="predicate.statements.*.mechanism",
        what="by which events, in full",
    ),
    Support(
        text="NIST SP 800-226",
        duty="stating a differential privacy guarantee",
        file=READABLE,
        field="predicate.statements.*.accountant",
        what="added up by which accountant",
    ),
)


def mapping(predicate: Predicate, report: Path) -> str:
    """Write the table of duties and what supports them: how many entries each row leads to."""
    wholes = {
        READABLE: {"predicate": record_codec.encode(predicate, "predicate")},
        report.name: json.loads(read_regular(report)),
    }
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
        entries = len(tuple(_walk(wholes[row.file], row.field.split("."), f"{row.file}: {row.field}")))
        count = str(entries) if entries else "none in this run"
        lines.append(f"| {row.text} | {row.duty} | {row.file} | {row.field} | {row.what} | {count} |")
    return "\n".join(lines) + "\n"


def values_at(file: Path, field: str) -> tuple[JsonValue, ...]:
    """Return every value a field of a JSON file leads to; a star stands for every entry of a list.

    Raises:
      StoreError: a name on the way is not there.
    """
    whole = json.loads(read_regular(file))
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


def annex(kind: Kind, predicate: Predicate) -> str:
    """Write the annex of an impact assessment from what a certificate states."""
    lines = [
        f"# Annex to the impact assessment: {predicate.run}",
        "",
        f"Kind: {kind}. Status: {predicate.status}. Rounds: {len(predicate.rounds)}. "
        f"Certified: {predicate.certified}.",
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
        "## Who has left",
        "",
        *_withdrawals(predicate),
        "",
        "## Who signs",
        "",
        *_signers(predicate),
    ]
    return "\n".join(lines) + "\n"


def _promises(predicate: Predicate) -> list[str]:
    lines = ["| observer | epsilon | delta | unit | neighbouring | accountant |", "|---|---|---|---|---|---|"]
    for one in predicate.statements:
        observer, epsilon = one.observer.replace("_", " "), bound(one.epsilon)
        row = (observer, epsilon, f"{one.delta:g}", one.unit, one.adjacency, one.accountant)
        lines.append(f"| {' | '.join(row)} |")
    observers: dict[str, list[str]] = {}
    for one in predicate.statements:
        observers.setdefault(one.note, []).append(one.observer.replace("_", " "))
    notes = [f"{', '.join(names)}: {note}" for note, names in observers.items() if note]
    return [*lines, "", *_bullets(notes)] if notes else lines


def _attacks(predicate: Predicate) -> list[str]:
    if not predicate.audit:
        return ["This run was not audited."]
    counts: dict[str, int] = {}
    for finding in predicate.audit:
        verdict = "not tried under this budget" if finding.measure == NOT_TRIED else finding.verdict
        counts[verdict] = counts.get(verdict, 0) + 1
    lines = [predicate.audit_sentence, ""] if predicate.audit_sentence else []
    lines += ["Findings, one for each attack, observer, point and recorded round:", ""]
    return [*lines, *_bullets([f"{verdict}: {count}" for verdict, count in sorted(counts.items())])]


def _withdrawals(predicate: Predicate) -> list[str]:
    """State the bound on what released models may still reveal of somebody who has left."""
    left = [owner for owner in predicate.owners if owner.withdrawn]
    if not left:
        return ["Nobody."]
    return _bullets([_bound_on(owner, predicate.delta) for owner in left])


def _bound_on(owner: OwnerEvidence, delta: float) -> str:
    most = f"epsilon {bound(owner.epsilon)} at delta {delta:g}"
    return (
        f"{owner.owner}: withdrawn on {owner.withdrawn}, and used for nothing since. What models released "
        f"before may still reveal of its rows is bounded by {most}."
    )


def _signers(predicate: Predicate) -> list[str]:
    lines = []
    for signer in predicate.signers:
        mark = " (simulated key, binds nobody)" if signer.simulated else ""
        party = signer.role if signer.role == OPERATOR else f"owner {signer.name}"
        lines.append(f"{party}: {signer.public_key}{mark}")
    return _bullets(lines)


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]
