"""Data sets: where they come from, which columns mean what, and which part of them is public."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from defenses.dp.records import RecordKey, Records, canonical_text, person_content
from ffm_secure.config.run_file import Task as TaskTable
from ffm_secure.data.builtin_sets import load_builtin
from ffm_secure.data.cleaning import kept_rows
from ffm_secure.data.columns import (
    Choices,
    Kind,
    image_column_name,
    require_columns,
    text_columns,
)
from ffm_secure.data.columns import (
    label_column as choose_label_column,
)
from ffm_secure.data.files import arrow_table, read_source
from ffm_secure.data.images import LazyImages, StoredPictures, image_column, range_note
from ffm_secure.data.labels import NameSource, encode_labels, is_text
from ffm_secure.data.memory import IN_MEMORY, Memory
from ffm_secure.data.table import Table, listed
from ffm_secure.data.texts import ReadText, joined_text
from ffm_secure.errors import DataError
from ffm_secure.foreign import Cells
from ffm_secure.registry import TASKS
from ffm_secure.record_codec import read_regular

UNSTATED = "not stated"  # a licence
_SAMPLE = 200  # cells of a column by which it is told what it holds
_SPOKEN = ("system", "system_prompt", "context", "history")  # what a model would be told, too
_FEWEST_WORDS = 3.0  # mean words of a column from which on it is text
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Hold examples by column: text as list of str, labels as int64 [n], pictures as uint8 [n, H, W, 3].

    Large picture columns may be `LazyImages`, which answer `column[indices]` with the same arrays.
    """

    columns: Mapping[str, Sequence[Any] | NDArray[Any]] = field(repr=False)  # rows never print
    label_column: str | None = None
    text_columns: tuple[str, ...] = ()
    origin: str = "examples"
    records: Records | None = None  # what a ledger knows the rows by, where they were named
    contents: NDArray[np.uint64] | None = None  # a keyed digest of what each row says, where they were named
    stored: StoredPictures | None = field(default=None, repr=False)  # pictures as their files hold them

    def __post_init__(self) -> None:
        lengths = {}
        for name, values in self.columns.items():
            lengths[name] = len(values)
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.origin}: columns differ in length ({lengths}); every column needs one row per example"
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Cells:
        """Give one column, or list those there are."""
        if name not in self.columns:
            raise DataError(f"{self.origin}: no column {name!r}; there are {listed(self.columns)}")
        return self.columns[name]

    @property
    def labels(self) -> Indices:
        """Give the labels, int64 [n]."""
        if self.label_column is None:
            raise DataError(
                f"{self.origin}: has no labels; name a label_column, or choose a kind that needs none"
            )
        return cast(Indices, self.column(self.label_column))

    def take(self, indices: Sequence[int] | Indices) -> Examples:
        """Choose rows, in the order of `indices`; indices may repeat.

        >>> Examples(columns={"text": ["a", "b", "c"]}).take([2, 0]).column("text")
        ['c', 'a']
        """
        chosen = np.asarray(indices, dtype=np.int64)
        columns = {}
        for name, values in self.columns.items():
            columns[name] = _take(values, chosen)
        records = None
        if self.records is not None:
            records = self.records.take(chosen)
        contents = None
        if self.contents is not None:
            contents = self.contents[chosen]
        stored = None
        if self.stored is not None:
            stored = self.stored.take(chosen)
        return replace(self, columns=columns, records=records, contents=contents, stored=stored)


def for_evaluation(public: Examples, count: int, *, seed: int, apart: int = 0) -> Examples:
    """Return the `count` public rows that a run is evaluated on: the same for everybody who has them all.

    None of them is among the `apart` rows that `root_rows` returns.
    """
    order = np.random.default_rng(seed).permutation(len(public))
    return public.take(np.sort(order[: max(0, min(count, len(public) - apart))]))


