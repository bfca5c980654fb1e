"""The run directory: config, checkpoints, records, observations; atomic, locked, resumable after a kill."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ffm_secure import record_codec
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import ConfigError, RecordError, StoreError
from ffm_secure.records import RoundRecord
from ffm_secure.registry import QUERIES
from ffm_secure.storage.durable import (
    PRIVATE_FILE,
    append_synced,
    create_folder,
    remove,
    replace_folder,
    require_own_folder,
    write_atomic,
    write_synced,
)
from ffm_secure.record_codec import read_regular, require_regular
from ffm_secure.strategies import ServerState

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1
ATTEMPT = "attempt.json"
RUN_BYTES = 16
_MAY_CHANGE = ("speed", "audit", "document")  # what shapes no result


class Store:
    """Own one run directory while the process lives; a second process is refused.

    Layout: `run.toml` effective config, `rounds.jsonl` one record a line, `attempt.json` the round begun last
    and how often, `checkpoints/round-NNNNNN/` global tensors and server state (the two newest are kept),
    `home/<client>/` what a simulated client keeps to itself, `adapter/` the final model, `best/` the best
    round, `data.json` digests of the rows the run reads, `ledger.sqlite`, `observations/`; `report.html`,
    `details.html` and `report.json` may leave, `internal.html` and `internal.json` stay.
    Guarantee: killed at any moment, `resume` returns the last finished round and the records up to it.
    """

    def __init__(self, folder: Path, lock: int | None) -> None:
        self.folder, self._lock = folder, lock

    @classmethod
    def open(cls, folder: Path, config: RunConfig) -> Store:
        """Create the directory, or continue in it if it belongs to the same run.

        Raises:
          StoreError: the directory holds another run, is in use, or cannot be written.
        """
        try:
            create_folder(folder)
            _require_safe(folder)
            lock = _lock(folder)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written: {error.strerror}") from None
        store = cls(folder, lock)
        try:
            store._claim(config)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def read(cls, folder: Path) -> Store:
        """Open a directory for reading only."""
        if not (folder / "run.toml").is_file():
            raise StoreError(f"{folder}: is not a run directory (no run.toml)")
        return cls(folder, None)

    def close(self) -> None:
        """Release the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self, config: RunConfig) -> None:
        path = self.folder / "run.toml"
        if path.exists():
            self.refuse_other_settings(config)
            return
        for name in ("checkpoints", "observations"):
            create_folder(self.folder / name)
        write_atomic(path, run_file.dump(config).encode())

    def refuse_other_settings(self, config: RunConfig) -> None:
        """Refuse a run file that does not go on with the run in this folder, naming what differs."""
        stored = self.config()
        if _same_run(stored, config) or extends(stored, config):
            return
        changed = ", ".join(_differences(stored, config)) or "its contents"
        raise StoreError(
            f"{self.folder}: holds a run with other settings ({changed}); choose another name or folder"
        )

    def adopt(self, config: RunConfig) -> None:
        """Note that the run goes on beyond its last round, once the noise for the rest is on disk, or that
        other words stand in its report.
        """
        stored = self.config()
        if extends(stored, config) or dataclasses.replace(stored, document=config.document) == config:
            write_atomic(self.folder / "run.toml", run_file.dump(config).encode())

    def config(self) -> RunConfig:
        """Return the effective config of the run."""
        try:
            return run_file.load(self.folder / "run.toml")
        except ConfigError as error:
            raise StoreError(f"{self.folder}: run.toml is damaged\n{error}") from None

    def contents(self) -> str:
        """Return the digests of the rows the run reads; nothing where the run began without noting them."""
        path = self.folder / "data.json"
        if not path.is_file():
            return ""
        stored = _read_json(path)
        if not isinstance(stored, dict) or not isinstance(stored.get("rows"), str):
            raise StoreError(f"{path}: is damaged")
        return str(stored["rows"])

    def require_contents(self, digests: str, *, bare: str = "") -> None:
        """Note the rows a run reads when it begins, and refuse to go on with others.

        `digests` are keyed; `bare` ones are what runs of earlier software noted.

        Raises:
          StoreError: the rows have changed since.
        """
        stored = self.contents()
        if stored and stored not in (digests, bare):
            held = set(stored.split())
            nearest = max((digests, bare), key=lambda rows: len(held.intersection(rows.split())))
            raise StoreError(f"{self.folder}: {changed_rows(stored, nearest)}")
        if not stored and self._newest() is None:
            write_atomic(
                self.folder / "data.json", (json.dumps({"format": FORMAT, "rows": digests}) + "\n").encode()
            )

    def begin_attempt(self, number: int, run_id: bytes) -> int:
        """Note that a round of a run begins, and return how often it was begun before.

        Guarantee: on disk before it returns, so that a round which a kill ends goes on under the next
        attempt.
        """
        earlier = self._attempt()
        same = earlier is not None and earlier[:2] == (run_id.hex(), number)
        attempt = 0
        if earlier is not None and same:
            attempt = earlier[2] + 1
        content = {"format": FORMAT, "run": run_id.hex(), "round": number, "attempt": attempt}
        write_atomic(self.folder / ATTEMPT, (json.dumps(content) + "\n").encode())
        return attempt

    def run_begun(self) -> bytes | None:
        """Return the id of the run whose first round was begun here; None before that."""
        earlier = self._attempt()
        if earlier is None:
            return None
        return bytes.fromhex(earlier[0])

    def _attempt(self) -> tuple[str, int, int] | None:
        """Return run, round and attempt of the round begun last."""
        path = self.folder / ATTEMPT
        if not os.path.lexists(path):
            return None
        stored = _read_json(path)
        try:
            if not isinstance(stored, dict) or stored["format"] != FORMAT:
                raise ValueError
            run, number, attempt = str(stored["run"]), int(stored["round"]), int(stored["attempt"])
            if len(bytes.fromhex(run)) != RUN_BYTES or number < 1 or attempt < 0:
                raise ValueError
            return run, number, attempt
        except (KeyError, TypeError, ValueError):
            raise StoreError(f"{path}: is damaged") from None

    def commit(self, state: ServerState, record: RoundRecord, *, run_id: bytes, best: bool = False) -> None:
        """Make a finished round durable: first the state, then the record that points at it.

        The best round so far is kept beside the newest two, for as long as it is the best.
        """
        line = (record_codec.to_line(record) + "\n").encode()
        content = _checkpoint(state, record.round, run_id)

        def fill(folder: Path) -> None:
            write_synced(folder / "state.safetensors", content)
            write_synced(folder / "record.json", line)

        create_folder(self.folder / "checkpoints")
        replace_folder(self.folder / "checkpoints" / f"round-{record.round:06d}", fill)
        append_synced(self.folder / "rounds.jsonl", line)
        if best:
            replace_folder(self.folder / "best", fill)
        self._forget_old(keep=2)

    def resume(self) -> tuple[ServerState, tuple[RoundRecord, ...], bytes] | None:
        """Return the last finished state, the records up to it and the run's id; None before round one."""
        checkpoint = self._newest()
        if checkpoint is None:
            return None
        state, last, run_id = _read_checkpoint(checkpoint)
        record = _read_record(checkpoint / "record.json")
        records = []
        for item in self.records():
            if item.round < record.round:
                records.append(item)
        if [item.round for item in records] != list(range(1, last)):
            raise StoreError(
                f"{self.folder / 'rounds.jsonl'}: records of earlier rounds are missing or out of order"
            )
        complete = (*records, record)
        if self._lock is not None:
            write_atomic(
                self.folder / "rounds.jsonl",
                "".join(record_codec.to_line(item) + "\n" for item in complete).encode(),
            )
        return state, complete, run_id

    def best(self) -> tuple[ServerState, RoundRecord] | None:
        """Return the best round that was kept, with its state; None where there is none of this run."""
        folder = self.folder / "best"
        if not (folder / "record.json").is_file():
            return None
        record = _read_record(folder / "record.json")
        if record in self.records():
            return (_read_checkpoint(folder)[0], record)
        return None

    def records(self) -> tuple[RoundRecord, ...]:
        """Return the records on disk; a torn last line is the mark of a kill and is dropped."""
        path = self.folder / "rounds.jsonl"
        try:
            if path.exists():
                lines = read_regular(path).split(b"\n")
            else:
                lines = []
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
        complete: list[bytes] = lines[:-1]
        records: dict[int, RoundRecord] = {}
        for number, line in enumerate(complete, start=1):
            record = _decode_record(line, f"{path}, line {number}")
            records[record.round] = record
        return tuple(records[number] for number in sorted(records))

    def write_text(self, name: str, content: str) -> Path:
        """Write a small file of the run atomically."""
        write_atomic(self.folder / name, content.encode())
        return self.folder / name

    def replace_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Fill a new folder and swap it in whole.

        Raises:
          StoreError: tensors cannot be written; what a library says then is no error of the disk to others.
        """
        try:
            replace_folder(self.folder / name, fill)
        except safetensors.SafetensorError as error:
            raise StoreError(
                f"{self.folder / name}: cannot be written ({str(error)[:160]}); free space or mend the disk, "
                "then run the same command again: what was finished is not lost"
            ) from None
        return self.folder / name

    def _newest(self) -> Path | None:
        folder = self.folder / "checkpoints"
        if folder.is_dir():
            names = sorted(item for item in folder.glob("round-*") if item.is_dir())
        else:
            names = []
        if names:
            return names[-1]
        return None

    def _forget_old(self, *, keep: int) -> None:
        names = sorted((self.folder / "checkpoints").glob("round-*"))
        for old in names[:-keep]:
            remove(old)


def _require_safe(folder: Path) -> None:
    """Refuse a run directory, or a folder in it, in which others could have planted something."""
    require_own_folder(folder)
    for entry in folder.iterdir():
        if entry.is_dir():
            require_own_folder(entry)


def _lock(folder: Path) -> int:
    """Take the lock of a run directory; what stands under its name is neither followed nor changed.

    Raises:
      StoreError: another process holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / ".lock", flags, PRIVATE_FILE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"{folder}: another process is running this run; wait for it or stop it") from None
    return descriptor


