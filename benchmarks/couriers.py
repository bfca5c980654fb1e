"""What carrying a secure round costs: its wall seconds less the slowest site's computing, side by side over
the couriers.

    python -m benchmarks.couriers [--sites 4] [--numbers 1000000] [--rounds 5] [--couriers NAMES] [--json]
    python -m benchmarks.couriers --table [--gibibytes 8]     # every size, each in a process of its own
    python -m benchmarks.couriers --falls                    # over the last of the couriers
    python -m benchmarks.couriers --echo 100000000            # one large message to a site and back

A round is what a run sends: the model to every site, then ffm-secagg/2 in active mode, whose opened sum is
compared with the plain one. Sites are threads of this process behind their couriers; over NVFlare every
message crosses four processes and mutual TLS on loopback. Both couriers carry every round in turn, so that
they meet the same weather. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.secagg import gather
from defenses.random_source import RandomSource
from defenses.secagg import ClientPolicy, ClientSession, Identity, ServerSession, SessionParameters
from ffm_secure.engines.in_process import InProcessCourier
from ffm_secure.engines.nvflare.courier import Patience
from ffm_secure.engines.nvflare.processes import Process
from ffm_secure.engines.nvflare.site_service import serve
from ffm_secure.transport.courier import Lost, MachineCourier
from tests.engines.nvflare_federation import enrol

RUN = "be" * 32
_PACKAGES = {"nvflare": "nvflare", "flower": "flwr"}  # by what is installed a courier can be measured
PATIENT = Patience(start=240.0, join=120.0)  # forty processes start at once


@dataclass(slots=True, kw_only=True)
class Parties:
    """Everybody of the protocol."""

    parameters: SessionParameters
    policy: ClientPolicy
    people: Sequence[Identity]
    source: RandomSource


@dataclass(slots=True)
class SecureSite:
    """A site that plays its half of one round after another, and notes its own seconds."""

    parties: Parties
    number: int
    vector: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    session: ClientSession | None = None
    round: int = 0

    def handle(self, stage: str, message: bytes) -> bytes:
        began = time.perf_counter()
        answer = self._answer(stage, message)
        self.seconds[stage] = time.perf_counter() - began
        return answer

    def _answer(self, stage: str, message: bytes) -> bytes:
        if stage == "plan":
            self.round = int.from_bytes(message[:4], "little")
            parameters = _of_round(self.parties.parameters, self.round)
            source = self.parties.source.derive("site", self.number, self.round)
            self.session = ClientSession(
                self.parties.people[self.number], parameters, self.parties.policy, source, now=0
            )
            return b"accepted"
        assert self.session is not None
        name = self.round.to_bytes(32, "little")
        steps: dict[str, Callable[[], bytes | memoryview]] = {
            "advertise": self.session.advertise,
            "share": lambda: self.session.share(message),
            "mask": lambda: self.session.mask(message, self.vector, update=name, model_hash=name),
            "confirm": lambda: self.session.confirm(message),
            "unmask": lambda: self.session.unmask(message),
        }
        return bytes(steps[stage]())


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round took, in seconds."""

    wall: float
    sites: float  # the slowest site's of every stage, added up
    server: float
    stages: Mapping[str, float]

    @property
    def overhead(self) -> float:
        """Return what the slowest site did not take."""
        return self.wall - self.sites

    @property
    def carrying(self) -> float:
        """Return what neither the slowest site nor the server's own computing took."""
        return self.wall - self.sites - self.server


def _of_round(parameters: SessionParameters, number: int) -> SessionParameters:
    """Return the parameters of a round about a model of its own: nobody answers for one twice."""
    return replace(parameters, round=number, model_hash=number.to_bytes(32, "little"))


def secure_round(courier: MachineCourier, sites: Sequence[SecureSite], number: int) -> Round:
    """Carry one round and check the opened sum."""
    parties = sites[0].parties
    server = ServerSession(_of_round(parties.parameters, number))
    people = {site: parties.people[site].id for site in range(len(sites))}
    length = parties.parameters.length
    model = number.to_bytes(4, "little") + bytes(4 * length)
    steps: tuple[tuple[str, Callable[[bytes], bytes], Callable[[bytes], object]], ...] = (
        ("plan", lambda who: model, lambda answer: None),
        ("advertise", lambda who: b"", server.receive_advertisement),
        ("share", server.roster_message, server.receive_shares),
        ("mask", server.delivery_for, server.receive_masked_input),
        ("confirm", server.survivors_message, server.receive_confirmation),
        ("unmask", server.request_for, server.receive_response),
    )
    began, served, stages = time.perf_counter(), 0.0, {}
    for stage, message_for, receive in steps:
        opened, own = time.perf_counter(), time.thread_time()
        messages = {site: message_for(who) for site, who in people.items()}
        served += time.thread_time() - own
        for reply in courier.send(stage, messages, deadline=time.time() + 300.0):
            if isinstance(reply.content, Lost):
                raise RuntimeError(f"site {reply.site} was lost at {stage}")
            own = time.thread_time()
            receive(bytes(reply.content))
            served += time.thread_time() - own
        stages[stage] = time.perf_counter() - opened
    own = time.thread_time()
    total = server.finish().vector
    served += time.thread_time() - own
    wall = time.perf_counter() - began
    expected = sum((site.vector for site in sites), np.zeros(length, dtype=np.uint32))
    if not (total == expected).all():
        raise AssertionError("the opened sum is not the sum")
    slowest = sum(max(site.seconds[stage] for site in sites) for stage in stages)
    return Round(wall=wall, sites=slowest, server=served, stages=stages)


