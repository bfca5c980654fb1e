"""What of a run may leave: releases alone. Whatever was counted or read on private rows stays behind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath

from ffm_secure.foreign import JsonValue
from ffm_secure.records import AuditFinding, AuditSummary, ClientOutcome, PlanSummary, RunSummary

NOT_TRIED = "not run"  # the measure of a finding whose attack was never started
CHARGED = "charged release"  # the source of figures per client that the ledger has paid for
OF_THE_MECHANISM = frozenset({"canaries"})  # curves that no private row had a part in
_PATH = re.compile(
    r"(?:(?<=^)|(?<=[\s'\"=(]))(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",;:)/\\]+[/\\])*([^\s'\",;:)/\\]+)"
)


def released(summary: RunSummary) -> RunSummary:
    """Return the part of a summary that may leave.

    Guarantee: it holds no size and no score of an owner's rows, no score of an attack on them, nothing that
    was recovered, no name of an owner whose taking part is what the unit protects, and no path of this
    machine. Verdicts stay: whoever releases a report releases them, and no epsilon counts them.
    """
    return replace(
        summary,
        view="public",
        config=without_paths(summary.config),
        plan=_released_plan(summary.plan, tuple(_strings(summary.config))),
        clients=summary.clients if summary.clients_source == CHARGED else (),
        clients_source=summary.clients_source if summary.clients_source == CHARGED else "not released",
        personal=(),
        owners=_named(summary),
        audit=None if summary.audit is None else released_audit(summary.audit),
        data=None if summary.data is None else replace(summary.data, source=_name(summary.data.source)),
    )


def released_audit(audit: AuditSummary) -> AuditSummary:
    """Return what an audit found without any figure or text that came from private rows."""
    return replace(
        audit,
        findings=tuple(map(_released_finding, audit.findings)),
        notes=(),
        curves=tuple(one for one in audit.curves if one.attack in OF_THE_MECHANISM),
    )


def owner_names(clients: tuple[ClientOutcome, ...], owners: tuple[str, ...]) -> tuple[str, ...]:
    """Return the owners' names; an older summary holds them beside their figures alone."""
    return owners or tuple(client.client for client in clients)


def _named(summary: RunSummary) -> tuple[str, ...]:
    """Return the owners' names, unless the promise is that nobody learns who took part."""
    units = {statement.unit for statement in summary.statements}
    return () if "client" in units else owner_names(summary.clients, summary.owners)


def _released_finding(finding: AuditFinding) -> AuditFinding:
    """Keep who attacked what with which outcome; the reason only where no private row had a part in it."""
    return AuditFinding(
        observer=finding.observer,
        attack=finding.attack,
        point=finding.point,
        verdict=finding.verdict,
        measure=finding.measure,
        score=None,
        reason=finding.reason if finding.measure == NOT_TRIED else "",
        granted=finding.granted,
        source=finding.source,
        round=finding.round,
    )


def _released_plan(plan: PlanSummary, named: tuple[str, ...]) -> PlanSummary:
    """Name the files in a plan without their folders; `named` are the strings of the run file."""
    paths = [text for text in named if _name(text) != text]

    def bare(text: str) -> str:
        for path in paths:
            text = text.replace(path, _name(path))
        return _PATH.sub(lambda match: match.group(1), text)

    return replace(plan, spends=bare(plan.spends), warnings=tuple(map(bare, plan.warnings)))


def _strings(value: JsonValue) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def without_paths(value: JsonValue) -> JsonValue:
    """Return a table with every absolute path in it cut to its last name."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_paths(item) for item in value)
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """Return an absolute path without its folders; other texts stay.

    >>> _name("/home/ada/my rows/notes.csv"), _name("org/model"), _name("builtin:minilm")
    ('notes.csv', 'org/model', 'builtin:minilm')
    """
    if "\n" in text:
        return text
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() or text.startswith("~"):
            return kind(text).name or text
    return text
