"""Rounds as a Weights & Biases run that stays on this disk: offline, under one id, whatever is killed."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from ffm_secure.foreign import LibraryObject
from ffm_secure.records import RoundRecord
from ffm_secure.storage.durable import create_folder
from ffm_secure.tracking.base import TrackedRun, numbers, report_nothing

_SILENT: Final = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_SILENT": "true",
}
_IN_USE: Final = "is in use"  # what the writing process says of a run whose end it has not written yet
_SHARED: Final = "WANDB_SERVICE"  # would tie every child of this program to the writing process
_FILE_HEADER: Final = struct.Struct("<4sHB")
_PART_HEADER: Final = struct.Struct("<IHB")  # checksum, length, which part of a record
_BLOCK: Final = 32_768  # bytes; no part crosses the end of one
_WHOLE, _FIRST, _LAST = 1, 2, 4
_PAUSE, _SETTLING, _PATIENCE = 0.02, 0.3, 20.0  # seconds between two looks, and in all


class WandbRun:
    """Keep the offline records of a run; every start adds a folder of its own, and they are synced as one."""

    def __init__(self, tracked: TrackedRun, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        report_nothing("wandb", _SILENT)
        self._tracked, self._folder = tracked, tracked.folder / tracked.name
        self._run: LibraryObject = None
        self._last = 0  # round that was logged last

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Add the rounds that are in no record yet; what a kill tore off is among them."""
        create_folder(self._folder)
        shown = self._settled()
        self._run = self._open()
        for record in records:
            if record.round not in shown:
                self.log(record)

    def log(self, record: RoundRecord) -> None:
        """Add one round; a process of the library's writes it, which a kill of this one does not end."""
        self._run.log(numbers(record), step=record.round)
        self._last = record.round

    def close(self) -> None:
        """End the process that writes, and wait until it has written; the run may go on later."""
        if self._run is None:
            return
        self._run.finish()
        self._run = None
        until = self._clock() + _PATIENCE
        while self._last and self._last not in self._shown() and self._clock() < until:
            time.sleep(_PAUSE)

    def _shown(self) -> set[int]:
        return {number for number, _ in histories(self._folder)}

    def _settled(self) -> set[int]:
        """Return the rounds that are shown, once the process of a killed start has written what it has."""
        shown, before = self._shown(), None
        while before != shown and any(self._folder.iterdir()):
            time.sleep(_SETTLING)
            shown, before = self._shown(), shown
        return shown

    def _open(self) -> LibraryObject:
        import wandb

        starts = [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]
        folder = self._folder / f"{max(starts, default=0) + 1:06d}"
        create_folder(folder)
        settings = wandb.Settings(
            mode="offline",
            console="off",
            reinit="create_new",  # a run of whoever calls us is left alone
            disable_git=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        until, shared = self._clock() + _PATIENCE, _SHARED in os.environ
        while True:
            try:
                return wandb.init(
                    project="ffm-secure",
                    name=self._tracked.name,
                    id=self._tracked.run_id,
                    dir=str(folder),
                    settings=settings,
                )
            except Exception as error:  # the library has no type for a run that is about to end
                if _IN_USE not in str(error) or self._clock() > until:
                    raise
            finally:
                if not shared:
                    os.environ.pop(_SHARED, None)
            time.sleep(_PAUSE)


def histories(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the step and the values, as JSON text, of every record below a folder, in the order of starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("*/wandb/offline-run-*/run-*.wandb")):
        for content in _contents(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num, _values(record.history.item)


def _values(items: Sequence[LibraryObject]) -> dict[str, str]:
    values = {}
    for item in items:
        values["/".join(item.nested_key) or item.key] = item.value_json
    return values


def _contents(file: bytes) -> Iterator[bytes]:
    """Yield the records of a file in the format of LevelDB's log; it ends where a kill tore it."""
    place, parts = _FILE_HEADER.size, b""
    while place + _PART_HEADER.size <= len(file):
        left = _BLOCK - place % _BLOCK
        if left < _PART_HEADER.size:
            place += left
            continue
        _, length, kind = _PART_HEADER.unpack_from(file, place)
        end = place + _PART_HEADER.size + length
        if end > len(file) or not _WHOLE <= kind <= _LAST:
            return
        content = file[place + _PART_HEADER.size : end]
        parts = content if kind in (_WHOLE, _FIRST) else parts + content
        if kind in (_WHOLE, _LAST):
            yield parts
        place = end
