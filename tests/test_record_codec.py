"""The one codec of records: nothing is lost, one record has one spelling,
and what does not fit is refused by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffm_secure import record_codec
from ffm_secure.config.schema import parse_toml
from ffm_secure.errors import ConfigError, RecordError
from ffm_secure.record_codec import read_json

ANY_FLOAT = st.floats(allow_nan=False)
TEXT = st.text(max_size=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    weight: float
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """One field of every form a record may have."""

    payload: bytes
    count: int
    rate: float
    name: str
    open: bool
    phase: Literal["private", "public"]
    cohort: tuple[int, ...]
    pairs: tuple[tuple[str, int], ...]
    lost: Mapping[int, str]
    inner: Inner
    others: tuple[Inner, ...]
    score: float | None = None
    free: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    run_id: bytes
    round: int
    cohort: tuple[int, ...]
    phase: Literal["private", "public"]
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFormat:
    format: int = 1
    name: str


INNER = st.builds(Inner, weight=ANY_FLOAT, label=st.none() | TEXT)
EVERYTHING = st.builds(
    Everything,
    payload=st.binary(max_size=8),
    count=st.integers(),
    rate=ANY_FLOAT,
    name=TEXT,
    open=st.booleans(),
    phase=st.sampled_from(["private", "public"]),
    cohort=st.lists(st.integers(0, 99), max_size=4).map(tuple),
    pairs=st.lists(st.tuples(TEXT, st.integers()), max_size=2).map(tuple),
    lost=st.dictionaries(st.integers(-999, 999), TEXT, max_size=3),
    inner=INNER,
    others=st.lists(INNER, max_size=2).map(tuple),
    score=st.none() | ANY_FLOAT,
    free=st.dictionaries(TEXT, st.integers() | TEXT | st.booleans() | st.none(), max_size=3),
)
ONE = Everything(
    payload=b"\x00\xff",
    count=3,
    rate=0.5,
    name="a\x1b[31m",
    open=True,
    phase="private",
    cohort=(1, 2),
    pairs=(("a", 1),),
    lost={10: "upload", 9: "share"},
    inner=Inner(weight=math.inf),
    others=(),
)


@given(record=EVERYTHING)
def test_every_record_comes_back_equal_and_in_the_same_bytes(record: Everything) -> None:
    data = record_codec.canonical_bytes(record)
    again = record_codec.from_bytes(Everything, data, "message")
    assert again == record
    assert record_codec.canonical_bytes(again) == data
    assert record_codec.from_json(Everything, record_codec.to_line(record), "line") == record


def test_the_canonical_form_is_written_down_here() -> None:
    plan = Message(run_id=b"\x01\xab", round=2, cohort=(0, 3), phase="public", share=0.5)
    assert record_codec.canonical_bytes(plan) == (
        b'{"cohort":[0,3],"format":1,"phase":"public","round":2,"run_id":"01ab","share":0.5}'
    )
    assert record_codec.encode(ONE)["lost"] == {"9": "share", "10": "upload"}
    assert record_codec.encode(ONE)["inner"] == {"weight": "infinity", "label": None}
    assert "\x1b" not in record_codec.to_line(ONE)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda data: b" " + data,
        lambda data: data.replace(b",", b", "),
        lambda data: json.dumps(dict(reversed(json.loads(data).items()))).encode(),
        lambda data: data.replace(b'"name":"a', b'"name":"\\u0061'),
        lambda data: data.replace(b'"rate":0.5', b'"rate":5e-1'),
        lambda data: data[:-1] + b',"count":3}',
        lambda data: data[:-1],
        lambda data: b"\xff" + data,
        lambda data: b"[" * 100_000,
    ],
)
def test_another_spelling_of_the_same_record_is_refused(spelling: Any) -> None:
    changed = spelling(record_codec.canonical_bytes(ONE))
    with pytest.raises(RecordError, match="message"):
        record_codec.from_bytes(Everything, changed, "message")


def test_equal_mappings_in_another_order_have_equal_bytes() -> None:
    turned = record_codec.decode(
        Everything, {**record_codec.encode(ONE), "lost": {"10": "upload", "9": "share"}}, "x"
    )
    assert record_codec.canonical_bytes(turned) == record_codec.canonical_bytes(ONE)


def test_a_field_added_later_is_filled_in_and_an_unknown_one_is_refused_by_name() -> None:
    older = record_codec.encode(ONE)
    del older["score"], older["free"]
    assert record_codec.decode(Everything, older, "line 1") == ONE
    with pytest.raises(RecordError, match=r"line 1\.colour: unknown field; known are payload, count"):
        record_codec.decode(Everything, {**older, "colour": 1}, "line 1")
    with pytest.raises(RecordError, match=r"line 1\.inner\.colour: unknown field"):
        record_codec.decode(Everything, {**older, "inner": {"weight": 1, "colour": 2}}, "line 1")
    del older["count"]
    with pytest.raises(RecordError, match=r"line 1\.count: missing"):
        record_codec.decode(Everything, older, "line 1")


WRONG: list[tuple[str, object]] = [
    ("payload", "0"),
    ("payload", "zz"),
    ("payload", "AB"),
    ("payload", "ab cd"),
    ("payload", 7),
    ("count", "3"),
    ("count", 3.0),
    ("count", True),
    ("rate", "0.5"),
    ("rate", "inf"),
    ("rate", True),
    ("rate", None),
    ("rate", 10**400),
    ("name", 3),
    ("open", 1),
    ("phase", "odd"),
    ("phase", ["private"]),
    ("cohort", 3),
    ("cohort", [1.5]),
    ("pairs", [["a", 1, 2]]),
    ("pairs", [["a"]]),
    ("lost", {"x": "y"}),
    ("lost", {"01": "y"}),
    ("lost", {"1": 2}),
    ("lost", []),
    ("inner", []),
    ("inner", {"weight": "heavy"}),
    ("others", [1]),
    ("score", "high"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RecordError, match=rf"record\.{name}"):
        record_codec.decode(Everything, {**record_codec.encode(ONE), name: value}, "record")


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _ in WRONG} == {item.name for item in fields(Everything)} - {"free"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "3"),
        ("rate", "0.5"),
        ("payload", "ab"),
        ("cohort", 3),
        ("cohort", "12"),
        ("phase", "odd"),
        ("inner", {}),
    ],
)
def test_what_could_not_be_read_back_is_never_written(name: str, value: object) -> None:
    values = {item.name: getattr(ONE, item.name) for item in fields(Everything)}
    with pytest.raises(RecordError, match=rf"Everything\.{name}"):
        record_codec.to_line(Everything(**{**values, name: value}))


def test_bytes_that_do_not_fit_show_in_no_message() -> None:
    for value in ("5ec2e7zz", "5ec2e7 5e"):
        with pytest.raises(RecordError) as caught:
            record_codec.decode(Everything, {**record_codec.encode(ONE), "payload": value}, "record")
        assert "5ec2e7" not in str(caught.value)


def test_messages_hold_no_control_character_of_what_was_read() -> None:
    older = record_codec.encode(ONE)
    for changed in (
        {"\x1b[2J": 1},
        {"name": ["\x1b[2J"]},
        {"lost": {"1": ["\x1b"]}},
        {"lost": {"\x1b": "a"}},
    ):
        with pytest.raises(RecordError) as caught:
            record_codec.decode(Everything, {**older, **changed}, "record")
        assert str(caught.value).isprintable()


def test_a_records_own_checks_speak_with_its_place() -> None:
    with pytest.raises(RecordError, match="line 4: rounds must be at least 1"):
        record_codec.from_json(Checked, '{"rounds":0}', "line 4")


def test_the_format_is_read_before_anything_else() -> None:
    assert record_codec.from_json(Checked, '{"rounds":1}', "x") == Checked(rounds=1)
    assert record_codec.to_line(Checked(rounds=1)) == '{"format":1,"rounds":1}'
    assert record_codec.to_line(OwnFormat(name="a")) == '{"format":1,"name":"a"}'
    for kind, text in (
        (Checked, '{"format":2,"speed":1}'),
        (OwnFormat, '{"format":2,"name":"a"}'),
        (OwnFormat, '{"name":"a"}'),
    ):
        with pytest.raises(RecordError, match=r"x\.format = (2|None): this version reads format 1 only"):
            record_codec.from_json(kind, text, "x")


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    table = {"a": np.float32(0.5), "b": [np.int64(3), -math.inf], "c": Checked(rounds=2)}
    assert record_codec.to_plain(table) == {"a": 0.5, "b": [3, "-infinity"], "c": {"rounds": 2}}
    with pytest.raises(RecordError, match=r"value\.a = 'set'"):
        record_codec.to_plain({"a": {1}})


@pytest.mark.parametrize("planted", ["nested", "pipe", "device", "folder", "no JSON"])
def test_a_small_json_file_is_read_or_refused_at_once(planted: str, tmp_path: Path) -> None:
    """Nesting was a traceback, a pipe waited for ever, and a device filled the memory."""
    path = tmp_path / "file.json"
    if planted == "pipe":
        os.mkfifo(path)
    elif planted == "device":
        path.symlink_to("/dev/zero")
    elif planted == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 200_000 if planted == "nested" else "{")
    with pytest.raises((ValueError, OSError)):
        read_json(path)


def test_a_run_file_without_end_is_refused_at_once() -> None:
    """It filled the memory of the machine."""
    with pytest.raises(ConfigError, match="must be at most"):
        parse_toml(Path("/dev/zero"))
