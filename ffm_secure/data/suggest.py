"""What a run on some rows could look like:
kind, columns, owners and cleaning, read off the rows themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffm_secure.config.run_file import ENCODINGS
from ffm_secure.data import columns as known
from ffm_secure.data.chat import is_chat
from ffm_secure.data.checks import FEWEST_NOTES, FEWEST_PER_CLASS, gap_names
from ffm_secure.data.cleaning import kept_rows
from ffm_secure.data.columns import Choices, Kind
from ffm_secure.data.delimited import guess_encoding
from ffm_secure.data.files import TEXT_READERS, read_source
from ffm_secure.data.images import SUFFIXES
from ffm_secure.data.labels import as_list, is_blank, is_text, plain
from ffm_secure.data.table import Table, listed
from ffm_secure.errors import DataError
from ffm_secure.registry import TASKS

LABEL_WORDS = (
    *known.LABEL_NAMES,
    *(
        "category",
        "specialty",
        "speciality",
        "sentiment",
        "diagnosis",
        "topic",
        "intent",
        "department",
        "outcome",
    ),
    *("rating", "emotion", "type", "kind", "status"),
)
OWNER_WORDS = (
    *(
        "hospital",
        "site",
        "clinic",
        "owner",
        "client",
        "bank",
        "branch",
        "institution",
        "organisation",
        "organization",
    ),
    *(
        "center",
        "centre",
        "school",
        "office",
        "practice",
        "author",
        "speaker",
        "user",
        "user_id",
        "region",
        "source",
    ),
)
MOST_CLASSES, MOST_OWNERS = 100, 1000
LONGEST, SHORTEST = 256, 16  # tokens a suggestion keeps of a text
_TOKENS_PER_WORD = 1.5
_SAMPLE = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the caller said instead of leaving it to the rows; empty means: look."""

    kind: str = ""
    text: str = ""
    label: str = ""
    owner: str = ""
    encoding: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Hold what the rows say about a run on them."""

    kind: Kind
    rows: int  # that stay after cleaning, without the validation part
    has_validation: bool
    encoding: str
    text: tuple[str, ...]  # empty: found without being named
    label: str
    image: str
    owner: str
    owners: tuple[tuple[str, int], ...]
    class_names: tuple[str, ...]  # empty where numbers say it all, or the source names them
    classes: int
    clean: tuple[str, ...]
    reasons: Mapping[str, str]  # for each cleaner: what it is for, with a count
    max_length: int
    gaps: tuple[str, ...] = ()  # class names that usually mean that nothing was entered


def suggest(path: Path, asked: Asked) -> Suggestion:
    """Look at a file or folder and suggest a run.

    Raises:
      DataError: it cannot be read, or a column cannot be told from the others; the message says how to name
        it.
    """
    if asked.encoding not in ENCODINGS:
        raise DataError(f"--encoding = {asked.encoding!r}: must be {', '.join(filter(None, ENCODINGS))}")
    encoding = asked.encoding or _encoding(path)
    table, validation = read_source(path, encoding)
    image = _image(table)
    kind = _kind(table, asked, image)
    classifies = kind.endswith("classification")
    if kind != "image_classification":
        text = _text(table, asked, kind)
    else:
        text = ()
    label = ""
    if classifies:
        label = _label(table, asked, (*text, image))
    owner = _owner(table, asked, (*text, label, image))
    choices = Choices(kind=kind, text=text, label=label, image=image, owner=owner)
    clean, reasons = _cleaning(table, choices)
    rows, _ = kept_rows(table, Choices(kind=kind, owner=owner, clean=clean), text=text, label=label or None)
    if label and table.label_names is None:
        names, spelled = _class_names(table, label, rows, validation)
    else:
        names, spelled = ((), 0)
    if spelled:
        clean, reasons = (
            (*clean, "label_spelling"),
            {
                **reasons,
                "label_spelling": f"{spelled:,} labels differ from the commonest spelling by case or blanks",
            },
        )
    if owner:
        owners = Counter(str(as_list(table.columns[owner])[row]) for row in rows)
    else:
        owners = Counter()
    return Suggestion(
        kind=kind,
        rows=len(rows),
        has_validation=validation is not None,
        encoding=encoding,
        text=() if _is_guessed(table, kind, text) else text,
        label="" if label == _first_known(table, known.LABEL_NAMES) else label,
        image="" if image == _first_known(table, known.IMAGE_NAMES) else image,
        owner=owner,
        owners=tuple(sorted(owners.items(), key=lambda item: (-item[1], item[0]))),
        class_names=names,
        classes=_class_count(table, label, names),
        clean=clean,
        reasons=reasons,
        max_length=_max_length(table, text, rows),
        gaps=gap_names(names),
    )


def _encoding(path: Path) -> str:
    """Return the encoding that the text files of a source need named."""
    if path.is_file():
        files = [path]
    else:
        if path.is_dir():
            files = sorted(path.iterdir())
        else:
            files = []
    guesses = set()
    for file in files:
        if file.suffix.lower() in TEXT_READERS and file.is_file():
            guesses.add(guess_encoding(file))
    return next(iter(guesses - {""}), "")


def _first_known(table: Table, names: Sequence[str]) -> str:
    present = {}
    for name in reversed(table.columns):
        present[name.casefold()] = name
    return next((present[name] for name in names if name in present), "")


def _image(table: Table) -> str:
    """Return the column of pictures: encoded ones, or names of picture files."""
    for name, values in table.columns.items():
        if isinstance(values, np.ndarray):
            if values.ndim >= 3:
                return name
            continue
        sample = values[:_SAMPLE]
        if all(_is_picture(value) for value in sample):
            return name
    return ""


def _is_picture(value: object) -> bool:
    if isinstance(value, dict):
        return "bytes" in value
    return isinstance(value, bytes | Path) or (
        isinstance(value, str) and Path(value).suffix.lower() in SUFFIXES
    )


def _kind(table: Table, asked: Asked, image: str) -> Kind:
    if asked.kind:
        if asked.kind not in TASKS:
            raise DataError(f"--kind = {asked.kind!r}: must be {', '.join(TASKS)}")
        return asked.kind
    if image:
        return "image_classification"
    answered = any(all(_first_known(table, (name,)) for name in group) for group in known.ANSWERED)
    chats = any(_holds(table, name, is_chat) for name in table.columns)
    labelled = asked.label or _first_known(table, LABEL_WORDS) or _by_shape(table, ())
    if chats or (answered and not asked.label) or not labelled:
        return "causal_lm"
    return "text_classification"


def _holds(table: Table, name: str, test: Callable[[Any], bool]) -> bool:
    values = table.columns[name]
    return not isinstance(values, np.ndarray) and any(map(test, values[:_SAMPLE]))


def _text(table: Table, asked: Asked, kind: Kind) -> tuple[str, ...]:
    if asked.text:
        if asked.text not in table.columns:
            names = tuple(name.strip() for name in asked.text.split(","))
        else:
            names = (asked.text,)
        known.require_columns(table, names)
        return names
    try:
        return known.text_columns(table, Choices(kind=kind))
    except DataError:
        words = {name: _words(table, name) for name in table.columns}
    longest = max(words, key=lambda name: words[name], default="")
    if not longest or words[longest] < 2:
        raise DataError(
            f"{table.origin}: which column holds the text? there are "
            f"{listed(table.columns)}; say it with --text NAME"
        )
    return (longest,)


def _words(table: Table, name: str) -> float:
    values = table.columns[name]
    if not isinstance(values, np.ndarray):
        texts = []
        for value in values[:_SAMPLE]:
            if isinstance(value, str):
                texts.append(value)
    else:
        texts = []
    if texts:
        return float(np.mean([len(text.split()) for text in texts]))
    return 0.0


def _label(table: Table, asked: Asked, used: Sequence[str]) -> str:
    if asked.label:
        known.require_columns(table, (asked.label,))
        return asked.label
    name = _first_known(table, [word for word in LABEL_WORDS if word not in used]) or _by_shape(table, used)
    if not name:
        raise DataError(
            f"{table.origin}: which column holds the label? there are {listed(table.columns)}; say it with "
            "--label NAME, or choose a task without labels, --kind causal_lm"
        )
    return name


def _by_shape(table: Table, used: Sequence[str]) -> str:
    """Return the one column that looks like classes and not like owners or text; nothing where several do."""
    candidates = []
    for name in table.columns:
        if (
            name not in used
            and name.casefold() not in OWNER_WORDS
            and _groups(table, name, MOST_CLASSES) >= 2
        ):
            candidates.append(name)
    if len(candidates) == 1:
        return candidates[0]
    return ""


def _groups(table: Table, name: str, most: int) -> int:
    """Count the different values of a column that parts its rows into groups of two or more on average; 0 for
    others.
    """
    values = table.columns[name]
    if isinstance(values, np.ndarray) and (values.dtype.kind not in "iu" or values.ndim != 1):
        return 0
    names = []
    for value in as_list(values):
        if not is_blank(value):
            names.append(value)
    if not all(isinstance(value, str | int) for value in names):
        return 0
    distinct = len({plain(value) for value in names})
    if distinct <= most and 2 * distinct <= len(names):
        return distinct
    return 0


def _owner(table: Table, asked: Asked, used: Sequence[str]) -> str:
    if asked.owner:
        known.require_columns(table, (asked.owner,))
        return asked.owner
    for name in (*table.owners, *OWNER_WORDS):
        column = _first_known(table, (name,)) or (name if name in table.columns else "")
        if column and column not in used and _groups(table, column, MOST_OWNERS) >= 2:
            return column
    return ""


def _cleaning(table: Table, choices: Choices) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the cleaners these rows need, with what each would leave out."""
    needed: list[str] = []
    reasons: dict[str, str] = {}
    rows = len(table)
    pictures = choices.kind == "image_classification"  # whose repeats show in their pixels alone
    for cleaner in ("blank_rows",) if pictures else ("blank_rows", "repeated_rows"):
        choice = Choices(kind=choices.kind, owner=choices.owner, clean=(*needed, cleaner))
        stays, _ = kept_rows(table, choice, text=choices.text, label=choices.label or None)
        if len(stays) < rows:
            what = "repeat another row whole"
            if cleaner == "blank_rows":
                what = "have a blank text, label or owner"
            reasons[cleaner] = f"{rows - len(stays):,} rows {what}"
            needed.append(cleaner)
            rows = len(stays)
    return tuple(needed), reasons