def changed_rows(stored: str, present: str) -> str:
    """Say which rows of a run are not what they were, and what to do."""
    words = {"data": "training", "validation": "validation", "public": "public"}
    changed = []
    for word in stored.split():
        if word not in present.split():
            changed.append(words.get(word.partition(":")[0], word))
    return (
        f"its {' and '.join(changed) or 'public'} rows have changed since the run began; "
        "restore them, or choose another name or folder"
    )


def _same_run(stored: RunConfig, asked: RunConfig) -> bool:
    """Compare everything that shapes the result; the rest may change between two starts of one run."""
    return dataclasses.replace(asked, **{name: getattr(stored, name) for name in _MAY_CHANGE}) == stored


def extends(stored: RunConfig, asked: RunConfig) -> bool:
    """Tell whether a run is asked for more rounds and else the same, or with more epsilon beside."""
    if asked.federation.rounds <= stored.federation.rounds or asked.privacy.epsilon < stored.privacy.epsilon:
        return False
    if asked.evaluation.rows != "public" or asked.federation.lifecycle.finish != "none":
        return False  # what is asked of the last model was paid for, and would be of an earlier one
    if QUERIES.has(asked.federation.lifecycle.start, "settles"):
        return False  # what it began was ended with the last round
    if asked.task.stream.order:
        return False  # the rounds are dealt to the stages, so more of them would move every stage's end
    federation = dataclasses.replace(asked.federation, rounds=stored.federation.rounds)
    privacy = dataclasses.replace(asked.privacy, epsilon=stored.privacy.epsilon)
    return _same_run(stored, dataclasses.replace(asked, federation=federation, privacy=privacy))


