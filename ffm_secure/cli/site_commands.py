"""What a site's own people do: make it, look at it, allow runs, serve it."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from defenses.dp import Ledger
from defenses.errors import DefenseError
from defenses.random_source import RandomSource
from ffm_secure.quantities import small
from ffm_secure.config.federated import run_digest
from ffm_secure.display.console import clear_errors, print_lines, say
from ffm_secure.cli.machine_engines import enrolment, running
from ffm_secure.config import compatibility, run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import ConfigError, FfmError, StoreError
from ffm_secure.site import folder as site_folder
from ffm_secure.site import key_rotation
from ffm_secure.site.folder import SiteFolder, line_for_operator
from ffm_secure.site.policy import objections
from ffm_secure.site.site_file import LifetimeBudget, Policy, SiteFile
from ffm_secure.storage.status import read_status
from ffm_secure.transport.roster import NAME, NAME_HELP, FederationRoster, read_key
from ffm_secure.record_codec import read_regular


_LEAST_FREE: Final = 64 << 20  # bytes


def init(
    folder: Path, *, name: str, data: str, operator: str, epsilon: float, delta: float, public: str
) -> None:
    """Make a site."""
    with clear_errors():
        engine = enrolment()  # before anything is made: it may not be installed
        _require_words(name, operator, epsilon, delta)
        data, public = _from_here(data), _from_here(public)
        file = SiteFile(
            format=1,
            name=name,
            data=data,
            public=public,
            operator=operator,
            budget=LifetimeBudget(epsilon=epsilon, delta=delta),
            policy=Policy(largest_epsilon=epsilon, largest_delta=delta),
        )
        place = site_folder.create(folder, file, RandomSource.system())
        identity = place.identity()
        request = engine.request_site(folder, name, identity.sign)
    print_lines(
        [
            f"site {name}: read {place.file}, it says what this site insists on",
            *_missing_rows(data, public),
            "send the operator this line by a way you trust, and the file beside it:",
            f"  {line_for_operator(name, identity.public_key)}",
            f"  {request}",
            f"the operator returns roster.json, which goes into {folder}, and an approval: "
            f"ffm-secure site enrol {folder} APPROVAL",
        ]
    )


def _from_here(name: str) -> str:
    """Return the whole path of what lies where the command is run: `site.toml` counts from its own folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def _missing_rows(data: str, public: str) -> list[str]:
    lines = []
    for setting, name in (("data", data), ("public", public)):
        if name and not Path(name).expanduser().exists():
            lines.append(f"{setting}: there is no {name} yet; a name without / counts from the site's folder")
    return lines


def _require_words(name: str, operator: str, epsilon: float, delta: float) -> None:
    problems = []
    if not re.fullmatch(NAME, name) or name == "coordinator":
        problems.append(f"--name = {name[:80]!r}: must be {NAME_HELP}, and not: coordinator")
    try:
        read_key(operator)
    except ValueError as error:
        problems.append(f"--operator = {operator[:80]!r}: {error}; ask the operator for its key")
    if not 0.0 < epsilon <= 1e6:
        problems.append(f"--epsilon = {epsilon:g}: must be above 0 and at most 1000000")
    if not 0.0 < delta < 1.0:
        problems.append(f"--delta = {small(delta)}: must be above 0 and below 1")
    if problems:
        raise ConfigError("site init", problems)


def enrol(folder: Path, approval: Path) -> None:
    """Keep the certificate that came back."""
    with clear_errors():
        place = SiteFolder(place=folder)
        file = place.read()
        endpoint = enrolment().accept(
            folder, _bytes_of(approval), name=file.name, operator=read_key(file.operator)
        )
    print_lines(
        [f"{file.name} may connect to {endpoint.host}:{endpoint.port}; now: ffm-secure site check {folder}"]
    )


