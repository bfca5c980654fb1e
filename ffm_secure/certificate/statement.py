"""What a certificate says, as an in-toto statement: which files, and under which run they came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ffm_secure import record_codec
from ffm_secure.display.printable import printable
from ffm_secure.errors import RecordError
from ffm_secure.record_codec import Plain
from ffm_secure.records import Observer, Point, PrivacyStatement, RunStatus, Verdict

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
FORMAT = 1
Kind = Literal["simulation", "federation"]
TYPES: Mapping[Kind, str] = {
    "simulation": "urn:ffm-secure:certificate:simulation:v1",
    "federation": "urn:ffm-secure:certificate:federation:v1",
}
TENSORS = (
    "ffmTensorsSha256"  # over names, shapes, types and values of a model's tensors, whatever file holds them
)
FILE = "sha256"  # of a file's bytes
MODEL = "adapter"  # the folder of the exported model
BASE = "base:"  # begins the name of the base model, which is no file of the run
OPERATOR = "operator"  # the one name of its role


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Name one thing the certificate is about, with its digests by algorithm."""

    name: str
    digest: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedEvent:
    """Hold a privacy event in its canonical JSON form, and how often it came in a row."""

    event: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerEvidence:
    """Say what one data owner's ledger holds: the history of its row that has spent most, and the ledger's
    head.
    """

    owner: str
    epsilon: float  # of `events` at the delta of the statements; infinity without a guarantee
    events: tuple[CountedEvent, ...]
    ledger_entries: int
    ledger_head: str
    withdrawn: str = (
        ""  # the day from which nothing of it is used any more; `epsilon` bounds what was released
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEvidence:
    """Say how many owners a round asked and how many answered; which they were follows from the run file."""

    round: int
    cohort: int
    survivors: int
    aborted: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingEvidence:
    """Report one attack of the audit, without anything it recovered."""

    observer: Observer
    attack: str
    point: Point
    verdict: Verdict
    measure: str
    score: float | None = None
    control: float | None = None
    baseline: float | None = None
    source: str = "replayed"
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Name one party whose signature the certificate needs."""

    role: Literal["operator", "owner"]
    name: str
    public_key: str  # as a roster writes it: ed25519: and 64 hexadecimal digits
    simulated: bool = False  # the key was made for this certificate alone, by whoever ran the simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicate:
    """Hold everything a certificate states about a run."""

    format: int = FORMAT
    run: str
    run_id: str
    certified: str  # when, ISO 8601, UTC
    status: RunStatus
    run_file: str  # the effective run file, as canonical TOML
    unit: str
    delta: float
    statements: tuple[PrivacyStatement, ...]
    owners: tuple[OwnerEvidence, ...]
    rounds: tuple[RoundEvidence, ...]
    transcript: str  # SHA-256 of the records of all rounds
    audit: tuple[FindingEvidence, ...] = ()
    audit_sentence: str = ""
    epsilon_lower: float | None = None
    declared_public: tuple[str, ...] = ()
    not_protected: tuple[str, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    lock: str = ""  # SHA-256 over names and versions of every installed distribution
    roster: str = ""  # digest of the operator's list of sites, in a federation
    signers: tuple[Signer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """Bind subjects to a predicate, in the form of an in-toto statement, version 1."""

    kind: Kind
    subjects: tuple[Subject, ...]
    predicate: Predicate

    def to_bytes(self) -> bytes:
        """Return the canonical bytes that are signed."""
        subjects = [record_codec.encode(subject, "subject") for subject in self.subjects]
        whole = {
            "_type": STATEMENT_TYPE,
            "subject": subjects,
            "predicateType": TYPES[self.kind],
            "predicate": record_codec.encode(self.predicate, "predicate"),
        }
        return canonical(whole)

    @classmethod
    def from_bytes(cls, content: bytes) -> Statement:
        """Read a statement; anything but its own canonical bytes is refused.

        Raises:
          RecordError: the content is no statement of this version, or not in its canonical form.
        """
        whole = parse_object(content, "statement")
        if set(whole) != {"_type", "subject", "predicateType", "predicate"}:
            raise RecordError(
                "statement: must hold _type, subject, predicateType and predicate, nothing else"
            )
        kinds = {name: kind for kind, name in TYPES.items()}
        kind = kinds.get(str(whole["predicateType"]))
        if whole["_type"] != STATEMENT_TYPE or kind is None:
            raise RecordError("statement: is of a type this version does not know")
        statement = cls(
            kind=kind,
            subjects=_subjects(whole["subject"]),
            predicate=record_codec.decode(Predicate, whole["predicate"], "predicate"),
        )
        if canonical(whole) != content:  # of what was read: a field that came later may be missing
            raise RecordError("statement: is not in its canonical form")
        if statement.predicate.format != FORMAT:
            raise RecordError(f"statement: this version reads format {FORMAT} only")
        _require_printable(whole)
        return statement


def canonical(value: object) -> bytes:
    """Return the one byte form of a JSON value: sorted names, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_object(content: bytes, where: str) -> dict[str, Plain]:
    """Read one JSON object, without a name twice.

    Raises:
      RecordError: it is none.
    """
    value = record_codec.parse_json(content, where)
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be a JSON object")
    return value


def one_line(text: str) -> str:
    """Return free text as it may stand in a statement."""
    return printable(" ".join(text.split()))


def _require_printable(value: Plain) -> None:
    """Refuse text that a terminal would obey, or that makes one line of a table two; a run file has lines.

    Raises:
      RecordError: some is there.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "run_file":
                _require_printable([key, item])
    elif isinstance(value, list):
        for item in value:
            _require_printable(item)
    elif isinstance(value, str) and (printable(value) != value or "\n" in value or "\t" in value):
        raise RecordError("statement: holds text that cannot be printed in one line")


def _subjects(value: Plain) -> tuple[Subject, ...]:
    if not isinstance(value, list):
        raise RecordError("statement: subject must be a list")
    return tuple(record_codec.decode(Subject, entry, "subject") for entry in value)
