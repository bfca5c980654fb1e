"""A run of many rounds among processes of their own, one of which is killed -9 every few rounds.

    python -m benchmarks.faults [--engine plain|nvflare] [--sites 20] [--rounds 200] [--every 5]
    python -m benchmarks.faults --check FOLDER      # what a run that was cut off left in the folder it kept

Sites hold rows, ledgers, memories and keys in folders of their own, and a tiny model: what is tried is who
pays, remembers and sums, not how fast. Over `plain` a site is a process behind a socket, forked from one that
has imported the package; over `nvflare` it is `ffm-secure site start`, relay and all, with mutual TLS on
loopback, and the engine's server is killed, too. With `--forked` the services there are forked as well, so
that twenty of them fit on a small machine: what is killed and started again is the same, but for the import
of the libraries. Whoever was killed is started again at once.

At the end every opened sum is compared, number by number, with what the survivors sealed; every ledger with
what was released; and the machine is searched for processes that should be gone. The last line is one JSON
object. The victims and the stages are drawn from `--seed`. SIGTERM ends a run early, with what was done; what
was seen is in the folder after every round, so that one that is cut off is not lost, either.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_checks import NAME, check_ledgers, check_sums, records_of, summary
from benchmarks.fault_parties import COORDINATOR
from defenses.secagg import Identity
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.engines.nvflare import enrolment
from ffm_secure.records import RoundRecord
from ffm_secure.server.timetable import Timetable
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.site_file import SelfAudit
from ffm_secure.storage.durable import write_atomic
from ffm_secure.storage.status import read_status
from tests.engines.site_processes import SiteProcesses
from tests.parties.helpers import Federation, found, notes_run

STAGES = ("plan", "begin", "advertise", "share", "upload", "confirm", "unmask", "finish")
TIMES = Timetable(join=20.0, rejoin=1.0, train=60.0, other=30.0, gather=120.0, patience=300.0)
LONGEST = 600.0  # seconds until a run that does not move counts as stuck
SEEN = "seen.json"  # beside the folders of the parties: what was seen up to now


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """Who is killed, when."""

    round: int
    stage: str
    kind: str  # site, server or coordinator
    site: int = -1


@dataclass(slots=True, kw_only=True)
class Recovery:
    """How long it took after a fall until everything was as before."""

    fall: Fall
    when: float
    at_stage: str  # the stage that was open
    at_round: int
    seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class Processes:
    """Everybody's processes."""

    federation: Federation
    names: Sequence[str]
    engine: str
    fork: bool = True
    forked: SiteProcesses | None = None
    services: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)  # where nothing is forked
    coordinator: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the sites, then the coordinator."""
        places = [self.federation.site(name) for name in self.names]
        if self.engine == "plain":
            self.forked = SiteProcesses({place: place for place in places})
        elif self.fork:
            self.forked = SiteProcesses({place: place for place in places}, relay=True)
        else:
            for site in range(len(places)):
                self.start_service(site)
        self.start_coordinator()

    def start_service(self, site: int) -> None:
        """Start one site's service as its people do."""
        place = self.federation.site(self.names[site])
        with (place / "service.out").open("ab") as out:
            words = [sys.executable, "-m", "ffm_secure", "site", "start", str(place)]
            self.services[site] = subprocess.Popen(words, stdout=out, stderr=out)

    def start_coordinator(self) -> None:
        """Start the coordinator."""
        place = str(self.federation.place)
        words = [sys.executable, "-m", "benchmarks.fault_parties", place, self.engine]
        with (self.federation.place / COORDINATOR / "output.txt").open("ab") as out:
            self.coordinator = subprocess.Popen(words, stdout=out, stderr=out)

    def kill(self, fall: Fall) -> None:
        """End somebody as a power cut does, and start it again."""
        assert self.coordinator is not None
        if fall.kind == "coordinator":
            self.coordinator.kill()
            self.coordinator.wait()
            self.start_coordinator()
        elif fall.kind == "server":
            for number in processes_of("server_train"):
                if str(self.federation.place) in command_of(number):
                    os.kill(number, signal.SIGKILL)
        else:
            self.kill_site(fall.site)

    def kill_site(self, site: int) -> None:
        """End one site's service, and start it again."""
        if self.forked is not None:
            place = self.federation.site(self.names[site])
            self.forked.kill(place)
            self.forked.start(place, wait=False)
        else:
            self.services[site].kill()
            self.services[site].wait()
            self.start_service(site)

    def close(self) -> None:
        """End everybody, in order."""
        if self.coordinator is not None:
            self.coordinator.kill()
            self.coordinator.wait()
        if self.forked is not None:
            self.forked.close()
        for service in self.services.values():
            service.terminate()
        for service in self.services.values():
            service.wait(60)


