"""The data check: what a plan says about rows to their owner, and what no run may begin with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffm_secure.config import run_file
from ffm_secure.data.checks import (
    DataCheck,
    NamedCount,
    _one_letter_apart,
    examine,
    find_problems,
    lines,
    require_sound,
    similar_names,
)
from ffm_secure.data.dataset import Dataset, load
from ffm_secure.data.memory import from_memory
from ffm_secure.errors import DataError
from tests.federation.helpers import table as run_table


def data_of(
    labels, *, public=None, texts=None, owners=None, kind="text_classification", **options
) -> Dataset:
    count = len(labels)
    columns = {"text": list(texts or [f"t{i}" for i in range(count)]), "label": list(labels)}
    if owners is not None:
        columns["site"] = list(owners)
    held = {"train": columns}
    if public is not None:
        held["validation"] = {name: [*values[:1]] * len(public) for name, values in columns.items()}
        held["validation"]["label"] = list(public)
        held["validation"]["text"] = [f"public {i}" for i in range(len(public))]
    return load(from_memory(held), kind=kind, base=Path("."), seed=0, **options)


# What is refused


def problem(data: Dataset, **options) -> str:
    (only,) = find_problems(data, **options)
    return only


def test_a_note_column_is_no_column_of_classes_and_none_of_it_is_shown():
    data = data_of([f"patient {i} came with a cough" for i in range(40)])
    said = problem(data)
    assert "40 different values in 40 rows" in said
    assert "set task.label_column" in said
    assert "cough" not in said
    assert "30 different values in 40 rows" in problem(data_of([f"n{i % 30}" for i in range(40)]))


def test_long_values_are_notes_even_where_they_repeat():
    data = data_of(["a" * 90, "b" * 90] * 20)
    assert "2 of its 2 values have more than 80 letters" in problem(data)


def test_numbers_of_rows_are_no_classes():
    assert "40 different values in 40 rows" in problem(data_of(list(range(40))))


def test_twenty_classes_of_four_rows_are_classes():
    assert (
        find_problems(data_of([f"c{i % 20}" for i in range(80)], public=[f"c{i}" for i in range(20)])) == ()
    )


@pytest.mark.parametrize("label", ["same", 0])
def test_one_class_is_refused_with_its_count(label):
    assert "all 20 rows are of one class" in problem(data_of([label] * 20))


@pytest.mark.parametrize(
    ("numbers", "empty", "count", "declared"),
    [
        ((1, 2), "leave out 0,", "3 classes", '["1", "2"]'),
        ((3, 900), "0, 1, 2, 4", "901 classes", '["3", "900"]'),
    ],
)
def test_a_model_head_is_never_widened_in_silence(numbers, empty, count, declared):
    data = data_of([numbers[i % 2] for i in range(40)])
    said = problem(data)
    for part in (empty, count, f"task.class_names = {declared}"):
        assert part in said
    names = [str(number) for number in numbers]
    mended = data_of([numbers[i % 2] for i in range(40)], class_names=names)
    assert (find_problems(mended), len(mended.label_names)) == ((), 2)


def test_stored_names_may_leave_a_class_empty_and_the_check_says_which(tmp_path):
    features = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}'
    table = pa.table({"text": [f"t{i}" for i in range(20)], "label": [0, 1] * 10})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / "train.parquet")
    check = examine(load(".", kind="text_classification", base=tmp_path, seed=0))
    assert (check.problems, check.empty_classes) == ((), ("z",))
    assert "classes without any row: z" in check.warnings


def test_blank_labels_are_counted():
    data = data_of(["a", "b", " ", ""] * 10, public=["a", "b"])
    assert "20 of 42 rows have a blank label" in problem(
        data
    )  # and nothing more: a blank is no name to declare
    assert find_problems(data_of(["a", "b", " ", ""] * 10, public=["a", "b"], clean=["blank_rows"])) == ()


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_owners_are_counted(blank):
    data = data_of(["a", "b"] * 10, public=["a", "b"], owners=["Mercy", "North", blank, "North"] * 5)
    assert "owner column 'site': 5 of 20 rows name no owner" in problem(data, owner_column="site")


def test_a_class_name_that_only_private_rows_carry_is_declared_or_refused():
    data = data_of(["a", "b", "rare disease", "b"] * 9, public=["a", "b"])
    said = problem(data)
    assert "1 class names occur in private rows alone" in said
    assert 'task.class_names = ["a", "b", "rare disease"]' in said
    assert find_problems(data, claims=False) == ()
    declared = data_of(
        ["a", "b", "rare disease", "b"] * 9, public=["a", "b"], class_names=["a", "b", "rare disease"]
    )
    assert find_problems(declared) == ()


def test_every_problem_is_said_at_once():
    data = data_of(["a", "b", "", "c"] * 9, public=["a"], owners=["x", ""] * 18)
    config = run_file.from_table(
        run_table(
            task={
                "kind": "text_classification",
                "data": "d",
                "clients": 4,
                "split": {"kind": "natural", "column": "site"},
            },
            privacy={"unit": "record", "epsilon": 1.0, "delta": 1e-5, "clip_norm": 1.0},
        )
    )
    with pytest.raises(DataError, match="memory: 3 problems") as caught:
        require_sound(data, config)
    for words in ("name no owner", "blank label", "private rows alone"):
        assert words in str(caught.value)


# What is counted


def test_counts_are_those_of_the_slow_definition():
    texts = ["one", "one", "two", " ", "three", "CafÃ©", "bad \ufffd", "one"]
    labels = ["a", "b", "a", "b", "a", "b", "a", "a"]
    data = data_of(labels, public=["a", "b"], texts=texts, owners=["M", "N"] * 4)
    data = dataclasses.replace(
        data,
        validation=dataclasses.replace(
            data.validation, columns={**data.validation.columns, "text": ["two", "other"]}
        ),
    )
    check = examine(data, owner_column="site")
    assert (check.rows, check.public_rows) == (8, 2)
    assert check.classes == (NamedCount(name="a", rows=6), NamedCount(name="b", rows=4))
    assert check.owners == (NamedCount(name="M", rows=4), NamedCount(name="N", rows=4))
    assert check.repeated == 2
    assert check.contradicting == 3
    assert check.shared == 1
    assert check.blank_texts == 1
    assert check.garbled == 2


def test_the_share_of_cut_texts_is_said_and_warned_of():
    data = data_of(["a", "b"] * 10)
    check = examine(data, lengths=np.array([3, 9, 9, 9]), max_length=8)
    assert check.cut == 0.75
    assert any("75% of the texts are cut at task.max_length = 8" in line for line in check.warnings)
    assert examine(data, lengths=np.array([8, 8]), max_length=8).cut == 0.0
    assert examine(data).cut is None


def test_answers_that_are_cut_off_are_warned_of():
    data = data_of(["a", "b"] * 10)
    check = examine(data, max_length=8, unanswered=0.25)
    assert any("25% of the answers lie beyond task.max_length = 8" in line for line in check.warnings)
    assert not any("answers" in line for line in examine(data, unanswered=0.0).warnings)


def test_repeated_pictures_are_seen():
    pixels = np.zeros((6, 4, 4), np.uint8)
    pixels[0] = 9
    memory = from_memory({"image": pixels, "label": np.arange(6) % 2})
    check = examine(load(memory, kind="image_classification", base=Path("."), seed=0))
    assert check.repeated in (3, 4)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("neg", "neg "), (("neg", "neg "),)),
        (("Cardiology", "cardiology", "CARDIOLOGY "), (("CARDIOLOGY ", "Cardiology", "cardiology"),)),
        (("Chirurgie", "Pädiatrie", "Padiatrie"), (("Padiatrie", "Pädiatrie"),)),
        (("follow-up", "follow up"), (("follow up", "follow-up"),)),
        (("male", "female"), ()),
        (("class 1", "class 2"), ()),
        (("+", "-"), ()),
    ],
)
def test_names_that_differ_in_spelling_alone_are_grouped(names, expected):
    assert similar_names([NamedCount(name=name, rows=50) for name in names]) == expected


def test_a_misspelt_name_is_found_only_where_it_is_rare():
    counts = [NamedCount(name="Cardiology", rows=100), NamedCount(name="Cardiolgy", rows=2)]
    assert similar_names(counts) == (("Cardiology", "Cardiolgy"),)
    counts = [NamedCount(name="hyperbole", rows=100), NamedCount(name="hyperboly", rows=90)]
    assert similar_names(counts) == ()


def distance(first: str, second: str) -> int:
    """Return the edit distance by its recursion."""
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return distance(first[1:], second[1:])
    return 1 + min(distance(first[1:], second), distance(first, second[1:]), distance(first[1:], second[1:]))


@given(st.text("ab", min_size=5, max_size=7), st.text("ab", min_size=5, max_size=7))
def test_one_letter_apart_is_edit_distance_one(first, second):
    assert _one_letter_apart(first, second) == (distance(first, second) == 1)


# How it is said


def test_the_lines_name_counts_owners_and_say_for_whom_they_are():
    data = data_of(["bad", "good"] * 10, public=["bad", "good"], owners=["Mercy", "North"] * 10)
    said = "\n".join(lines(examine(data, owner_column="site")))
    for words in ("for you", "2: bad 11, good 11", "2 by 'site': Mercy 10, North 10", "20 private, 2 public"):
        assert words in said


def test_a_data_check_is_no_part_of_any_record():
    from ffm_secure import records

    for value in vars(records).values():
        if dataclasses.is_dataclass(value):
            assert not any("DataCheck" in str(field.type) for field in dataclasses.fields(value))
    assert DataCheck.__module__ == "ffm_secure.data.checks"
