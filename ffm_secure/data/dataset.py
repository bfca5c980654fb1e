"""Data sets: where they come from, which columns mean what, and which part of them is public."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ffm_secure.data.files import Table, arrow_table, read_source
from ffm_secure.data.images import LazyImages, image_column
from ffm_secure.errors import DataError

Kind = Literal["text_classification", "causal_lm", "masked_lm", "image_classification"]
Indices = NDArray[np.int64]

MAX_LABELS = 65_536  # above it the label column is more likely an identifier

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("question", "sentence"),
)
TEXT_NAMES = ("text", "sentence", "note", "content", "document", "review", "question")
CORPUS_GROUPS = (
    ("text",),
    ("instruction", "input", "output"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("sentence",),
    ("note",),
    ("content",),
    ("document",),
)
LABEL_NAMES = ("label", "labels", "target", "class")
IMAGE_NAMES = ("image", "images", "img", "pixels")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Hold examples by column: text as list of str, labels as int64 [n], pictures as uint8 [n, H, W, 3].

    Large picture columns may be `LazyImages`, which answer `column[indices]` with the same arrays.
    """

    columns: Mapping[str, Sequence[Any] | NDArray[Any]]
    label_column: str | None = None
    text_columns: tuple[str, ...] = ()
    origin: str = "examples"

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.origin}: columns differ in length ({lengths}); every column needs one row per example"
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Any:
        """Give one column, or list those there are."""
        if name not in self.columns:
            raise DataError(
                f"{self.origin}: no column {name!r}; there are {', '.join(map(repr, self.columns))}"
            )
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
        return replace(self, columns={name: _take(values, chosen) for name, values in self.columns.items()})


def _take(values: Any, chosen: Indices) -> Any:
    if isinstance(values, np.ndarray):
        return values[chosen]
    if isinstance(values, LazyImages):
        return values.take(chosen)
    return [values[index] for index in chosen]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Hold a data set's two parts and what its columns mean.

    Assumes: `label_names` is public. It is the union over all clients and both parts; where class names are themselves
    secret, give integer labels over a list agreed on beforehand.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """What the caller fixed about the columns; empty means: guess by the rules of `docs/data.md`."""

    kind: Kind
    text: tuple[str, ...]
    label: str
    image: str
    image_size: int | None


def load(
    source: str,
    *,
    kind: Kind,
    base: Path,
    seed: int,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    image_size: int | None = None,
    validation_fraction: float = 0.1,
) -> Dataset:
    """Load a data set for one kind of task.

    `source` is `builtin:<name>` (with options as in `builtin:clinic_notes?hospitals=4`), a file or folder (relative
    paths count from `base`), or the name of a Hugging Face dataset (`owner/name`, or `owner/name:configuration`). A
    source without a validation part gives up `validation_fraction` of its rows, chosen by `seed`. Several text columns
    are given as a list or "first, second".

    Raises:
      DataError: the source cannot be found or read, a column is missing or malformed, or a value is out of bounds.
    """
    if kind not in get_args(Kind):
        raise DataError(f"kind = {kind!r}: must be one of {', '.join(get_args(Kind))}")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(f"validation_fraction = {validation_fraction}: must lie between 0 and 1")
    names = [text_column] if isinstance(text_column, str) else list(text_column or ())
    choices = _Choices(
        kind=kind,
        text=tuple(n for n in names if n),
        label=label_column or "",
        image=image_column or "",
        image_size=image_size,
    )
    train: Table
    validation: Table | None
    if source.startswith("builtin:"):
        train, validation, license_note = _load_builtin(source.removeprefix("builtin:"))
    else:
        train, validation, license_note = _load_outside(source, base)
    missing = validation is None
    if validation is None:
        train, validation = _hold_out(train, validation_fraction, seed)
    loaded = _dataset(source, train, validation, choices=choices, license_note=license_note)
    return replace(loaded, held_out=len(loaded.validation) if missing else 0)


