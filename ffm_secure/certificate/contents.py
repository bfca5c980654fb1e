"""What a statement says, held against itself: every part that another part of it decides."""

from __future__ import annotations

import math
import re
import tomllib
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath

from defenses.dp import Event, from_json
from defenses.dp.events import statement_of
from defenses.errors import DefenseError
from ffm_secure.certificate.check import Check, refused
from ffm_secure.certificate.statement import (
    BASE,
    FILE,
    MODEL,
    OPERATOR,
    TENSORS,
    CountedEvent,
    OwnerEvidence,
    Predicate,
    Signer,
    Statement,
    Subject,
)
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import dump_toml
from ffm_secure.errors import ConfigError
from ffm_secure.privacy.statements import statements_of
from ffm_secure.records import PrivacyStatement
from ffm_secure.site.allowance import composed

TOLERANCE = 1e-6  # of an epsilon computed anew
WITHOUT_UNIT = 1e-5  # the delta at which a run without a privacy unit is composed
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNREADABLE = (DefenseError, ValueError, ArithmeticError, RecursionError)
_NEIGHBOURS = {"record": "add_remove", "person": "add_remove", "client": "zero_out"}


def check_contents(statement: Statement) -> list[Check]:
    """Return every check that needs nothing but the statement."""
    predicate = statement.predicate
    config = read_run_file(predicate)
    if config is None:
        return [refused("run file", "is none that this version reads, or not in its canonical form")]
    return [
        _run_file(predicate, config),
        *_owners(predicate, config),
        *_statements(predicate, config),
        _lower_bound(predicate),
        _rounds(predicate, config),
        _parties(statement),
        _subjects(statement),
    ]


def read_run_file(predicate: Predicate) -> RunConfig | None:
    """Return the run file of a statement; None where it holds none in its canonical form."""
    text = predicate.run_file
    try:
        table = tomllib.loads(text)
        if dump_toml(table) != text:
            return None
        return run_file.from_table(table)
    except (ConfigError, ValueError, RecursionError):
        return None


def parsed(events: Sequence[CountedEvent]) -> list[tuple[Event, int]]:
    """Return events as the accountant adds them up.

    Raises:
      DefenseError, ValueError, ArithmeticError, RecursionError: one is none in its canonical form.
    """
    pairs = []
    for counted in events:
        event = from_json(counted.event)
        if event.to_json() != counted.event:
            raise ValueError("not in its canonical form")
        pairs.append((event, counted.count))
    return pairs


def worst_of(owners: Sequence[OwnerEvidence]) -> OwnerEvidence:
    """Return the owner that has spent most, the first of several: what the statements are about."""
    return max(owners, key=lambda owner: owner.epsilon)


def number(value: float) -> str:
    """Write an epsilon as people read it."""
    return "infinite" if math.isinf(value) else f"{value:.6g}"


def same_epsilon(computed: float, stated: float) -> bool:
    """Tell whether two epsilons agree to the tolerance; infinity agrees with itself alone."""
    if math.isinf(computed) or math.isinf(stated):
        return computed == stated
    return abs(computed - stated) <= TOLERANCE


def _run_file(predicate: Predicate, config: RunConfig) -> Check:
    """Hold the run file to what the certificate says of it."""
    privacy = config.privacy
    delta = WITHOUT_UNIT if privacy.unit == "none" else privacy.delta
    if privacy.noise != "system":
        return refused("run file", "the noise came from a seed: such a run is never certified")
    if (config.name, privacy.unit, delta) != (predicate.run, predicate.unit, predicate.delta):
        return refused("run file", "name, unit or delta are others than the certificate's")
    detail = f"{config.name}: {config.federation.rounds} rounds, unit {privacy.unit}"
    return Check(claim="run file", holds=True, detail=detail)


def _owners(predicate: Predicate, config: RunConfig) -> list[Check]:
    """Compute the epsilon of every owner anew, from events of the run's own unit."""
    checks = []
    for owner in predicate.owners:
        claim = f"epsilon of {owner.owner}"
        problem = _problem_of(owner, config)
        if problem:
            checks.append(refused(claim, problem))
            continue
        value = _recomputed(owner, predicate.delta)
        detail = f"{number(value)} from {sum(event.count for event in owner.events):,} events"
        holds = same_epsilon(value, owner.epsilon)
        if not holds:
            detail += f", stated {number(owner.epsilon)}"
        checks.append(Check(claim=claim, holds=holds, detail=detail))
    return checks


def _problem_of(owner: OwnerEvidence, config: RunConfig) -> str:
    try:
        pairs = parsed(owner.events)
        protections = {statement_of(event) for event, _ in pairs} - {None}
    except _UNREADABLE:
        return "holds something that is no event"
    if not pairs or min(count for _, count in pairs) < 1:
        return "takes part without any event"
    if len({event for event, _ in pairs}) < len(pairs):
        return "names an event twice"
    unit = config.privacy.unit
    for protected in protections:
        if protected is None or unit == "none":
            continue
        if (protected.unit, protected.adjacency) != (unit, _NEIGHBOURS[unit]):
            return "holds an event of another unit or of other neighbours than the run file's"
        if protected.records_per_person > config.privacy.records_per_person and unit == "person":
            return "holds an event of persons with more records than the run file's"
    return ""


def _recomputed(owner: OwnerEvidence, delta: float) -> float:
    """Return the epsilon of an owner's events; not-a-number where they do not add up."""
    try:
        return composed(tuple(parsed(owner.events)), delta)
    except _UNREADABLE:
        return math.nan


