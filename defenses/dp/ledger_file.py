"""The files under the ledger: an append-only SQLite table whose rows are chained by hashes, its anchor, and
its key.

Blocks of records lie in a second table, bound to their rows by a digest; digests of records are keyed, and
the key has a file of its own (`<ledger>.key`), so that neither the table nor an export tells who is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defenses.dp.records import KEY_BYTES
from defenses.errors import ParameterError, TamperedError

FORMAT_VERSION = 1
BUSY_SECONDS = 120.0

_SCHEMA = (
    (
        "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, "
        "dataset TEXT NOT NULL, unit TEXT NOT NULL, body TEXT NOT NULL, hash BLOB NOT NULL)"
    ),
    "CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries"
    " WHEN NEW.sequence <= (SELECT COALESCE(MAX(sequence), 0) FROM entries)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
_BLOCKS_SCHEMA = (
    "CREATE TABLE blocks (sequence INTEGER PRIMARY KEY, keys BLOB NOT NULL, links BLOB NOT NULL)",
    "CREATE TRIGGER blocks_no_update BEFORE UPDATE ON blocks"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER blocks_no_delete BEFORE DELETE ON blocks"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER blocks_no_replace BEFORE INSERT ON blocks"
    " WHEN NEW.sequence <= (SELECT COALESCE(MAX(sequence), 0) FROM blocks)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
_COLUMNS = "sequence, kind, owner, dataset, unit, body, hash"
_START = bytes(32)


@dataclass(frozen=True, slots=True)
class Row:
    """One stored row; `body` is canonical JSON and holds the other columns too."""

    sequence: int
    kind: str
    owner: str
    dataset: str
    unit: str
    body: str
    hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Number and hash of a last row; whoever keeps it can tell later whether history was rewritten."""

    sequence: int
    hash: str


