"""The data check of a plan: what the rows look like to their owner, and what no run may begin with.

Counts of private rows are no release: they are shown to the person who plans a run on rows they hold, and
stand in no report, no record and no file.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.data.images import LazyImages
from ffm_secure.data.labels import as_list, is_blank, visible
from ffm_secure.errors import DataError

Indices = NDArray[np.int64]

MOST_SHOWN = 20  # classes or owners a line names
FEWEST_PER_CLASS = 2.0  # mean rows of a class below which the label column holds notes or numbers of rows
FEWEST_NOTES = 10  # classes below which a small table is not suspected
LONGEST_CLASS_NAME = 80
MOST_COMPARED = 300  # names that are compared with each other letter by letter

# What a wrong encoding leaves behind: the replacement mark, UTF-8 read as Windows-1252, words of accented
# letters alone (other alphabets read as Western), and control characters.
_TROUBLE = re.compile("\ufffd|[À-ÖØ-öø-ÿ]{4}|[ÂÃ][\u0080-\u00bf]|â€|[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?", re.ASCII)
_NUMBER = re.compile(r"[-+]?\d{1,15}([.]\d{1,15})?", re.ASCII)
# Letters of other alphabets that look like Latin ones, as keyboards and recognised scans mix them.
_LOOK_ALIKE = str.maketrans("аеорсухіјѕһԁԛԝѵгвкмнтαοιυκνρτχεβη", "aeopcyxijshdqwvrbkmhtaoiukvptxebn")
_MISSING = frozenset(("nan", "n/a", "na", "none", "null", "nil", "?", "-", "--", "missing", "#n/a", "nat"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCount:
    """Hold how many rows carry a name."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """Hold what a data set looks like. For the person who holds the rows; never part of a record that is
    released.
    """

    rows: int
    public_rows: int
    held_out: int  # public rows taken from the private part
    classes: tuple[NamedCount, ...] = ()  # over both parts
    empty_classes: tuple[str, ...] = ()
    similar_classes: tuple[tuple[str, ...], ...] = ()
    owner_column: str = ""
    owners: tuple[NamedCount, ...] = ()  # of the private part
    similar_owners: tuple[tuple[str, ...], ...] = ()
    blank_texts: int = 0
    repeated: int = 0  # rows beyond the first of each content
    contradicting: int = 0  # rows whose content stands elsewhere under another label
    shared: int = 0  # private rows whose content is also a public one's
    garbled: int = 0  # rows with traces of a wrong encoding
    max_length: int = 0
    cut: float | None = None  # share of texts cut at max_length; None where there is no text
    answerless: int = 0  # prompts or chats without an answer
    unanswered: float | None = None  # share of prompts or chats whose answer is cut off whole
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def require_sound(dataset: Dataset, config: RunConfig) -> None:
    """Refuse a data set that no run may begin with.

    Raises:
      DataError: with every problem at once: its name, a count, and what to do.
    """
    problems = find_problems(dataset, owner_column=owner_column(config), claims=config.privacy.unit != "none")
    if problems:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise DataError("\n".join([f"{dataset.name}: {count}", *(f"  {problem}" for problem in problems)]))


def owner_column(config: RunConfig) -> str:
    """Return the column that names the owners of a natural split."""
    if config.task.split.kind == "natural":
        return config.task.split.column
    return ""


def examine(
    dataset: Dataset,
    *,
    owner_column: str = "",
    claims: bool = True,
    lengths: Indices | None = None,
    max_length: int = 0,
    unanswered: float | None = None,
    notes: Sequence[str] = (),
) -> DataCheck:
    """Look at a data set as its owner would want to before a run.

    `claims` tells whether the run promises anything about its private rows, `lengths` holds the tokens of
    uncut texts, int64 [any number of private rows], `unanswered` the share of answers that are cut off, and
    `notes` what the task adds.
    """
    classes = class_counts(dataset)
    owners = owner_counts(dataset.train, owner_column)
    contents = _contents(dataset, dataset.train)
    public = set(_contents(dataset, dataset.validation))
    texts = _texts(dataset, dataset.train)
    present = []
    for item in classes:
        if item.rows:
            present.append(item)
    cut = None
    if lengths is not None and len(lengths):
        cut = float(np.mean(lengths > max_length))
    check = DataCheck(
        rows=len(dataset.train),
        public_rows=len(dataset.validation),
        held_out=dataset.held_out,
        classes=tuple(present),
        empty_classes=tuple(item.name for item in classes if not item.rows),
        similar_classes=similar_names(present),
        owner_column=owner_column,
        owners=owners,
        similar_owners=similar_names(owners),
        blank_texts=sum(map(is_blank, texts)),
        repeated=len(contents) - len(set(contents)),
        contradicting=_contradicting(dataset, contents),
        shared=sum(content in public for content in contents),
        garbled=sum(bool(_TROUBLE.search(text)) for text in texts),
        max_length=max_length,
        cut=cut,
        answerless=_answerless(dataset),
        unanswered=unanswered,
        notes=(*dataset.notes, *notes),
        problems=find_problems(dataset, owner_column=owner_column, claims=claims),
    )
    return replace(check, warnings=tuple(_warnings(check, dataset, claims=claims)))


def find_problems(dataset: Dataset, *, owner_column: str = "", claims: bool = True) -> tuple[str, ...]:
    """Return why no run may begin with this data set: each problem with its name, a count and what to do."""
    problems = list(_owner_problems(dataset, owner_column))
    if dataset.label_names is not None:
        problems += _label_problems(dataset, claims=claims)
    texts = _texts(dataset, dataset.train)
    if texts and _answerless(dataset) == len(texts):
        problems.append(
            f"text: none of {len(texts):,} prompts or chats holds an answer, so nothing would be learned; "
            "name the column of the answers, give chats turns of an assistant, or set task.loss_on = 'all'"
        )
    if texts and all(map(is_blank, texts)):
        problems.append(f"text: all {len(texts):,} private rows are blank; name another text_column")
    return tuple(problems)


def _owner_problems(dataset: Dataset, column: str) -> Iterator[str]:
    values = _owner_values(dataset.train, column)
    blank = sum(map(is_blank, values))
    if blank:
        yield (
            f"owner column {column!r}: {blank:,} of {len(values):,} rows name no owner; fill them, or "
            "leave them out with task.clean = ['blank_rows']"
        )


def _label_problems(dataset: Dataset, *, claims: bool) -> Iterator[str]:
    counts = class_counts(dataset)
    present = []
    for item in counts:
        if item.rows:
            present.append(item)
    rows = sum(item.rows for item in present)
    column = f"label column {dataset.label_column!r}"
    blank = sum(item.rows for item in present if is_blank(item.name))
    if blank:
        yield (
            f"{column}: {blank:,} of {rows:,} rows have a blank label; fill them, or leave them out with "
            "task.clean = ['blank_rows']"
        )
    notes = _holds_notes(dataset, present, rows)
    if notes:
        yield f"{column}: {notes}; set task.label_column to the column of the classes"
    elif len(present) < 2:
        yield (
            f"{column}: all {rows:,} rows are of one class; a classifier needs two: set "
            "task.label_column to another one"
        )
    if notes or dataset.names_from == "declared":
        return
    empty = []
    for item in counts:
        if not item.rows:
            empty.append(item.name)
    if dataset.names_from == "numbers" and empty:
        yield (
            f"{column}: its numbers leave out {_some(empty)}, and a model with an answer for each of "
            f"{len(counts):,} classes would be trained where {len(present):,} occur; declare the classes, "
            f"task.class_names = {_toml(present)}, or number them from 0"
        )
    private = 0
    if dataset.names_from == "column" and claims:
        private = _only_private(dataset)
    if private:
        yield (
            f"{column}: {private:,} class names occur in private rows alone, and the list of classes is "
            f"public; declare it with task.class_names = {_toml(present)}"
        )


def _holds_notes(dataset: Dataset, present: Sequence[NamedCount], rows: int) -> str:
    """Say why a label column cannot be one of classes; an empty string if it can. No value of it is shown."""
    if dataset.names_from in ("declared", "stored"):
        return ""
    if len(present) >= FEWEST_NOTES and rows < FEWEST_PER_CLASS * len(present):
        return (
            f"holds {len(present):,} different values in {rows:,} rows, which are notes "
            "or numbers of rows, not classes"
        )
    long = sum(len(item.name) > LONGEST_CLASS_NAME for item in present)
    if long:
        return (
            f"{long:,} of its {len(present):,} values have more than {LONGEST_CLASS_NAME} letters, "
            "which are notes, not classes"
        )
    return ""


def _only_private(dataset: Dataset) -> int:
    """Count the classes that no public row carries: their names would be released by being listed."""
    private = set(dataset.train.labels.tolist()) - set(dataset.validation.labels.tolist())
    names = dataset.label_names or ()
    return sum(not is_blank(names[label]) for label in private)


def _warnings(check: DataCheck, dataset: Dataset, *, claims: bool) -> Iterator[str]:
    for names in check.similar_classes:
        yield (
            f"classes that differ in spelling alone: {_quoted(names)}; declare task.class_names and let "
            "task.clean = ['label_spelling'] match them"
        )
    for names in check.similar_owners:
        yield f"owners that differ in spelling alone: {_quoted(names)}; each would get a budget of its own"
    yield from _shape_warnings(check)
    gaps = gap_names([item.name for item in check.classes])
    missing = [item for item in check.classes if item.name in gaps]
    if missing:
        yield (
            f"{_quoted([item.name for item in missing])} is a class of "
            f"{sum(m.rows for m in missing):,} rows; is it a gap?"
        )
    if check.empty_classes:
        yield f"classes without any row: {_some(check.empty_classes)}"
    single = sum(item.rows == 1 for item in check.owners)
    if single * 2 > len(check.owners):
        yield (
            f"{single:,} of {len(check.owners):,} owners hold a single row; does "
            f"{check.owner_column!r} name owners?"
        )
    if claims and dataset.names_from == "column":
        yield "class names are read from rows and taken to be public; declare them with task.class_names"
    if check.blank_texts:
        yield f"{check.blank_texts:,} texts are blank; task.clean = ['blank_rows'] leaves them out"
    if check.shared:
        yield (
            f"{check.shared:,} private rows stand word for word among the public "
            "ones, where nothing protects them"
        )
    if check.contradicting:
        yield f"{check.contradicting:,} rows are the same as others under another label"
    if check.garbled:
        yield (
            f"{check.garbled:,} texts show traces of a wrong encoding; save the file "
            "as UTF-8, or set task.encoding"
        )
    if check.cut is not None and check.cut > 0.5:
        yield f"{check.cut:.0%} of the texts are cut at task.max_length = {check.max_length}; raise it"
    if check.answerless:
        yield (
            f"{check.answerless:,} of {check.rows:,} prompts or chats hold no answer, and nothing is learned "
            "from them; fill it, or leave them out"
        )
    if check.unanswered and check.unanswered > check.answerless / max(1, check.rows) + 0.005:
        yield (
            f"{check.unanswered:.0%} of the answers lie beyond task.max_length = {check.max_length}, and "
            "nothing is learned from them; raise it"
        )


def _shape_warnings(check: DataCheck) -> Iterator[str]:
    """Warn of names that are no single class: several in one cell, lists, dates."""
    names = [item.name for item in check.classes]
    plain = {name.strip().casefold() for name in names}
    several = [name for name in names if _parts(name) and any(part in plain for part in _parts(name))]
    lists = [name for name in names if name.strip().startswith(("[", "{")) and len(name.strip()) > 1]
    if several or lists:
        yield (
            f"{_some([*several, *lists])}: several labels in one cell count as a class of their own; give "
            "every row one label, or a column for each"
        )
    if names and all(_DATE.fullmatch(name.strip()) for name in names):
        yield "all classes are dates; does task.label_column name the column of the classes?"


def _parts(name: str) -> list[str]:
    """Return the pieces of a name that holds several, an empty list for one."""
    pieces = [piece.strip().casefold() for piece in re.split(r"[;,|/+]", name)]
    if len(pieces) > 1 and all(pieces):
        return pieces
    return []


def gap_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that usually say that nothing was entered, such as nan.

    >>> gap_names(["good", "NaN", "n/a"])
    ('NaN', 'n/a')
    """
    return tuple(name for name in names if name.strip().casefold() in _MISSING)


