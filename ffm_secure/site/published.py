"""Rows and their two uses: what was private in one run is not public in another, nor the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from defenses.dp import Ledger
from defenses.dp.records import Flags, Keys, RecordKey
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.data.row_names import named, sayings
from ffm_secure.errors import DataError


def public_parts(dataset: Dataset, public: Examples | None) -> Mapping[str, Examples]:
    """Return the rows that a run uses as public ones, by their use."""
    parts = {"as validation rows": dataset.validation}
    if public is not None:
        parts["as rows of public phases"] = public
    return parts


def note_public(ledger: Ledger, dataset: Dataset, public: Examples | None, key: RecordKey) -> None:
    """Note in a ledger what the public rows of a run say, before it begins.

    Rows that say the same as a private row of this run count as that one, and are not noted.
    """
    private_now = _all_contents(sayings(dataset.train, dataset, key))
    for rows in public_parts(dataset, public).values():
        ways = sayings(rows, dataset, key)
        apart = ~_say_any(ways, private_now)
        ledger.publish(_all_contents(list(np.stack(ways)[:, apart])))


def refuse_public(
    ledger: Ledger, place: Path, dataset: Dataset, public: Examples | None, key: RecordKey, *, person: str
) -> None:
    """Refuse to use as public what a ledger charged for as private: a lot or a file follows what is read of a
    row, a promise follows the row.

    Rows that say the same as a private row of this run count as that one.
    Raises:
      DataError: with their number, and what to do.
    """
    private_now = None
    for use, rows in public_parts(dataset, public).items():
        ways = sayings(rows, dataset, key, person_column=person)
        blocks = np.stack(list(map(ledger.blocks_of_contents, ways)))
        charged = []
        for block in np.unique(blocks).tolist():
            if block and ledger.charged_units((block,)):
                charged.append(block)
        published = np.isin(blocks, charged).any(axis=0)
        if published.any():
            if private_now is None:
                private_now = _all_contents(sayings(dataset.train, dataset, key, person_column=person))
            published &= ~_say_any(ways, private_now)
        if published.any():
            raise DataError(
                f"{dataset.name}: {int(published.sum()):,} of the rows that would become public ({use}) "
                f"were used as private ones before ({place}); read the columns and parts that were read "
                "then, give other public rows, or say privacy.ledger = 'run' if all are fictitious or public"
            )


def refuse_private(ledger: Ledger, place: Path, dataset: Dataset, key: RecordKey) -> None:
    """Refuse to promise anything for rows that an earlier run used as public ones: no noise was added then.

    Raises:
      DataError: with their number, and what to do.
    """
    spoiled = np.zeros(len(dataset.train), dtype=bool)
    for keys in sayings(dataset.train, dataset, key):
        spoiled |= (keys != 0) & ledger.are_published(keys)
    if spoiled.any():
        raise DataError(
            f"{dataset.name}: {int(spoiled.sum()):,} of the private rows were used as public ones by an "
            f"earlier run ({place}): no promise holds for them; keep them public, take them out of the "
            "private part, or say privacy.ledger = 'run' if all are fictitious or public"
        )


def refuse_shared(dataset: Dataset, public: Dataset, key: RecordKey, *, name: str) -> None:
    """Refuse another set as public rows where some of it are private rows of the same run: what is said about
    a public row is charged to nobody.

    Blank rows say nothing and are not compared.
    Raises:
      DataError: with their number, and what to do.
    """
    private_now = dataset.train.contents
    public_contents = named(public, key).train.contents
    assert private_now is not None
    assert public_contents is not None
    shared = np.isin(public_contents, private_now) & (public_contents != key.contents([b""]))
    if shared.any():
        raise DataError(
            f"federation.lifecycle.public_data = {name!r}: {int(shared.sum()):,} of its {len(shared):,} rows "
            "are private rows of this run, and nothing protects what is public; give other public rows, or "
            "take these out of either set"
        )


def _all_contents(ways: list[Keys]) -> Keys:
    contents: Keys = np.concatenate(ways)
    chosen: Keys = contents[contents != 0]
    return chosen


def _say_any(ways: list[Keys], contents: Keys) -> Flags:
    """Mark the rows that say something of a list in any of their ways."""
    marked: Flags = np.isin(np.stack(ways), contents)
    one_of_them: Flags = np.any(marked, axis=0)
    return one_of_them
