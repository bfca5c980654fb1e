"""Play each observer against a run:
the same update at every point of its way, each attack with its control.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from attacks import canary, steps
from attacks.registry import ATTACKS
from defenses.random_source import RandomSource
from ffm_secure.auditing import cohorts
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import AuditBudget, Watch, unwatched
from ffm_secure.auditing.crafted import MaliciousServer
from ffm_secure.auditing.findings import Ran, run_attacks
from ffm_secure.auditing.leak_curves import leak_curves, place_on_curves
from ffm_secure.auditing.lower_bound import bounds_over_rounds, curve_over_rounds, measured_how, strongest
from ffm_secure.auditing.recorded import audit_recorded
from ffm_secure.auditing.step import CANDIDATES, with_draws
from ffm_secure.auditing.wording import decoder, sentence
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.memory import Memory
from ffm_secure.engines import simulation
from ffm_secure.agreed.loaded_model import LoadedModel, load_model, read_facts, stored_noise
from ffm_secure.errors import ConfigError, DataError, StoreError
from ffm_secure.records import (
    AuditFinding,
    AuditSummary,
    LeakCurve,
    Observer,
    RoundRecord,
    RunSummary,
)
from ffm_secure.report import document as report
from ffm_secure.site.broadcast_guard import BroadcastGuard
from ffm_secure.storage.run_directory import Store
from ffm_secure.strategies import ServerState


def audit_run(
    folder: Path,
    *,
    budget: str = "quick",
    rows: Memory | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> RunSummary:
    """Attack a finished run and write the findings into its report; `rows` are those a run was given from
    Python.

    `watch` is told what comes next. Guarantee: the same `seed` tries the same attacks on the same records and
    noise, whatever else the machine does.

    Raises:
      StoreError: the folder holds no finished run.
      ConfigError: the run file names an attack that does not exist.
    """
    summary = report.read(folder)
    config = Store.read(folder).config()
    if unknown := sorted(set(config.audit.attacks) - {"all", *ATTACKS}):
        raise ConfigError(
            "audit.attacks", [f"there is no attack {', '.join(unknown)}; `python -m attacks list` names them"]
        )
    resumed = Store.read(folder).resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round was finished, so there is nothing to audit")
    began = time.process_time()
    with steps.counted():
        purse = AuditBudget(name=budget, watch=watch)
        chances = _Chances(rows=rows, seed=seed)
        ready = _ready(folder, config, chances)
        observed = _recorded(folder, config, purse, ready)
        if isinstance(ready, str):
            replay = Replay(note=ready)
        else:
            replay = _replayed(folder, ready, resumed, purse, chances)
    findings = (*observed, *replay.findings)
    if replay.bounds:
        last = replay.bounds[max(replay.bounds)]
    else:
        last = ()
    audit = AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=strongest(last).epsilon if last else None,
        epsilon_lower_method=measured_how(last, summary) if last else "",
        sentence=" ".join(filter(None, (sentence(findings), replay.note))),
        questions=replay.questions,
        curves=replay.curves,
    )
    audited = replace(summary, audit=audit, view="internal")
    report.write(audited, folder)
    return audited


def _ready(folder: Path, config: RunConfig, chances: _Chances) -> simulation.Prepared | str:
    """Prepare the run once for all that is attacked; without its data say why no step can be played again."""
    try:
        return simulation.prepare(config, Path.cwd(), folder, chances.rows)
    except DataError as error:
        if not any((folder / "observations").glob("round-*")):
            raise
        return f"The worst case of one step was not played again: {error}"


def _recorded(
    folder: Path, config: RunConfig, purse: AuditBudget, ready: simulation.Prepared | str
) -> tuple[AuditFinding, ...]:
    """Attack what crossed the wire, where the run recorded it; needs the model and no data."""
    if not (folder / "observations").is_dir() or not any((folder / "observations").iterdir()):
        return ()
    model: LoadedModel
    if isinstance(ready, str):
        model = load_model(config, Path.cwd(), read_facts(folder), multiplier=stored_noise(folder))
    else:
        model = ready
    wanted = []
    for name in ATTACKS:
        if {"all", name} & set(config.audit.attacks):
            wanted.append(ATTACKS[name]())
    return tuple(audit_recorded(model, folder, purse, wanted, decoder(model.backbone.tokenizer)))


_NO_UPDATE = (
    "No update of a model crosses the wire, so no attack that reads one applies: what is released are sums "
    "of answers, whose noise the canaries put to the test."
)
_ANSWERS = (
    "No update of a model crosses the wire, so no attack that reads one applies: what is released are sums "
    "of answers to public rows. The canaries put the noise that the owners' own models learn through to the "
    "test, as if every step of it were seen; docs/distillation.md names the attacks on answers."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chances:
    """What records and noise are drawn from: rows given from Python, if any, and the seed of the audit."""

    rows: Memory | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of playing one step of one client again, or why it could not be played."""

    findings: tuple[AuditFinding, ...] = ()
    bounds: Mapping[int, tuple[canary.LowerBound, ...]] = field(default_factory=dict)
    questions: int = 0
    curves: tuple[LeakCurve, ...] = ()
    note: str = ""