def command_of(number: int) -> str:
    """Return the words a process was started with."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes_of(words: str) -> list[int]:
    """Return the processes whose command holds some words, but this one."""
    numbers = [int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()]
    return [number for number in numbers if words in command_of(number) and number != os.getpid()]


def configuration(sites: int, rounds: int, spare: int) -> RunConfig:
    """Return a run of many short rounds with real noise, masks and a tiny model."""
    size = 40 * sites
    lost = max(1, sites // 5)
    return notes_run(
        task={
            "data": f"builtin:clinic_notes?size={size + 40}&validation=40&hospitals={sites}",
            "clients": sites,
            "max_length": 8,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 1}},
        federation={
            "rounds": rounds,
            "cohort": sites,
            "evaluate_every": max(1, rounds // 4),
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 2, "learning_rate": 0.05},
        },
        privacy={
            "unit": "record",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip_norm": 1.0,
            "spare_rounds": spare,
            "ledger": "run",
        },
        protection={
            "kind": "secagg",
            "threshold": sites - lost,
            "colluding": 0 if sites < 5 else 1,
        },
        speed={"threads": 1},
    )


def prepare(place: Path, sites: int, rounds: int, spare: int) -> tuple[Federation, list[str]]:
    """Make everybody's folder, and everybody's certificates."""
    names = [f"site-{number:02d}" for number in range(sites)]
    config = configuration(sites, rounds, spare)
    federation = found(
        place,
        config,
        policy={"colluders": config.protection.colluding, "smallest_cohort": config.protection.threshold},
        timetable=TIMES,
        names=names,
        record=SelfAudit(rounds=rounds, mebibytes=1024),
    )
    return federation, names


def enrol(federation: Federation, names: Sequence[str]) -> None:
    """Let the operator sign everybody's certificates for the engine."""
    place, now = federation.place, datetime.datetime.now(datetime.UTC)
    enrolment.create_authority(place / "operator", "clinics", now=now)
    people: dict[str, Identity] = {COORDINATOR: Headquarters(place=place / COORDINATOR).key()}
    for name in names:
        people[name] = SiteFolder(place=place / name).identity()
    keys = {name: person.public_key for name, person in people.items()}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    for name, person in people.items():
        if name == COORDINATOR:
            asked = enrolment.request_coordinator(place / name, ("localhost", port), person.sign)
        else:
            asked = enrolment.request_site(place / name, name, person.sign)
        _, approved = enrolment.approve(
            place / "operator", asked.read_bytes(), keys=keys, sign=federation.operator.sign, now=now
        )
        enrolment.accept(place / name, approved, name=name, operator=federation.operator.public_key)


def falls_of(rounds: int, every: int, sites: int, kinds: Sequence[str], seed: int) -> list[Fall]:
    """Draw who is killed in every so many rounds, and at which stage."""
    dice = random.Random(seed)
    falls = []
    for number in range(every, rounds + 1, every):
        kind = dice.choice(kinds)
        site = dice.randrange(sites) if kind == "site" else -1
        falls.append(Fall(round=number, stage=dice.choice(STAGES), kind=kind, site=site))
    return falls


class Referee:
    """Watch a run from outside, kill as was drawn, and time what follows."""

    def __init__(self, processes: Processes, falls: Sequence[Fall]) -> None:
        self.processes, self.waiting = processes, list(falls)
        self.folder = processes.federation.place / COORDINATOR
        self.run_folder = self.folder / "runs" / NAME
        self.recoveries: list[Recovery] = []
        self.finished: dict[int, float] = {}
        self.began = self.moved = time.monotonic()
        self.stopped = False
        self.size = 0  # of the file of finished rounds when it was read last

    def watch(self, longest: float) -> float:
        """Return the seconds the whole run took; one that takes longer than `longest` ends there."""
        self.began = time.monotonic()
        while True:
            coordinator = self.processes.coordinator
            assert coordinator is not None
            over = coordinator.poll()
            self._look()
            if over is not None:
                if over:
                    raise SystemExit(f"the coordinator ended with {over}; see {self.folder / 'output.txt'}")
                return self.seconds()
            if self.stopped or self.seconds() > longest:
                return self.seconds()
            if time.monotonic() - self.moved > LONGEST:
                raise SystemExit(f"nothing moved for {LONGEST:.0f} s: {read_status(self.folder)}")
            time.sleep(0.02)

    def stop(self, *_: object) -> None:
        """End early."""
        self.stopped = True

    def seconds(self) -> float:
        """Return how long it has been watching."""
        return time.monotonic() - self.began

    def _look(self) -> None:
        for record in self._new_records():
            self.finished[record.round] = self.moved = time.monotonic()
            self._settle(record)
            self._note()
        if self.waiting and self._is_time(self.waiting[0]):
            fall = self.waiting.pop(0)
            shown = read_status(self.folder)
            stage, number = str(shown.get("stage", "")), int(shown.get("round", 0))
            when = time.monotonic()
            self.recoveries.append(Recovery(fall=fall, when=when, at_stage=stage, at_round=number))
            self.processes.kill(fall)
            self._note()
            print(f"round {fall.round}, {stage}: {fall.kind} {max(fall.site, 0) or ''}", flush=True)

    def _note(self) -> None:
        """Leave what was seen where a look at the folder finds it."""
        recoveries = [dataclasses.asdict(recovery) for recovery in self.recoveries]
        words = {"seconds": self.seconds(), "load": os.getloadavg()[0], "recoveries": recoveries}
        write_atomic(self.folder.parent / SEEN, json.dumps(words).encode())

    def _is_time(self, fall: Fall) -> bool:
        shown = read_status(self.folder)
        if fall.round in self.finished:
            return True  # the stage was too short to be met
        return shown.get("round") == fall.round and shown.get("stage") == fall.stage

    def _new_records(self) -> Iterator[RoundRecord]:
        path = self.run_folder / "rounds.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == self.size:
            return
        self.size = size
        for record in records_of(self.run_folder):
            if record.round not in self.finished:
                yield record

    def _settle(self, record: RoundRecord) -> None:
        """Note who is back: a site when it is in a sum again, anybody else when a round is finished."""
        for recovery in self.recoveries:
            if recovery.seconds is not None:
                continue
            fall = recovery.fall
            back = fall.site in record.survivors if fall.kind == "site" else bool(record.survivors)
            if back and (fall.kind != "site" or record.round > fall.round):
                recovery.seconds = time.monotonic() - recovery.when


