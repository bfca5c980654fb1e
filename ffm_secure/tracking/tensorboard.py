"""Rounds as TensorBoard events: one event a round, so that a kill leaves no half of one."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from ffm_secure.foreign import LibraryObject
from ffm_secure.records import RoundRecord
from ffm_secure.storage.durable import PRIVATE_FILE, create_folder
from ffm_secure.tracking.base import TrackedRun, numbers

_PATTERN: Final = "events.out.tfevents.*"
_VERSION: Final = "brain.Event:2"


class TensorBoard:
    """Keep the event files of a folder; every start of a run adds one, and they read as one run."""

    def __init__(self, tracked: TrackedRun, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = tracked.folder / tracked.name, clock
        self._file: BinaryIO | None = None

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Add the rounds that are missing; what stands there of later ones is hidden from readers."""
        create_folder(self._folder)
        shown = _rounds(self._folder)
        missing: list[RoundRecord] = []
        for record in records:
            if missing or record.round not in shown:
                missing.append(record)
        purged = missing[0].round if missing else len(records) + 1
        self._open(purged)
        for record in missing:
            self.log(record)

    def log(self, record: RoundRecord) -> None:
        """Add one round; the run directory holds what a power cut could take from it."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = []
        for name, value in numbers(record).items():
            values.append(Summary.Value(tag=name, simple_value=value))
        summary = Summary(value=values)
        self._add(Event(wall_time=self._clock(), step=record.round, summary=summary))

    def close(self) -> None:
        """Close the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, purged: int) -> None:
        """Start a file that hides every event of round `purged` and later in the files before it."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        earlier = [0]
        for path in self._folder.glob(_PATTERN):
            word = path.name.split(".")[3]
            earlier.append(int(word) if word.isdecimal() else 0)
        path = self._folder / f"events.out.tfevents.{max(earlier) + 1:010d}.rounds"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = open(os.open(path, flags, PRIVATE_FILE), "wb", buffering=0)  # noqa: SIM115 - until close
        self._add(Event(wall_time=self._clock(), file_version=_VERSION))
        session = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=self._clock(), step=purged, session_log=session))

    def _add(self, event: LibraryObject) -> None:
        """Append one TFRecord: length and its checksum, content and its checksum, in one write."""
        from tensorboardX.record_writer import masked_crc32c

        assert self._file is not None
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.write(length + checksums[0] + content + checksums[1])


def _rounds(folder: Path) -> set[int]:
    """Return the rounds that a reader of the event files sees."""
    shown: set[int] = set()
    for event in events(folder):
        if event.HasField("session_log"):
            shown = {number for number in shown if number < event.step}
        if event.HasField("summary"):
            shown.add(event.step)
    return shown


def events(folder: Path) -> Iterator[LibraryObject]:
    """Yield the events of a folder in the order a reader takes them; a file ends where a kill tore it."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob(_PATTERN)):
        for content in _contents(path.read_bytes()):
            yield Event.FromString(content)


def _contents(file: bytes) -> Iterator[bytes]:
    """Yield the records of a TFRecord file: length and its checksum, content and its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    place = 0
    while place + 12 <= len(file):
        (length,) = struct.unpack_from("<Q", file, place)
        end = place + 12 + length + 4
        content = file[place + 12 : end - 4]
        if end > len(file) or struct.pack("<I", masked_crc32c(content)) != file[end - 4 : end]:
            return
        yield content
        place = end
