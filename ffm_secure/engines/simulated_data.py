"""The rows of a simulation: private ones by owner, and public ones for evaluation and for phases of the
server's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from defenses.dp.records import RecordKey, Records
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.tables import Evaluation as EvaluationConfig
from ffm_secure.data import partition, stream
from ffm_secure.data.candidates import read_candidates, refuse_private_candidates
from ffm_secure.data.checks import require_sound
from ffm_secure.data.dataset import Dataset, Examples, load_task
from ffm_secure.data.memory import Memory
from ffm_secure.data.persons import bounded_persons, reunited
from ffm_secure.data.row_names import named
from ffm_secure.errors import DataError
from ffm_secure.lifecycle.finetune import Arrived
from ffm_secure.privacy.accounts import contents_fingerprint, dataset_fingerprint, keyed_fingerprint
from ffm_secure.registry import LIFECYCLES
from ffm_secure.site.ledger_place import IN_RUN, ledger_path, open_ledger, record_key
from ffm_secure.site.published import refuse_private, refuse_public, refuse_shared


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedData:
    """Hold what a simulation reads, dealt out once."""

    dataset: Dataset  # what is private, and the public validation rows
    config: RunConfig
    parts: tuple[np.ndarray, ...]  # the row numbers of every owner
    public: Examples | None  # rows that phases of the server's own learn from
    account: str  # the ledger's name for these rows, dealt in this way
    contents: str  # keyed digests of all rows the run reads
    bare_contents: str  # the same without the key, as older runs noted them
    owners: tuple[str, ...]  # as people call them
    held_back: tuple[np.ndarray, ...] = ()  # row numbers of every owner that are only asked about
    stages: NDArray[np.int64] | None = None  # of every private row, where they arrive in a stream
    staying: NDArray[np.bool_] | None = None  # which of them stay in their owner's reservoir
    candidates: tuple[str, ...] = ()  # public texts that private records vote on

    def names(self) -> tuple[Records, ...]:
        """Return what a ledger knows every owner's rows by."""
        records = self.dataset.train.records
        assert records is not None
        return tuple(records.take(part) for part in self.parts)

    def held_back_names(self) -> tuple[Records, ...]:
        """Return what a ledger knows every owner's held-back rows by."""
        records = self.dataset.train.records
        assert records is not None
        return tuple(records.take(part) for part in self.held_back)

    def arrivals(self, owner: int) -> tuple[Arrived, ...]:
        """Return what each stage may draw of one owner's rows; nothing without a stream."""
        if self.stages is None or self.staying is None:
            return ()
        stages, staying = self.stages[self.parts[owner]], self.staying[self.parts[owner]]
        arrivals = []
        for stage in range(len(self.config.task.stream.order)):
            new = np.flatnonzero(stages == stage).astype(np.int64)
            reservoir = np.flatnonzero((stages < stage) & staying).astype(np.int64)
            arrivals.append(Arrived(new=new, reservoir=reservoir))
        return tuple(arrivals)

    def stage_names(self) -> tuple[Records, ...]:
        """Return what a ledger knows rows by, for every owner and stage: those that pass, then those that
        stay.
        """
        records = self.dataset.train.records
        assert records is not None
        assert self.stages is not None
        assert self.staying is not None
        names = []
        for part in self.parts:
            for stage in range(len(self.config.task.stream.order)):
                here = self.stages[part] == stage
                for chosen in (here & ~self.staying[part], here & self.staying[part]):
                    names.append(records.take(part[chosen]))
        return tuple(names)

    def held_back_rows(self, owner: int) -> Examples:
        """Return the rows of one owner that are never learned from."""
        split, seed = self.config.task.split, self.config.seed
        return partition.client_rows(self.dataset.train, self.held_back, owner, split=split, seed=seed)

    def rows(self, owner: int) -> Examples:
        """Return one owner's rows as it has them."""
        split, seed = self.config.task.split, self.config.seed
        return partition.client_rows(self.dataset.train, self.parts, owner, split=split, seed=seed)