def _differences(stored: DataclassInstance, asked: DataclassInstance, where: str = "") -> list[str]:
    differences: list[str] = []
    for field in dataclasses.fields(stored):
        old, new = getattr(stored, field.name), getattr(asked, field.name)
        name = f"{where}{field.name}"
        if _is_record(old) and _is_record(new) and type(old) is type(new):
            differences += _differences(old, new, f"{name}.")
        elif old != new and field.name not in _MAY_CHANGE:
            differences.append(f"{name}: {old!r} there, {new!r} asked")
    return differences


def _is_record(value: object) -> TypeGuard[DataclassInstance]:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _checkpoint(state: ServerState, round: int, run_id: bytes) -> bytes:
    """Return the file of a checkpoint: the global vector and what the strategy keeps beside it."""
    tensors = {"vector": state.vector.contiguous()}
    for key, value in state.optimizer_state.items():
        tensors[f"slot.{key}"] = value.contiguous()
    metadata = {
        "format": str(FORMAT),
        "round": str(round),
        "steps": str(state.round),
        "run": run_id.hex(),
    }
    return safetensors.torch.save(tensors, metadata=metadata)


def _read_checkpoint(folder: Path) -> tuple[ServerState, int, bytes]:
    path = folder / "state.safetensors"
    try:
        require_regular(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != str(FORMAT):
            raise ValueError("format")
        vector = tensors.pop("vector")
        if vector.dtype != torch.float32 or vector.dim() != 1 or not bool(torch.isfinite(vector).all()):
            raise ValueError("vector")
        optimizer_state = {}
        for key, value in tensors.items():
            optimizer_state[key.removeprefix("slot.")] = value
        state = ServerState(round=int(metadata["steps"]), vector=vector, optimizer_state=optimizer_state)
        return state, int(metadata["round"]), bytes.fromhex(metadata["run"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        raise StoreError(
            f"{path}: is damaged; remove this checkpoint folder to continue from the one before"
        ) from None


def _read_json(path: Path) -> object:
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        raise StoreError(f"{path}: is damaged") from None


def _read_record(path: Path) -> RoundRecord:
    try:
        content = read_regular(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    return _decode_record(content, str(path))


def _decode_record(content: bytes, where: str) -> RoundRecord:
    try:
        return record_codec.from_json(RoundRecord, content, "record")
    except RecordError as error:
        raise StoreError(f"{where}: is damaged: {error}") from None
