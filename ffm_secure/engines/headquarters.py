"""A coordinator's folder: its key, its roster, its runs; and the coordinator of one run, made ready."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from defenses.random_source import RandomSource
from defenses.secagg import Identity
from ffm_secure import tasks
from ffm_secure.agreement import public_facts, terms_of
from ffm_secure.config import run_file
from ffm_secure.config.federated import shared_objections
from ffm_secure.config.run_file import RunConfig, Split
from ffm_secure.data.dataset import Dataset, builtin_table, for_evaluation, load_task
from ffm_secure.data.files import read_source
from ffm_secure.data.memory import Memory
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError, PlanRefused, StoreError
from ffm_secure.federation import Callback
from ffm_secure.loaded_model import LoadedModel, load_model
from ffm_secure.protection.halves import Terms, server_half
from ffm_secure.server import coordinator_file
from ffm_secure.queries import agenda
from ffm_secure.server.context import ServerContext
from ffm_secure.server.coordinator import Coordinator
from ffm_secure.server.coordinator_file import CoordinatorFile
from ffm_secure.storage.durable import create_folder, require_own_folder, write_atomic
from ffm_secure.storage.key_file import create_key, read_key_file
from ffm_secure.storage.run_directory import Store
from ffm_secure.storage.status import StatusFile
from ffm_secure.tasks.base import Task
from ffm_secure.transport.roster import FederationRoster, expired, read_key

FILE: Final = "coordinator.toml"
KEY: Final = "coordinator.key"
ROSTER: Final = "roster.json"
RUNS: Final = "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headquarters:
    """Name the places of a coordinator's folder."""

    place: Path

    def read(self) -> CoordinatorFile:
        """Read the coordinator's file.

        Raises:
          ConfigError, StoreError: with every problem.
        """
        if not self.place.is_dir():
            raise StoreError(
                f"{self.place}: is no folder; make a coordinator with: ffm-secure coordinator init "
                f"{self.place}"
            )
        require_own_folder(self.place)
        return coordinator_file.load(self.place / FILE)

    def key(self) -> Identity:
        """Read the key the coordinator signs with."""
        return read_key_file(self.place / KEY)

    def roster(self, file: CoordinatorFile, *, now: float) -> FederationRoster:
        """Read the roster.

        Raises:
          StoreError: there is none, it is not the operator's, has expired, or names another coordinator.
        """
        path = self.place / ROSTER
        try:
            content = path.read_bytes()
        except OSError:
            raise StoreError(
                f"{path}: is missing; ask the operator for the roster and put it there"
            ) from None
        roster = FederationRoster.from_bytes(content, operator=read_key(file.operator))
        if now >= roster.statement.expires:
            raise StoreError(f"{path}: {expired(roster.statement.expires)}")
        if roster.statement.coordinator != self.key().public_key:
            raise StoreError(
                f"{path}: names another coordinator; send the operator this one's key and ask again"
            )
        return roster

    def run_folder(self, name: str) -> Path:
        """Return where a run lies."""
        return self.place / RUNS / name


def create(place: Path, file: CoordinatorFile, source: RandomSource) -> Identity:
    """Make a coordinator's folder with a new key; return the key.

    Raises:
      StoreError: there is one already, or the folder cannot be written.
    """
    try:
        create_folder(place)
        require_own_folder(place)
        if os.path.lexists(place / FILE):
            raise StoreError(f"{place / FILE}: exists; a coordinator is made once, in a folder of its own")
        key = create_key(place / KEY, source)
        create_folder(place / RUNS)
        write_atomic(place / FILE, coordinator_file.dump(file).encode())
    except OSError as error:
        raise StoreError(f"{place}: cannot be written: {error.strerror}") from None
    return key


@dataclass(slots=True, kw_only=True)
class ReadyRun:
    """One run of a coordinator, ready to start."""

    coordinator: Coordinator
    loaded: LoadedModel
    task: Task
    dataset: Dataset
    folder: Path

    def close(self) -> None:
        """Let go of the run's folder."""
        self.coordinator.store.close()