def _take(values: Cells, chosen: Indices) -> Cells:
    if isinstance(values, np.ndarray):
        return values[chosen]
    if isinstance(values, LazyImages):
        return values.take(chosen)
    return [values[index] for index in chosen]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Hold a data set's two parts and what its columns mean.

    Assumes: `label_names` is public. It is the union over all clients and both parts; where class names are
    themselves secret, give integer labels over a list agreed on beforehand.
    """

    name: str
    train: Examples
    validation: Examples
    label_names: tuple[str, ...] | None
    text_columns: tuple[str, ...]
    label_column: str | None
    image_column: str | None
    natural_columns: tuple[str, ...]  # columns a natural split may use, for instance hospital or speaker
    license_note: str
    held_out: int = 0  # validation rows that were taken from the training part because the source has none
    names_from: NameSource = "stored"  # who named the classes
    answered: tuple[
        str, ...
    ] = ()  # columns joined to the text; the last is the answer a model learns to give
    answers_only: bool = True  # whether a causal model learns the answers alone
    is_chat: bool = False  # the text column holds packed chats, which the model's template turns into text
    notes: tuple[str, ...] = ()  # what reading and cleaning decided, for the person who plans the run


def load(
    source: str | Memory,
    *,
    kind: Kind,
    base: Path,
    seed: int,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    owner_column: str = "",
    image_size: int | None = None,
    validation_fraction: float = 0.1,
    encoding: str = "",
    class_names: Sequence[str] = (),
    clean: Sequence[str] = (),
    key: RecordKey | None = None,
    person_column: str = "",
) -> Dataset:
    """Load a data set for one kind of task.

    `source` is `builtin:<name>` (with options as in `builtin:clinic_notes?hospitals=4`), a file or folder
    (relative paths count from `base`), the name of a Hugging Face dataset (`owner/name`, or
    `owner/name:configuration`), or rows in memory. A source without a validation part gives up
    `validation_fraction` of its rows: whole persons where a person column is given, always the same ones for
    a `key`, whatever the seed, order or further rows. Several text columns are given as a list or "first,
    second". `encoding` is that of text files, `class_names` declares the classes in order, and `clean` says
    what is done about messy rows (`cleaning.CLEANERS`).

    Raises:
      DataError: the source cannot be found or read, a column is missing or malformed, or a value is out of
        bounds.
    """
    if kind not in TASKS:
        raise DataError(f"kind = {kind!r}: must be one of {', '.join(TASKS)}")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(f"validation_fraction = {validation_fraction}: must lie between 0 and 1")
    if isinstance(text_column, str):
        names = [text_column]
    else:
        names = list(text_column or ())
    choices = Choices(
        kind=kind,
        text=tuple(n for n in names if n),
        label=label_column or "",
        image=image_column or "",
        owner=owner_column,
        image_size=image_size,
        class_names=tuple(class_names),
        clean=tuple(clean),
        person=person_column,
    )
    train, validation, license_note = _load_source(source, base, encoding)
    train = _cleaned(train, choices)
    missing = validation is None
    if validation is None:
        train, validation = _hold_out(
            train, validation_fraction, choices, key or RecordKey.public(), person_column
        )
    else:
        validation = _cleaned(validation, choices)
    if isinstance(source, str):
        name = source
    else:
        name = source.name
    loaded = _dataset(name, train, validation, choices=choices, license_note=license_note)
    return replace(loaded, held_out=len(loaded.validation) if missing else 0)


def load_task(
    task: TaskTable,
    *,
    base: Path,
    seed: int,
    rows: Memory | None = None,
    key: RecordKey | None = None,
    person_column: str = "",
) -> Dataset:
    """Load the data set that the table `[task]` of a run file describes; `rows` given from Python take its
    place.

    Raises:
      DataError: as `load`.
    """
    owner_column = ""
    if task.split.kind == "natural":
        owner_column = task.split.column
    loaded = load(
        task.data if rows is None else rows,
        kind=task.kind,
        base=base,
        seed=seed,
        text_column=task.text_column,
        label_column=task.label_column,
        image_column=task.image_column,
        owner_column=owner_column,
        encoding=task.encoding,
        class_names=task.class_names,
        clean=task.clean,
        key=key,
        person_column=person_column,
    )
    return replace(loaded, answers_only=task.loss_on == "answer")


def _load_source(source: str | Memory, base: Path, encoding: str) -> tuple[Table, Table | None, str]:
    if isinstance(source, Memory):
        return source.train, source.validation, UNSTATED
    if source == IN_MEMORY:
        raise DataError(
            "data = 'memory': these rows were given from Python and lie in no "
            "file; give them again, with data="
        )
    if source.startswith("builtin:"):
        return load_builtin(source)
    return _load_outside(source, base, encoding)


def _cleaned(table: Table, choices: Choices) -> Table:
    """Leave out the rows that the run file wants left out, before anything is dealt or held out."""
    if not set(choices.clean) & {"blank_rows", "repeated_rows"}:
        return table
    label = choose_label_column(table, choices)
    if not image_column_name(table, choices):
        text = text_columns(table, choices)
    else:
        text = ()
    require_columns(table, (*text, *filter(None, (label, choices.owner))))
    rows, notes = kept_rows(table, choices, text=text, label=label)
    return replace(
        _rows(table, rows), notes=(*table.notes, *(f"{Path(table.origin).name}: {note}" for note in notes))
    )


def _load_outside(source: str, base: Path, encoding: str) -> tuple[Table, Table | None, str]:
    path = base / Path(source).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"data = {source[:80]!r}: not a usable path ({error})") from error
    if not exists:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", source, re.ASCII):
            raise DataError(f"data = {source!r}: there is no {path}; give a file, a folder or builtin:<name>")
        return *_load_hub(source, path), "as stated on the data set's page"
    try:
        return *read_source(path, encoding), _license_note(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check that it is yours to read"
        ) from error


def _license_note(path: Path) -> str:
    """Quote the licence line of a README beside the data; absent means not stated."""
    readme = (path if path.is_dir() else path.parent) / "README.md"
    try:
        match = re.search(r"\*\*Licen[cs]e:?\*\*:?\s*(.+)", read_regular(readme).decode())
    except (OSError, ValueError):
        match = None
    if match:
        return match.group(1).strip()
    return UNSTATED


def _load_hub(name: str, path: Path) -> tuple[Table, Table | None]:
    from ffm_secure.data.hub import (
        load_hub,
    )  # the `datasets` library takes seconds to import; only hub names need it

    train, validation = load_hub(name, path)
    held_out = None
    if validation is not None:
        held_out = arrow_table(validation, origin=f"{name} (validation)")
    return arrow_table(train, origin=f"{name} (train)"), held_out


def _hold_out(
    table: Table, fraction: float, choices: Choices, key: RecordKey, person_column: str
) -> tuple[Table, Table]:
    """Part off the rows whose lot falls below the fraction; a lot is drawn by what a row says, or by its
    person.

    Rows that are private in one run are never public in another: no seed, order or further row has a say.
    """
    count = math.ceil(len(table) * fraction)
    if count >= len(table):
        raise DataError(
            f"{table.origin}: {len(table)} row(s) cannot be parted into train and validation; add rows"
        )
    lots = key.lots(_lot_contents(table, choices, person_column))
    public = lots < np.uint64(fraction * 2.0**64)
    if public.all() or not public.any():  # few rows, or many that say the same
        public = np.zeros(len(table), dtype=bool)
        public[np.lexsort((-np.arange(len(table)), lots))[:count]] = True
    return _rows(table, np.flatnonzero(~public)), _rows(table, np.flatnonzero(public))


def _lot_contents(table: Table, choices: Choices, person_column: str) -> list[bytes]:
    if person_column:
        require_columns(table, (person_column,))
        return [person_content(value) for value in table.columns[person_column]]
    try:
        image = image_column_name(table, choices)
        columns = []
        if not image:
            for name in text_columns(table, choices):
                columns.append(table.columns[name])
    except (DataError, KeyError):  # what is wrong with the columns is said where they get their meaning
        image, columns = "", list(table.columns.values())
    if image:
        pictures = table.columns.get(image, [b""] * len(table))
        return [_picture_bytes(value, table.folder) for value in pictures]
    lot_contents: list[bytes] = []
    for cells in zip(*columns, strict=True):
        lot_contents.append(canonical_text(" ".join(map(str, cells))))
    return lot_contents


def _picture_bytes(value: object, folder: Path | None) -> bytes:
    """Return what a picture file holds, wherever it lies;
    what cannot be read is reported when it is decoded.
    """
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    try:
        return read_regular((folder or Path()) / str(value))
    except (OSError, ValueError):
        return str(value).encode("utf-8", "surrogatepass")


def _rows(table: Table, chosen: Indices) -> Table:
    columns = {}
    for name, values in table.columns.items():
        columns[name] = _take(values, chosen)
    numbers: Sequence[int] = range(len(table))
    if table.numbers is not None:
        numbers = table.numbers
    return replace(table, columns=columns, numbers=[numbers[row] for row in chosen])


def _dataset(source: str, train: Table, validation: Table, *, choices: Choices, license_note: str) -> Dataset:
    """Give the columns their meaning and check every value that will be used."""
    tables = (train, validation)
    label, image = choose_label_column(train, choices), image_column_name(train, choices)
    if not image:
        text = text_columns(train, choices)
    else:
        text = ()
    for table in tables:
        require_columns(table, (*text, *filter(None, (label, image))))
    if label is not None and label in (*text, image):
        raise DataError(
            f"{source}: column {label!r} would be read as the label and as what it is told by; set "
            "task.label_column and task.text_column (or task.image_column) to two columns"
        )
    parts: list[dict[str, Any]] = []
    for table in tables:
        parts.append(dict(table.columns))
    labels = None
    if label:
        loose = "label_spelling" in choices.clean
        labels = encode_labels(tables, label, declared=choices.class_names, loose=loose)
        for part, values in zip(parts, labels.parts, strict=True):
            part[label] = values
    stored: list[StoredPictures | None] = [None] * len(tables)
    if image:
        for number, (part, table) in enumerate(zip(parts, tables, strict=True)):
            part[image], stored[number] = image_column(
                table.columns[image], place=table.place, image_size=choices.image_size, folder=table.folder
            )
    used = {*text, label, image}
    notes = [*train.notes, *validation.notes]
    if image:
        notes += filter(None, [range_note(train.columns[image], stored[0])])
    if not source.startswith("builtin:"):
        notes += _unread_columns(train, {*used, choices.owner, choices.person, f"{label}_name"})
    if text:
        read = joined_text(tables, parts, text, choices)
    else:
        read = ReadText()
    examples = []
    for part, pictures, which in zip(parts, stored, ("train", "validation"), strict=True):
        examples.append(
            Examples(
                columns=part,
                label_column=label,
                text_columns=read.columns,
                origin=f"{source} ({which})",
                stored=pictures,
            )
        )
    return Dataset(
        name=source,
        train=examples[0],
        validation=examples[1],
        label_names=labels.names if labels else None,
        text_columns=read.columns,
        label_column=label,
        image_column=image,
        natural_columns=train.owners or _natural_columns(examples[0], used | set(read.columns)),
        license_note=license_note,
        names_from=labels.source if labels else "stored",
        answered=read.answered,
        is_chat=read.is_chat,
        notes=tuple(dict.fromkeys(notes)),
    )


def _holds_words(values: Cells) -> bool:
    """Tell whether a column holds sentences or lists, and not names, numbers or dates."""
    if isinstance(values, np.ndarray):
        return False
    sample = [value for value in values[:_SAMPLE] if value is not None]
    if any(isinstance(value, list | dict) for value in sample):
        return True
    words = [len(value.split()) for value in sample if isinstance(value, str)]
    return bool(words) and float(np.mean(words)) >= _FEWEST_WORDS


def _unread_columns(table: Table, used: set[str | None]) -> list[str]:
    """Say which columns of words are not read: a context or a system prompt that a model never sees."""
    unread = []
    for name, values in table.columns.items():
        if name not in used and (name.casefold() in _SPOKEN or _holds_words(values)):
            unread.append(name)
    if not unread:
        return []
    return [
        f"{Path(table.origin).name}: not read: {listed(unread)}; task.text_column names what is, as in "
        "'first, second'"
    ]


def _natural_columns(examples: Examples, used: set[str | None]) -> tuple[str, ...]:
    """List the columns that could name data owners: text or whole numbers, on average two rows or more per
    value.
    """
    columns = []
    for name, values in examples.columns.items():
        whole = isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1
        if name not in used and (whole or is_text(values)):
            distinct = len(set(values.tolist() if isinstance(values, np.ndarray) else values))
            if 2 <= distinct <= len(examples) / 2:
                columns.append(name)
    return tuple(columns)
