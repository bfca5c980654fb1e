"""The jobs of the engine that reach the sites: who comes late or comes back is reached by another."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ffm_secure.engines.nvflare.desk import Desk
from ffm_secure.engines.nvflare.folders import HEARTBEAT_SECONDS, MOST_JOBS
from ffm_secure.transport.local_socket import Door, Frames, Gone, Words

_LOG = logging.getLogger(__name__)
_FRESH = 3 * HEARTBEAT_SECONDS  # a relay that was silent for longer is not counted on
_AHEAD = 2  # answers that may wait to be read
_MOST = MOST_JOBS - 1  # beside each other: one more takes their place
Answer = tuple[Words, bytes] | None


class Arrived:
    """Answers on their way to one reader; few wait, so that memory does not grow with the sites."""

    def __init__(self) -> None:
        self._answers: queue.Queue[Answer] = queue.Queue(_AHEAD)
        self._left = threading.Event()

    def put(self, answer: Answer) -> None:
        """Hand over an answer, when there is room or the reader has left."""
        while not self._left.is_set():
            try:
                self._answers.put(answer, timeout=0.2)
            except queue.Full:
                continue
            return

    def get(self, seconds: float) -> Answer:
        """Return the next answer; None when the time is over."""
        try:
            return self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def leave(self) -> None:
        """Read no more."""
        self._left.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    start: float = 60.0  # from the submission of a job until its process speaks
    join: float = 20.0  # from there until the sites have joined that are connected
    answer: float = 600.0  # for a message that carries no deadline of its own
    look: float = 1.0  # between two looks at who is connected, while somebody is missing
    renew: float = 30.0  # between two jobs begun for the same missing sites


class Job:
    """One job, as this process sees it: who is in it, who can be written to, who waits for an answer.

    Guarantee: whoever waits is answered for, with `answered` false where the job ends before.
    """

    def __init__(self, frames: Frames, members: frozenset[str]) -> None:
        self._frames = frames
        self._lock = threading.Lock()
        self._waiting: dict[int, Arrived] = {}
        self.joined: set[str] = set()
        self.members = set(members)  # in the job, by what is known
        self.lost: dict[str, float] = {}  # fell out of the job, and when
        self._waits: set[str] = set()  # their relay is there, their service is not
        self.over = False
        self.began = time.time()

    def post(self, words: Words, content: bytes, arrived: Arrived) -> bool:
        """Write one message; its answer goes to `arrived`. Tell whether it was written."""
        number = int(str(words["number"]))
        with self._lock:
            if self.over or words["site"] not in self.joined:
                return False
            self._waiting[number] = arrived
        try:
            self._frames.write(words, content)
        except Gone:
            return False
        return True

    def forget(self, number: int) -> None:
        """Wait for an answer no more."""
        with self._lock:
            self._waiting.pop(number, None)

    def heard(self) -> set[str]:
        """Return the sites whose relay answers while their service does not: another job would not help."""
        return set(self._waits)

    @property
    def reaches_nobody(self) -> bool:
        """Tell whether everybody has fallen out of it."""
        return not self.members | self.joined

    @property
    def is_idle(self) -> bool:
        """Tell whether nobody waits for an answer."""
        with self._lock:
            return not self._waiting

    def close(self) -> None:
        """End the job."""
        self._frames.close()

    def listen(self, changed: threading.Event) -> None:
        """Sort what the job says until it ends; then answer everybody who waits."""
        with contextlib.suppress(Gone):
            while (frame := self._frames.read()) is not None:
                self._sort(*frame)
                changed.set()
        with self._lock:
            self.over = True
            everybody, self._waiting = self._waiting, {}
        changed.set()
        for number, arrived in everybody.items():
            arrived.put(({"number": number, "answered": False}, b""))

    def _sort(self, words: Words, content: bytes) -> None:
        name = str(words["site"])
        if words["say"] == "joined":
            self._waits.discard(name)
            self.joined.add(name)
            return
        if words["say"] == "waits":
            self._waits.add(name)
            return
        if words["say"] == "lost":
            self._lose(name)
            return
        if words["away"]:
            self.joined.discard(name)
        if words["away"] == "lost":
            self._lose(name)
        with self._lock:
            arrived = self._waiting.pop(int(str(words["number"])), None)
        if arrived is not None:
            arrived.put((words, content))

    def _lose(self, name: str) -> None:
        """Count on a site no more; what its relay said before is no word of the one that comes back."""
        self._waits.discard(name)
        self.joined.discard(name)
        self.members.discard(name)
        self.lost[name] = time.time()


@dataclass(slots=True, kw_only=True)
class _Missing:
    """For whom a job was begun last, and when."""

    names: frozenset[str] = frozenset()
    when: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Looks:
    """Who was connected at the last look: a job is begun when that has settled."""

    before: frozenset[str] = field(default_factory=frozenset)


class JobKeeper:
    """Keep jobs that together reach every site that is connected, in a thread of its own.

    A site that comes back is reached by a job of its own, and nobody else starts a process for it; when that
    would be one job too many, one for everybody takes the place of all.

    Guarantee: a job that works goes on until another has taken over, and until its last answer has come.
    """

    def __init__(self, desk: Desk, door: Door, sites: Sequence[str], run: str, patience: Patience) -> None:
        self._desk, self._door, self._sites, self._run = desk, door, tuple(sites), run
        self._patience = patience
        self._missing, self._looks = _Missing(), _Looks()
        self._jobs: tuple[Job, ...] = ()  # the newest last; replaced as a whole, so that any thread may read
        self._retired: list[Job] = []
        self._closing = threading.Event()
        self.changed = threading.Event()
        self.begun = 0
        self._thread = threading.Thread(target=self._keep, name="jobs", daemon=True)
        self._thread.start()

    def joined(self) -> frozenset[str]:
        """Return the sites that can be written to."""
        return frozenset().union(*(job.joined for job in self._running()))

    def job_of(self, site: str) -> Job | None:
        """Return the newest job by which a site can be written to."""
        for job in reversed(self._running()):
            if site in job.joined:
                return job
        return None

    def wait(self, until: float) -> bool:
        """Wait for a job that runs until a time, in seconds since 1970; tell whether there is one."""
        while not self._closing.is_set():
            if self._running():
                return True
            if time.time() >= until:
                return False
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """End every job and log out."""
        self._closing.set()
        self._door.close()
        for job in (*self._jobs, *self._retired):
            job.close()
        self._thread.join(2 * self._patience.look + 15.0)

    def _running(self) -> tuple[Job, ...]:
        return tuple(job for job in self._jobs if not job.over)

    def _keep(self) -> None:
        while not self._closing.is_set():
            try:
                self._tend()
            except Exception:  # a thread that dies would lose every site; the next look may be luckier
                _LOG.exception("looking after the job failed")
            self._retire()
            self._closing.wait(self._patience.look)
        self._desk.close()

    def _tend(self) -> None:
        """Begin another job where it would reach somebody who is connected and whom no other does."""
        jobs = self._running()
        everybody = frozenset(self._sites)
        if everybody <= self.joined():
            return
        connected = self._connected(jobs)
        settled, self._looks.before = connected == self._looks.before, connected
        if not connected or (not settled and connected != everybody):
            return
        held = frozenset[str]().union(*(self._held(job) for job in jobs))
        missing = connected - held
        again = (
            missing <= self._missing.names and time.monotonic() - self._missing.when < self._patience.renew
        )
        if not missing or (jobs and again):
            return
        self._missing = _Missing(names=missing, when=time.monotonic())
        useful = tuple(job for job in jobs if not job.reaches_nobody)
        if useful and len(useful) < _MOST:
            self._begin_beside(missing)
        else:
            self._begin_anew(connected)

    def _held(self, job: Job) -> frozenset[str]:
        """Return who is in a job: who has joined it, and for a while who may still."""
        if time.time() - job.began < self._patience.join:
            return frozenset(job.joined | job.members)
        return frozenset(job.joined | (job.members & job.heard()))

    def _connected(self, jobs: Sequence[Job]) -> frozenset[str]:
        """Return the sites whose relay has spoken just now, and since it was lost."""
        spoke = self._desk.connected()
        oldest = time.time() - _FRESH
        lost: dict[str, float] = {}
        for job in jobs:
            for name, when in job.lost.items():
                lost[name] = max(when, lost.get(name, 0.0))
        return frozenset(
            name for name in self._sites if name in spoke and spoke[name] >= max(oldest, lost.get(name, 0.0))
        )

    def _begin_beside(self, missing: frozenset[str]) -> None:
        """Begin a job for those whom no other reaches; the others go on as they are."""
        job = self._begin([name for name in self._sites if name in missing])
        if job is not None:
            self._jobs = (*self._running(), job)

    def _begin_anew(self, expected: frozenset[str]) -> None:
        """Begin a job for everybody; it takes the place of all others when they have joined it."""
        job = self._begin(self._sites)
        if job is not None:
            self._await_sites(job, expected)
            before, self._jobs = self._jobs, (job,)
            self._retired += before

    def _begin(self, sites: Sequence[str]) -> Job | None:
        identifier = self._desk.submit(sites, self._run)
        if identifier is None:
            return None
        job = self._accept(identifier)
        if job is None:
            self._desk.abort(identifier)
            return None
        self.begun += 1
        self.changed.set()
        return job

    def _accept(self, identifier: str) -> Job | None:
        """Wait for the process of a job."""
        closes = time.monotonic() + self._patience.start
        while time.monotonic() < closes and not self._closing.is_set():
            frames = self._door.accept(0.5)
            if frames is None:
                continue
            words = _first_words(frames)
            if words is None or words.get("job") != identifier:
                frames.close()  # of an earlier job that ends
                continue
            names = words["sites"]
            job = Job(frames, frozenset(names if isinstance(names, list) else ()) & frozenset(self._sites))
            threading.Thread(target=job.listen, args=(self.changed,), name="job", daemon=True).start()
            return job
        return None

    def _await_sites(self, job: Job, expected: frozenset[str]) -> None:
        closes = time.monotonic() + self._patience.join
        while not expected & job.members <= job.joined | job.heard() and time.monotonic() < closes:
            if job.over or self._closing.is_set():
                return
            time.sleep(0.02)

    def _retire(self) -> None:
        """End the jobs that nobody needs any more."""
        idle = tuple(job for job in self._running() if job.reaches_nobody and len(self._jobs) > 1)
        if idle:
            self._jobs = tuple(job for job in self._running() if job not in idle)
            self._retired += idle
        for job in tuple(self._retired):
            if job.is_idle or job.over:
                job.close()
                self._retired.remove(job)


def _first_words(frames: Frames) -> Words | None:
    with contextlib.suppress(Gone):
        first = frames.read(5.0)
        return None if first is None else first[0]
    return None