def measure(words: argparse.Namespace) -> dict[str, object]:
    """Run, kill, compare; return the figures."""
    kinds = ("site", "coordinator") if words.engine == "plain" else ("site", "server", "coordinator")
    falls = falls_of(words.rounds, words.every, words.sites, kinds, words.seed)
    spare = 4 + 2 * sum(fall.kind != "site" for fall in falls)
    with contextlib.ExitStack() as stack:
        place = Path(words.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        federation, names = prepare(place, words.sites, words.rounds, spare)
        if words.engine == "nvflare":
            enrol(federation, names)
        processes = Processes(federation=federation, names=names, engine=words.engine, fork=words.forked)
        referee = Referee(processes, falls)
        signal.signal(signal.SIGTERM, referee.stop)
        try:
            processes.start()
            referee.watch(60 * words.minutes)
        finally:
            processes.close()
        orphans = still_there(place)
        figures = check(place)
    return {"benchmark": "faults", "engine": words.engine, **figures, "orphans": orphans}


def still_there(place: Path) -> list[str]:
    """Return the commands of processes of a folder that do not end by themselves in a little while."""
    left: list[str] = []
    for _ in range(20):
        left = [command_of(number) for number in processes_of(f"{place}/")]
        if not left:
            break
        time.sleep(1.0)
    return left


def check(place: Path) -> dict[str, object]:
    """Compare what a run left in its folder, with what was seen of it; return the figures.

    Raises:
      AssertionError: a sum, a ledger or a number of a round is not as it must be.
    """
    config = run_file.load(place / COORDINATOR / "run.toml")
    names = sorted(folder.name for folder in place.glob("site-*"))
    records = records_of(place / COORDINATOR / "runs" / NAME)
    notes = json.loads((place / SEEN).read_bytes())
    recoveries = [Recovery(**{**item, "fall": Fall(**item["fall"])}) for item in notes["recoveries"]]
    numbers = [record.round for record in records]
    if numbers != list(range(1, len(numbers) + 1)):
        raise AssertionError(f"rounds are missing, or there twice: {numbers}")
    attempts = Counter[int]()
    for recovery in recoveries:  # between two rounds the one that follows may be begun twice
        attempts.update((recovery.at_round, recovery.at_round + 1))
    back: dict[str, list[float]] = {recovery.fall.kind: [] for recovery in recoveries}
    for recovery in recoveries:
        if recovery.seconds is not None:
            back[recovery.fall.kind].append(recovery.seconds)
    return {
        "sites": len(names),
        "rounds": len(records),
        "rounds_planned": config.federation.rounds,
        "falls": dict(Counter(recovery.fall.kind for recovery in recoveries)),
        "met_at_their_stage": sum(item.at_stage == item.fall.stage for item in recoveries),
        "aborted": sum(bool(record.aborted) for record in records),
        "rounds_with_losses": sum(bool(record.dropped) for record in records),
        **check_sums(place, config, names, records),
        **check_ledgers(place, names, records, attempts),
        "seconds": notes["seconds"],
        "round_seconds": summary([record.seconds for record in records]),
        "back_seconds": {kind: summary(values) for kind, values in back.items()},
        "load": notes["load"],
    }


def main() -> None:
    """Print the figures and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engine", choices=("plain", "nvflare"), default="plain")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=240.0, help="end after so long, with what was done")
    parser.add_argument("--forked", action="store_true", help="fork the services, also over an engine")
    parser.add_argument("--keep", default="", help="a new folder that is kept; else a temporary one")
    parser.add_argument("--check", default="", help="run nothing: compare what is in a folder that was kept")
    words = parser.parse_args()
    figures = check(Path(words.check)) if words.check else measure(words)
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