def _load_outside(source: str, base: Path) -> tuple[Table, Table | None, str]:
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
        return *read_source(path), _license_note(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check that it is yours to read"
        ) from error


def _license_note(path: Path) -> str:
    """Quote the licence line of a README beside the data; absent means not stated."""
    readme = (path if path.is_dir() else path.parent) / "README.md"
    try:
        found = re.search(r"\*\*Licen[cs]e:?\*\*:?\s*(.+)", readme.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    return found.group(1).strip() if found else "not stated"


def _load_hub(name: str, path: Path) -> tuple[Table, Table | None]:
    from ffm_secure.data.hub import (
        load_hub,
    )  # the `datasets` library takes seconds to import; only hub names need it

    train, validation = load_hub(name, path)
    held_out = None if validation is None else arrow_table(validation, origin=f"{name} (validation)")
    return arrow_table(train, origin=f"{name} (train)"), held_out


def _load_builtin(text: str) -> tuple[Table, Table, str]:
    name, _, query = text.partition("?")
    if name not in BUILTIN:
        raise DataError(
            f"data = 'builtin:{name}': there is no such set; there are {', '.join(sorted(BUILTIN))}"
        )
    options: dict[str, int] = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
            raise DataError(f"builtin:{name}: {item!r} is not <option>=<whole number>")
        options[key] = int(value)
    return BUILTIN[name](options)


def _digits(options: Mapping[str, int]) -> tuple[Table, Table, str]:
    from sklearn.datasets import load_digits  # not needed by most runs, and slow to import

    if options:
        raise DataError(f"builtin:digits takes no options, found {', '.join(options)}")
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(
        np.uint8
    )  # 17 grey levels stay 17 distinct ones
    order = np.random.Generator(np.random.PCG64(1797)).permutation(len(labels))
    names = tuple(str(digit) for digit in range(10))
    parts = [
        Table(
            origin="builtin:digits", columns={"image": pixels[rows], "label": labels[rows]}, label_names=names
        )
        for rows in (order[:1437], order[1437:])
    ]
    return (
        parts[0],
        parts[1],
        "CC BY 4.0: Optical Recognition of Handwritten Digits, UCI, as shipped with scikit-learn",
    )


def _clinic_notes(options: Mapping[str, int]) -> tuple[Table, Table, str]:
    from ffm_secure.data.clinic_notes.notes import clinic_notes  # its vocabulary is only needed here

    train, validation, names = clinic_notes(options)
    parts = [
        Table(origin="builtin:clinic_notes", columns=part, label_names=names, owners=("hospital", "patient"))
        for part in (train, validation)
    ]
    return (
        parts[0],
        parts[1],
        "generated by this package; Apache-2.0; every person, number and address is fictitious",
    )


BUILTIN: dict[str, Callable[[Mapping[str, int]], tuple[Table, Table, str]]] = {
    "clinic_notes": _clinic_notes,
    "digits": _digits,
}


def _hold_out(table: Table, fraction: float, seed: int) -> tuple[Table, Table]:
    rows = len(table)
    count = math.ceil(rows * fraction)
    if count >= rows:
        raise DataError(f"{table.origin}: {rows} row(s) cannot be parted into train and validation; add rows")
    order = np.random.Generator(np.random.PCG64([seed, 0x7A11])).permutation(rows)
    return _rows(table, np.sort(order[count:])), _rows(table, np.sort(order[:count]))


def _rows(table: Table, chosen: Indices) -> Table:
    columns = {name: _take(values, chosen) for name, values in table.columns.items()}
    numbers = range(len(table)) if table.numbers is None else table.numbers
    return replace(table, columns=columns, numbers=[numbers[row] for row in chosen])


def _dataset(
    source: str, train: Table, validation: Table, *, choices: _Choices, license_note: str
) -> Dataset:
    """Give the columns their meaning and check every value that will be used.

    A language model reads one text: several columns are joined, line by line, into a new one such as `question+answer`.
    """
    label = _label_column(train, choices)
    image = _image_column(train, choices)
    text = () if image else _text_columns(train, choices)
    for table in (train, validation):
        _require_columns(table, (*text, *filter(None, (label, image))))
        _check_text(table, text)
    used = {*text, label, image}
    parts: list[dict[str, Any]] = [dict(table.columns) for table in (train, validation)]
    names: tuple[str, ...] | None = None
    if label:
        labels, names = _encode_labels((train, validation), label)
        for part, values in zip(parts, labels, strict=True):
            part[label] = values
    if image:
        for part, table in zip(parts, (train, validation), strict=True):
            part[image] = image_column(table.columns[image], place=table.place, image_size=choices.image_size)
    if choices.kind.endswith("_lm") and len(text) > 1:
        joined = "+".join(text)
        for part in parts:
            part[joined] = [
                "\n".join(filter(None, texts)) for texts in zip(*(part[name] for name in text), strict=True)
            ]
        text = (joined,)
        used.add(joined)
    examples = [
        Examples(columns=part, label_column=label, text_columns=text, origin=f"{source} ({which})")
        for part, which in zip(parts, ("train", "validation"), strict=True)
    ]
    return Dataset(
        name=source,
        train=examples[0],
        validation=examples[1],
        label_names=names,
        text_columns=text,
        label_column=label,
        image_column=image,
        natural_columns=train.owners or _natural_columns(examples[0], used),
        license_note=license_note,
    )


def _require_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.columns:
            raise DataError(
                f"{table.origin}: no column {name!r}; there are {', '.join(map(repr, table.columns))}"
            )


def _label_column(table: Table, choices: _Choices) -> str | None:
    if not choices.kind.endswith("classification"):
        return None
    if choices.label:
        return choices.label
    found = next((name for name in LABEL_NAMES if name in table.columns), None)
    if found is None:
        raise DataError(
            f"{table.origin}: no label column among {', '.join(map(repr, table.columns))}; "
            "set label_column to one of them"
        )
    return found


def _image_column(table: Table, choices: _Choices) -> str | None:
    if choices.kind != "image_classification":
        return None
    if choices.image:
        return choices.image
    found = next((name for name in IMAGE_NAMES if name in table.columns), None)
    if found is None:
        raise DataError(
            f"{table.origin}: no picture column among {', '.join(map(repr, table.columns))}; "
            "set image_column to one of them"
        )
    return found


def _text_columns(table: Table, choices: _Choices) -> tuple[str, ...]:
    if choices.text:
        single = choices.text[0]
        if len(choices.text) == 1 and single not in table.columns and "," in single:
            return tuple(part.strip() for part in single.split(","))
        return choices.text
    singles = tuple((name,) for name in TEXT_NAMES)
    candidates = (
        (*TEXT_PAIRS, *singles)
        if choices.kind == "text_classification"
        else (*CORPUS_GROUPS, *TEXT_PAIRS, *singles)
    )
    for names in candidates:
        if all(name in table.columns for name in names):
            return names
    raise DataError(
        f"{table.origin}: no text column among {', '.join(map(repr, table.columns))}; set text_column to one of them"
    )


def _check_text(table: Table, names: Sequence[str]) -> None:
    for name in names:
        values = table.columns[name]
        for row, value in enumerate(values):
            if not isinstance(value, str):
                found = "nothing" if value is None else f"{type(value).__name__}"
                raise DataError(
                    f"{table.place(row)}: column {name!r} holds {found}, not text; fill or remove the row"
                )


def _encode_labels(tables: tuple[Table, Table], name: str) -> tuple[list[Indices], tuple[str, ...]]:
    """Map labels to ids: whole numbers stay as they are, text is numbered in sorted order of the public union."""
    if all(_is_text(table.columns[name]) for table in tables):
        names = tuple(sorted({value for table in tables for value in table.columns[name]}))
        ids = {value: index for index, value in enumerate(names)}
        labels = [np.array([ids[value] for value in table.columns[name]], dtype=np.int64) for table in tables]
    else:
        labels = [_whole_labels(table, name) for table in tables]
        names = _names_for(tables, labels, column=name)
    if len(names) > MAX_LABELS:
        raise DataError(
            f"{tables[0].origin}: column {name!r} has {len(names)} classes, more than the bound of {MAX_LABELS}"
        )
    return labels, names


def _is_text(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _whole_labels(table: Table, name: str) -> Indices:
    values = table.columns[name]
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iub":
        numbers = values.astype(np.int64)
        bad = np.flatnonzero((numbers < 0) | (numbers >= MAX_LABELS))
        if bad.size:
            raise DataError(
                f"{table.place(int(bad[0]))}: label {values[bad[0]]} in column {name!r} is outside 0 to "
                f"{MAX_LABELS - 1}; number the classes from 0, or write them as text"
            )
        return numbers
    for row, value in enumerate(values):
        if not _is_class_number(value):
            found = "nothing" if value is None else str(value)[:40]
            raise DataError(
                f"{table.place(row)}: label {found} in column {name!r} is neither a whole number from 0 nor text "
                "throughout; fill or remove the row"
            )
    return np.array([int(value) for value in values], dtype=np.int64)


def _is_class_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return float(value).is_integer() and 0 <= float(value) < MAX_LABELS


def _names_for(tables: tuple[Table, Table], labels: list[Indices], *, column: str) -> tuple[str, ...]:
    count = 1 + max(int(values.max()) for values in labels)
    stored = tables[0].label_names
    if stored is not None and len(stored) >= count:
        return stored
    beside = _names_beside(tables[0], labels[0], column=column, count=count)
    return beside or tuple(str(index) for index in range(count))


def _names_beside(table: Table, labels: Indices, *, column: str, count: int) -> tuple[str, ...] | None:
    """Use a column `<label>_name` where it names every class in exactly one way."""
    values = table.columns.get(f"{column}_name")
    if values is None or not _is_text(values):
        return None
    pairs = set(zip(labels.tolist(), values, strict=True))
    names = dict(pairs)
    return tuple(names[index] for index in range(count)) if len(pairs) == len(names) == count else None


def _natural_columns(examples: Examples, used: set[str | None]) -> tuple[str, ...]:
    """List the columns that could name data owners: text or whole numbers, on average two rows or more per value."""
    found = []
    for name, values in examples.columns.items():
        whole = isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1
        if name not in used and (whole or _is_text(values)):
            distinct = len(set(values.tolist() if isinstance(values, np.ndarray) else values))
            if 2 <= distinct <= len(examples) / 2:
                found.append(name)
    return tuple(found)


def public_stream(dataset: Dataset, fraction: float, seed: int) -> tuple[Examples, Dataset]:
    """Split off a public part of the train examples for pre-training; the rest stays private.

    Guarantee: no private example has the same text (or picture) as a public one: copies of a drawn example become
    public with it, so the public part may be slightly larger than `fraction`.

    Raises:
      DataError: the fraction leaves one side without examples.
    """
    rows = len(dataset.train)
    count = round(rows * fraction) if 0.0 < fraction < 1.0 else 0
    if not 0 < count < rows:
        raise DataError(
            f"public fraction = {fraction}: of {rows} rows it leaves one side empty; choose between 0 and 1"
        )
    drawn = np.random.Generator(np.random.PCG64([seed, 0x9B1C])).permutation(rows)[:count]
    keys = _content_keys(dataset)
    public_keys = {keys[row] for row in drawn}
    public = np.array([key in public_keys for key in keys])
    if public.all():
        raise DataError(f"public fraction = {fraction}: every example is a copy of a public one; choose less")
    private = replace(dataset, train=dataset.train.take(np.flatnonzero(~public)))
    return dataset.train.take(np.flatnonzero(public)), private


def _content_keys(dataset: Dataset) -> list[Any]:
    if dataset.image_column:
        images = dataset.train.column(dataset.image_column)
        return [images[row].tobytes() for row in range(len(images))]
    return list(zip(*(dataset.train.column(name) for name in dataset.text_columns), strict=True))