@dataclass(slots=True, kw_only=True)
class StatusWatch:
    """Write which stage is open, and for whom it waits, where `coordinator status` reads it."""

    status: StatusFile
    run: str
    rounds: int
    _waiting: list[str] = field(default_factory=list)
    _words: dict[str, str | int] = field(default_factory=dict)

    def opened(self, stage: str, round: int, sites: Collection[str], deadline: float) -> None:
        """Note a stage that is open."""
        self._waiting = list(sites)
        self._words = {
            "state": "running",
            "run": self.run,
            "rounds": self.rounds,
            "round": round,
            "stage": stage,
            "asked": len(sites),
            "deadline": int(deadline),
        }
        self._write()

    def answered(self, site: str, outcome: str) -> None:
        """Note who answered."""
        if site in self._waiting:
            self._waiting.remove(site)
        if outcome != "answered":
            self._words[outcome] = ", ".join(filter(None, (str(self._words.get(outcome, "")), site)))
        self._write()

    def _write(self) -> None:
        self.status.write(**self._words, waiting=", ".join(self._waiting))


def prepare_run(
    place: Path,
    file: Path,
    *,
    clock: Callable[[], float] = time.time,
    callback: Callback | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ReadyRun:
    """Load model and public rows of a run and open its folder; no site hears of it yet.

    Raises:
      ConfigError, PlanRefused, DataError, ModelError, StoreError: with what to do.
    """
    quarters = Headquarters(place=place.resolve())
    own = quarters.read()
    roster, key = quarters.roster(own, now=clock()), quarters.key()
    config = run_file.load(file)
    refused = shared_objections(config, sites=len(roster.names))
    if refused:
        raise PlanRefused(refused)
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    base = file.resolve().parent
    dataset = public_rows(config, base)
    loaded = load_model(config, base, public_facts(config, roster.names))
    task = tasks.build_task(
        config.task.kind, backbone=loaded.backbone, dataset=dataset, max_length=config.task.max_length
    )
    server = _server(config, base, dataset, loaded, task, roster)
    folder = quarters.run_folder(config.name)
    coordinator = Coordinator(
        server=server,
        store=Store.open(folder, config),
        roster=roster,
        terms=terms_of(loaded, roster.digest),
        sign=key.sign,
        timetable=own.deadlines,
        watch=StatusWatch(status=StatusFile(quarters.place), run=config.name, rounds=agenda.rounds(config)),
        callback=callback,
        should_stop=should_stop,
        clock=clock,
    )
    return ReadyRun(coordinator=coordinator, loaded=loaded, task=task, dataset=dataset, folder=folder)


def _server(
    config: RunConfig, base: Path, dataset: Dataset, loaded: LoadedModel, task: Task, roster: FederationRoster
) -> ServerContext:
    terms = Terms(config=config, codec=loaded.codec, roster=roster, binding=loaded.binding())
    evaluation = for_evaluation(dataset.validation, config.task.evaluation_examples, seed=config.seed)
    other = config.federation.lifecycle.public_data
    public = None
    if other:
        named = replace(config.task, data=other)
        public = task.encode(load_task(named, base=base, seed=config.seed).train)
    answers = {}
    for name, question in loaded.spec.questions.items():
        asked = Terms(config=config, codec=question.codec, roster=roster, binding=loaded.binding(question))
        answers[name] = server_half(asked)
    return ServerContext(
        spec=loaded.spec,
        trainable=loaded.trainable,
        task=task,
        evaluation=task.encode(evaluation),
        public=public,
        protection=server_half(terms),
        answers=answers,
        run_id=os.urandom(16),
    )


def public_rows(config: RunConfig, base: Path) -> Dataset:
    """Read the public rows a run is evaluated on: the validation part of its data, or all of a single file.

    Raises:
      DataError: there are none, or they cannot be read.
    """
    table = _public_table(config, base)
    rows = Memory(train=table, validation=table, name=config.task.data)
    task = replace(config.task, split=Split(), clients=1)
    return load_task(task, base=base, seed=config.seed, rows=rows)


def _public_table(config: RunConfig, base: Path) -> Table:
    source = config.task.data
    if source.startswith("builtin:"):
        return builtin_table(source)
    path = base / Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"task.data = {source!r}: there is no {path}; a coordinator's data are public rows: a file, "
            "a folder with a "
            "validation part, or builtin:<name>"
        )
    train, validation = read_source(path, config.task.encoding)
    return train if validation is None else validation