def rotate_key(folder: Path) -> None:
    """Give the site a new key."""
    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file = place.read()
        identity = key_rotation.rotate_key(place, RandomSource.system())
        request = enrolment().renew(place.place, identity.sign)
    print_lines(
        [
            f"site {file.name}: has a new key; the old one is gone, and what it took part in is remembered",
            "send the operator this line by a way you trust, and the file beside it:",
            f"  {line_for_operator(file.name, identity.public_key)}",
            f"  {request}",
            "until everybody has the operator's next roster, this site takes no part; the runs it allowed "
            "stay allowed",
        ]
    )


def check(folder: Path, run: Path | None) -> None:
    """Look at everything, offline."""
    from ffm_secure.site.service import open_ledger, require_ready  # with the model libraries

    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file, now = place.read(), time.time()
        require_ready(place, file, now=now)
        roster = place.roster(file, now=now)
        open_ledger(place, file).close()
        allowed = [place.load_allowed(path) for path in place.allowed().values()]
        runs = [*allowed, run_file.load(run)] if run else allowed
        problems: list[str] = []
        lines = [f"{file.name} of {roster.statement.federation}: keys, roster and ledger are in order"]
        for config in runs:
            problems += [
                f"{config.name}: {words}" for words in objections(config, file, sites=len(roster.names))
            ]
            lines += _try_run(place, file, roster, config, problems)
        if problems:
            raise ConfigError(str(folder), problems)
    print_lines([*lines, "nothing was charged"])


def _try_run(
    place: SiteFolder, file: SiteFile, roster: FederationRoster, config: RunConfig, problems: list[str]
) -> list[str]:
    """Load rows and model for a run as the service would."""
    from ffm_secure.site.service import open_ledger
    from ffm_secure.site.workplace import Belongings, open_workplace

    ledger = open_ledger(place, file)
    try:
        own = Belongings(
            file=file,
            base=place.place,
            identity=place.identity(),
            roster=roster,
            ledger=ledger,
            clock=time.time,
        )
        workplace = open_workplace(config, own)
    except (FfmError, DefenseError) as error:
        problems.append(f"{config.name}: {error}")
        return []
    finally:
        ledger.close()
    return [
        *describe(config),
        f"  model       {workplace.terms.backbone[:16]} (backbone), loads",
        f"  rows        {workplace.rows:,}, read",
    ]


def describe(config: RunConfig) -> list[str]:
    """Say what a run asks of a site, for the person who allows it."""
    privacy, federation = config.privacy, config.federation
    promise = "nothing is promised"
    if privacy.unit != "none":
        promise = (
            f"epsilon {privacy.epsilon:g} at delta {small(privacy.delta)} per {privacy.unit}, "
            f"clip {privacy.clip_norm:g}"
        )
    fewest = compatibility.minimum_survivors(config)
    return [
        f"run {config.name}: {run_digest(config)}",
        f"  learns      {config.task.kind} with {config.model.trainable.kind} on {config.model.name}",
        f"  rounds      {federation.rounds}, {federation.cohort} of {config.task.clients} sites in each",
        f"  promises    {promise}",
        f"  opens       sums of at least {fewest} sites, by {config.protection.kind}",
    ]


def allow(folder: Path, run: Path) -> None:
    """Allow a run, once."""
    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file = place.read()
        roster = place.roster(file, now=time.time())
        config = run_file.load(run)
        refused = objections(config, file, sites=len(roster.names))
        if refused:
            raise ConfigError(f"{run} against {place.file}", list(refused))
        place.allow(config)
    print_lines([*describe(config), f"allowed, once; try it offline with: ffm-secure site check {folder}"])


