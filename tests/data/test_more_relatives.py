"""More small odd inputs of the kinds people bring: what a checker would think of next.

As in `test_relatives`: every key says what is right, and no error quotes a private value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ffm_secure.cli.init import init
from ffm_secure.data import chat, checks
from ffm_secure.data.dataset import load
from ffm_secure.data.suggest import Asked
from ffm_secure.errors import DataError
from tests.data.test_relatives import (
    CAUSAL,
    PICTURE,
    SECRET,
    TEXT,
    TEXTS,
    Case,
    beside,
    chats,
    every,
    image,
    is_colour,
    judge,
    labelled,
    parquet,
    pictures,
    raw,
    reads,
    refuses,
    rows,
    turns,
)

Write = Callable[[Path], object]
CYRILLIC = rows().replace("note", "заметка").encode("cp1251")


def objects(**columns: Any) -> Write:
    """Write JSON rows of the columns; a list gives a value a row, anything else stands in all."""
    table = []
    for number in range(12):
        table.append({key: v[number % len(v)] if isinstance(v, list) else v for key, v in columns.items()})
    return lambda folder: (folder / "train.json").write_text(json.dumps(table))


def more_pictures(*names: str) -> Write:
    """Write two folders of pictures, and further pictures under the names."""

    def write(folder: Path) -> None:
        pictures(image("L", 9))(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 6), 9).save(folder / name)

    return write


def renamed(write: Write, old: str, new: str) -> Write:
    def both(folder: Path) -> None:
        write(folder)
        (folder / old).rename(folder / new)

    return both


def twelve_bits(path: Path) -> None:
    Image.fromarray(np.full((6, 8), 4095, np.uint16)).save(path)


def nested(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name / "first").mkdir(parents=True)
        Image.new("L", (8, 6), 9).save(folder / "train" / name / "first" / "0.png")


LETTERS = {
    "Cyrillic letters are named, and not read as accents": refuses(raw(CYRILLIC), "'cp1251'"),
    "Cyrillic letters are read by their name": reads(
        raw(CYRILLIC), lambda d: "заметка" in every(d, "text")[0], encoding="cp1251", said="read as cp1251"
    ),
    "Cyrillic letters read as Western ones are seen": reads(
        raw(CYRILLIC), encoding="cp1252", said="traces of a wrong encoding"
    ),
    "Chinese signs read as Western ones are seen": reads(
        raw(rows().replace("note", "中文字符").encode("gb18030")), encoding="mixed", said="wrong encoding"
    ),
    "one byte of zero is no other encoding": reads(raw(rows().replace("note 3", "no\0te 3"))),
    "two-byte letters of a sheet with tabs are read": reads(
        raw(rows("\t").encode("utf-16"), "train.tsv"), said="read as utf-16"
    ),
}
TABLES = {
    "blank lines before the names are no names": reads(
        raw("\n  \n" + rows()), lambda d: set(every(d, "text")) == set(TEXTS)
    ),
    "a title before the names is told to go": refuses(raw("Export\n" + rows()), "seems to be a title"),
    "columns of nothing are left out": reads(
        raw(rows().replace("\n", ",,\n")),
        lambda d: [*d.train.columns] == ["text", "label"],
        said="left out 2 columns without a name and a value",
    ),
    "a separator too many in every row is named": refuses(
        raw(rows().replace("\n", ",\n").replace("label,", "label", 1)), "every line but the first ends with"
    ),
    "quotes escaped by a stroke are told what to be": refuses(
        raw("text,label\n" + f'"he said \\"{SECRET}\\" ",1\n' * 3), "inside a quoted field is written twice"
    ),
    "a first row with a date is no header": refuses(
        raw(f"2024-01-01,{SECRET},b\n2024-01-02,b,c\n"), "is a date or an address"
    ),
    "a first row with a number of a case is no header": refuses(
        raw(f"P-01,{SECRET},b\nP-02,b,c\n"), "written like those below it"
    ),
    "a part in capital letters is a part": reads(raw(rows(), "Train.CSV"), lambda d: len(d.train) > 0),
    "a part that is not read is said": reads(
        beside(raw(rows()), ("test.csv", rows().encode())), said="'test.csv' is not read"
    ),
    "a text of notes that no column name covers is said": reads(
        objects(text=TEXTS, label=[0, 1], context="what came before it"), said="not read: 'context'"
    ),
    "a file of a data frame is told how to be written": refuses(
        lambda folder: (folder / "train.feather").write_bytes(b"x"), "it holds train.feather"
    ),
    "another file of the folder is named": refuses(raw(rows(), "train.txt"), "it holds train.txt"),
}
JSON = {
    "a comma behind an object is seen": refuses(
        raw(json.dumps({"text": SECRET, "label": 0}) + ",\n", "train.jsonl"), "comma stands behind"
    ),
    "objects over several lines are told to be one list": refuses(
        raw(json.dumps({"text": SECRET, "label": 0}, indent=1) * 2, "train.json"), "as one list"
    ),
    "objects of Python are told what to be": refuses(
        raw(str({"text": SECRET, "label": 0}), "train.jsonl"), "looks like Python"
    ),
    "a key that one row has alone is counted and not shown": refuses(
        raw('{"text": "a", "label": 0}\n' + json.dumps({"text": "b", "label": 1, SECRET: 1}), "train.jsonl"),
        "line 2 has 1 more key than line 1;",
    ),
    "a key that a row lacks is named": refuses(
        raw('{"text": "a", "label": 0}\n{"text": "b"}\n', "train.jsonl"), "line 2 lacks 'label'"
    ),
    "an empty file says so": refuses(raw(" \n", "train.json"), "is empty"),
}
LABELS = {
    "whole floats are matched to declared numbers": reads(
        labelled(1.0, 2.0), lambda d: set(every(d, "label")) == {0, 1}, class_names=["1", "2"]
    ),
    "half floats are class numbers": reads(
        parquet(label=pa.array(np.array([0, 1] * 6, np.float16))), lambda d: set(every(d, "label")) == {0, 1}
    ),
    "yes or no or nothing: nothing is the gap": refuses(labelled(True, None, False), "nothing.*blank_rows"),
    "yes or no are left when gaps are left out": reads(
        labelled(True, None, False), lambda d: set(every(d, "label")) == {0, 1}, clean=["blank_rows"]
    ),
    "several labels in a cell are seen": reads(labelled("a;b", "a", "b"), said="several labels in one cell"),
    "lists in a cell are seen": reads(labelled('["a"]', '["b"]'), said="several labels in one cell"),
    "dates for classes are seen": reads(labelled("2024-01-01", "2024-01-02"), said="all classes are dates"),
    "one word or two are seen": reads(labelled("non smoker", "nonsmoker"), said="spelling alone"),
    "signs of a web page are seen": reads(labelled("a &amp; b", "a & b"), said="spelling alone"),
}
CHATS = {
    "roles beside words are a chat": reads(
        objects(messages={"role": ["user", "assistant"], "content": ["a", "b"]}),
        lambda d: chat.unpack(every(d, "messages")[0]) == [("user", "a"), ("assistant", "b")],
        kind=CAUSAL,
    ),
    "a gap among chats is counted": refuses(
        chats(turns("a", "b"), None), "no messages.*rows in all", kind=CAUSAL
    ),
    "a text among chats is counted": refuses(chats(turns("a", "b"), SECRET), "no JSON", kind=CAUSAL),
    "chats under other names are found": reads(
        chats(turns("a", "b"), column="dialogue"), lambda d: d.is_chat, kind=CAUSAL
    ),
    "chats that nobody answers are refused": refuses(
        chats(turns("a", roles=("user",))), "none of .* holds an answer", kind=CAUSAL
    ),
    "some chats that nobody answers are counted": reads(
        chats(turns("a", "b"), turns("a", roles=("user",))),
        said="prompts or chats hold no answer",
        kind=CAUSAL,
    ),
    "blank answers are refused": refuses(
        objects(prompt=TEXTS, completion=""), "none of .* holds an answer", kind=CAUSAL
    ),
    "a system prompt beside chats is said": reads(
        objects(system="be kind", messages=[turns("a", "b")]), said="not read: 'system'", kind=CAUSAL
    ),
    "what a question is about is read, too": reads(
        objects(question=TEXTS, context="c", answer="b"),
        lambda d: d.text_columns == ("context+question+answer",),
        kind=CAUSAL,
    ),
    "preferences are told to be one side": refuses(
        objects(prompt="a", chosen=SECRET, rejected="c"), "preferences .chosen and rejected", kind=CAUSAL
    ),
}
PICTURES = {
    "what notebooks leave behind is no class": reads(
        more_pictures("train/.ipynb_checkpoints/0.png"),
        lambda d: d.label_names == ("cat", "dog"),
        kind=PICTURE,
    ),
    "what archives leave behind is no class": reads(
        beside(pictures(image("L", 9)), ("train/__MACOSX/._0.png", b"x")),
        lambda d: d.label_names == ("cat", "dog"),
        kind=PICTURE,
    ),
    "what a finder leaves behind is no picture": reads(
        beside(pictures(image("L", 9)), ("train/cat/._0.png", b"x"), ("train/cat/Thumbs.db", b"x")),
        lambda d: len(every(d, "image")) == 12,
        said="1 '._0.png', 1 'Thumbs.db'",
        kind=PICTURE,
    ),
    "pictures beside the classes are said": reads(
        more_pictures("train/lost.png"), said="1 picture lies in no class folder", kind=PICTURE
    ),
    "folders inside classes are said": reads(
        more_pictures("train/cat/first/0.png"), said="not read: 'cat/first'", kind=PICTURE
    ),
    "classes a level too deep are told where they are": refuses(
        nested, "folders inside 'cat'; move them up", kind=PICTURE
    ),
    "folders in capital letters are parts": reads(
        renamed(more_pictures("validation/cat/0.png"), "validation", "Validation"),
        lambda d: (len(d.train), len(d.validation)) == (12, 1),
        kind=PICTURE,
    ),
    "a part of pictures that is not read is said": reads(
        more_pictures("test/cat/0.png"), said="'test' is not read", kind=PICTURE
    ),
    "twelve bits in sixteen are said to be dark": reads(
        pictures(twelve_bits), is_colour(15, 15, 15), said="4,095 of 65,535 become nearly black", kind=PICTURE
    ),
    "another suffix of JPEG is read": reads(
        pictures(image("RGB", (9, 9, 9), format="JPEG"), ".jfif"), lambda d: len(d.train) > 0, kind=PICTURE
    ),
    "pictures as text are refused and not shown": refuses(
        objects(image=SECRET * 20, label=[0, 1]), "180 letters and no name", kind=PICTURE
    ),
    "addresses of the network are refused": refuses(
        objects(image=f"https://{SECRET}/a.png", label=[0, 1]), "nothing is fetched", kind=PICTURE
    ),
}
ALL: dict[str, Case] = {**LETTERS, **TABLES, **JSON, **LABELS, **CHATS, **PICTURES}


@pytest.mark.parametrize("says", ALL)
def test_what_is_right(says: str, tmp_path: Path) -> None:
    judge(ALL[says], tmp_path)


def test_blanks_that_nobody_sees_are_written_out(tmp_path: Path) -> None:
    labelled("card\u00a0io", "card io", "b")(tmp_path)
    data = load(".", kind=TEXT, base=tmp_path, seed=0)
    (problem,) = checks.find_problems(data)
    assert 'class_names = ["b", "card io", "card\\u00a0io"]' in problem


def test_chats_that_nobody_answers_may_be_learned_whole(tmp_path: Path) -> None:
    chats(turns("a", roles=("user",)))(tmp_path)
    data = load(".", kind=CAUSAL, base=tmp_path, seed=0)
    assert checks.find_problems(data)
    assert checks.find_problems(replace(data, answers_only=False)) == ()


STARTED = {
    "whole floats": (labelled(1.0, 2.0), 'class_names = ["1", "2"]'),
    "a class of the public rows alone": (
        beside(labelled("a", "b"), ("validation.json", b'[{"text": "q", "label": "c"}]')),
        'class_names = ["a", "b", "c"]',
    ),
    "an encoding that is named": (raw(CYRILLIC), 'encoding = "cp1251"'),
}
NOT_STARTED = {
    "prices": (objects(text=TEXTS, label=[f"{number}.5" for number in range(12)]), "12 different values"),
    "letters of another alphabet": (raw(CYRILLIC), "--encoding"),
}


@pytest.mark.parametrize("says", STARTED)
def test_a_run_file_is_written_that_its_plan_accepts(says: str, tmp_path: Path) -> None:
    write, line = STARTED[says]
    write(tmp_path)
    asked = Asked(encoding="cp1251" if "encoding" in says else "")
    init(tmp_path, tmp_path / "run.toml", asked)
    assert line in (tmp_path / "run.toml").read_text()


@pytest.mark.parametrize("says", NOT_STARTED)
def test_no_run_file_is_written_that_would_publish_notes(says: str, tmp_path: Path) -> None:
    write, words = NOT_STARTED[says]
    write(tmp_path)
    with pytest.raises(DataError, match=words):
        init(tmp_path, tmp_path / "run.toml", Asked())
    assert not (tmp_path / "run.toml").exists()


def test_names_that_say_nothing_are_pointed_out(tmp_path: Path) -> None:
    labelled("good", "nan", "bad")(tmp_path)
    said = init(tmp_path, tmp_path / "run.toml", Asked())
    assert "look     'nan': declared as classes; empty those cells if nothing was entered there" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.feather", "to_parquet"), ("a.pkl", "to_parquet"), ("a.txt", "call it .csv"), ("a.gz", "unpack it")],
)
def test_a_file_that_is_named_itself_is_told_what_to_become(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=re.escape(words)):
        load(name, kind=TEXT, base=tmp_path, seed=0)
