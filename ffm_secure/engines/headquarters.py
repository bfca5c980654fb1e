"""The coordinator of one run, made ready in its folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ffm_secure import tasks
from ffm_secure.agreed.agreement import public_facts, terms_of
from ffm_secure.config import run_file
from ffm_secure.config.federated import shared_objections
from ffm_secure.config.groups import root_examples
from ffm_secure.config.run_file import RunConfig, Split
from ffm_secure.data.builtin_sets import builtin_table
from ffm_secure.data.candidates import read_candidates
from ffm_secure.data.dataset import Dataset, for_evaluation, load_task
from ffm_secure.data.files import read_source
from ffm_secure.data.memory import Memory
from ffm_secure.data.root_rows import root_rows
from ffm_secure.data.table import Table
from ffm_secure.engines.coordinator_folder import Headquarters
from ffm_secure.errors import DataError, PlanRefused
from ffm_secure.federation import Callback
from ffm_secure.agreed.loaded_model import LoadedModel, load_model
from ffm_secure.protection.halves import Terms, server_half
from ffm_secure.queries import agenda
from ffm_secure.server.context import ServerContext
from ffm_secure.server.evidence import evidence_of
from ffm_secure.coordinator.coordinator import Coordinator
from ffm_secure.storage.run_directory import Store
from ffm_secure.storage.status import StatusFile
from ffm_secure.tasks.base import Task
from ffm_secure.transport.roster import FederationRoster


@dataclass(slots=True, kw_only=True)
class ReadyRun:
    """One run of a coordinator, ready to start."""

    coordinator: Coordinator
    loaded: LoadedModel
    task: Task
    dataset: Dataset  # public rows
    folder: Path
    initial: Tensor  # [d], what training starts from
    began: float

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
    facts = replace(public_facts(config, roster.names), candidates=read_candidates(config, base))
    loaded = load_model(config, base, facts)
    task = tasks.build_task(
        config.task.kind, backbone=loaded.backbone, dataset=dataset, max_length=config.task.max_length
    )
    folder = quarters.run_folder(config.name)
    server = _server(config, base, dataset, loaded, task, roster)
    store = Store.open(folder, config)
    server.evidence = evidence_of(loaded.spec, folder)
    coordinator = Coordinator(
        server=server,
        store=store,
        roster=roster,
        terms=terms_of(loaded, roster.digest),
        sign=key.sign,
        timetable=own.deadlines,
        watch=StatusWatch(status=StatusFile(quarters.place), run=config.name, rounds=agenda.rounds(config)),
        callback=callback,
        should_stop=should_stop,
        clock=clock,
    )
    return ReadyRun(
        coordinator=coordinator,
        loaded=loaded,
        task=task,
        dataset=dataset,
        folder=folder,
        initial=loaded.trainable.flatten().cpu(),
        began=clock(),
    )


def _server(
    config: RunConfig,
    base: Path,
    dataset: Dataset,
    loaded: LoadedModel,
    task: Task,
    roster: FederationRoster,
) -> ServerContext:
    terms = Terms(config=config, codec=loaded.codec, roster=roster, binding=loaded.binding())
    evaluation = for_evaluation(
        dataset.validation, config.task.evaluation_examples, seed=config.seed, apart=root_examples(config)
    )
    root = None
    if root_examples(config):
        root = root_rows(dataset.validation, root_examples(config), seed=config.seed)
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
        root=task.encode(root) if root is not None else None,
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