def _statements(predicate: Predicate, config: RunConfig) -> list[Check]:
    """State epsilon anew from run file and events, and hold every field of every statement to it."""
    if not predicate.owners:
        return [refused("statements", "nobody has paid for anything")]
    worst = worst_of(predicate.owners)
    try:
        expected = statements_of(config, parsed(worst.events), predicate.delta)
    except _UNREADABLE:
        return [refused("statements", f"the events of {worst.owner} do not add up")]
    observers = [statement.observer for statement in predicate.statements]
    if observers != [statement.observer for statement in expected]:
        return [refused("statements", "must be one towards each observer")]
    checks = []
    for stated, computed in zip(predicate.statements, expected, strict=True):
        detail = f"{number(stated.epsilon)} at delta {stated.delta:g} per {stated.unit}"
        holds = _same_statement(stated, computed)
        if not holds:
            detail += f", but the events say {number(computed.epsilon)} per {computed.unit}"
        checks.append(Check(claim=f"statement towards {stated.observer}", holds=holds, detail=detail))
    return checks


def _same_statement(stated: PrivacyStatement, computed: PrivacyStatement) -> bool:
    words = ("delta", "unit", "adjacency", "mechanism", "accountant")
    if any(getattr(stated, name) != getattr(computed, name) for name in words):
        return False
    same = same_epsilon(computed.epsilon, stated.epsilon) and same_epsilon(computed.slack, stated.slack)
    return same and stated.note.startswith(computed.note)


def _lower_bound(predicate: Predicate) -> Check:
    """An audit that measures more than the events allow says that one of the two is wrong."""
    upper = max((owner.epsilon for owner in predicate.owners), default=0.0)
    lower = predicate.epsilon_lower
    claim = "audit"
    if lower is None:
        return Check(claim=claim, holds=True, detail=f"{len(predicate.audit)} findings, no lower bound")
    if not 0.0 <= lower <= upper:
        return refused(
            claim, f"its lower bound {number(lower)} is above {number(upper)}, which the events say"
        )
    return Check(claim=claim, holds=True, detail=f"lower bound {number(lower)}, events {number(upper)}")


def _rounds(predicate: Predicate, config: RunConfig) -> Check:
    """Every round once, in order; nobody answers who was not asked, and who answered is an owner."""
    claim, clients = "rounds", config.task.clients
    if [record.round for record in predicate.rounds] != list(range(1, len(predicate.rounds) + 1)):
        return refused(claim, "are not counted from 1 without a gap")
    for record in predicate.rounds:
        if not 0 <= record.survivors <= record.cohort <= clients:
            return refused(claim, f"round {record.round}: more answered than were asked, or than there are")
    answered = max((record.survivors for record in predicate.rounds), default=0)
    if not predicate.rounds or answered > len(predicate.owners) or len(predicate.owners) > clients:
        return refused(
            claim, f"{answered} owners answered a round, and {len(predicate.owners)} are certified"
        )
    if not _DIGEST.fullmatch(predicate.transcript):
        return refused(claim, "the digest of their records is none")
    return Check(claim=claim, holds=True, detail=f"{len(predicate.rounds)}, at most {answered} answered")


def _parties(statement: Statement) -> Check:
    """Every owner that has evidence signs, and nobody else; a simulated key is allowed in a simulation."""
    claim, predicate = "every owner signs", statement.predicate
    owners = sorted(owner.owner for owner in predicate.owners)
    signing = sorted(signer.name for signer in predicate.signers if signer.role == "owner")
    if owners != signing or not owners:
        missing = ", ".join(sorted(set(owners) ^ set(signing))) or "nobody"
        return refused(claim, f"owners and signers differ: {missing}")
    operators = [signer.name for signer in predicate.signers if signer.role == OPERATOR]
    if operators != [OPERATOR] or OPERATOR in owners:
        return refused(claim, "one operator signs, under that name, and nobody else has it")
    if len({_folded(name) for name in owners}) < len(owners):
        return refused(claim, "two owners have one name")
    keys = [signer.public_key for signer in predicate.signers]
    if len(set(keys)) < len(keys):
        return refused(claim, "one key signs for two parties")
    if statement.kind != "simulation" and (_simulated(predicate.signers) or not predicate.roster):
        return refused(claim, "simulated keys, or no roster, outside a simulation")
    return Check(claim=claim, holds=True, detail=f"{len(owners)} owners and one operator")


def _simulated(signers: Sequence[Signer]) -> bool:
    return any(signer.simulated for signer in signers)


def _folded(name: str) -> str:
    """Return what is equal for names that people would take for one."""
    return unicodedata.normalize("NFKC", name).strip().casefold()


def _subjects(statement: Statement) -> Check:
    """Files have plain names below one folder, each once, and one digest; a model is among them."""
    claim, names = "subjects", [subject.name for subject in statement.subjects]
    if len({_folded(name) for name in names}) < len(names):
        return refused(claim, "a name stands twice")
    for subject in statement.subjects:
        if not is_base(subject) and not _is_file(subject):
            return refused(claim, f"{subject.name[:80]!r} is no plain name with one SHA-256")
    files = [name for name in names if name.startswith(f"{MODEL}/")]
    if not files or sum(is_base(subject) for subject in statement.subjects) > 1:
        return refused(claim, "no exported model, or several bases")
    return Check(claim=claim, holds=True, detail=f"{len(files)} files of the model, {len(names)} in all")


def is_base(subject: Subject) -> bool:
    """Tell whether a subject is the base model, known by its tensors and no file of the run."""
    return subject.name.startswith(BASE) and set(subject.digest) == {TENSORS}


def _is_file(subject: Subject) -> bool:
    name = PurePosixPath(subject.name)
    plain = name.parts and name.as_posix() == subject.name and not name.is_absolute()
    if not plain or ".." in name.parts or len(subject.name) > 1000:
        return False
    digest = subject.digest.get(FILE, "")
    return set(subject.digest) == {FILE} and _DIGEST.fullmatch(digest) is not None
