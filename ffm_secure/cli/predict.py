"""The command `predict`: answer texts or pictures with the model of a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ffm_secure.display.console import clear_errors, say
from ffm_secure.errors import ConfigError, DataError, StoreError

if TYPE_CHECKING:
    from ffm_secure.data.chat import Turn
    from ffm_secure.data.table import Table
    from ffm_secure.trainable.predictor import Prediction, Predictor

_LAYOUTS = {
    "template": "each text is a user's turn, written by the model's chat template as in training; the answer "
    "alone is shown",
    "lines": "each text is a user's turn, written as a line 'user: ...' as in training; the answer alone is "
    "shown",
    "answered": "each text is a prompt, with a line break behind it as in training; the answer alone is "
    "shown",
}


def predict(folder: Path, *, texts: Sequence[str], file: Path | None, json: bool) -> None:
    """Print one answer a line, in the order of the input."""
    if bool(texts) == (file is not None):
        raise ConfigError("predict", ["give --text (once or more) or --file, exactly one of them"])
    from ffm_secure.storage.run_directory import Store

    with clear_errors():
        predictor = load_predictor(folder)
        if file is not None:
            answers = _answer_file(predictor, file, Store.read(folder).config().task.encoding)
        else:
            answers = _answer_texts(predictor, texts)
    _say_how(predictor)
    say(answers, [_line(item) for item in answers], json=json)


def _say_how(predictor: Predictor) -> None:
    """Say, beside the answers, how the texts were put before a model that learned chats or prompts."""
    words = _LAYOUTS.get(predictor.export.layout, "")
    if words and predictor.export.task == "causal_lm":
        sys.stderr.write(f"note: {words}\n")


def load_predictor(folder: Path) -> Predictor:
    """Build the model of a run directory with what it trained."""
    from ffm_secure.config.schema import to_table
    from ffm_secure.storage.run_directory import Store
    from ffm_secure.strategies import merges_into_base
    from ffm_secure.trainable.predictor import ModelSource, Predictor

    config = Store.read(folder).config()
    if not (folder / "adapter").is_dir():
        raise StoreError(f"{folder}: has no adapter yet; finish the run first (ffm-secure run)")
    source = ModelSource(
        name=config.model.name,
        spec={**to_table(config.model.trainable), "folded": merges_into_base(config.federation.strategy)},
        seed=config.seed,
        dtype=config.model.dtype,
        random_weights=config.model.weights == "random",
    )
    return Predictor.load(folder / "adapter", source, base=folder)


def _answer_texts(predictor: Predictor, texts: Sequence[str]) -> list[Prediction]:
    if predictor.export.task.startswith("image"):
        raise ConfigError(
            "predict", ["the model reads pictures; give --file with a picture or a folder of them"]
        )
    if predictor.answers_chats:
        return predictor.chats([_turns(text) for text in texts])
    pairs = len(predictor.reads) == 2
    if not pairs:
        return predictor.texts([list(texts)])
    parts = []
    for text in texts:
        parts.append(text.split("\t"))
    if any(len(part) != 2 for part in parts):
        raise ConfigError(
            "predict", ["the model reads pairs; give the two texts of --text with a tab between them"]
        )
    return predictor.texts([[part[0] for part in parts], [part[1] for part in parts]])


def _answer_file(predictor: Predictor, file: Path, encoding: str) -> list[Prediction]:
    if not file.exists():
        raise ConfigError("predict", [f"--file = {str(file)!r}: does not exist"])
    if predictor.export.task.startswith("image"):
        return _answer_pictures(predictor, file)
    if file.suffix == ".txt":
        return _answer_texts(predictor, file.read_text(encoding="utf-8-sig").splitlines())
    table = _table(file, encoding)
    if predictor.answers_chats:
        return predictor.chats(_chats(predictor, table, file))
    columns = []
    for name in predictor.reads:
        columns.append(_column(table, name, file, answered=predictor.export.task == "causal_lm"))
    return predictor.texts(columns)


def _table(file: Path, encoding: str) -> Table:
    """Read a table as UTF-8 or what its mark says, else in the encoding the run read its rows in."""
    from ffm_secure.data.files import read_table

    try:
        return read_table(file)
    except DataError:
        if not encoding:
            raise
    return read_table(file, encoding)


def _turns(text: str) -> list[Turn]:
    """Read one text as a user's turn, or as a whole chat where it is the JSON of one."""
    from ffm_secure.data import chat

    if not chat.is_chat(text):
        return [("user", text)]
    try:
        return chat.turns_of(text)
    except ValueError as error:
        raise ConfigError("predict", [f"--text: a chat holds {error}; {chat.EXPECTED}"]) from None


def _chats(predictor: Predictor, table: Table, file: Path) -> list[list[Turn]]:
    """Return the chats of a table: of the columns a run read, those that are there."""
    from ffm_secure.data import chat

    (name,) = predictor.reads
    parts = [name] if name in table.columns else [part for part in name.split("+") if part in table.columns]
    if not parts:
        known = ", ".join(table.columns)
        raise ConfigError(
            "predict", [f"{file}: has no column {name!r}, which the model reads; it has {known}"]
        )
    chats: list[list[Turn]] = [[] for _ in range(len(table))]
    for part in parts:
        values = table.columns[part]
        if not any(map(chat.is_chat, values)):
            values = [[{"role": "user", "content": str(value)}] for value in values]
        packed = chat.chat_column(replace(table, columns={**table.columns, part: values}), part)
        for turns, row in zip(chats, packed, strict=True):
            turns += chat.unpack(row)
    return chats


def _column(table: Table, name: str, file: Path, *, answered: bool) -> list[str]:
    """Return a column the model reads, or put it together from those a run joined to it; the last of them is
    the answer where the model is to give it.
    """
    from ffm_secure.data.columns import check_text

    parts = name.split("+")
    if name in table.columns:
        parts = [name]
    elif answered and len(parts) > 1:
        parts = parts[:-1]
    absent = [part for part in parts if part not in table.columns]
    if absent:
        known = ", ".join(table.columns)
        raise ConfigError(
            "predict",
            [f"{file}: has no column {absent[0]!r}, which the model reads; it has {known}"],
        )
    check_text(table, parts)
    rows = zip(*(table.columns[part] for part in parts), strict=True)
    return ["\n".join(text for text in map(str, texts) if text) for texts in rows]


def _answer_pictures(predictor: Predictor, file: Path) -> list[Prediction]:
    from ffm_secure.data.images import SUFFIXES, decode

    if file.is_dir():
        paths = sorted(
            path for path in file.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."
        )
    else:
        paths = [file]
    if not paths:
        raise ConfigError(
            "predict", [f"--file = {str(file)!r}: holds no picture ({', '.join(sorted(SUFFIXES))})"]
        )
    side = predictor.trainable.backbone.image_size
    return predictor.pictures([decode(path, str(path), side=side) for path in paths])


def _line(item: Prediction) -> str:
    if item.score is None:
        return item.answer
    return f"{item.answer}\t{item.score:.4f}"