def _class_names(
    table: Table, label: str, rows: NDArray[np.int64], validation: Table | None
) -> tuple[tuple[str, ...], int]:
    """Return the commonest spelling of every class of both parts, and how many labels are spelt otherwise;
    nothing for 0, 1, 2, ...

    Raises:
      DataError: the column holds notes or numbers of rows, not classes.
    """
    column = as_list(table.columns[label])
    values = []
    for row in rows:
        values.append(column[row])
    _require_classes(table, label, values)
    if validation is not None:
        values += [value for value in as_list(validation.columns.get(label, [])) if not is_blank(value)]
    if not is_text(values):
        numbers = sorted(
            {int(value) for value in values if isinstance(value, int | float) and float(value).is_integer()}
        )
        return (() if numbers == list(range(len(numbers))) else tuple(map(str, numbers))), 0
    spellings: dict[str, Counter[str]] = {}
    for value in values:
        spellings.setdefault(plain(value), Counter())[value] += 1
    names = [
        max(counts, key=lambda name: (counts[name], name == name.strip(), name))
        for counts in spellings.values()
    ]
    other = len(values) - sum(max(counts.values()) for counts in spellings.values())
    return tuple(sorted(name.strip() for name in names)), other


def _require_classes(table: Table, label: str, values: Sequence[object]) -> None:
    """Refuse to declare nearly as many classes as there are rows: they would be public."""
    distinct = len({plain(value) for value in values})
    if distinct >= FEWEST_NOTES and len(values) < FEWEST_PER_CLASS * distinct:
        raise DataError(
            f"{table.origin}: column {listed([label])} holds {distinct:,} different values in "
            f"{len(values):,} rows, which are notes or numbers of rows, not classes; name the column of the "
            "classes with --label, or a task without labels, --kind causal_lm"
        )


def _class_count(table: Table, label: str, names: Sequence[str]) -> int:
    if not label:
        return 0
    if names or table.label_names:
        return len(names or table.label_names or ())
    return len({str(value) for value in as_list(table.columns[label]) if not is_blank(value)})


def _is_guessed(table: Table, kind: Kind, text: tuple[str, ...]) -> bool:
    try:
        return not text or known.text_columns(table, Choices(kind=kind)) == text
    except DataError:
        return False


def _max_length(table: Table, text: Sequence[str], rows: NDArray[np.int64]) -> int:
    """Return tokens that hold nineteen of twenty texts, as a multiple of 16, from their words alone."""
    step = max(1, len(rows) // _SAMPLE)
    lengths = []
    for row in rows[::step]:
        lengths.append(sum(len(str(table.columns[name][row]).split()) for name in text))
    if text and lengths:
        tokens = float(np.quantile(lengths, 0.95)) * _TOKENS_PER_WORD + 2
    else:
        tokens = SHORTEST
    return int(min(LONGEST, max(SHORTEST, 16 * math.ceil(tokens / 16))))