def lines(check: DataCheck) -> list[str]:
    """Write a data check for the terminal of the person who holds the rows."""
    source = ""
    if check.held_out:
        source = f", {check.held_out:,} of them taken from the rows"
    written = [
        "data check (for you: these counts stand in no report)",
        f"  rows     {check.rows:,} private, {check.public_rows:,} public{source}",
    ]
    if check.classes:
        written.append(f"  classes  {len(check.classes):,}: {_named(check.classes)}")
    if check.owners:
        written.append(f"  owners   {len(check.owners):,} by {check.owner_column!r}: {_named(check.owners)}")
    counts = (
        (check.blank_texts, "blank texts"),
        (check.repeated, "repeated rows"),
        (check.shared, "private rows that are public too"),
        (check.garbled, "texts with traces of a wrong encoding"),
    )
    written.append("  counts   " + ", ".join(f"{count:,} {what}" for count, what in counts))
    if check.cut is not None:
        written.append(f"  lengths  {check.cut:.0%} of the texts are cut at max_length = {check.max_length}")
    for note in check.notes:
        written.append(f"  note     {note}")
    for warning in check.warnings:
        written.append(f"  warning  {warning}")
    return written + [f"  problem  {problem}" for problem in check.problems]


def class_counts(dataset: Dataset) -> tuple[NamedCount, ...]:
    """Count the rows of every class over both parts, in the order of the classes."""
    if dataset.label_names is None:
        return ()
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    counts = np.bincount(labels, minlength=len(dataset.label_names)).tolist()
    return tuple(
        NamedCount(name=name, rows=rows) for name, rows in zip(dataset.label_names, counts, strict=True)
    )


