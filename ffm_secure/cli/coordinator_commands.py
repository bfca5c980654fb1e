"""What a coordinator's people do: make it, start a run, look at it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from defenses.random_source import RandomSource
from ffm_secure.cli.coordinator_watch import SpokenWatch
from ffm_secure.config.federated import run_digest
from ffm_secure.display.console import clear_errors, print_lines, say
from ffm_secure.cli.machine_engines import enrolment, running
from ffm_secure.engines import coordinator_folder
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.errors import BudgetExhausted, ConfigError, StoreError
from ffm_secure.coordinator.coordinator_file import CoordinatorFile
from ffm_secure.storage.key_file import replace_key
from ffm_secure.storage.status import StatusFile, read_status
from ffm_secure.tracking.trackers import Trackers, require_trackers
from ffm_secure.transport.envelope import header_of
from ffm_secure.transport.roster import key_words, read_key
from ffm_secure.record_codec import read_regular

_NOT_KNOWN = 0.0  # receipts state what rows have spent in all runs, and their budget is the site's own

if TYPE_CHECKING:
    from ffm_secure.engines.headquarters import ReadyRun
    from ffm_secure.federation import Callback, TrainingResult


def init(folder: Path, *, operator: str, host: str, port: int) -> None:
    """Make a coordinator."""
    with clear_errors():
        engine = enrolment()  # before anything is made: it may not be installed
        problems = engine.endpoint_problems(host, port)
        try:
            read_key(operator)
        except ValueError as error:
            problems.append(f"--operator = {operator[:80]!r}: {error}; ask the operator for its key")
        if problems:
            raise ConfigError("coordinator init", problems)
        key = coordinator_folder.create(
            folder, CoordinatorFile(format=1, operator=operator), RandomSource.system()
        )
        request = engine.request_coordinator(folder, (host, port), key.sign)
    print_lines(
        [
            f"coordinator at {host}:{port}: that port must be reachable from every site, and no other",
            "send the operator this line by a way you trust, and the file beside it:",
            f"  coordinator {key_words(key.public_key)}",
            f"  {request}",
            f"the operator returns roster.json, which goes into {folder}, and an approval: "
            f"ffm-secure coordinator enrol {folder} APPROVAL",
        ]
    )


def enrol(folder: Path, approval: Path) -> None:
    """Keep the certificates that came back."""
    with clear_errors():
        file = Headquarters(place=folder).read()
        try:
            content = read_regular(approval)
        except OSError as error:
            raise StoreError(f"{approval}: cannot be read: {error.strerror}") from None
        endpoint = enrolment().accept(folder, content, name="coordinator", operator=read_key(file.operator))
    print_lines(
        [
            f"the federation meets at {endpoint.host}:{endpoint.port}",
            f"runs start with: ffm-secure coordinator start {folder} RUN.toml",
        ]
    )


def rotate_key(folder: Path) -> None:
    """Give the coordinator a new key."""
    with clear_errors():
        quarters = Headquarters(place=folder.resolve())
        quarters.read()
        key = replace_key(quarters.place / coordinator_folder.KEY, RandomSource.system())
        request = enrolment().renew(quarters.place, key.sign)
    print_lines(
        [
            "the coordinator has a new key, and the old one is gone",
            "send the operator this line by a way you trust, and the file beside it:",
            f"  coordinator {key_words(key.public_key)}",
            f"  {request}",
            "until everybody has the operator's next roster, no site answers",
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Where a run shows its rounds: in the terminal, and in trackers."""

    track: tuple[str, ...] = ()
    track_to: Path | None = None
    json: bool = False
    quiet: bool = False


def start(folder: Path, run: Path, engine: str, shown: Shown, *, workers: Sequence[str] = ()) -> None:
    """Run a run file among the sites; each of `workers` names those that one process serves."""
    with clear_errors():
        require_trackers(shown.track)
        carrier = running(engine)
        Headquarters(place=folder).read()
        if not enrolment(engine).is_enrolled(folder):
            raise StoreError(
                f"{folder}: has no certificates yet; send the operator tls-request.json, then: "
                f"ffm-secure coordinator enrol {folder} APPROVAL"
            )
        from ffm_secure.engines import coordinated, headquarters  # the model libraries, when they are needed

        ready = headquarters.prepare_run(folder, run)
        try:
            hosts = hosts_of(workers, ready.coordinator.roster.names, engine)
            trained = _train(folder, ready, carrier, shown, hosts)
            summary = coordinated.finish(ready, trained)
        finally:
            ready.close()
            StatusFile(folder).write(state="stopped", run=ready.loaded.config.name)
    rounds, metric = len(trained.records), summary.metric_final
    given_up = sum(bool(record.aborted) for record in trained.records)
    without = f", {given_up} of them given up and nothing learned in those" if given_up else ""
    lines = [
        f"{summary.name}: {trained.status} after {rounds} rounds{without}",
        f"  {summary.metric_name} {metric:.4f} (before training {summary.metric_zero_round:.4f})",
        *coordinated.receipt_lines(ready),
        f"  report   {ready.folder / 'report.html'}",
    ]
    words = {"folder": str(ready.folder), "status": trained.status, "rounds": rounds, "metric": metric}
    say(words, lines, json=shown.json, quiet=shown.quiet)
    if trained.status == "budget exhausted":
        raise BudgetExhausted(trained.reason)