class LedgerFile:
    """Append rows and read them back, checking the chain.

    Guarantee: an append is one atomic transaction with synchronous=FULL; the anchor is written after the
    commit, so it may lag behind after a crash (and is repaired by the next change) but never leads. With
    `until` the rows are read as they stood when that one was the last, and none can be added.
    """

    def __init__(self, path: Path, *, create: bool, until: int | None = None) -> None:
        if path.is_symlink():  # its anchor and its key would lie elsewhere
            raise ParameterError(f"path = {str(path)!r}: is a link; name the ledger itself")
        self.path = path
        self._until = until
        self.head_path = path.with_name(path.name + ".head")
        self.key_path = path.with_name(path.name + ".key")
        if not create and not path.exists():
            raise ParameterError(f"path = {str(path)!r}: there is no ledger here")
        if create:
            _create_private(path)
        self._connection = sqlite3.connect(
            path,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # whoever shares a ledger among threads lets them take turns
        )
        try:
            self._prepare()
        except BaseException as error:
            self._connection.close()
            if _is_damage(error):
                raise TamperedError from None
            raise

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA trusted_schema = OFF")
        with self.transaction():
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                if self.head_path.exists() or self.key_path.exists():  # what was here is gone
                    raise TamperedError
                for statement in _SCHEMA:
                    self._connection.execute(statement)
                empty = {"owner": "", "dataset": "", "unit": ""}
                self.append(
                    {"kind": "genesis", **empty, "version": FORMAT_VERSION, "ledger": os.urandom(16).hex()}
                )
        if not self.head_path.exists():
            self._adopt_newborn()
        self._check_schema()
        self._check_anchor(self._read_head())

    def _adopt_newborn(self) -> None:
        """A ledger that died (or whose twin still works) between its first row and its anchor has one row and
        no anchor.
        """
        if self.last().sequence > 1 and not self.head_path.exists():
            raise TamperedError
        self.write_head()

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[None]:
        """Hold the file's lock; commit at the end, undo on any error."""
        self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if _is_damage(error):
                raise TamperedError from None
            raise

    def append(self, body: dict[str, Any]) -> Row:
        """Chain one row to the last; only inside a transaction."""
        if self._until is not None:
            raise ParameterError(
                f"{self.path}: is read as it stood at row {self._until}; open it to change it"
            )
        last = self._connection.execute(
            "SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        sequence, previous = (last[0] + 1, bytes(last[1])) if last else (1, _START)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        row = Row(
            sequence,
            body["kind"],
            body["owner"],
            body["dataset"],
            body["unit"],
            text,
            _link(previous, sequence, text),
        )
        values = (row.sequence, row.kind, row.owner, row.dataset, row.unit, row.body, row.hash)
        self._connection.execute(f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return row

    def rows(self, *, after: int, owner: str | None = None, dataset: str | None = None) -> Iterator[Row]:
        """Read rows in order, of one owner or data set if asked; the chain is not checked here."""
        query = (
            f"SELECT {_COLUMNS} FROM entries WHERE sequence > ? AND (?2 IS NULL OR owner = ?2)"
            " AND (?3 IS NULL OR dataset = ?3) AND (?4 IS NULL OR sequence <= ?4) ORDER BY sequence"
        )
        wanted = (after, owner, dataset, self._until)
        for values in self._connection.execute(query.replace("> ?", "> ?1"), wanted):
            yield Row(*values)

    def new_rows(self, sequence: int) -> Iterator[Row]:
        """Read the rows after `seen`, checking that each continues the
        chain and says what its columns say.
        """
        previous, expected = _START, 1
        if sequence:
            known = self._connection.execute(
                "SELECT hash FROM entries WHERE sequence = ?", (sequence,)
            ).fetchone()
            if known is None:
                raise TamperedError
            previous, expected = bytes(known[0]), sequence + 1
        for row in list(self.rows(after=sequence)):
            _check_row(row, expected, previous)
            previous, expected = row.hash, expected + 1
            yield row

    def last(self) -> Head:
        """Return number and hash of the last row."""
        try:
            sequence, digest = self._connection.execute(
                "SELECT sequence, hash FROM entries WHERE ?1 IS NULL OR sequence <= ?1"
                " ORDER BY sequence DESC LIMIT 1",
                (self._until,),
            ).fetchone()
            return Head(sequence=sequence, hash=bytes(digest).hex())
        except (TypeError, sqlite3.DatabaseError):
            raise TamperedError from None

    def write_head(self) -> None:
        """Anchor the last row, under the file's lock so that an older anchor never replaces a newer one."""
        with self.transaction():
            head = self.last()
            text = json.dumps({"version": FORMAT_VERSION, "sequence": head.sequence, "hash": head.hash})
            _write_durably(self.head_path, text.encode())

    def verify(self, anchor: Head | None) -> None:
        """Check the whole file; raises TamperedError."""
        try:
            self._check_schema()
            if self._connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise TamperedError
            for _ in self.new_rows(0):
                pass
            self._check_anchor(self._read_head())
            if anchor is not None:
                self._check_anchor(anchor)
        except sqlite3.DatabaseError:
            raise TamperedError from None

    def prepare_blocks(self) -> None:
        """Make the table of blocks where there is none yet; only inside a transaction."""
        if not self._has_blocks():
            for statement in _BLOCKS_SCHEMA:
                self._connection.execute(statement)

    def store_block(self, sequence: int, keys: bytes, links: bytes) -> None:
        """Store what the block of a row is made of; only inside a transaction."""
        self._connection.execute("INSERT INTO blocks VALUES (?, ?, ?)", (sequence, keys, links))

    def load_block(self, sequence: int) -> tuple[bytes, bytes]:
        """Return what the block of a row is made of."""
        try:
            stored = self._connection.execute(
                "SELECT keys, links FROM blocks WHERE sequence = ?", (sequence,)
            ).fetchone()
        except sqlite3.DatabaseError:
            raise TamperedError from None
        if stored is None or not all(isinstance(part, bytes) for part in stored):
            raise TamperedError
        return stored[0], stored[1]

    def create_key(self) -> bytes:
        """Make the ledger's key, readable by its owner only; an older one that no row was written with is
        kept. Only inside a transaction.

        Guarantee: the key is there whole or not at all, whatever the disk or the process does meanwhile: half
        of one would be refused for ever, and no backup holds the other half.
        Raises: ParameterError when a file of that name is not a key.
        """
        if os.path.lexists(self.key_path):
            return self.read_key()
        secret = os.urandom(KEY_BYTES)
        _write_durably(self.key_path, secret)
        return secret

    def read_key(self) -> bytes:
        """Return the ledger's key.

        Raises: ParameterError when it is missing, a link, not a key, or readable by others.
        """
        try:
            secret = _read_private(self.key_path)
        except OSError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise ParameterError(
                f"{self.key_path}: is missing or damaged; without it no row can be "
                "recognised: restore it from a backup"
            )
        return secret

    def _has_blocks(self) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE name = 'blocks'"
        return self._connection.execute(query).fetchone() is not None

    def _check_schema(self) -> None:
        stored = self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        expected = (*_SCHEMA, *(_BLOCKS_SCHEMA if self._has_blocks() else ()))
        if sorted(sql for (sql,) in stored) != sorted(expected):
            raise TamperedError

    def _check_anchor(self, anchor: Head) -> None:
        known = self._connection.execute(
            "SELECT hash FROM entries WHERE sequence = ?", (anchor.sequence,)
        ).fetchone()
        if known is None or bytes(known[0]).hex() != anchor.hash:
            raise TamperedError

    def _read_head(self) -> Head:
        try:
            if not self.head_path.is_file():  # of a pipe nothing would ever come
                raise TamperedError
            values = json.loads(self.head_path.read_text())
            if values["version"] != FORMAT_VERSION:
                raise TamperedError
            return Head(sequence=int(values["sequence"]), hash=str(values["hash"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise TamperedError from None


def _create_private(path: Path) -> None:
    """Create an empty file that only its owner may read; SQLite gives its journals the same rights, and names
    what fails.
    """
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _read_private(path: Path) -> bytes:
    """Read a secret of 32 bytes; a link, a pipe or a device is none.

    Raises: ParameterError when others may read it.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != KEY_BYTES:
            return b""
        if status.st_mode & 0o077:
            raise ParameterError(
                f"{path}: others may read or write it, and with it tell who is in the ledger; run: "
                f"chmod 600 {path}"
            )
        return stream.read()


def _is_damage(error: BaseException) -> bool:
    """A damaged file, as opposed to a busy or full one."""
    return type(error) is sqlite3.DatabaseError or (
        isinstance(error, sqlite3.OperationalError) and "decode" in str(error)
    )


def _link(previous: bytes, sequence: int, body: str) -> bytes:
    return hashlib.sha256(
        b"ffm-secure ledger 1\x00" + previous + sequence.to_bytes(8, "big") + body.encode()
    ).digest()


def _check_row(row: Row, sequence: int, previous: bytes) -> None:
    try:
        values = json.loads(row.body)
        columns = (values["kind"], values["owner"], values["dataset"], values["unit"])
        digest = _link(previous, sequence, row.body)
    except (TypeError, ValueError, KeyError, AttributeError, UnicodeError):
        raise TamperedError from None
    if (
        row.sequence != sequence
        or row.hash != digest
        or columns != (row.kind, row.owner, row.dataset, row.unit)
    ):
        raise TamperedError


def _write_durably(path: Path, content: bytes) -> None:
    """Replace a small file atomically, on disk before this returns."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