def parties_of(sites: int, numbers: int) -> list[SecureSite]:
    """Bring the parties together; they know each other for every round and courier."""
    parameters, policy, people, source = gather(
        sites, numbers, mode="active", modulus_bits=32, survivors=sites, neighbours=None, threshold=None
    )
    parties = Parties(parameters=parameters, policy=policy, people=people, source=source)
    values = np.random.default_rng(3).integers(0, 1 << 20, size=(sites, numbers), dtype=np.uint32)
    return [SecureSite(parties, number, values[number]) for number in range(sites)]


JOBS = {"runner_process": "server", "worker_process": "site"}  # words of a job's command, and whose it is


def job_memory(folder: Path, word: str) -> dict[str, list[int]]:
    """Return what the engine's job processes below a folder hold, in bytes: `VmRSS` now, `VmHWM` at most."""
    held: dict[str, list[int]] = {whose: [] for whose in JOBS.values()}
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (
                (place / "cmdline").read_bytes().decode(errors="replace") if place.name.isdigit() else ""
            )
            for words, whose in JOBS.items():
                if words in command and str(folder) in command:
                    status = (place / "status").read_text()
                    held[whose].append(1024 * int(status.split(f"{word}:")[1].split()[0]))
    return held


def vectors_held(
    before: Mapping[str, list[int]], after: Mapping[str, list[int]], size: int
) -> dict[str, float]:
    """Return how many vectors of so many bytes a job process held at most, beyond what it began with."""
    vectors = {}
    for whose in before:
        if before[whose] and after[whose]:
            vectors[whose] = (max(after[whose]) - min(before[whose])) / size
    return vectors


class WaitedFor(MachineCourier, Protocol):
    """A courier that waits for its sites."""

    def open(self, *, smallest: int, seconds: float) -> None: ...


class Machines(Protocol):
    """The processes of an engine on this machine."""

    server: Process | None

    def engine_folder(self, name: str) -> Path: ...

    def start(self) -> None: ...

    def start_site(self, name: str) -> None: ...

    def kill(self, name: str) -> None: ...

    def courier(self, run: str, patience: Patience | None = None) -> WaitedFor: ...

    def stop(self) -> None: ...


@contextlib.contextmanager
def over_local(sites: Sequence[SecureSite], folder: Path) -> Iterator[MachineCourier]:
    """Call the sites in this process."""
    courier = InProcessCourier({site.number: site.handle for site in sites})
    yield courier
    courier.close()


def _enrol_flower(folder: Path, names: Sequence[str]) -> Machines:
    """Make the folders of the second engine, which is installed in an environment of its own."""
    from tests.engines import flower_federation

    return flower_federation.enrol(folder, names)


ENROL: Mapping[str, Callable[[Path, Sequence[str]], Machines]] = {"nvflare": enrol, "flower": _enrol_flower}


@contextlib.contextmanager
def over_machines(engine: str, sites: Sequence[SecureSite], folder: Path) -> Iterator[MachineCourier]:
    """Start a federation of machines on loopback whose services are these sites."""
    names = _names(sites)
    with contextlib.ExitStack() as stack:
        machines = ENROL[engine](folder, names)
        for name, site in zip(names, sites, strict=True):
            stack.callback(serve(machines.engine_folder(name), site.handle, RUN.__eq__).close)
        stack.callback(machines.stop)
        machines.start()
        courier = machines.courier(RUN, PATIENT if engine == "nvflare" else None)
        stack.callback(courier.close)
        courier.open(smallest=len(names), seconds=600.0)
        yield courier


def _names(sites: Sequence[SecureSite]) -> list[str]:
    return [f"s{number}" for number in range(len(sites))]


Opens = Callable[[Sequence[SecureSite], Path], contextlib.AbstractContextManager[MachineCourier]]
COURIERS: Mapping[str, Opens] = {"local": over_local} | {name: partial(over_machines, name) for name in ENROL}
"""How a federation of these sites is opened over each engine; another engine adds its line."""


