"""Files as people really have them:
separators, encodings, headers, JSON lists, saved folders, chats, odd pictures.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffm_secure.data import chat
from ffm_secure.data import images as data_images
from ffm_secure.data.columns import Kind
from ffm_secure.data.dataset import Dataset, load
from ffm_secure.data.delimited import guess_encoding
from ffm_secure.data.images import LazyImages
from ffm_secure.data.memory import from_memory
from ffm_secure.errors import DataError

TEXT, PICTURE, CAUSAL = "text_classification", "image_classification", "causal_lm"
ROWS = [(f"note {i}, with a comma and “quotes”", i % 2) for i in range(20)]


def read(source: str, base: Path, kind: Kind = TEXT, **options) -> Dataset:
    return load(source, kind=kind, base=base, seed=0, **options)


def rows_of(data: Dataset, *names: str) -> set[tuple]:
    columns = [[*data.train.column(name), *data.validation.column(name)] for name in names]
    return set(zip(*columns, strict=True))


def write_rows(
    path: Path, rows, *, separator: str = ",", header=("text", "label"), encoding: str = "utf-8"
) -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])


# Delimited tables


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_separator_is_seen_and_said(tmp_path, separator, word):
    write_rows(tmp_path / "train.csv", ROWS, separator=separator)
    data = read(".", tmp_path)
    assert rows_of(data, "text", "label") == set(ROWS)
    assert data.notes == (f"train.csv: fields are parted by {word}",)


def test_commas_in_most_texts_do_not_win_over_semicolons(tmp_path):
    write_rows(tmp_path / "train.csv", [("one, two", 0), ("three, four", 1)] * 9, separator=";")
    assert rows_of(read(".", tmp_path), "text", "label") == {("one, two", 0), ("three, four", 1)}


def test_the_line_that_excel_reads_the_separator_from_is_no_header(tmp_path):
    (tmp_path / "train.csv").write_text("sep=;\r\ntext;label\r\n" + "a;0\r\nb;1\r\n" * 5)
    assert rows_of(read(".", tmp_path), "text", "label") == {("a", 0), ("b", 1)}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides(tmp_path, encoding):
    write_rows(tmp_path / "train.csv", ROWS, encoding=encoding)
    data = read(".", tmp_path)
    assert rows_of(data, "text", "label") == set(ROWS)
    assert bool(data.notes) == (encoding != "utf-8-sig")


def test_another_encoding_is_refused_with_a_count_and_read_when_it_is_named(tmp_path):
    write_rows(tmp_path / "train.csv", ROWS, encoding="cp1252")
    with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(20 lines in all\).*task.encoding.*'cp1252'"):
        read(".", tmp_path)
    assert guess_encoding(tmp_path / "train.csv") == "cp1252"
    assert rows_of(read(".", tmp_path, encoding="cp1252"), "text", "label") == set(ROWS)
    write_rows(tmp_path / "train.csv", ROWS, encoding="utf-16-le")
    assert guess_encoding(tmp_path / "train.csv") == "utf-16-le"
    assert rows_of(read(".", tmp_path, encoding="utf-16-le"), "text", "label") == set(ROWS)


SECRET = "Anna Beispiel was seen on Monday for a cough that would not go away"


@pytest.mark.parametrize(
    "rows",
    [
        [(1, SECRET), (2, "b"), (1, "c")],
        [("good", "Anna"), ("bad", "b"), ("good", "c")],
        [(SECRET, "x"), ("b", "y"), ("c", "x")],
        [("Anna", "3.5"), ("b", "4"), ("c", "5")],
    ],
)
def test_a_table_without_a_header_is_refused_and_none_of_it_is_shown(tmp_path, rows):
    for name, separator in (("train.csv", ","), ("train.csv", ";"), ("train.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows(rows * 5)
        with pytest.raises(DataError, match=r"has no header line .*first line") as caught:
            read(name, tmp_path)
        assert "Anna" not in str(caught.value)
        (tmp_path / name).unlink()


def test_a_column_name_that_reads_like_a_row_is_never_listed(tmp_path):
    pq.write_table(pa.table({SECRET: ["a", "b"], "y": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no label column among \(column 1\), 'y'"):
        read(".", tmp_path)


def test_an_unnamed_index_and_blanks_around_names_are_no_trouble(tmp_path):
    (tmp_path / "train.csv").write_text(", Text ,LABEL\n" + "".join(f"{i},a{i},{i % 2}\n" for i in range(10)))
    data = read(".", tmp_path)
    assert (data.text_columns, data.label_column) == (("Text",), "LABEL")


def test_ragged_rows_are_counted(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\na;1\nb;c;2\nd\ne;0\n")
    with pytest.raises(
        DataError, match=r"line 3 has 3 fields, the header 2 \(2 such lines in all\).*semicolons"
    ):
        read(".", tmp_path)


# JSON


def test_json_comes_as_list_columns_or_lines(tmp_path):
    rows = [{"text": text, "label": label} for text, label in ROWS]
    for value in (rows, {"data": rows}, {"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}):
        (tmp_path / "train.json").write_text(json.dumps(value))
        assert rows_of(read(".", tmp_path), "text", "label") == set(ROWS)
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(read(".", tmp_path), "text", "label") == set(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, 3]', "item 1 is a int"),
        ('[{"text": "a"}, {"body": "b"}]', "item 1 lacks 'text' and has 1 more key than item 0; give all"),
        ('{"a": [1], "b": {"c": 1}}', "without one list of rows"),
        ("[{", "is not JSON"),
        ("3", "is a int"),
        ("[]", "holds no rows"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path, content, message):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(".", tmp_path)


# Folders of save_to_disk


def saved(folder: Path, rows) -> None:
    import datasets

    part = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": part, "validation": part.select(range(4))}).save_to_disk(folder)


def test_a_folder_of_save_to_disk_is_read_with_its_parts(tmp_path):
    saved(tmp_path / "both", [{"text": text, "label": label} for text, label in ROWS])
    data = read("both", tmp_path)
    assert (len(data.train), len(data.validation), data.held_out) == (20, 4, 0)
    assert rows_of(data, "text", "label") == set(ROWS)
    alone = read("both/train", tmp_path)
    assert len(alone.train) + alone.held_out == 20
    assert alone.held_out == len(alone.validation) > 0


def test_a_damaged_saved_folder_names_the_file(tmp_path):
    saved(tmp_path, [{"text": text, "label": label} for text, label in ROWS])
    file = next((tmp_path / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"{file.name}: not a readable arrow file"):
        read(".", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name}: is missing"):
        read(".", tmp_path)
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(DataError, match="lists no data files"):
        read(".", tmp_path)


# Chats


CHAT = [("user", "2 and 2?"), ("assistant", "4"), ("user", "and 3?"), ("assistant", "7")]


def messages(role: str, content: str, turns=CHAT) -> list[dict[str, str]]:
    return [{role: who, content: words} for who, words in turns]


def test_both_dialects_of_chats_say_the_same(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    shared = [(names[who], words) for who, words in CHAT]
    for column, value in (
        ("messages", messages("role", "content")),
        ("conversations", messages("from", "value", shared)),
        ("messages", json.dumps(messages("role", "content"))),
        ("messages", [{"role": who, "content": [{"type": "text", "text": words}]} for who, words in CHAT]),
    ):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps({column: value}) + "\n" for _ in range(4)))
        data = read(".", tmp_path, CAUSAL)
        assert (data.text_columns, data.is_chat) == ((column,), True)
        assert chat.unpack(data.train.column(column)[0]) == CHAT
    assert read(".", tmp_path, "masked_lm").train.column("messages")[0] == "2 and 2?\n4\nand 3?\n7"


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ([], "no messages"),
        ([{"content": "a"}], "a message without a role"),
        ([{"role": "user", "content": 3}], "whose content is a int"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"parts other than text \(image\)"),
    ],
)
def test_a_chat_of_another_shape_is_counted_and_named(tmp_path, odd, message):
    sound = [
        {"messages": [*messages("role", "content"), {"role": "user", "content": f"{i}"}]} for i in range(8)
    ]
    (tmp_path / "train.json").write_text(json.dumps([*sound, *[{"messages": odd}] * 12]))
    with pytest.raises(DataError, match=rf"item \d+: column 'messages' holds .*{message}.* rows in all"):
        read(".", tmp_path, CAUSAL, validation_fraction=0.5)


def test_a_classifier_says_that_it_reads_no_chats(tmp_path):
    rows = [{"messages": messages("role", "content"), "label": i % 2} for i in range(9)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="chats are read by causal_lm"):
        read(".", tmp_path, text_column="messages")


def test_the_answer_of_a_prompt_is_known(tmp_path):
    rows = [{"instruction": "rate", "input": "", "output": f"{i}"} for i in range(9)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = read(".", tmp_path, CAUSAL)
    assert data.answered == ("instruction", "input", "output")
    assert read(".", tmp_path, "masked_lm").answered == ()


# Pictures


def ramp() -> np.ndarray:
    return np.linspace(0, 65_535, 64).reshape(8, 8).astype(np.uint16)


def picture_folder(folder: Path, name: str, save) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            save(folder / label / f"{i}{name}")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_grey_is_scaled_by_its_range(tmp_path, suffix):
    picture_folder(tmp_path, suffix, lambda path: Image.fromarray(ramp()).save(path))
    pixels = read(".", tmp_path, PICTURE).train.column("image")
    assert (pixels[0, ..., 0] == ramp() // 257).all()
    np.savez(tmp_path / "a.npz", image=np.stack([ramp()] * 6), label=np.arange(6) % 2)
    stored = read("a.npz", tmp_path, PICTURE).train.column("image")
    assert (stored[0] == pixels[0]).all()


@pytest.mark.parametrize(("mode", "word"), [("F", "floating-point"), ("I", "32 bits")])
def test_numbers_without_a_known_range_are_refused_by_file(tmp_path, mode, word):
    values = np.ones((8, 8), np.float32 if mode == "F" else np.int32)
    picture_folder(tmp_path, ".tif", lambda path: Image.fromarray(values).save(path))
    with pytest.raises(
        DataError, match=rf"cat/0.tif: its pixels are .*{word}.*7 pictures in all; also .*cat/1.tif"
    ):
        read(".", tmp_path, PICTURE)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".bmp", ".PNG"])
def test_more_formats_are_read(tmp_path, suffix):
    grey = np.full((8, 8), 120, np.uint8)
    picture_folder(tmp_path, suffix, lambda path: Image.fromarray(grey).save(path))
    assert (read(".", tmp_path, PICTURE).train.column("image") == 120).all()


def test_several_frames_are_refused_by_file(tmp_path):
    frames = [Image.new("L", (8, 8), 40 * i) for i in range(3)]
    for suffix in (".gif", ".tif"):
        folder = picture_folder(
            tmp_path / suffix[1:],
            suffix,
            lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]),
        )
        with pytest.raises(DataError, match=rf"cat/0{suffix}: holds 3 frames"):
            read(str(folder), tmp_path, PICTURE)


def test_damaged_pictures_are_named_by_file_even_where_they_are_decoded_late(tmp_path, monkeypatch):
    picture_folder(tmp_path, ".png", lambda path: Image.fromarray(ramp().astype(np.uint8)).save(path))
    for name in ("cat/2.png", "dog/0.png", "dog/3.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:60])
    expected = r"cat/2.png: .*damaged.*[23] pictures in all; also .*dog/3.png"  # one may be in the other part
    with pytest.raises(DataError, match=expected):
        read(".", tmp_path, PICTURE, validation_fraction=1e-9)
    monkeypatch.setattr(data_images, "EAGER_BYTES", 0)
    with pytest.raises(DataError, match=r"damaged"):
        read(".", tmp_path, PICTURE)


def test_a_table_names_its_pictures(tmp_path):
    picture_folder(tmp_path / "scans", ".png", lambda path: Image.new("RGB", (8, 8), (9, 0, 0)).save(path))
    names = [(f"scans/{label}/{i}.png", label) for label in ("cat", "dog") for i in range(4)]
    write_rows(tmp_path / "train.csv", names, header=("file_name", "label"))
    data = read(".", tmp_path, PICTURE)
    assert data.label_names == ("cat", "dog")
    assert (data.train.column("file_name")[..., 0] == 9).all()
    write_rows(tmp_path / "train.csv", [*names, ("scans/cat/9.png", "cat")], header=("file_name", "label"))
    with pytest.raises(
        DataError, match=r"train.csv: line 10: holds no picture: there is no file .*scans/cat/9.png"
    ):
        read(".", tmp_path, PICTURE, validation_fraction=1e-9)


def test_a_metadata_table_beside_the_pictures_is_read(tmp_path):
    picture_folder(tmp_path / "train", ".png", lambda path: Image.new("RGB", (8, 8), (9, 0, 0)).save(path))
    names = [(f"{label}/{i}.png", y) for y, label in enumerate(("cat", "dog")) for i in range(4)]
    write_rows(tmp_path / "train" / "metadata.csv", names, header=("file_name", "label"))
    assert len(read(".", tmp_path, PICTURE).train) == 7


def test_large_columns_stay_encoded_and_say_the_same(tmp_path, monkeypatch):
    picture_folder(tmp_path, ".png", lambda path: Image.fromarray(ramp()).save(path))
    eager = read(".", tmp_path, PICTURE).train.column("image")
    monkeypatch.setattr(data_images, "EAGER_BYTES", 0)
    lazy = read(".", tmp_path, PICTURE).train.column("image")
    assert isinstance(lazy, LazyImages)
    assert (lazy[:] == eager).all()


# Labels and rows that are blank, repeated or misspelt


MESSY = [
    *[
        (f"heart {i}", ("Cardiology", "cardiology ", "CARDIOLOGY")[i % 3], ("Mercy", "North")[i % 2])
        for i in range(12)
    ],
    *[(f"skin {i}", "Dermatology", ("Mercy", "North")[i % 2]) for i in range(12)],
]
CLEAN = ("blank_rows", "repeated_rows", "label_spelling")


def write_messy(path: Path, *more) -> None:
    write_rows(path, [*MESSY, *more], header=("text", "label", "hospital"))


def test_cleaning_leaves_out_what_the_run_file_says_and_counts_it(tmp_path):
    write_messy(
        tmp_path / "train.csv",
        ("", "Dermatology", "Mercy"),
        ("x", " ", "Mercy"),
        ("y", "Cardiology", ""),
        MESSY[0],
    )
    data = read(
        ".", tmp_path, class_names=["Cardiology", "Dermatology"], clean=CLEAN, owner_column="hospital"
    )
    assert rows_of(data, "text") == {(text,) for text, _, _ in MESSY}
    assert np.bincount([*data.train.labels, *data.validation.labels]).tolist() == [12, 12]
    assert any("left out 3 rows with a blank" in note for note in data.notes)
    assert any("left out 1 rows that repeat" in note for note in data.notes)


def test_a_repeat_at_another_owner_stays(tmp_path):
    write_messy(tmp_path / "train.csv", ("heart 0", "Cardiology", "North"))
    data = read(".", tmp_path, clean=["repeated_rows"], owner_column="hospital")
    assert len(data.train) + len(data.validation) == 25


def test_a_label_that_is_not_declared_is_counted_and_not_shown(tmp_path):
    write_messy(tmp_path / "train.csv", ("x", "secret diagnosis", "Mercy"))
    expected = (
        r"the label in column 'label' is not one of class_names \(8 rows in all\) \(8 differ by capital"
    )
    with pytest.raises(DataError, match=r"not one of class_names.*task.clean") as caught:
        read(".", tmp_path, class_names=["Cardiology", "Dermatology"])
    assert "secret" not in str(caught.value)
    write_messy(tmp_path / "train.csv")
    pq.write_table(pa.table({"text": ["x"], "label": ["Cardiology"]}), tmp_path / "validation.parquet")
    (tmp_path / "validation.parquet").unlink()
    write_rows(tmp_path / "validation.csv", MESSY[-2:], header=("text", "label", "hospital"))
    with pytest.raises(DataError, match=expected):
        read(".", tmp_path, class_names=["Cardiology", "Dermatology"])


def test_declared_names_number_the_classes(tmp_path):
    write_rows(tmp_path / "train.csv", [(text, label + 1) for text, label in ROWS])
    assert read(".", tmp_path).label_names == ("0", "1", "2")
    named = read(".", tmp_path, class_names=["1", "2"])
    assert (named.label_names, set(named.train.labels.tolist())) == (("1", "2"), {0, 1})
    positions = read(".", tmp_path, class_names=["none", "bad", "good"])
    assert set(positions.train.labels.tolist()) == {1, 2}
    with pytest.raises(DataError, match="beyond the 2 classes"):
        read(".", tmp_path, class_names=["bad", "good"])
    write_rows(tmp_path / "signs.csv", [(text, 2 * label - 1) for text, label in ROWS])
    with pytest.raises(DataError, match=r"outside 0 to .*declare them with task.class_names"):
        read("signs.csv", tmp_path)
    signs = read("signs.csv", tmp_path, class_names=["-1", "1"])
    assert set(zip(signs.train.column("text"), signs.train.labels.tolist(), strict=True)) <= set(ROWS)
    with pytest.raises(DataError, match="name every class once"):
        read(".", tmp_path, class_names=["a", "a"])


# Rows in memory


def test_what_a_python_user_holds_is_read_like_a_file(tmp_path):
    import datasets

    rows = [{"text": text, "label": label} for text, label in ROWS]
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    for held in (
        rows,
        columns,
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_pandas(),
    ):
        data = load(from_memory(held), kind=TEXT, base=tmp_path, seed=0)
        assert rows_of(data, "text", "label") == set(ROWS)
    both = load(from_memory({"train": rows, "validation": rows[:3]}), kind=TEXT, base=tmp_path, seed=0)
    assert (len(both.train), len(both.validation), both.held_out) == (20, 3, 0)


@pytest.mark.parametrize("held", [[], {}, 3, "text", [1, 2], {"text": ["a"], "label": [0, 1]}])
def test_anything_else_in_memory_is_one_clear_error(held):
    with pytest.raises(DataError, match="memory"):
        from_memory(held)
