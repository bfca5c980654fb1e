"""Check a certificate offline: signatures, files, ledgers, and every epsilon from its events."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from defenses.dp import Event, Ledger, from_json
from defenses.dp.accountant import composed
from defenses.dp.ledger_file import Head
from defenses.errors import DefenseError
from ffm_secure.certificate.envelope import Envelope, key_id
from ffm_secure.certificate.statement import TENSORS, CountedEvent, OwnerEvidence, Statement
from ffm_secure.config import run_file
from ffm_secure.errors import ConfigError, FfmError, StoreError
from ffm_secure.storage.durable import file_digest
from ffm_secure.transport.roster import read_key

TOLERANCE = 1e-6  # of an epsilon computed anew
MODEL = "adapter/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Say of one claim whether it holds, and what was seen."""

    claim: str
    holds: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Hold every check of a certificate, and what could not be checked because it was not materials."""

    kind: str
    run: str
    checks: tuple[Check, ...]
    not_given: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Tell whether every check holds."""
        return all(check.holds for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """Name what a verifier has beside the certificate."""

    folder: Path | None = None  # holds the certified files under their names
    model: Path | None = None  # the exported model alone
    ledger: Path | None = None
    trust: Mapping[str, str] = field(
        default_factory=dict
    )  # key, hexadecimal -> whose it is, known from elsewhere
    owner: str = ""  # whose ledger it is, where one ledger does not hold them all
    cross_check: bool = False


def verify(content: bytes, materials: Materials) -> Verification:
    """Check everything that can be checked without the data, without a model library and without a network.

    Guarantee: a certificate whose bytes differ anywhere from those that were signed does not hold.

    Raises:
      RecordError: the bytes are no certificate.
    """
    envelope = Envelope.from_bytes(content)
    statement = Statement.from_bytes(envelope.payload)
    checks = [*_signatures(envelope, statement, materials), *_epsilons(statement), *_run_file(statement)]
    not_given: list[str] = []
    checks += _files(statement, materials, not_given)
    if materials.ledger is not None:
        checks += _ledger(statement, materials.ledger, materials.owner)
    else:
        not_given.append("a ledger: that its entries are still there was not checked (--ledger)")
    if materials.cross_check:
        checks += _cross_checks(statement)
    if not materials.trust:
        not_given.append("keys: that they belong to the parties they name was not checked (--trust)")
    return Verification(
        kind=statement.kind, run=statement.predicate.run, checks=tuple(checks), not_given=tuple(not_given)
    )


def _signatures(envelope: Envelope, statement: Statement, materials: Materials) -> list[Check]:
    signers = statement.predicate.signers
    checks = []
    for signer in signers:
        role = "operator" if signer.role == "operator" else f"owner {signer.name}"
        valid = envelope.verifies(_public_key(signer.public_key))
        known = not materials.trust or materials.trust.get(signer.public_key) == signer.name
        detail = "signed" if valid else "no valid signature"
        if valid and not known:
            detail = "signed, by a key that is not among the trusted for this name"
        if signer.simulated:
            detail += ", simulated key"
        checks.append(Check(claim=f"signature of {role}", holds=valid and known, detail=detail))
    expected = {key_id(_public_key(signer.public_key)) for signer in signers}
    strangers = [signature.key_id for signature in envelope.signatures if signature.key_id not in expected]
    keys = [signer.public_key for signer in signers]
    if strangers or len(set(keys)) < len(keys):
        checks.append(Check(claim="signers", holds=False, detail="a key is foreign, or signs twice"))
    return [*checks, _everybody(statement)]


def _everybody(statement: Statement) -> Check:
    """Every owner that has evidence signs, and nobody else; a simulated key is allowed in a simulation."""
    predicate = statement.predicate
    owners = sorted(owner.owner for owner in predicate.owners)
    signing = sorted(signer.name for signer in predicate.signers if signer.role == "owner")
    operators = [signer for signer in predicate.signers if signer.role == "operator"]
    simulated = [signer.name for signer in predicate.signers if signer.simulated]
    if owners != signing or not owners:
        missing = ", ".join(sorted(set(owners) ^ set(signing))) or "nobody"
        return Check(claim="every owner signs", holds=False, detail=f"owners and signers differ: {missing}")
    if len(operators) != 1:
        return Check(claim="every owner signs", holds=False, detail=f"{len(operators)} operators, not one")
    if simulated and statement.kind != "simulation":
        return Check(claim="every owner signs", holds=False, detail="simulated keys outside a simulation")
    return Check(claim="every owner signs", holds=True, detail=f"{len(owners)} owners and one operator")


def _public_key(words: str) -> bytes:
    """Return a key as bytes; none, under which nothing verifies, where nobody should use it."""
    try:
        return read_key(words)
    except ValueError:
        return b""


def _epsilons(statement: Statement) -> list[Check]:
    """Compute the epsilon of every owner anew, and hold every finite statement to the largest."""
    predicate = statement.predicate
    checks, computed = [], []
    for owner in predicate.owners:
        value = _recomputed(owner, predicate.delta)
        computed.append(value)
        same = _equal(value, owner.epsilon)
        detail = f"{_number(value)} from {sum(event.count for event in owner.events):,} events"
        if not same:
            detail += f", stated {_number(owner.epsilon)}"
        checks.append(Check(claim=f"epsilon of {owner.owner}", holds=same, detail=detail))
    largest = max(computed, default=math.inf)
    for stated in predicate.statements:
        same = stated.delta == predicate.delta and _equal(largest, stated.epsilon)
        holds = same or not math.isfinite(stated.epsilon)
        detail = f"{_number(stated.epsilon)} at delta {stated.delta:g} per {stated.unit}"
        if not holds:
            detail += f", but the events say {_number(largest)}"
        checks.append(Check(claim=f"statement towards {stated.observer}", holds=holds, detail=detail))
    return checks


def _recomputed(owner: OwnerEvidence, delta: float) -> float:
    """Return the epsilon of an owner's events; not-a-number where they are no events."""
    try:
        return composed(_parsed(owner.events), delta)
    except (DefenseError, ValueError):
        return math.nan


def _parsed(events: Sequence[CountedEvent]) -> list[tuple[Event, int]]:
    return [(from_json(counted.event), counted.count) for counted in events]


def _run_file(statement: Statement) -> list[Check]:
    """Hold the run file to what the certificate says of it."""
    predicate = statement.predicate
    try:
        config = run_file.from_table(tomllib.loads(predicate.run_file))
    except (ConfigError, tomllib.TOMLDecodeError):
        return [Check(claim="run file", holds=False, detail="is none that this version reads")]
    delta = config.privacy.delta if config.privacy.unit != "none" else predicate.delta
    same = (config.name, config.privacy.unit, delta) == (predicate.run, predicate.unit, predicate.delta)
    private = config.privacy.noise == "system"
    detail = f"{config.name}: {config.federation.rounds} rounds, unit {config.privacy.unit}"
    if not private:
        detail = "the noise came from a seed: such a run is never certified"
    if not same:
        detail = "name, unit or delta are others than the certificate's"
    return [Check(claim="run file", holds=same and private, detail=detail)]


def _files(statement: Statement, materials: Materials, not_given: list[str]) -> list[Check]:
    checks, absent = [], []
    for subject in statement.subjects:
        if TENSORS in subject.digest:
            continue  # the base is no file of this run; its name and digest are for who loads it
        place = _place(subject.name, materials)
        if place is None:
            absent.append(subject.name)
            continue
        checks.append(_file(subject.name, subject.digest.get("sha256", ""), place))
    if absent:
        not_given.append(f"{len(absent)} certified files, {absent[0]} among them (--files or --model)")
    checks += _surplus(statement, materials)
    return checks


def _place(name: str, materials: Materials) -> Path | None:
    if ".." in Path(name).parts or Path(name).is_absolute():
        return Path("/nonexistent")
    if materials.model is not None and name.startswith(MODEL):
        return materials.model / name.removeprefix(MODEL)
    return materials.folder / name if materials.folder is not None else None


def _file(name: str, stated: str, place: Path) -> Check:
    try:
        digest = file_digest(place)
    except StoreError:
        return Check(claim=name, holds=False, detail="is missing")
    return Check(
        claim=name, holds=digest == stated, detail="unchanged" if digest == stated else "was changed"
    )


def _surplus(statement: Statement, materials: Materials) -> list[Check]:
    """Refuse files in the model's folder that nobody has certified: a library may load them."""
    model = materials.model or (materials.folder / MODEL if materials.folder is not None else None)
    if model is None or not model.is_dir():
        return []
    known = {subject.name for subject in statement.subjects}
    foreign = []
    for path in sorted(model.rglob("*")):
        name = MODEL + path.relative_to(model).as_posix()
        if not path.is_dir() and name not in known:
            foreign.append(name)
    if not foreign:
        return []
    return [Check(claim="no other file in the model", holds=False, detail=f"{foreign[0]} is not certified")]


def _ledger(statement: Statement, path: Path, owner: str) -> list[Check]:
    """Hold a ledger to the head and the events the certificate states of it."""
    owners = [held for held in statement.predicate.owners if owner in ("", held.owner)]
    if not owners or not path.is_file():
        return [Check(claim="ledger", holds=False, detail="is not there, or its owner is not certified")]
    try:
        with Ledger.open(path, create=False) as ledger:
            for held in owners:
                ledger.verify(Head(sequence=held.ledger_entries, hash=held.ledger_head))
            checks = [_charges(ledger, held, statement) for held in owners]
    except (DefenseError, FfmError):
        return [Check(claim="ledger", holds=False, detail="not authentic, or entries were taken back")]
    return [Check(claim="ledger", holds=True, detail="authentic, holds everything certified"), *checks]


def _charges(ledger: Ledger, held: OwnerEvidence, statement: Statement) -> Check:
    """What an owner was charged in this run is among the certified events."""
    charged = ledger.charged(held.owner, statement.predicate.run_id)
    certified: Counter[str] = Counter()
    for counted in held.events:
        certified[counted.event] += counted.count
    short = [event for event, count in charged if certified[event.to_json()] < count]
    holds = bool(charged) and not short
    detail = f"{sum(count for _, count in charged):,} charges of this run, all certified"
    if not holds:
        detail = "holds no charge of this run, or more than was certified"
    return Check(claim=f"ledger of {held.owner}", holds=holds, detail=detail)


def _cross_checks(statement: Statement) -> list[Check]:
    """Compute epsilon with a second accountant, where it is installed."""
    from ffm_secure.certificate import second_accountant

    checks = []
    for owner in statement.predicate.owners:
        other = second_accountant.epsilon(_parsed(owner.events), statement.predicate.delta)
        if other is None:
            detail = "dp-accounting is not installed, or knows no such mechanism"
            checks.append(Check(claim=f"second accountant, {owner.owner}", holds=False, detail=detail))
            continue
        close = other <= owner.epsilon * 1.02 + 1e-3 and owner.epsilon <= other * 1.02 + 1e-3
        detail = f"{_number(other)} by dp-accounting"
        checks.append(Check(claim=f"second accountant, {owner.owner}", holds=close, detail=detail))
    return checks


def _equal(computed: float, stated: float) -> bool:
    if math.isinf(computed) or math.isinf(stated):
        return computed == stated
    return abs(computed - stated) <= TOLERANCE


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.6g}"
