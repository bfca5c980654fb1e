"""What a client must never do twice, remembered on disk: enter a round, upload an update, give away a model's
sum again.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from defenses.errors import ParameterError, ProtocolError, TamperedError

_FORMAT: Final = 1
_LARGEST_FILE: Final = 1 << 28


@dataclass(slots=True)
class _Memory:
    """What a guard knows. It only grows."""

    generation: int = 0
    rounds: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    updates: set[bytes] = field(default_factory=set)
    answered: set[bytes] = field(default_factory=set)
    serials: dict[str, int] = field(default_factory=dict)

    def to_bytes(self, owner: bytes) -> bytes:
        content = {
            "format": _FORMAT,
            "owner": owner.hex(),
            "generation": self.generation,
            "rounds": {run.hex(): list(place) for run, place in sorted(self.rounds.items())},
            "updates": sorted(update.hex() for update in self.updates),
            "answered": sorted(model.hex() for model in self.answered),
            "serials": dict(sorted(self.serials.items())),
        }
        body = json.dumps(content, separators=(",", ":")).encode()
        return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, owner: bytes) -> _Memory:
        """Read what `to_bytes` wrote.

        Raises: TamperedError for anything else, and for another owner's.
        """
        try:
            body, digest, rest = data.split(b"\n")
            content = json.loads(body)
            genuine = digest.decode() == hashlib.sha256(body).hexdigest() and not rest
            if not genuine or (content["format"], content["owner"]) != (_FORMAT, owner.hex()):
                raise ValueError
            return cls(
                generation=int(content["generation"]),
                rounds={bytes.fromhex(run): (int(a), int(b)) for run, (a, b) in content["rounds"].items()},
                updates={bytes.fromhex(update) for update in content["updates"]},
                answered={bytes.fromhex(model) for model in content["answered"]},
                serials={str(name): int(serial) for name, serial in content["serials"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise TamperedError


class ReplayGuard:
    """Remember which sessions a client entered, which updates it uploaded and which models it answered for.

    `in_memory` is for identities that live as long as the process; a client that restarts keeps its guard in
    a file: `create` once, beside the identity, and `open` ever after. An identity whose guard is lost must
    not be used again, so a missing file is refused, never replaced.

    Guarantee: what is refused once is refused for ever, in this process and the next; a file is replaced
    whole, readable and writable by its owner alone, and on the disk before a method returns. Threads and
    processes with one file see each other. A file older than what this object knows is refused; a guard in
    memory refuses a forked process.
    Assumes: nobody puts an older copy of the file back while no client runs. Keep it out of backups that are
    restored.
    Raises: ProtocolError from every method for what was done before; TamperedError for a file that is not
    what was written.
    """

    __slots__ = ("_lock", "_memory", "_owner", "_path", "_process")

    def __init__(self, *, owner: bytes, path: Path | None, memory: _Memory) -> None:
        self._owner, self._path, self._memory = owner, path, memory
        self._lock = threading.Lock()
        self._process = os.getpid()

    @classmethod
    def in_memory(cls) -> ReplayGuard:
        """Return a guard that forgets with the process: for identities that do, and for simulations."""
        return cls(owner=b"", path=None, memory=_Memory())

    @classmethod
    def create(cls, path: Path, *, owner: bytes) -> ReplayGuard:
        """Start the guard of a new identity in a file that must not exist.

        Raises: ParameterError when it does.
        """
        return cls._start(path, owner, _Memory())

    @classmethod
    def _start(cls, path: Path, owner: bytes, memory: _Memory) -> ReplayGuard:
        guard = cls(owner=owner, path=path, memory=memory)
        with guard._alone():
            if os.path.lexists(path):
                raise ParameterError(f"{path}: exists; open it, or give a new identity a new file")
            guard._write(memory)
        return guard

    @classmethod
    def open(cls, path: Path, *, owner: bytes) -> ReplayGuard:
        """Read the guard of an identity.

        Raises: ParameterError when there is no such file, or others can read or write it; TamperedError when
        it is damaged or another identity's.
        """
        guard = cls(owner=owner, path=path, memory=_Memory())
        with guard._alone():
            guard._memory = guard._read()
        return guard

    def hand_over(self, path: Path, *, owner: bytes) -> ReplayGuard:
        """Start the guard of the identity that takes this one's place, in a file that must not exist.

        Guarantee: the new guard refuses everything this one refuses.

        Raises: ParameterError when there is such a file.
        """
        with self._alone():
            memory = copy.deepcopy(self._memory if self._path is None else self._read())
        return self._start(path, owner, memory)

    @property
    def rounds(self) -> Mapping[bytes, tuple[int, int]]:
        """Return the last round and attempt entered for each run."""
        return MappingProxyType(dict(self._memory.rounds))

    def enter(self, run_id: bytes, round_number: int, attempt: int = 0) -> None:
        """Record that a session starts. Within a run rounds grow, and within a round attempts."""

        def note(memory: _Memory) -> bool:
            if (round_number, attempt) <= memory.rounds.get(run_id, (-1, 0)):
                raise ProtocolError
            memory.rounds[run_id] = (round_number, attempt)
            return True

        self._note(note)

    def accept_roster(self, federation: str, serial: int) -> None:
        """Record the serial number of a roster. An older one than was accepted before is refused."""

        def note(memory: _Memory) -> bool:
            known = memory.serials.get(federation)
            if serial < (known or 0):
                raise ProtocolError
            memory.serials[federation] = serial
            return serial != known

        self._note(note)

    def spend(self, update: bytes, *, model: bytes, repeat: bool = False) -> None:
        """Record that an update of a model is about to leave the client.

        Refused for an update that left before, and for a model this client already answered for, unless the
        caller lets models `repeat`.
        """

        def note(memory: _Memory) -> bool:
            if update in memory.updates or (model in memory.answered and not repeat):
                raise ProtocolError
            memory.updates.add(update)
            return True

        self._note(note)

    def answer(self, model: bytes, *, repeat: bool = False) -> None:
        """Record that this client is about to help open a sum of updates of a model; refused the second time.

        So whoever helped open one sum about a model is in no later one. A sum needs at least two honest
        helpers, and every combination of sums of one model holds those of its first together: it singles out
        nobody. A client that masked, and was never asked, may mask again for the model with another update: a
        round that failed can be tried again.
        """

        def note(memory: _Memory) -> bool:
            known = model in memory.answered
            if known and not repeat:
                raise ProtocolError
            memory.answered.add(model)
            return not known

        self._note(note)

    def _note(self, change: Callable[[_Memory], bool]) -> None:
        """Check and set as one step: on disk before memory, and in neither if refused; `change` tells whether
        there is anything new to write.
        """
        with self._alone():
            if self._path is None and self._process != os.getpid():
                raise ProtocolError
            current = self._memory if self._path is None else self._read()
            changed = change(current)
            if self._path is not None and changed:
                current.generation += 1
                self._write(current)
            self._memory = current

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads, and other processes with the same file, out."""
        with self._lock:
            if self._path is None:
                yield
                return
            beside = self._path.with_name(self._path.name + ".lock")
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _read(self) -> _Memory:
        path = self._path
        try:
            descriptor = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ParameterError(
                f"{path}: no such file. This identity's memory of past rounds is lost: make "
                "a new identity with a new guard"
            ) from None
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or about.st_uid != os.geteuid():
                raise ParameterError(
                    f"{path}: must belong to this user and be readable by nobody else (0600)"
                )
            if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_FILE:
                raise TamperedError
            memory = _Memory.from_bytes(file.read(), self._owner)
        if memory.generation < self._memory.generation:
            raise TamperedError
        return memory

    def _write(self, memory: _Memory) -> None:
        """Replace the file in one step, and wait until file and directory entry are on the disk."""
        path = self._path
        if path is None:
            return
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(memory.to_bytes(self._owner))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        os.replace(fresh, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __repr__(self) -> str:
        return f"ReplayGuard({'in memory' if self._path is None else str(self._path)!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a replay guard is one memory and cannot be copied or pickled")