def hosts_of(workers: Sequence[str], roster: Collection[str], engine: str) -> dict[str, str]:
    """Return of every site that shares a process whose relay carries for it: the first's of its worker.

    Raises:
      ConfigError: with every name that is not on the roster, or is named twice.
    """
    if not workers:
        return {}
    problems, hosts = [], dict[str, str]()
    if engine != "nvflare":
        problems.append(
            f"--worker with --engine {engine}: only nvflare carries for several sites of a process"
        )
    for worker in workers:
        names = [name.strip() for name in worker.split(",")]
        for name in names:
            if name not in roster:
                problems.append(f"--worker {worker}: {name[:80]!r} is not on the roster: {', '.join(roster)}")
            if name in hosts:
                problems.append(f"--worker {worker}: {name[:80]!r} is named twice; one process serves a site")
            hosts[name] = names[0]
    if problems:
        raise ConfigError("coordinator start", problems)
    return hosts


def _train(
    folder: Path, ready: ReadyRun, carrier: ModuleType, shown: Shown, hosts: Mapping[str, str]
) -> TrainingResult:
    from ffm_secure.display.notebook import Callbacks
    from ffm_secure.display.progress import Bars

    config, names = ready.loaded.config, ready.coordinator.roster.names
    quiet = shown.quiet or shown.json

    def deadline(message: bytes) -> float:
        return header_of(message).deadline

    # Which process serves a site is a matter of this engine alone, so only it is asked.
    options = {"hosts": hosts} if hosts else {}
    with (
        carrier.open_courier(
            folder.resolve(), names, run_digest(config), deadline=deadline, **options
        ) as courier,
        Bars(rounds=config.federation.rounds, budget=_NOT_KNOWN, quiet=quiet) as bars,
        tracked(ready, shown) as trackers,
    ):
        ready.coordinator.callback = Callbacks([bars, *trackers])
        if ready.coordinator.watch is not None and not quiet:
            say_line = partial(bars.console.print, markup=False)
            ready.coordinator.watch = SpokenWatch(inner=ready.coordinator.watch, say=say_line)
        return ready.coordinator.run(courier)


@contextmanager
def tracked(ready: ReadyRun, shown: Shown) -> Iterator[tuple[Callback, ...]]:
    """Bring the trackers that were asked for to where the run is; they hear of published numbers alone."""
    if not shown.track:
        yield ()
        return
    _, records = ready.coordinator.begin()
    place, name = shown.track_to or ready.folder / "tracking", ready.loaded.config.name
    with Trackers(shown.track, place, name=name, run_id=ready.coordinator.server.run_id) as trackers:
        trackers.begin(records)
        yield (trackers,)


def status(folder: Path, *, json: bool) -> None:
    """Say which stage is open."""
    with clear_errors():
        Headquarters(place=folder).read()
    shown = dict(read_status(folder))
    say(shown, _status_lines(shown), json=json)


def _status_lines(shown: dict[str, object]) -> list[str]:
    if shown.get("state") != "running":
        return [f"no run is under way ({shown.get('state', 'none was started here')})"]
    left = int(str(shown.get("deadline", 0))) - time.time()
    lines = [
        f"{shown.get('run')}: round {shown.get('round')} of {shown.get('rounds')}, "
        f"stage {shown.get('stage')}, {shown.get('asked')} sites asked, {max(0, left):.0f} s left",
        f"waits for: {shown.get('waiting') or 'nobody'}",
    ]
    for outcome in ("refused", "improper", "silent"):
        if shown.get(outcome):
            lines.append(f"{outcome}: {shown[outcome]}")
    if shown.get("refused"):
        lines.append("why a site refuses is in its own log: its people see it with ffm-secure site log")
    return lines