def owner_counts(examples: Examples, column: str) -> tuple[NamedCount, ...]:
    """Count the rows of every owner, the largest first."""
    counts = Counter(str(value) for value in _owner_values(examples, column) if not is_blank(value))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(NamedCount(name=name, rows=rows) for name, rows in ranked)


def _owner_values(examples: Examples, column: str) -> list[object]:
    if column and column in examples.columns:
        return as_list(examples.columns[column])
    return []


def similar_names(counts: Sequence[NamedCount]) -> tuple[tuple[str, ...], ...]:
    """Group names that differ in case, accents, blanks or marks alone, or in one letter where one of them is
    rare.

    >>> counts = {"neg": 9, "Neg ": 1, "pos": 9}
    >>> similar_names([NamedCount(name=name, rows=rows) for name, rows in counts.items()])
    (('Neg ', 'neg'),)
    """
    groups: dict[str, list[str]] = {}
    for item in counts:
        groups.setdefault(_bare(item.name), []).append(item.name)
    similar = []
    for names in groups.values():
        if len(names) > 1:
            similar.append(tuple(sorted(names)))
    return (*similar, *_misspelt(counts))


def _bare(name: str) -> str:
    """Return what a name looks like to a person who reads it quickly; equal numbers look alike."""
    if _NUMBER.fullmatch(name.strip()):
        return f"{float(name):g}"
    unescaped = html.unescape(visible(name)).casefold()
    letters = unicodedata.normalize("NFKD", unescaped.translate(_LOOK_ALIKE))
    words = ""
    for letter in letters:
        if not unicodedata.combining(letter):
            words += letter if letter.isalnum() else " "
    if any(map(str.isdigit, words)):  # 1 2 is not 12
        return " ".join(words.split()) or name
    return "".join(words.split()) or name


