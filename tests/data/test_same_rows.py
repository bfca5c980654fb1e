"""The same rows in another form are the same rows to a ledger: letters nobody sees, chats, pictures,
numbers.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from defenses.dp import Charge, Ledger
from defenses.dp.events import GaussianEvent
from defenses.dp.records import (
    RecordKey,
    Records,
    canonical_pixels,
    canonical_text,
    earlier_person,
    earlier_text,
    name_records,
    person_content,
)
from ffm_secure.data.dataset import load
from ffm_secure.data.row_names import named

Edit = Callable[[str], str]
TEXTS = [
    f"Patientin Müller Nr. {number} hustet, “trocken” – seit {number % 9} Tagen, it's no flu"
    for number in range(40)
]
EVENT = GaussianEvent(
    unit="record", adjacency="add_remove", sampling="full", sampling_rate=1.0, noise_multiplier=2.0,
    steps=1, clip_norm=1.0, release="update",
)  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    opened = Ledger.open(tmp_path / "owner.sqlite")
    opened.grant("record", 100.0, 1e-5)
    return opened


def charge(ledger: Ledger, records: Records) -> None:
    blocks = ledger.blocks_for([records])[0]
    ledger.reserve(
        [Charge(owner="a", dataset="d", run="r", round=1, release="u", event=EVENT, blocks=blocks)]
    )


def known(ledger: Ledger, records: Records) -> int:
    """Count the rows whose account is not fresh."""
    count = 0
    for row in range(len(records)):
        blocks = ledger.known_blocks([records.take(np.array([row]))])
        count += ledger.epsilon_of(blocks, "record", 1e-5) > 0
    return count


def after_every_second(mark: str) -> Edit:
    return lambda text: "".join(letter + mark * (place % 2) for place, letter in enumerate(text))


EDITS: dict[str, Edit] = {
    "variation selector": after_every_second("\ufe0f"),
    "rare variation selector": after_every_second("\U000e0101"),
    "grapheme joiner": after_every_second("\u034f"),
    "Mongolian selector": after_every_second("\u180b"),
    "Hangul filler": after_every_second("\u3164"),
    "Khmer vowel nobody sees": after_every_second("\u17b4"),
    "no character": after_every_second("\ufffe"),
    "control characters": after_every_second("\x1b\x00\x7f\x84"),
    "a blank that is no space": lambda text: text.replace(" ", "\u2800"),
    "straight quotes": lambda text: text.replace("“", '"').replace("”", '"'),
    "curly apostrophe": lambda text: text.replace("'", "\u2019"),
    "backtick": lambda text: text.replace("'", "`"),
    "hyphen for a dash": lambda text: text.replace("–", "-"),
    "a long dash": lambda text: text.replace("–", "—"),
    "digits of another script": lambda text: text.translate({48 + n: 0x0660 + n for n in range(10)}),
    "Turkish capitals": lambda text: text.replace("i", "İ"),
    "UTF-8 read as ISO 8859-1": lambda text: text.encode().decode("latin-1"),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_nobody_sees_makes_no_fresh_row(edit: str, ledger: Ledger) -> None:
    """Each of these had a fresh account, for every row."""
    key = ledger.record_key()
    charge(ledger, name_records(key.contents(map(canonical_text, TEXTS))))
    edited = list(map(EDITS[edit], TEXTS))
    assert edited != TEXTS
    assert known(ledger, name_records(key.contents(map(canonical_text, edited)))) == len(TEXTS)
    others = [f"{text}, and sneezes" for text in edited]
    assert known(ledger, name_records(key.contents(map(canonical_text, others)))) == 0


@given(text=st.text())
def test_a_canonical_text_is_one(text: str) -> None:
    once = canonical_text(text)
    assert canonical_text(once.decode("utf-8", "surrogatepass")) == once


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    others = [{name: spoilt(cell) for name, cell in row.items()} for row in rows[:3]]
    for part, chosen in (("train", rows), ("validation", others)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return str(folder)


def spoilt(cell: Any) -> Any:
    return f"another {cell}" if isinstance(cell, str) and len(cell) > 1 else cell


def names(source: str, kind: Any, key: RecordKey) -> Records:
    records = named(load(source, kind=kind, base=Path(), seed=0, key=key), key).train.records
    assert records is not None
    return records


def test_rows_that_an_older_ledger_charged_are_known(ledger: Ledger, tmp_path: Path) -> None:
    """It compared dashes and curly quotes as they are."""
    key = ledger.record_key()
    charge(ledger, name_records(key.contents(map(earlier_text, TEXTS))))
    source = write(tmp_path / "x", [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)])
    assert known(ledger, names(source, "text_classification", key)) == len(TEXTS)


QUESTIONS = [
    (f"How long has patient {n} coughed by now?", f"For {n % 9} days and nights, {n}.") for n in range(30)
]
FORMS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "columns": lambda q, a: {"question": q, "answer": a},
    "chat": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "conversation": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "system prompt": lambda q, a: {
        "messages": [
            {"role": "system", "content": "You are a friendly doctor, and you never lie."},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    },
    "one text": lambda q, a: {"text": f"{q}\n{a}"},
}


@pytest.mark.parametrize("first", FORMS)
def test_a_question_and_its_answer_are_one_row_however_they_are_written(
    first: str, ledger: Ledger, tmp_path: Path
) -> None:
    """The same pairs as a chat had a fresh budget."""
    key = ledger.record_key()
    sources = {form: write(tmp_path / form, [FORMS[form](*pair) for pair in QUESTIONS]) for form in FORMS}
    charge(ledger, names(sources[first], "causal_lm", key))
    for form, source in sources.items():
        if {first, form} == {"one text", "system prompt"}:
            continue  # one text says nothing about where its parts begin
        assert known(ledger, names(source, "causal_lm", key)) == len(QUESTIONS), form


PICTURES = [np.random.default_rng(n).integers(0, 256, (12, 12, 3), dtype=np.uint8) for n in range(12)]


def gallery(folder: Path, pictures: list[Any], *, turned: bool = False) -> str:
    for part, chosen in (("train", pictures), ("validation", [255 - picture for picture in pictures[:4]])):
        for number, pixels in enumerate(chosen):
            place = folder / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            if turned:
                exif[0x0112] = 6
                pixels = np.rot90(pixels).copy()
            Image.fromarray(pixels).save(place / f"{number}.png", exif=exif if turned else None)
    return str(folder)


def test_one_picture_of_another_size_makes_no_fresh_rows(ledger: Ledger, tmp_path: Path) -> None:
    """It had all of them brought to one size, and every one was new."""
    key, kind = ledger.record_key(), "image_classification"
    charge(ledger, names(gallery(tmp_path / "same", PICTURES), kind, key))
    odd = np.zeros((14, 13, 3), dtype=np.uint8)
    mixed = names(gallery(tmp_path / "mixed", [*PICTURES, odd]), kind, key)
    assert known(ledger, mixed) == len(PICTURES)


def test_it_does_not_matter_which_way_was_first(ledger: Ledger, tmp_path: Path) -> None:
    key, kind = ledger.record_key(), "image_classification"
    odd = np.zeros((14, 13, 3), dtype=np.uint8)
    charge(ledger, names(gallery(tmp_path / "mixed", [*PICTURES, odd]), kind, key))
    assert known(ledger, names(gallery(tmp_path / "same", PICTURES), kind, key)) == len(PICTURES)


@pytest.mark.parametrize("turned_first", [False, True])
def test_a_picture_that_was_turned_upright_is_the_same(
    turned_first: bool, ledger: Ledger, tmp_path: Path
) -> None:
    """What a telephone notes in a tag another program writes into the pixels."""
    key, kind = ledger.record_key(), "image_classification"
    charge(ledger, names(gallery(tmp_path / "one", PICTURES, turned=turned_first), kind, key))
    again = names(gallery(tmp_path / "two", PICTURES, turned=not turned_first), kind, key)
    assert known(ledger, again) == len(PICTURES)


def test_pictures_that_an_older_ledger_charged_lying_are_known(ledger: Ledger, tmp_path: Path) -> None:
    key = ledger.record_key()
    lying = [canonical_pixels(np.rot90(pixels)) for pixels in PICTURES]
    charge(ledger, name_records(key.contents(lying)))
    records = names(gallery(tmp_path / "one", PICTURES, turned=True), "image_classification", key)
    assert known(ledger, records) == len(PICTURES)


@pytest.mark.parametrize(
    ("one", "same"), [(7, 7.0), ("7", "007"), (" 7", "7.00"), ("70", "7e1"), ("A 7", "a  7"), ("0.5", "0.50")]
)
def test_a_person_is_the_same_however_the_number_is_written(one: object, same: object) -> None:
    """A spreadsheet with one empty cell turns 7 into 7.0, and another drops leading noughts."""
    assert person_content(one) == person_content(same)
    assert person_content(one) != person_content("71")
    for value in (one, same):
        assert earlier_person(value) in (b"", b"person\x00" + earlier_text(str(value)))
