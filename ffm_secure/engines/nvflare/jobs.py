"""One job of the engine after another, so that who comes late or comes back is reached by the next."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ffm_secure.engines.nvflare.desk import Desk
from ffm_secure.engines.nvflare.folders import HEARTBEAT_SECONDS
from ffm_secure.transport.local_socket import Door, Frames, Gone, Words

_LOG = logging.getLogger(__name__)
_FRESH = 3 * HEARTBEAT_SECONDS  # a relay that was silent for longer is not counted on
_AHEAD = 2  # answers that may wait to be read
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
        """Return the next answer; None when the time is over or the job has ended."""
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
    """One job, as this process sees it: who is in it, who can be written to, who waits for an answer."""

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
    def is_idle(self) -> bool:
        """Tell whether nobody waits for an answer."""
        with self._lock:
            return not self._waiting

    def close(self) -> None:
        """End the job."""
        self._frames.close()

    def listen(self, changed: threading.Event) -> None:
        """Sort what the job says until it ends; then tell everybody who waits."""
        with contextlib.suppress(Gone):
            while (frame := self._frames.read()) is not None:
                self._sort(*frame)
                changed.set()
        with self._lock:
            self.over = True
            everybody, self._waiting = tuple(self._waiting.values()), {}
        for arrived in everybody:
            arrived.put(None)
        changed.set()

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
    """Keep a job that reaches every site that is connected, in a thread of its own.

    Guarantee: a job that works goes on until the next has taken over, and until its last answer has come.
    """

    def __init__(self, desk: Desk, door: Door, sites: Sequence[str], run: str, patience: Patience) -> None:
        self._desk, self._door, self._sites, self._run = desk, door, tuple(sites), run
        self._patience = patience
        self._missing, self._looks = _Missing(), _Looks()
        self._retired: list[Job] = []
        self._closing = threading.Event()
        self.changed = threading.Event()
        self.current: Job | None = None
        self.begun = 0
        self._thread = threading.Thread(target=self._keep, name="jobs", daemon=True)
        self._thread.start()

    def wait(self, until: float) -> Job | None:
        """Return the job that runs; wait for one until a time, in seconds since 1970."""
        while not self._closing.is_set():
            job = self.current
            if job is not None and not job.over:
                return job
            if time.time() >= until:
                return None
            time.sleep(0.05)
        return None

    def close(self) -> None:
        """End every job and log out."""
        self._closing.set()
        self._door.close()
        for job in (self.current, *self._retired):
            if job is not None:
                job.close()
        self._thread.join(2 * self._patience.look + 15.0)

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
        """Begin another job where it would reach somebody who is connected and whom this one does not."""
        job = self.current
        alive = job is not None and not job.over
        everybody = frozenset(self._sites)
        if job is not None and alive and everybody <= job.joined:
            return
        connected = self._connected(job if alive else None)
        settled, self._looks.before = connected == self._looks.before, connected
        if not connected or (not settled and connected != everybody):
            return
        missing = connected - self._held(job) if job is not None and alive else connected
        again = (
            missing <= self._missing.names and time.monotonic() - self._missing.when < self._patience.renew
        )
        if not missing or (alive and again):
            return
        self._missing = _Missing(names=missing, when=time.monotonic())
        self._begin(connected)

    def _held(self, job: Job) -> frozenset[str]:
        """Return who is in a job: who has joined it, and for a while who may still."""
        if time.time() - job.began < self._patience.join:
            return frozenset(job.joined | job.members)
        return frozenset(job.joined | (job.members & job.heard()))

    def _connected(self, job: Job | None) -> frozenset[str]:
        """Return the sites whose relay has spoken just now, and since it was lost."""
        spoke = self._desk.connected()
        lost = job.lost if job is not None else {}
        oldest = time.time() - _FRESH
        return frozenset(
            name
            for name in self._sites
            if spoke.get(name, 0.0) >= max(oldest, lost.get(name, 0.0)) and name in spoke
        )

    def _begin(self, expected: frozenset[str]) -> None:
        identifier = self._desk.submit(self._sites, self._run)
        if identifier is None:
            return
        job = self._accept(identifier)
        if job is None:
            self._desk.abort(identifier)
            return
        self._await_sites(job, expected)
        before, self.current = self.current, job
        self.begun += 1
        self.changed.set()
        if before is not None:
            self._retired.append(before)

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
        for job in tuple(self._retired):
            if job.is_idle or job.over:
                job.close()
                self._retired.remove(job)


def _first_words(frames: Frames) -> Words | None:
    with contextlib.suppress(Gone):
        first = frames.read(5.0)
        return None if first is None else first[0]
    return None