def _misspelt(counts: Sequence[NamedCount]) -> Iterator[tuple[str, ...]]:
    """Pair each rare name with a tenfold commoner one that is a single letter away."""
    ranked = sorted(counts, key=lambda item: -item.rows)[:MOST_COMPARED]
    for rare in ranked:
        common = (item.name for item in ranked if item.rows >= 10 * rare.rows)
        close = next((name for name in common if _one_letter_apart(_bare(name), _bare(rare.name))), None)
        if close is not None:
            yield (close, rare.name)


def _one_letter_apart(first: str, second: str) -> bool:
    """Tell whether one letter was changed, added or lost; short names and names with numbers are never
    compared.
    """
    short, long = sorted((first, second), key=len)
    if len(short) < 5 or len(long) - len(short) > 1 or any(map(str.isdigit, short + long)) or short == long:
        return False
    same = next(
        (i for i, pair in enumerate(zip(short, long, strict=False)) if pair[0] != pair[1]), len(short)
    )
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]


def _texts(dataset: Dataset, examples: Examples) -> list[str]:
    """Return what is read of each row as one text."""
    columns = []
    for name in dataset.text_columns:
        columns.append(examples.columns[name])
    texts: list[str] = []
    if dataset.is_chat:
        for chat in columns[0]:
            texts.append("\n".join(content for _, content in json.loads(chat)))
        return texts
    for parts in zip(*columns, strict=True):
        texts.append("\n".join(map(str, parts)))
    return texts