def load(
    config: RunConfig, base: Path, folder: Path | None = None, rows: Memory | None = None
) -> SimulatedData:
    """Load a run's data, or take rows given from Python; name the rows for the ledger in `folder`, and deal
    them out.

    Raises:
      DataError: what is wrong with it, and what to do.
    """
    key = record_key(config.privacy, folder)
    privacy = config.privacy
    whole = _named_rows(config, base, key, rows)
    require_sound(whole, config)
    dataset, public = part_in_public(config, whole, base)
    _refuse_other_uses(config, dataset, public, key, folder)
    task = config.task
    parts = partition.partition(dataset.train, clients=task.clients, split=task.split, seed=config.seed)
    if privacy.person_column:
        parts = reunited(dataset.train, parts, column=privacy.person_column)
    parts, held_back = _hold_back(config, dataset.train, tuple(parts), key)
    stages, staying = None, None
    if task.stream.order:
        stages = stream.stages_of(dataset.train, task.stream, dataset)
        staying = stream.staying_rows(dataset.train, task.stream, key)
        parts = tuple(part[stages[part] != stream.NO_STAGE] for part in parts)
    account = dataset_fingerprint(
        dataset.name, whole.train, parts
    )  # of all rows: taking some out is no new account
    other = None
    if config.federation.lifecycle.public_data:
        other = public
    bare = contents_fingerprint(account, whole, other)
    candidates = _candidates(config, base, dataset)
    if candidates:
        bare = hashlib.sha256(f"{bare} {candidates!r}".encode("utf-8", "surrogatepass")).hexdigest()
    return SimulatedData(
        dataset=dataset,
        config=config,
        parts=tuple(parts),
        public=public,
        account=account,
        contents=keyed_fingerprint(bare, key),
        bare_contents=bare,
        owners=partition.owner_names(dataset.train, clients=task.clients, split=task.split, seed=config.seed),
        held_back=held_back,
        stages=stages,
        staying=staying,
        candidates=candidates,
    )


def _candidates(config: RunConfig, base: Path, dataset: Dataset) -> tuple[str, ...]:
    """Read the candidates of a run that votes.

    Raises:
      DataError: they cannot be read, or are private rows of the run.
    """
    candidates = read_candidates(config, base)
    if candidates:
        for name in dataset.text_columns:
            refuse_private_candidates(candidates, dataset.train.column(name))
    return candidates


