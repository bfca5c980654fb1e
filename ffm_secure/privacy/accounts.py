"""Which account a run charges: named by the rows themselves and how they were dealt,
never by a path alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from defenses.dp import Ledger
from defenses.dp.records import RecordKey
from ffm_secure.foreign import Cells


class Rows(Protocol):
    """What a fingerprint needs of a table of rows."""

    @property
    def columns(self) -> Mapping[str, Cells]:
        """Return the columns by name."""

    def __len__(self) -> int:
        """Count the rows."""


class RowSet(Protocol):
    """What a fingerprint needs of a data set."""

    @property
    def validation(self) -> Rows:
        """Return the rows that a run is evaluated on."""


def rows_digest(examples: Rows) -> str:
    """Return a digest of public rows, which whoever has them computes alike."""
    return _data_digest(examples)


def dataset_fingerprint(name: str, examples: Rows, parts: Sequence[np.ndarray]) -> str:
    """Return the ledger's name for these training rows dealt in this way.

    Guarantee: a copy, another path or a link to the same rows gives the same data digest; another split of
    them gives the same data digest and another split digest.
    """
    split = hashlib.sha256()
    for part in parts:
        split.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype="<i8").tobytes())
    return f"{name[-120:]} data:{_data_digest(examples)[:16]} split:{split.hexdigest()[:16]}"


def contents_fingerprint(account: str, dataset: RowSet, other: Rows | None = None) -> str:
    """Name all rows a run reads: the training rows by their digest in an account, the validation rows,
    another set's public rows.
    """
    parts = [_data_word(account), f"validation:{_data_digest(dataset.validation)[:16]}"]
    if other is not None:
        parts.append(f"public:{_data_digest(other)[:16]}")
    return " ".join(parts)


def keyed_fingerprint(fingerprint: str, key: RecordKey) -> str:
    """Return a contents fingerprint that only the holder of a ledger's key can compute: what is written down.

    Whoever knew all rows but one could try guesses of that one on the bare digests.
    """
    words = (word.partition(":") for word in fingerprint.split())
    return " ".join(f"{name}:{key.digest(value.encode())}" for name, _, value in words)


def holds_other_rows(ledger: Ledger, account: str) -> bool:
    """Tell whether a ledger of one run was opened for other training rows than those of an account."""
    known = set()
    for _, held, _ in ledger.accounts():
        known.add(_data_word(held))
    return bool(known) and _data_word(account) not in known


def _data_word(account: str) -> str:
    return account.split()[-2]  # the name before it may hold spaces


def _data_digest(examples: Rows) -> str:
    digest = hashlib.sha256(str(len(examples)).encode())
    for name in sorted(examples.columns):
        column = examples.columns[name]
        digest.update(b"\x00column\x00" + name.encode())
        if isinstance(column, np.ndarray) and column.dtype != object:
            digest.update(np.ascontiguousarray(column).tobytes())
            continue
        for start in range(0, len(column), 1024):
            block = None
            if not isinstance(column, list | tuple | np.ndarray):
                block = column[np.arange(start, min(start + 1024, len(column)))]
            if isinstance(block, np.ndarray):
                digest.update(np.ascontiguousarray(block).tobytes())
                continue
            for item in column[start : start + 1024]:
                text = str(item).encode("utf-8", "surrogatepass")
                digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