def _answerless(dataset: Dataset) -> int:
    """Count the private prompts or chats without an answer, where the answers alone are learned."""
    if not dataset.answers_only:
        return 0
    if dataset.is_chat:
        chats = map(json.loads, dataset.train.columns[dataset.text_columns[0]])
        return sum(
            not any(role == "assistant" and not is_blank(words) for role, words in chat) for chat in chats
        )
    if dataset.answered:
        return sum(map(is_blank, dataset.train.columns[dataset.answered[-1]]))
    return 0


def _contents(dataset: Dataset, examples: Examples) -> list[Hashable]:
    """Return what makes two rows the same: their text, or their pixels where these are in memory."""
    if not dataset.image_column:
        return list(_texts(dataset, examples))
    images = examples.columns[dataset.image_column]
    if isinstance(images, LazyImages):
        return []
    contents: list[Hashable] = []
    for image in np.asarray(images):
        contents.append(image.tobytes())
    return contents


def _contradicting(dataset: Dataset, contents: Sequence[Hashable]) -> int:
    """Count the rows whose content has several labels."""
    if dataset.label_names is None or not contents:
        return 0
    labels: dict[Hashable, set[int]] = {}
    for content, label in zip(contents, dataset.train.labels.tolist(), strict=True):
        labels.setdefault(content, set()).add(label)
    return sum(len(labels[content]) > 1 for content in contents)


def _named(counts: Sequence[NamedCount]) -> str:
    shown = ", ".join(f"{_short(item.name)} {item.rows:,}" for item in counts[:MOST_SHOWN])
    rest = len(counts) - MOST_SHOWN
    return shown + (f" and {rest:,} more" if rest > 0 else "")


def _short(name: str) -> str:
    if len(name) <= 40:
        shown = name
    else:
        shown = name[:37] + "..."
    if shown != shown.strip() or not shown:
        return repr(shown)
    return shown


def _some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_SHOWN
    return ", ".join(map(_short, names[:MOST_SHOWN])) + (f" and {rest:,} more" if rest > 0 else "")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _quoted_for_toml(name: str) -> str:
    """Write a name as a string of TOML, with blanks and signs that nobody sees as numbers."""
    shown = ""
    for letter in name:
        written = json.dumps(letter, ensure_ascii=not (letter == " " or letter.isprintable()))
        shown += written[1:-1]
    return f'"{shown}"'


def _toml(present: Sequence[NamedCount]) -> str:
    """Write the line that declares the classes, or its beginning where there are many."""
    names = []
    for item in present:
        if not is_blank(item.name):
            names.append(_quoted_for_toml(item.name))
    return f"[{', '.join(names[:MOST_SHOWN])}{', ...' if len(names) > MOST_SHOWN else ''}]"
