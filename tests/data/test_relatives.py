"""Small odd inputs of the kinds people bring: each is read rightly, or refused with a name and a remedy.

Every case says in its key what is right. No case ends in anything but a data set or one error of ours, no
error quotes a private value, and what is decided on the way is said.
"""

from __future__ import annotations

import datetime
import io
import json
import re
import struct
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffm_secure.data import checks, chat
from ffm_secure.data.dataset import Dataset, load
from ffm_secure.errors import DataError

SECRET = "Xanthippe"  # stands in private cells alone, so no error may hold it
TEXT, CAUSAL, PICTURE, WRITING = (
    "text_classification",
    "causal_lm",
    "image_classification",
    "sequence_to_sequence",
)
TEXTS = [f"{SECRET} note {number}" for number in range(12)]
HALVES = [number % 2 for number in range(12)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How an input is written, and what is right: a refusal, what is read, or what is said of it."""

    write: Callable[[Path], object]
    kind: str = TEXT
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    holds: Callable[[Dataset], bool] = lambda data: True
    said: str = ""


def refuses(write: Callable[[Path], object], words: str, *, kind: str = TEXT, **options: Any) -> Case:
    return Case(write=write, refused=words, kind=kind, options=options)


def reads(
    write: Callable[[Path], object],
    holds: Callable[[Dataset], bool] = lambda data: True,
    *,
    said: str = "",
    kind: str = TEXT,
    **options: Any,
) -> Case:
    return Case(write=write, holds=holds, said=said, kind=kind, options=options)


def judge(case: Case, folder: Path) -> None:
    case.write(folder)
    try:
        data = load(".", kind=case.kind, base=folder, seed=0, **case.options)
        problems = checks.find_problems(data, claims=False)
        if problems:
            raise DataError("; ".join(problems))
    except DataError as error:
        shown = "".join(traceback.format_exception(error))
        assert case.refused, str(error)
        assert SECRET not in shown.replace(str(folder), "")
        assert re.search(case.refused, str(error)), str(error)
        assert ";" in str(error), "an error says what to do"
        return
    assert not case.refused, "it was read in silence"
    assert case.holds(data)
    check = checks.examine(data, claims=False)
    if case.said:
        assert re.search(case.said, "\n".join((*check.notes, *check.warnings)))


def every(data: Dataset, name: str) -> list[Any]:
    return [*data.train.column(name), *data.validation.column(name)]


# --- how inputs are written ---------------------------------------------------------------------------------


def raw(content: bytes | str, name: str = "train.csv") -> Callable[[Path], object]:
    if isinstance(content, str):
        content = content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def rows(separator: str = ",", end: str = "\n", header: str = "text,label") -> str:
    lines = [header.replace(",", separator)]
    lines += [f"{text}{separator}{label}" for text, label in zip(TEXTS, HALVES, strict=True)]
    return end.join(lines) + end


def labelled(*labels: Any) -> Callable[[Path], object]:
    """Write JSON rows that bear the labels in turn."""
    table = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(TEXTS)]
    return lambda folder: (folder / "train.json").write_text(json.dumps(table))


def parquet(**columns: Any) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table({"text": TEXTS} | columns), folder / "train.parquet")


def cycled(*values: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([values[i % len(values)] for i in range(12)], type=kind)


def chats(*chat_rows: Any, column: str = "messages") -> Callable[[Path], object]:
    table = [{column: chat_rows[i % len(chat_rows)]} for i in range(12)]
    return lambda folder: (folder / "train.json").write_text(json.dumps(table))


def turns(*contents: Any, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, Any]]:
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def pictures(save: Callable[[Path], object], suffix: str = ".png") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for name in ("cat", "dog"):
            (folder / "train" / name).mkdir(parents=True)
            for number in range(6):
                save(folder / "train" / name / f"{number}{suffix}")

    return write


def image(mode: str, color: Any, **options: Any) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, (8, 6), color).save(path, **options)


def split_colours(path: Path) -> None:
    """Save a picture that is red on the left as the sensor saw it, with the note that it was held upright."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4, 0] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def first_pixels(data: Dataset) -> np.ndarray:
    return np.asarray(data.train.column("image")[0])


def is_colour(*wanted: int) -> Callable[[Dataset], bool]:
    return lambda data: bool(np.abs(first_pixels(data).astype(int) - np.array(wanted)).max() <= 3)


def palette(path: Path) -> None:
    stored = Image.new("P", (8, 6), 1)
    stored.putpalette([0, 0, 0, 10, 200, 30])
    stored.save(path)


def several(path: Path) -> None:
    frames = [Image.new("L", (8, 6), 40 * number) for number in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def sixteen_bit_colour(path: Path) -> None:
    """Write a PNG of 16 bits a channel by hand: Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    line = b"\0" + struct.pack(">3H", 65_535, 257 * 100, 0) * 8
    header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line * 6)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def named_pictures(written: str) -> Callable[[Path], object]:
    """Write a table that names its pictures as `written` says, with {} for the number."""

    def write(folder: Path) -> None:
        (folder / "scans" / "a").mkdir(parents=True)
        for number in range(12):
            Image.new("L", (8, 6), 90).save(folder / "scans" / "a" / f"{number}.png")
        lines = [f"{written.format(number)},{('cat', 'dog')[number % 2]}" for number in range(12)]
        (folder / "train.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")

    return write


def saved(**parts: Any) -> Callable[[Path], object]:
    import datasets

    split = {name: datasets.Dataset.from_dict(columns) for name, columns in parts.items()}
    return lambda folder: datasets.DatasetDict(split).save_to_disk(folder)


BOTH = {"text": TEXTS, "label": HALVES}


def beside(write: Callable[[Path], object], *others: tuple[str, bytes]) -> Callable[[Path], object]:
    def both(folder: Path) -> None:
        write(folder)
        for name, content in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return both


def long_field(length: int) -> str:
    return f'text,label\n"{"a" * length}",0\n' + "".join(f"{text},1\n" for text in TEXTS)


# --- the cases ----------------------------------------------------------------------------------------------

LABELS = {
    "true and false are two classes": reads(labelled(True, False), lambda d: d.label_names == ("0", "1")),
    "true among numbers is refused": refuses(labelled(True, 1), "neither a whole number"),
    "whole floats are class numbers": reads(
        parquet(label=cycled(0.0, 1.0)), lambda d: set(d.train.labels) == {0, 1}
    ),
    "halves are no class numbers": refuses(parquet(label=cycled(0.0, 0.5)), "neither a whole number .*text"),
    "not-a-number is a gap": refuses(parquet(label=cycled(0.0, float("nan"))), "blank_rows"),
    "nothing is a gap": refuses(labelled(None, 1), "nothing.*blank_rows"),
    "a gap is left out when asked": reads(
        labelled(None, 0, 1),
        lambda d: len(every(d, "label")) == 8,
        clean=["blank_rows"],
        said="left out 4 rows",
    ),
    "numbers and words are refused with what to do": refuses(labelled("good", 1), "all labels as text"),
    "a number beyond any float is refused": refuses(labelled(10**400, 1), "neither a whole number"),
    "lists of labels are refused": refuses(labelled(["good"], ["bad"]), "a list.*text, or all as whole"),
    "objects are refused": refuses(labelled({"id": 1}), "a dict"),
    "dates are refused": refuses(
        parquet(label=cycled(datetime.date(2020, 1, 1), datetime.date(2021, 1, 1))), "a date"
    ),
    "decimals are refused": refuses(parquet(label=cycled(Decimal("1"), Decimal("0"))), "a Decimal"),
    "bytes are refused": refuses(parquet(label=cycled(b"a", b"b")), "a bytes"),
    "unlabelled rows of public data are refused": refuses(labelled(-1, 1), "outside 0 to"),
    "dictionary columns are words": reads(
        parquet(label=cycled("good", "bad").dictionary_encode()), lambda d: d.label_names == ("bad", "good")
    ),
    "wide integers are refused and not wrapped": refuses(
        parquet(label=cycled(2**64 - 1, 1, kind=pa.uint64())), "outside 0 to"
    ),
    "a blank without width is blank": refuses(labelled("good", "\u200b"), "blank label"),
    "a class in letters of two alphabets is seen": reads(
        labelled("Cardio", "\u0421ardio"), said="spelling alone"
    ),
    "a mark without width is seen": reads(labelled("ca\u200brdio", "cardio"), said="spelling alone"),
    "letters composed in two ways are one to the eye": reads(
        labelled("Caf\u00e9", "Cafe\u0301"), said="spelling alone"
    ),
    "letters composed in two ways are matched when asked": reads(
        labelled("Caf\u00e9", "Cafe\u0301", "bar"),
        lambda d: sorted(np.bincount(every(d, "label")).tolist()) == [4, 8],
        class_names=["Caf\u00e9", "bar"],
        clean=["label_spelling"],
    ),
    "numbers written in two ways are seen": reads(labelled("1", "1.0", "2"), said="spelling alone"),
    "very long labels are notes": refuses(labelled("a" * 300, "b"), "notes, not classes"),
    "one class is refused": refuses(labelled("good"), "one class"),
    "numbers that leave a class out are refused": refuses(labelled(1, 2), "leave out 0.*class_names"),
    "the text itself is no label": refuses(
        labelled(0, 1), "read as the label", label_column="text", text_column="text"
    ),
    "leading zeros are names": reads(
        raw(rows().replace(",0\n", ",01\n").replace(",1\n", ",10\n")), lambda d: d.label_names == ("01", "10")
    ),
}
TABLES = {
    "carriage returns end lines of an old Mac": reads(
        raw(rows(end="\r")), lambda d: set(every(d, "text")) == set(TEXTS)
    ),
    "two-byte letters without a mark are named": refuses(
        raw(rows().encode("utf-16-le")), "task.encoding.*'utf-16-le'"
    ),
    "two-byte letters the other way round too": refuses(raw(rows().encode("utf-16-be")), "'utf-16-be'"),
    "a named encoding is read": reads(
        raw(rows().replace("note", "n\u00f6te").encode("iso-8859-1")),
        lambda d: "n\u00f6te" in every(d, "text")[0],
        encoding="iso-8859-1",
        said="read as iso-8859-1",
    ),
    "a wrong encoding is counted": refuses(
        raw(rows().replace("note", "n\u00f6te").encode("cp1252")), "12 lines in all"
    ),
    "two marks of byte order are taken off": reads(
        raw("\ufeff".encode() + rows().encode()), lambda d: d.text_columns == ("text",)
    ),
    "a document in one field is read": reads(
        raw(long_field(200_000)), lambda d: max(map(len, every(d, "text"))) == 200_000
    ),
    "an open quote is refused by its line": refuses(
        raw('text,label\n"' + rows()[11:]), "line 2 .*check its quotes"
    ),
    "rows of other widths are counted": refuses(raw(rows() + f"{SECRET},a,1\n"), "line 14 has 3 fields"),
    "an empty file is refused": refuses(raw(""), "no rows"),
    "a header alone is refused": refuses(raw("text,label\n"), "no rows"),
    "blank lines are no rows": reads(
        raw("\n\n".join(rows().splitlines()) + "\n\n\n"), lambda d: len(every(d, "text")) == 12
    ),
    "two columns of one name are named": refuses(
        raw(rows(header="text,text")), r"same name \(columns 1 and 2\); rename"
    ),
    "another separator is named": refuses(raw(rows(separator=":")), "parts the fields; use commas"),
    "a packed table is told how to be unpacked": refuses(raw(b"\x1f\x8b", "train.csv.gz"), "train.csv.gz"),
    "a sheet is told how to be saved": refuses(raw(b"PK", "train.xlsx"), "train.xlsx"),
    "numbers instead of texts are refused": refuses(
        raw("text,label\n" + "12,0\n13,1\n" * 6), "int64, not text"
    ),
    "a line beyond the header is no column name": refuses(raw(rows()[11:]), "has no header line"),
}
JSON = {
    "a key named twice is refused": refuses(
        raw('{"text": "a", "text": "b", "label": 0}\n', "train.jsonl"), "names a key twice"
    ),
    "two parts in one file are told apart": refuses(
        raw(
            json.dumps({"train": [{"text": SECRET, "label": 0}], "test": [{"text": "b", "label": 1}]}),
            "train.json",
        ),
        "2 lists of rows \\('train', 'test'\\); write each",
    ),
    "a list of lists is refused": refuses(
        raw(json.dumps([[SECRET, 1]]), "train.json"), "item 0 is a list.*;|every row"
    ),
    "half a pair of surrogates is a text": reads(
        raw(json.dumps([{"text": f"a\ud800{i}", "label": i % 2} for i in range(12)]), "train.json"),
        lambda d: len(every(d, "text")) == 12,
    ),
    "a cut file is refused": refuses(
        raw(json.dumps([{"text": SECRET, "label": 0}])[:-4], "train.json"), "is not JSON"
    ),
    "columns of a data frame are told what to be": refuses(
        raw(json.dumps({"text": {"0": SECRET}, "label": {"0": 1}}), "train.json"), "write a list of objects"
    ),
    "nested texts are refused": refuses(
        raw(json.dumps([{"text": {"body": SECRET}, "label": 0}] * 4), "train.json"), "holds dict, not text"
    ),
    "a dictionary of languages is told to be columns": refuses(
        raw(json.dumps([{"source": {"en": SECRET, "de": "b"}, "target": "b"}] * 4), "train.json"),
        "each language into a column",
        kind=WRITING,
    ),
    "no rows is refused": refuses(raw("[]", "train.json"), "no rows"),
}
PARQUET = {
    "texts as bytes are refused": refuses(
        lambda folder: pq.write_table(
            pa.table({"text": [b"a"] * 4, "label": [0, 1] * 2}), folder / "train.parquet"
        ),
        "holds bytes, not text",
    ),
    "large strings are texts": reads(parquet(text=pa.array(TEXTS, pa.large_string()), label=cycled(0, 1))),
    "a text that is nothing is counted": refuses(
        parquet(text=pa.array([*TEXTS[:-1], None]), label=cycled(0, 1)), "holds nothing, not text"
    ),
    "a cut file is refused by name": refuses(
        lambda folder: (folder / "train.parquet").write_bytes(b"PAR1" + b"\0" * 40 + b"PAR1"),
        "train.parquet.*;",
    ),
    "a table without columns is refused": refuses(
        lambda folder: pq.write_table(pa.table({}), folder / "train.parquet"), "no rows"
    ),
}
CHATS = {
    "a system turn is a turn": reads(
        chats([{"role": "system", "content": "be kind"}, *turns("a", "b")]),
        lambda d: chat.unpack(every(d, "messages")[0])[0] == ("system", "be kind"),
        kind=CAUSAL,
    ),
    "a call of a tool without words is an empty turn": reads(
        chats(
            [
                *turns("a"),
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "three"},
            ]
        ),
        lambda d: (
            [role for role, _ in chat.unpack(every(d, "messages")[0])]
            == ["user", "assistant", "tool", "assistant"]
        ),
        kind=CAUSAL,
    ),
    "a turn without a role is counted": refuses(
        chats([{"content": SECRET}]), "without a role.*rows in all", kind=CAUSAL
    ),
    "parts of text are joined": reads(
        chats(turns([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "c")),
        lambda d: chat.unpack(every(d, "messages")[0])[0] == ("user", "ab"),
        kind=CAUSAL,
    ),
    "bare words among the parts are text": reads(
        chats(turns(["a ", {"type": "text", "text": "b"}], "c")),
        lambda d: chat.unpack(every(d, "messages")[0])[0] == ("user", "a b"),
        kind=CAUSAL,
    ),
    "pictures among the parts are refused": refuses(
        chats(turns([{"type": "image_url"}], SECRET)), "parts other than text", kind=CAUSAL
    ),
    "an empty chat is counted": refuses(chats([], turns("a", SECRET)), "no messages.*6 rows", kind=CAUSAL),
    "a chat of one object is read": refuses(
        chats({"role": "user", "content": SECRET}), "not text|messages", kind=CAUSAL
    ),
    "pairs of strings are refused": refuses(chats([["user", SECRET]]), ";", kind=CAUSAL),
    "two dialects in one table are read": reads(
        chats(
            [
                {"role": None, "from": "human", "content": None, "value": "a"},
                *turns("b", roles=("assistant",)),
            ]
        ),
        lambda d: chat.unpack(every(d, "messages")[0]) == [("user", "a"), ("assistant", "b")],
        kind=CAUSAL,
    ),
    "texts of Python are told what to be": refuses(
        chats(str(turns(SECRET, "b"))), "no JSON .*double quotes.*rows in all", kind=CAUSAL
    ),
    "texts of JSON are chats": reads(chats(json.dumps(turns("a", "b"))), lambda d: d.is_chat, kind=CAUSAL),
    "a chat that says nothing of an assistant is refused": refuses(
        chats(turns("a", "b", roles=("user",))), "turns of an assistant", kind=CAUSAL
    ),
}
PICTURES = {
    "a transparent picture is seen on white": reads(
        pictures(image("RGBA", (0, 0, 0, 0))), is_colour(255, 255, 255), kind=PICTURE
    ),
    "an opaque picture is as it is": reads(
        pictures(image("RGBA", (9, 80, 7, 255))), is_colour(9, 80, 7), kind=PICTURE
    ),
    "half transparent grey is mixed with white": reads(
        pictures(image("LA", (0, 128))), is_colour(127, 127, 127), kind=PICTURE
    ),
    "a palette gives its colours": reads(pictures(palette), is_colour(10, 200, 30), kind=PICTURE),
    "one bit is black and white": reads(pictures(image("1", 1)), is_colour(255, 255, 255), kind=PICTURE),
    "inks become colours": reads(
        pictures(image("CMYK", (0, 255, 255, 0), quality=95), ".jpg"), is_colour(254, 0, 0), kind=PICTURE
    ),
    "sixteen bits of grey are scaled": reads(
        pictures(image("I;16", 257 * 40)), is_colour(40, 40, 40), kind=PICTURE
    ),
    "sixteen bits of colour are scaled": reads(
        pictures(sixteen_bit_colour), is_colour(255, 100, 0), kind=PICTURE
    ),
    "floating numbers are refused by file": refuses(
        pictures(image("F", 0.5), ".tif"), "0.tif: .*floating", kind=PICTURE
    ),
    "colours of a lab are refused by file": refuses(
        pictures(image("LAB", (9, 9, 9)), ".tif"), "are LAB.*save it as RGB", kind=PICTURE
    ),
    "moving pictures are refused by file": refuses(
        pictures(several, ".gif"), "0.gif: holds 3 frames", kind=PICTURE
    ),
    "a cut picture is refused by file": refuses(
        pictures(lambda path: path.write_bytes(_cut())), "0.png: .*damaged.*11 pictures|damaged", kind=PICTURE
    ),
    "an empty file is refused by name": refuses(
        pictures(lambda path: path.write_bytes(b"")), "0.png: the picture is empty", kind=PICTURE
    ),
    "words called a picture are refused": refuses(
        pictures(lambda path: path.write_text(SECRET)), "0.png: not a readable", kind=PICTURE
    ),
    "a turned picture is turned back": reads(
        pictures(split_colours, ".jpg"),
        lambda d: (
            first_pixels(d).shape == (8, 6, 3)
            and first_pixels(d)[0, 3, 0] > 200 > 60 > first_pixels(d)[7, 3, 0]
        ),
        kind=PICTURE,
    ),
    "a strip is not unpacked to a huge square": reads(
        pictures(lambda path: Image.new("L", (1, 40_000), 70).save(path)),
        is_colour(70, 70, 70),
        kind=PICTURE,
        image_size=8,
    ),
    "names of files count from the table": reads(
        named_pictures("scans/a/{}.png"), lambda d: d.label_names == ("cat", "dog"), kind=PICTURE
    ),
    "names written on Windows are found": reads(
        named_pictures("scans\\a\\{}.png"), lambda d: len(d.train) > 0, kind=PICTURE
    ),
    "a name of no file is refused by its line": refuses(
        named_pictures("scans/b/{}.png"), "line 2: .*there is no file", kind=PICTURE
    ),
    "a name of a folder is refused": refuses(named_pictures("scans"), "there is no file", kind=PICTURE),
    "files of other kinds are said to be left out": reads(
        beside(pictures(image("L", 9)), ("train/cat/photo.heic", b"x"), ("train/fox/a.heic", b"x")),
        lambda d: d.label_names == ("cat", "dog"),
        said="'fox' holds no picture",
        kind=PICTURE,
    ),
}
SAVED = {
    "parts that are not read are said": reads(
        saved(train=BOTH, test=BOTH), said="the parts test are not read"
    ),
    "a folder without a train part is refused": refuses(saved(test=BOTH), "no part called train, only test"),
    "an empty part is refused": refuses(saved(train=BOTH, validation={"text": [], "label": []}), "no rows"),
    "parts with other columns are refused": refuses(
        saved(train=BOTH, validation={"body": TEXTS, "label": HALVES}), "no column 'text'"
    ),
}
WRITTEN = {
    "a prompt and its answer are two columns": reads(
        raw(json.dumps([{"prompt": t, "completion": "yes"} for t in TEXTS]), "train.json"),
        lambda d: d.text_columns == ("prompt", "completion"),
        kind=WRITING,
    ),
    "what is read may stand in several columns": reads(
        raw(json.dumps([{"instruction": "rate", "input": t, "output": "yes"} for t in TEXTS]), "train.json"),
        lambda d: (
            d.text_columns == ("instruction+input", "output")
            and every(d, "instruction+input")[0].startswith("rate\n")
        ),
        kind=WRITING,
    ),
    "one column alone is refused": refuses(
        raw(json.dumps([{"text": t} for t in TEXTS]), "train.json"),
        "a column to write|column to write",
        kind=WRITING,
    ),
    "one named column is refused": refuses(
        raw(json.dumps([{"text": t} for t in TEXTS]), "train.json"),
        "one to write last",
        kind=WRITING,
        text_column="text",
    ),
    "an answer that is blank is left out when asked": reads(
        raw(
            json.dumps([{"prompt": t, "completion": "" if i < 2 else "y"} for i, t in enumerate(TEXTS)]),
            "train.json",
        ),
        lambda d: len(every(d, "prompt")) == 10,
        kind=WRITING,
        clean=["blank_rows"],
        said="left out 2 rows",
    ),
}


def _cut() -> bytes:
    stored = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stored, "PNG")
    return stored.getvalue()[:900]


ALL = {**LABELS, **TABLES, **JSON, **PARQUET, **CHATS, **PICTURES, **SAVED, **WRITTEN}


@pytest.mark.parametrize("says", ALL)
def test_what_is_right(says: str, tmp_path: Path) -> None:
    judge(ALL[says], tmp_path)
