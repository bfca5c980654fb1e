"""A run from Python: load, plan, start, look at the result. The command line is a thin shell around this."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from ffm_secure import federation
from ffm_secure.display import notebook
from ffm_secure.display.progress import Bars
from ffm_secure.config import run_file
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.data.memory import IN_MEMORY, from_memory
from ffm_secure.engines import own_models, simulation, summary, synthetic_set
from ffm_secure.errors import StoreError
from ffm_secure.models.in_memory import held_model
from ffm_secure.records import PlanSummary, RoundRecord, RunSummary
from ffm_secure.queries import agenda
from ffm_secure.report import croissant
from ffm_secure.report import document as report
from ffm_secure.report import model_card
from ffm_secure.server import rounds
from ffm_secure.site.ledger_place import IN_RUN
from ffm_secure.storage.run_directory import Store
from ffm_secure.tracking.trackers import Trackers, require_trackers
from ffm_secure.trainable import exports


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run left behind."""

    folder: Path
    summary: RunSummary
    known: bool = False  # the run was complete before, so nothing was trained or charged

    @property
    def epsilon(self) -> float:
        """Return the epsilon that holds against the public; infinite if nothing is guaranteed."""
        return self.summary.statements[0].epsilon

    @property
    def metric(self) -> float:
        """Return the task's metric of the final model on the public validation rows."""
        return self.summary.metric_final

    accuracy = metric

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {value}" for name, value in notebook.summary_rows(self.summary))
        return f"<Result {rows}>"

    def _repr_html_(self) -> str:
        return notebook.table(
            [*notebook.summary_rows(self.summary), ("report", str(self.folder / "report.html"))]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tracked:
    """Say which trackers a start was asked for, and where they write."""

    kinds: tuple[str, ...]
    folder: Path


class Run:
    """One run file with its place on disk; rows and a model that are in memory may take the place of those it
    names.

    `data` is a list of dicts, a dict of columns, a `datasets.Dataset`, a data frame, or a dict of these with
    the keys `train` and `validation`; `task.data` is then read by nobody. `model` is a transformers model,
    which is written under `runs` once so that the run can be continued and audited; `tokenizer` is what it
    reads texts with.

    Raises:
      ConfigError: what no run file could say, with every problem at once; nothing is written.

    >>> import ffm_secure as ffm
    >>> run = ffm.load("examples/tiny.toml")
    >>> run.config.federation.rounds
    3
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        base: Path | str = ".",
        runs: Path | str = "runs",
        data: object = None,
        model: object = None,
        tokenizer: object = None,
    ) -> None:
        self.base, self.folder = Path(base), Path(runs) / config.name
        self._rows = None if data is None else from_memory(data)
        self._model = None if model is None else held_model(model, tokenizer)
        if self._rows is not None:
            config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=IN_MEMORY))
        if self._model is not None:
            folder = self._model.folder((Path(runs) / ".models").resolve())
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(folder)))
        run_file.from_table(to_table(config), where=config.name)  # what no run file could say is refused here
        self.config = config
        self._prepared: simulation.Prepared | None = None

    def prepared(self) -> simulation.Prepared:
        """Load data and model once."""
        if self._model is not None:
            self._model.store(Path(self.config.model.name))
        if self._prepared is None:
            self._prepared = simulation.prepare(self.config, self.base, self.folder, self._rows)
        return self._prepared

    def __repr__(self) -> str:
        task, federation_ = self.config.task, self.config.federation
        return (
            f"<Run {self.config.name}: {task.kind}, {task.clients} owners, "
            f"{federation_.rounds} rounds in {self.folder}>"
        )

    def plan(self) -> PlanSummary:
        """Say what the run would train, send, spend and reveal; trains nothing.

        Raises:
          StoreError: the run's folder holds a run with other settings, whose noise is none of this one.
        """
        prepared = self.prepared()
        if (self.folder / "noise.json").is_file():
            Store.read(self.folder).refuse_other_settings(self.config)
        return summary.describe(prepared)

    def start(
        self,
        *,
        callback: federation.Callback | Sequence[federation.Callback] | None = None,
        fairness: bool = True,
        complete: bool = True,
        track: Sequence[str] = (),
        track_to: Path | str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Train to the end of the rounds or of the budget; continue a run that was stopped.

        A run that is complete already is read, not trained, evaluated or charged again.
        `callback` hears of every round, or several are, in order; a notebook shows a bar where there is none.

        Without `fairness` the report says nothing about single clients, and their evaluation is saved.
        `should_stop` is asked after every round; when it says yes, the run ends there as if it had been
        interrupted. Without `complete` the folder `adapter/` holds what was trained alone: no model of any
        size lies beside it. `track` names trackers that show every round too: csv, tensorboard, mlflow; they
        write below `track_to`, or below `tracking/` in the run directory, and a run that goes on continues
        what they show.
        """
        began = time.perf_counter()
        tracked = _Tracked(kinds=tuple(track), folder=Path(track_to or self.folder / "tracking"))
        require_trackers(tracked.kinds)
        prepared = self.prepared()
        initial = prepared.trainable.flatten().cpu()
        with Store.open(self.folder, self.config) as store:
            store.require_contents(prepared.contents, bare=prepared.data.bare_contents)
            known = self._known(store)
            if known is not None:
                with self._listening(None, tracked, store.run_begun() or b"", known.rounds):
                    return Result(folder=self.folder, summary=self._renamed(store, known), known=True)
            ready = simulation.build(prepared, self.folder)
            store.adopt(self.config)
            zero = ready.server.evaluate(initial).metric
            try:
                start = ready.begin(store)
                run_id = ready.server.run_id
                with self._listening(callback, tracked, run_id, start[1]) as listener:
                    trained = federation.run(
                        ready.server,
                        ready.courier,
                        store,
                        start=start,
                        callback=listener,
                        should_stop=should_stop,
                    )
            finally:
                ready.courier.close()
            self._release(ready, trained, initial)
            if fairness:
                outcomes = summary.outcomes(ready, trained, initial)
            else:
                outcomes = ()
            personal = own_models.make_own_models(ready, trained, initial)
            seconds = time.perf_counter() - began
            result = summary.summarise(
                ready,
                trained,
                start=initial,
                zero_metric=zero,
                outcomes=outcomes,
                personal=personal,
                seconds=seconds,
                ended=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self._finish(store, ready, trained, result, complete=complete)
        return Result(folder=self.folder, summary=result)

    def _known(self, store: Store) -> RunSummary | None:
        """Return the summary of a run that has done all its rounds and left what it should; None if work is
        left.
        """
        if not (self.folder / "adapter").is_dir():
            return None
        try:
            stored = report.read(self.folder)
        except StoreError:
            return None  # it is written anew from the checkpoints
        whole = stored.status == "complete" and agenda.next_turn(self.config, stored.rounds) is None
        if whole and store.records() == stored.rounds:
            return stored
        return None

    def _renamed(self, store: Store, known: RunSummary) -> RunSummary:
        """Follow what a complete run's file says of the people behind it now."""
        document = to_table(self.config)["document"]
        if known.config.get("document", document) == document:
            return known
        store.adopt(self.config)
        followed = dataclasses.replace(known, config={**known.config, "document": document})
        report.write(followed, self.folder)
        return followed

    @contextmanager
    def _listening(
        self,
        callback: federation.Callback | Sequence[federation.Callback] | None,
        tracked: _Tracked,
        run_id: bytes,
        records: Sequence[RoundRecord],
    ) -> Iterator[federation.Callback | None]:
        """Return the one callback of the loop, which may be several; a bar in a notebook without any."""
        with ExitStack() as stack:
            if callback is None and notebook.in_notebook():
                rounds, budget = agenda.rounds(self.config), self.config.privacy.epsilon
                callback = stack.enter_context(Bars(rounds=rounds, budget=budget, quiet=False))
            if not tracked.kinds and not isinstance(callback, Sequence):
                yield callback
                return
            listeners: list[federation.Callback] = []
            if isinstance(callback, Sequence):
                listeners += callback
            elif callback is not None:
                listeners.append(callback)
            if tracked.kinds:
                trackers = Trackers(tracked.kinds, tracked.folder, name=self.config.name, run_id=run_id)
                listeners.append(stack.enter_context(trackers))
                trackers.begin(records)
            yield notebook.Callbacks(listeners)

    def _release(
        self, ready: simulation.Simulation, trained: federation.TrainingResult, initial: Tensor
    ) -> None:
        """Note what the public sees, where the run file asks for it."""
        opened = []
        for record in trained.records:
            if record.survivors:
                opened.append(record)
        if ready.server.transcript is not None and opened:
            survivors = tuple(sorted({site for record in opened for site in record.survivors}))
            plan = rounds.plan_round(ready.server, opened[-1].round, trained.state)
            ready.server.transcript.released(initial, trained.state.vector, survivors, plan)

    def _finish(
        self,
        store: Store,
        ready: simulation.Simulation,
        trained: federation.TrainingResult,
        result: RunSummary,
        *,
        complete: bool,
    ) -> None:
        """Export the model, and the own model of every site that keeps numbers at home; write the report."""
        ready.trainable.load_vector(trained.state.vector)
        store.replace_folder("adapter", lambda folder: self._export(folder, ready, result, complete))
        synthetic = synthetic_set.chosen(ready, trained.state)
        if synthetic is not None:
            store.replace_folder("synthetic", lambda folder: croissant.write(folder, synthetic, result))
        for site in ready.sites if ready.states.places else ():
            own = ready.own_vector(site.data.index, trained.state.vector, before=len(trained.records) + 1)
            ready.trainable.load_vector(own)
            folder = ready.states.place(site.data.index) / "adapter"
            ready.trainable.export(folder, self.config.model.name)
        self._keep_best(store, ready, trained)
        report.write(result, self.folder)

    def _keep_best(
        self, store: Store, ready: simulation.Simulation, trained: federation.TrainingResult
    ) -> None:
        """Export the model of the best round beside the last one, where they are two."""
        best = store.best()
        if best is None or best[1].round == len(trained.records):
            return
        ready.trainable.load_vector(best[0].vector)
        name = self.config.model.name
        store.replace_folder("best/adapter", lambda folder: ready.trainable.export(folder, name))
        ready.trainable.load_vector(trained.state.vector)

    def _export(self, folder: Path, ready: simulation.Simulation, result: RunSummary, complete: bool) -> None:
        """Write what was trained, and unless told not to, what others need to use it, with a card."""
        task, name = ready.task, self.config.model.name
        if not complete:
            ready.trainable.export(folder, name)
            return
        written = exports.export(
            ready.trainable,
            folder,
            name,
            max_length=task.max_length,
            text_columns=task.data.text_columns,
            layout=task.layout,
        )
        model_card.write_card(folder, written, result)


def load(path: str | Path, overrides: tuple[str, ...] = (), *, runs: str | Path = "runs") -> Run:
    """Read a run file; a relative path in it is looked up in the current folder first,
    then beside the file.
    """
    path = Path(path)
    return place(run_file.load(path, tuple(overrides)), base=path.resolve().parent, runs=Path(runs))


def place(config: RunConfig, *, base: Path, runs: Path) -> Run:
    """Give a config its place on disk: what is local is named by its absolute path."""
    task = dataclasses.replace(config.task, data=_locate(config.task.data, base))
    lifecycle = config.federation.lifecycle
    if lifecycle.public_data:
        lifecycle = dataclasses.replace(lifecycle, public_data=_locate(lifecycle.public_data, base))
    if lifecycle.votes.candidates:
        votes = dataclasses.replace(lifecycle.votes, candidates=_locate(lifecycle.votes.candidates, base))
        lifecycle = dataclasses.replace(lifecycle, votes=votes)
    federation_ = dataclasses.replace(config.federation, lifecycle=lifecycle)
    adapter = ""
    if config.model.adapter:
        adapter = _locate(config.model.adapter, base)
    model = dataclasses.replace(config.model, name=_locate(config.model.name, base), adapter=adapter)
    privacy = dataclasses.replace(config.privacy, ledger=_place_ledger(config.privacy.ledger, base))
    placed = dataclasses.replace(config, task=task, model=model, federation=federation_, privacy=privacy)
    return Run(placed, base=base, runs=runs)


def _place_ledger(name: str, base: Path) -> str:
    """Return a ledger's absolute path; a relative one counts from the run file's folder, wherever the command
    is given.
    """
    if name in ("", IN_RUN):
        return name
    return str((base / Path(name).expanduser()).resolve())


def _locate(name: str, base: Path) -> str:
    """Return the absolute path of something local, so that the stored run file works from any folder; other
    names stay.
    """
    if name.startswith("builtin:"):
        return name
    for place in (Path.cwd(), base):
        candidate = place / Path(name).expanduser()
        if candidate.exists():
            return str(candidate.resolve())
    return name