def start(folders: Sequence[Path], engine: str, *, relay: bool = True) -> None:
    """Serve a site, or several of a simulation, until a signal; the relay is that of the first."""
    folder = folders[0]
    with clear_errors():
        carrier = running(engine)
        for place in folders:
            SiteFolder(place=place).read()
        if not enrolment(engine).is_enrolled(folder):
            raise StoreError(
                f"{folder}: has no certificate yet; send the operator tls-request.json, then: "
                f"ffm-secure site enrol {folder} APPROVAL"
            )
        from ffm_secure.engines.worker import open_worker  # the model libraries, when they are needed

        worker = open_worker(folders)
        try:
            worker.prepare()
            for name, place in zip(worker.names, folders, strict=True):
                print_lines([f"{name} is served; what it refuses, and why: ffm-secure site log {place}"])
            carrier.serve_site(
                folder.resolve(),
                worker.names[0],
                worker.handle,
                worker.allows,
                should_stop=stop_signal(),
                with_relay=relay,
            )
        finally:
            worker.close()


def stop_signal() -> Callable[[], bool]:
    """Return what tells whether this process was asked to stop; a service is stopped by SIGTERM or SIGINT."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    return lambda: bool(asked)


def status(folder: Path, *, json: bool) -> None:
    """Say what the site is doing."""
    with clear_errors():
        place = SiteFolder(place=folder.resolve())
        file = place.read()
        served = place.is_served()
        shown: dict[str, object] = {"state": "not served"}
        if served:
            shown |= read_status(place.place)
        shown |= {"name": file.name, "served": served, "allowed": sorted(place.allowed())}
        lines = [f"{file.name}: {_doing(shown)}", *_roster_lines(place, file), *_disk_lines(place)]
        lines += [
            f"allowed: {place.load_allowed(path).name} ({digest[:16]})"
            for digest, path in place.allowed().items()
        ]
        lines += [*_coordinator_lines(place), *_budget_lines(place, file)]
        lines.append(f"line for the operator: {line_for_operator(file.name, place.identity().public_key)}")
    say(shown, lines, json=json)


def _doing(shown: dict[str, object]) -> str:
    words = [str(shown.get("state", "started"))]
    for name in ("run", "round", "stage"):
        if shown.get(name):
            words.append(f"{name} {shown[name]}")
    when = shown.get("when")
    if isinstance(when, int):
        words.append(f"since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(when))}")
    return ", ".join(words)


def _disk_lines(place: SiteFolder) -> list[str]:
    """Say that the disk is nearly full: a site that cannot write refuses every round."""
    free = shutil.disk_usage(place.place).free
    if free >= _LEAST_FREE:
        return []
    return [f"disk: {free >> 20} MiB are free at {place.place}; free space, or rounds will be refused"]


def _coordinator_lines(place: SiteFolder) -> list[str]:
    """Say whether the coordinator answers, once this site knows where it is."""
    if not enrolment().is_enrolled(place.place):
        return ["coordinator: not known yet; enrol with the approval that the operator sends back"]
    return [str(running("nvflare").coordinator_words(place.place))]


def _roster_lines(place: SiteFolder, file: SiteFile) -> list[str]:
    try:
        roster = place.roster(file, now=time.time())
    except FfmError as error:
        return [str(error)]
    days = (roster.statement.expires - time.time()) / 86_400
    return [f"roster {roster.statement.serial}: {', '.join(roster.names)}; good for {days:.0f} more days"]


def _budget_lines(place: SiteFolder, file: SiteFile) -> list[str]:
    path, budget = place.ledger_path(file), file.budget
    if not path.is_file():
        return [
            f"ledger: nothing spent of {budget.epsilon:g} at delta {small(budget.delta)} per {budget.unit}"
        ]
    with Ledger.open(path, create=False) as ledger:
        spent = ledger.epsilon_of(ledger.blocks(), budget.unit, budget.delta) if ledger.blocks() else 0.0
    return [
        f"ledger: {spent:.4g} spent of {budget.epsilon:g} at delta {small(budget.delta)} per {budget.unit}"
    ]


def log(folder: Path, lines: int) -> None:
    """Print the newest lines of the log."""
    path = SiteFolder(place=folder).log
    try:
        written = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise StoreError(f"{path}: is not there; the site was never started") from None
    print_lines(written[-max(1, lines) :])


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