def bytes_needed(names: Sequence[str], sites: int, numbers: int) -> int:
    """Return about how many bytes of memory a measurement takes.

    Everywhere every site's vector and one site's work on it; between processes also what every site's service
    and job hold of a message at a time, what the server's job holds, and the processes themselves.
    """
    vector = 4 * numbers
    needed = (sites + 3) * vector
    if set(names) - {"local"}:
        needed += sites * (3 * vector + 2 * vector + (300 << 20))
        needed += 2 * min(sites * vector, 1 << 30) + (300 << 20)
    return needed


def falls(sites: int, engine: str) -> dict[str, float]:
    """Kill what can fall over an engine; return the seconds until it is noticed and mended."""
    names = [f"s{number}" for number in range(sites)]
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        machines = ENROL[engine](Path(place), names)
        for name in names:
            stack.callback(serve(machines.engine_folder(name), _slowly, RUN.__eq__).close)
        stack.callback(machines.stop)
        began = time.perf_counter()
        machines.start()
        courier = machines.courier(RUN)
        stack.callback(courier.close)
        courier.open(smallest=sites, seconds=300.0)
        seconds = {"start": time.perf_counter() - began}

        began = time.perf_counter()
        waiting = courier.send("slow", {0: b"600"}, deadline=time.time() + 600.0)
        threading.Timer(0.5, machines.kill, (names[0],)).start()
        next(iter(waiting))
        seconds["site's machine, noticed"] = time.perf_counter() - began - 0.5
        machines.start_site(names[0])
        seconds["site's machine, back"] = _until_all_answer(courier, sites)

        assert machines.server is not None
        os.kill(machines.server.number, signal.SIGKILL)
        time.sleep(0.5)
        seconds["server, back"] = _until_all_answer(courier, sites)
        return seconds


def echo(size: int) -> dict[str, object]:
    """Send one large message over NVFlare and get it back; return the seconds and what was held of it."""
    names, content = ("s0", "s1"), np.random.default_rng(1).bytes(size)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        machines = enrol(Path(place), names)
        for name in names:
            stack.callback(serve(machines.engine_folder(name), _slowly, RUN.__eq__).close)
        stack.callback(machines.stop)
        machines.start()
        courier = machines.courier(RUN)
        stack.callback(courier.close)
        courier.open(smallest=len(names), seconds=300.0)
        idle, seconds = job_memory(Path(place), "VmRSS"), []
        for _ in range(3):  # what an earlier message leaves behind counts, too
            began = time.perf_counter()
            (reply,) = courier.send("echo", {0: content}, deadline=time.time() + 600.0)
            seconds.append(time.perf_counter() - began)
            if isinstance(reply.content, Lost) or bytes(reply.content) != content:
                raise AssertionError("it did not come back as it was sent")
        held = vectors_held(idle, job_memory(Path(place), "VmHWM"), size)
    return {"bytes": size, "seconds": min(seconds), "vectors_held": held, "load": os.getloadavg()[0]}


def _slowly(stage: str, message: bytes) -> bytes:
    if stage == "slow":
        time.sleep(float(message))
    return bytes(message)


def _until_all_answer(courier: MachineCourier, sites: int) -> float:
    began = time.perf_counter()
    while time.perf_counter() - began < 300.0:
        replies = list(courier.send("echo", dict.fromkeys(range(sites), b"x"), deadline=time.time() + 5.0))
        if not any(isinstance(reply.content, Lost) for reply in replies):
            return time.perf_counter() - began
        time.sleep(0.1)
    raise RuntimeError("not all sites came back")


def summary(name: str, rounds: Sequence[Round], load: float) -> dict[str, object]:
    """Return the figures of one courier."""
    return {
        "courier": name,
        "rounds": len(rounds),
        "wall_seconds": statistics.median(item.wall for item in rounds),
        "site_seconds": statistics.median(item.sites for item in rounds),
        "server_seconds": statistics.median(item.server for item in rounds),
        "overhead_seconds": statistics.median(item.overhead for item in rounds),
        "carrying_seconds": statistics.median(item.carrying for item in rounds),
        "overhead_least": min(item.overhead for item in rounds),
        "overhead_most": max(item.overhead for item in rounds),
        "stages": {
            stage: statistics.median(item.stages[stage] for item in rounds) for stage in rounds[0].stages
        },
        "load": load,
    }