def _replayed(
    folder: Path,
    prepared: simulation.Prepared,
    resumed: tuple[ServerState, tuple[RoundRecord, ...], bytes],
    purse: AuditBudget,
    chances: _Chances,
) -> Replay:
    """Play one step of one client again, at its worst."""
    config = prepared.config
    if not prepared.spec.learns or prepared.spec.sheet is not None:
        bounds = bounds_over_rounds(prepared)
        note = _NO_UPDATE if prepared.spec.sheet is None else _ANSWERS
        return Replay(bounds=bounds, curves=tuple(curve_over_rounds(bounds)), note=note)
    # Built while the model holds the start that all sites agreed on, as theirs was.
    server = MaliciousServer(prepared=prepared, guard=BroadcastGuard(prepared.trainable))
    vector = client_replay.next_start(prepared, folder, *resumed)
    several = with_draws(prepared, vector, CANDIDATES, seed=chances.seed)
    stages = [several, with_draws(prepared, vector, 1, seed=chances.seed, model=several.model)]
    observers = cast("tuple[Observer, ...]", config.audit.observers or ("server", "public"))
    decode, ran = decoder(prepared.backbone.tokenizer), Ran()
    witnesses = []
    for observer in observers:
        if (
            observer in cohorts.WITNESSES
            and client_replay.seen_by(observer, config, stages[0].points) == "aggregated"
        ):
            witnesses.append(observer)
    # Who sees each update alone needs no rounds to tell whose it is.
    text = not config.task.kind.startswith("image") and "all" in config.audit.attacks
    asked = bool(witnesses) and text
    read = None
    if asked:
        purse.watch(cohorts.NAME, 0, len(ATTACKS))
        read = cohorts.read_rounds(prepared, several.model, resumed[1], purse.name, seed=chances.seed)
    if read is not None:
        whose = dict.fromkeys(witnesses[:1], cohorts.attribution_question(read))
    else:
        whose = {}
    findings, questions = run_attacks(stages, observers, config, purse, decode, ran, whose, server)
    purse.watch("canaries", len(ATTACKS), len(ATTACKS))
    bounds = bounds_over_rounds(prepared, seed=1 + chances.seed, source=RandomSource.seeded(chances.seed))
    purse.watch("curves", len(ATTACKS), len(ATTACKS))
    curves = (
        *place_on_curves(leak_curves(stages[0], ran, purse.name), stages[0], prepared),
        *curve_over_rounds(bounds),
        *cohorts.with_curve(read),
    )
    return Replay(findings=findings, bounds=bounds, questions=questions, curves=curves)