def _hold_back(
    config: RunConfig, examples: Examples, parts: tuple[np.ndarray, ...], key: RecordKey
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Part every owner's rows into those learned from and those only asked about, where the run file says so.

    A row's lot decides, and equal rows have one lot, so a row is on the same side in every run and no copy of
    it on the other.
    """
    if config.evaluation.rows == "public":
        return parts, ()
    contents = examples.contents
    assert contents is not None
    lots = key.lots(b"held back" + int(value).to_bytes(8, "little") for value in contents)
    chosen = lots < np.uint64(config.evaluation.share * 2**64)
    learned = tuple(part[~chosen[part]] for part in parts)
    return learned, tuple(part[chosen[part]] for part in parts)


def part_in_public(config: RunConfig, dataset: Dataset, base: Path) -> tuple[Dataset, Examples | None]:
    """Return the private data set and, for pre-training, the public examples: another set, or rows taken out
    of this one.

    Raises:
      DataError: the public set answers another question or holds private rows, or too many rows are taken
        out.
    """
    spec = config.federation.lifecycle
    if not LIFECYCLES.has(spec.kind, "public_rows"):
        return dataset, None
    if spec.public_data:
        public = _other_set(config, base)
        if public.label_names != dataset.label_names:
            raise DataError(
                f"{spec.public_data}: its labels are not those of {config.task.data}; they must be the same"
            )
        if config.privacy.unit != "none":
            refuse_shared(dataset, public, record_key(config.privacy, None), name=spec.public_data)
        return dataset, public.train
    left = len(dataset.train) - spec.public_examples
    if left < config.task.clients:
        raise DataError(
            f"federation.lifecycle.public_examples = {spec.public_examples}: leaves {left} "
            f"private rows of {config.task.data}"
        )
    public_part, private = _public_rows(dataset.train, spec.public_examples, config)
    return replace(dataset, train=dataset.train.take(private)), dataset.train.take(public_part)


def _public_rows(examples: Examples, count: int, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Part off the rows with the smallest lots,
    so that a row private in one run is not public in the next.
    """
    named_rows = examples.contents
    assert named_rows is not None
    key = record_key(config.privacy, None)
    lots = key.lots(b"public" + int(value).to_bytes(8, "little") for value in named_rows)
    order = np.argsort(lots, kind="stable")
    return np.sort(order[:count]), np.sort(order[count:])


def _named_rows(config: RunConfig, base: Path, key: RecordKey, rows: Memory | None = None) -> Dataset:
    """Read the rows, name them, and leave out what is beyond the bound on a person."""
    loaded = load_dataset(config, base, rows, key=key)
    dataset = named(loaded, key, person_column=config.privacy.person_column)
    return bounded_persons(dataset, config.privacy, key)


def _refuse_other_uses(
    config: RunConfig, dataset: Dataset, public: Examples | None, key: RecordKey, folder: Path | None
) -> None:
    """Refuse to publish what a ledger charged for as private, and to promise anything for what was public.

    Raises:
      DataError: with the number of such rows, and what to do.
    """
    privacy = config.privacy
    path = ledger_path(privacy, folder)
    if privacy.unit == "none" or privacy.ledger == IN_RUN or path is None or not path.is_file():
        return
    with open_ledger(path) as ledger:
        refuse_public(ledger, path, dataset, public, key, person=privacy.person_column)
        refuse_private(ledger, path, dataset, key)


def _other_set(config: RunConfig, base: Path) -> Dataset:
    named = replace(config, task=replace(config.task, data=config.federation.lifecycle.public_data))
    return load_task(named.task, base=base, seed=config.seed)  # all of it is public


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Name the rows that a run file means now."""

    account: str  # of the training rows, not dealt to anybody
    digests: str  # of all rows, keyed, as the run itself notes them
    bare: str  # without the key, as older runs noted them


def contents(config: RunConfig, base: Path) -> Contents:
    """Read the data of a run file and name its rows, without a model."""
    key = record_key(config.privacy, None)
    whole = _named_rows(config, base, key)
    other = None
    if config.federation.lifecycle.public_data:
        other = _other_set(config, base)
    account = dataset_fingerprint(whole.name, whole.train, ())
    bare = contents_fingerprint(account, whole, other.train if other is not None else None)
    return Contents(account=account, digests=keyed_fingerprint(bare, key), bare=bare)


def _how_read(loaded: Dataset) -> str:
    """Say what a reader decided, for whoever sees nothing but the refusal."""
    decided = ["as chats"] * loaded.is_chat + list(loaded.notes)
    return f" ({'; '.join(decided)})" if decided else ""


def load_dataset(
    config: RunConfig, base: Path, rows: Memory | None = None, *, key: RecordKey | None = None
) -> Dataset:
    """Load the data set a run file names, or take rows given from Python.

    Raises:
      DataError: as `load_task`; or private rows would become public without the run file saying so.
    """
    privacy = config.privacy
    loaded = load_task(
        config.task,
        base=base,
        seed=config.seed,
        rows=rows,
        key=key or record_key(privacy, None),
        person_column=privacy.person_column,
    )
    if loaded.held_out and privacy.unit != "none" and config.task.validation != "hold_out":
        total = len(loaded.train) + len(loaded.validation)
        raise DataError(
            f"{config.task.data}: its {total:,} rows were read{_how_read(loaded)}; it has no public "
            "validation part; give one, or say task.validation = 'hold_out': then "
            f"{loaded.held_out:,} of its rows leave the private part and are public for good"
        )
    return loaded


def group_numbers(examples: Examples, evaluation: EvaluationConfig) -> np.ndarray | None:
    """Return every row's place among the declared groups, -1 for any other; None without groups."""
    if not evaluation.groups:
        return None
    if evaluation.group_column not in examples.columns:
        raise DataError(
            f"evaluation.group_column = {evaluation.group_column!r}: the data have no such column"
        )
    places = {name: place for place, name in enumerate(evaluation.groups)}
    column = examples.column(evaluation.group_column)
    return np.array([places.get(str(value), -1) for value in column], dtype=np.int64)