def measure(sites: int, numbers: int, rounds: int, names: Sequence[str]) -> list[dict[str, object]]:
    """Carry rounds over every courier in turn."""
    parties = parties_of(sites, numbers)
    results: dict[str, list[Round]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        couriers = {}
        for name in names:
            (folder / name).mkdir()
            couriers[name] = stack.enter_context(COURIERS[name](parties, folder / name))
        idle = job_memory(folder, "VmRSS")
        number = 0
        for turn in range(rounds + 1):
            for name, courier in couriers.items():
                number += 1
                result = secure_round(courier, parties, number)
                if turn:  # the first warms up
                    results[name].append(result)
        busiest = job_memory(folder, "VmHWM")
    load = os.getloadavg()[0]
    rows = [summary(name, items, load) for name, items in results.items()]
    for row in rows:
        if row["courier"] == "nvflare":
            row["vectors_held"] = vectors_held(idle, busiest, 4 * numbers)
    return rows


SIZES = ((4, 1_000_000), (20, 1_000_000), (4, 25_000_000), (20, 25_000_000))


def table(names: Sequence[str], rounds: int, gibibytes: float) -> None:
    """Measure every size in a process of its own, those that fit; print one table."""
    print("| sites | numbers | courier | round | less the slowest site | of that, the server's computing |")
    print("|---|---|---|---|---|---|")
    for sites, numbers in SIZES:
        fitting = [name for name in names if bytes_needed([name], sites, numbers) <= gibibytes * (1 << 30)]
        rows = _apart(fitting, sites, numbers, rounds if numbers < 10_000_000 else 2) if fitting else []
        for row in rows:
            seconds = [float(str(row[f"{kind}_seconds"])) for kind in ("wall", "overhead", "server")]
            cells = " | ".join(f"{value:.2f} s" for value in seconds)
            print(f"| {sites} | {numbers:,} | {row['courier']} | {cells} |", flush=True)
        for name in names:
            if name not in fitting:
                needed = bytes_needed([name], sites, numbers) / (1 << 30)
                print(f"| {sites} | {numbers:,} | {name} | needs about {needed:.0f} GiB | | |", flush=True)


def _apart(names: Sequence[str], sites: int, numbers: int, rounds: int) -> list[dict[str, object]]:
    """Measure one size in a process of its own, whose memory ends with it."""
    words = ["--sites", str(sites), "--numbers", str(numbers), "--rounds", str(rounds), "--json"]
    command = [sys.executable, "-m", "benchmarks.couriers", "--couriers", ",".join(names), *words]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(ended.stdout.strip().splitlines()[-1])["rows"])


def show(rows: Sequence[Mapping[str, object]], sites: int, numbers: int, rounds: int) -> None:
    """Print the figures of one size."""
    print(f"{sites} sites, {numbers:,} numbers; seconds, median of {rounds} rounds")
    print(f"{'courier':>9} {'wall':>9} {'site':>9} {'server':>9} {'overhead':>9} {'least':>9} {'/first':>9}")
    for row in rows:
        figures = ("wall_seconds", "site_seconds", "server_seconds", "overhead_seconds")
        cells = [f"{row[name]:>9.3f}" for name in (*figures, "overhead_least", "wall_over_first")]
        print(f"{row['courier']:>9}", *cells)
        if "vectors_held" in row:
            print(f"vectors that a job of the engine held at most: {row['vectors_held']}")


def main() -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument(
        "--falls", action="store_true", help="kill relays and the server instead, and time it"
    )
    here = ",".join(name for name in COURIERS if find_spec(_PACKAGES.get(name, "numpy")))
    parser.add_argument("--couriers", default=here, help=f"some of {', '.join(COURIERS)}")
    parser.add_argument("--table", action="store_true", help="4 and 20 sites, 1 and 25 million numbers")
    parser.add_argument("--gibibytes", type=float, default=8.0, help="leave out what needs more memory")
    parser.add_argument("--echo", type=int, default=0, help="one message of so many bytes to a site and back")
    words = parser.parse_args()
    if words.echo:
        print(json.dumps({"benchmark": "couriers, echo", **echo(words.echo)}))
        return
    names = words.couriers.split(",")
    if words.falls:
        figures = {"sites": words.sites, "engine": names[-1], **falls(words.sites, names[-1])}
        print(json.dumps({"benchmark": "couriers, falls", **figures}))
        return
    if words.table:
        table(names, words.rounds, words.gibibytes)
        return
    rows = measure(words.sites, words.numbers, words.rounds, names)
    base = float(str(rows[0]["wall_seconds"]))
    for row in rows:
        row["wall_over_first"] = float(str(row["wall_seconds"])) / base
    if not words.json:
        show(rows, words.sites, words.numbers, words.rounds)
    print(
        json.dumps(
            {
                "benchmark": "couriers",
                "sites": words.sites,
                "numbers": words.numbers,
                "cores": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
                "threads": threading.active_count(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
