"""The rows of a simulation: private ones by owner, and public ones for evaluation and for phases of the server's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ffm_secure.config.run_file import RunConfig
from ffm_secure.data import partition
from ffm_secure.data.checks import require_sound
from ffm_secure.data.dataset import Dataset, Examples, load_task
from defenses.dp.records import Records
from ffm_secure.data.row_names import named
from ffm_secure.data.memory import Memory
from ffm_secure.errors import DataError
from ffm_secure.privacy.accounts import contents_fingerprint, dataset_fingerprint
from ffm_secure.registry import LIFECYCLES
from ffm_secure.site.ledger_place import record_key


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedData:
    """Hold what a simulation reads, dealt out once."""

    dataset: Dataset  # what is private, and the public validation rows
    config: RunConfig
    parts: tuple[np.ndarray, ...]  # the row numbers of every owner
    public: Examples | None  # rows that phases of the server's own learn from
    account: str  # the ledger's name for these rows, dealt in this way
    contents: str  # digests of all rows the run reads
    owners: tuple[str, ...]  # as people call them

    def names(self) -> tuple[Records, ...]:
        """Return what a ledger knows every owner's rows by."""
        records = self.dataset.train.records
        assert records is not None
        return tuple(records.take(part) for part in self.parts)

    def rows(self, owner: int) -> Examples:
        """Return one owner's rows as it has them."""
        split, seed = self.config.task.split, self.config.seed
        return partition.client_rows(self.dataset.train, self.parts, owner, split=split, seed=seed)


def load(
    config: RunConfig, base: Path, folder: Path | None = None, rows: Memory | None = None
) -> SimulatedData:
    """Load a run's data, or take rows given from Python; name the rows for the ledger in `folder`, and deal them out.

    Raises:
      DataError: what is wrong with it, and what to do.
    """
    key = record_key(config.privacy, folder)
    whole = named(load_dataset(config, base, rows), key)
    require_sound(whole, config)
    dataset, public = part_in_public(config, whole, base)
    task = config.task
    parts = partition.partition(dataset.train, clients=task.clients, split=task.split, seed=config.seed)
    account = dataset_fingerprint(
        dataset.name, whole.train, parts
    )  # of all rows: taking some out is no new account
    other = public if config.federation.lifecycle.public_data else None
    return SimulatedData(
        dataset=dataset,
        config=config,
        parts=tuple(parts),
        public=public,
        account=account,
        contents=contents_fingerprint(account, whole, other),
        owners=partition.owner_names(dataset.train, clients=task.clients, split=task.split, seed=config.seed),
    )


def part_in_public(config: RunConfig, dataset: Dataset, base: Path) -> tuple[Dataset, Examples | None]:
    """Return the private data set and, for pre-training, the public examples: another set, or rows taken out of this one.

    Raises:
      DataError: the public set answers another question, or too many rows are taken out.
    """
    spec = config.federation.lifecycle
    if not LIFECYCLES.has(spec.kind, "public_phases"):
        return dataset, None
    if spec.public_data:
        public = _other_set(config, base)
        if public.label_names != dataset.label_names:
            raise DataError(
                f"{spec.public_data}: its labels are not those of {config.task.data}; they must be the same"
            )
        return dataset, public.train
    left = len(dataset.train) - spec.public_examples
    if left < config.task.clients:
        raise DataError(
            f"federation.lifecycle.public_examples = {spec.public_examples}: leaves {left} private rows of {config.task.data}"
        )
    order = np.random.default_rng([config.seed, 1]).permutation(len(dataset.train))
    taken, kept = np.sort(order[: spec.public_examples]), np.sort(order[spec.public_examples :])
    return replace(dataset, train=dataset.train.take(kept)), dataset.train.take(taken)


def _other_set(config: RunConfig, base: Path) -> Dataset:
    named = replace(config, task=replace(config.task, data=config.federation.lifecycle.public_data))
    return load_dataset(named, base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Name the rows that a run file means now."""

    account: str  # of the training rows, not dealt to anybody
    digests: str  # of all rows, as the run itself notes them
    seeded: bool  # whether the seed has a say: it parts validation rows from a set that has none


def contents(config: RunConfig, base: Path) -> Contents:
    """Read the data of a run file and name its rows, without a model."""
    whole = load_dataset(config, base)
    other = _other_set(config, base) if config.federation.lifecycle.public_data else None
    account = dataset_fingerprint(whole.name, whole.train, ())
    seeded = bool(whole.held_out or (other is not None and other.held_out))
    digests = contents_fingerprint(account, whole, other.train if other is not None else None)
    return Contents(account=account, digests=digests, seeded=seeded)


def load_dataset(config: RunConfig, base: Path, rows: Memory | None = None) -> Dataset:
    """Load the data set a run file names, or take rows given from Python."""
    return load_task(config.task, base=base, seed=config.seed, rows=rows)
