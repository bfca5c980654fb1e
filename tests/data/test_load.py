"""Loading: every format, the guesses, the clear errors,
and a thousand damaged files without a stranger's traceback.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from defenses.dp.records import RecordKey
from ffm_secure.data import images as data_images
from ffm_secure.data.dataset import Dataset, Examples, load
from ffm_secure.data.images import LazyImages
from ffm_secure.errors import DataError

TEXTS = [f"sentence number {i}" for i in range(20)]
LABELS = [i % 3 for i in range(20)]
HELD_OUT = {"sentence number 12"}  # whose lot under the key that everybody has falls below a tenth


def read(source, base, kind="text_classification", **options) -> Dataset:
    return load(str(source), kind=kind, base=base, seed=0, **options)


def write_parquet(folder: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def png(colour: int, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 255 - colour)).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Formats


def test_parquet_folder_with_both_parts(tmp_path):
    write_parquet(tmp_path, text=TEXTS, label=LABELS, ward=["a", "b"] * 10)
    pq.write_table(pa.table({"text": ["x"], "label": [2], "ward": ["a"]}), tmp_path / "validation.parquet")
    data = read(".", tmp_path)
    assert data.train.column("text") == TEXTS
    assert data.train.labels.dtype == np.int64
    assert data.train.labels.tolist() == LABELS
    assert (len(data.validation), data.label_names) == (1, ("0", "1", "2"))
    assert (data.text_columns, data.label_column, data.image_column) == (("text",), "label", None)
    assert data.natural_columns == ("ward",)
    assert data.license_note == "not stated"


def test_pieces_of_a_part_are_joined_in_order(tmp_path):
    for piece in range(2):
        rows = slice(10 * piece, 10 * piece + 10)
        pq.write_table(
            pa.table({"text": TEXTS[rows], "label": LABELS[rows]}), tmp_path / f"train-{piece}-of-2.parquet"
        )
    data = read(".", tmp_path, validation_fraction=0.1)
    assert sorted([*data.train.column("text"), *data.validation.column("text")]) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_text_formats_say_the_same(tmp_path, suffix):
    path = tmp_path / f"notes.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)])
    else:
        tab = "\t" if suffix == "tsv" else ","
        lines = [f"text{tab}label"] + [f"{t}{tab}{y}" for t, y in zip(TEXTS, LABELS, strict=True)]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    data = read(path.name, tmp_path)
    rows = {*zip(data.train.column("text"), data.train.labels.tolist(), strict=True)}
    rows |= {*zip(data.validation.column("text"), data.validation.labels.tolist(), strict=True)}
    assert rows == set(zip(TEXTS, LABELS, strict=True))
    assert set(data.validation.column("text")) == HELD_OUT  # the same rows, whatever the format


def test_csv_keeps_quoted_commas_and_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, two\nthree",1\nplain,0\nmore,0\n', encoding="utf-8")
    data = read("a.csv", tmp_path)
    assert "one, two\nthree" in [*data.train.column("text"), *data.validation.column("text")]


def test_npz_pictures_become_three_channels(tmp_path):
    pixels = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
    np.savez(tmp_path / "train.npz", images=pixels, labels=np.arange(10) % 2)
    np.savez(tmp_path / "validation.npz", images=pixels[:2], labels=np.arange(2))
    data = read(".", tmp_path, "image_classification")
    assert data.train.column("images").shape == (10, 4, 4, 3)
    assert (data.train.column("images")[..., 1] == pixels).all()
    assert data.label_column == "labels"


def test_picture_folders_name_their_classes(tmp_path):
    for part, count in (("train", 3), ("validation", 1)):
        for name in ("cat", "ant"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / name / f"{i}.png").write_bytes(png(40 * i))
    data = read(".", tmp_path, "image_classification")
    assert data.label_names == ("ant", "cat")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.column("image").shape == (6, 6, 8, 3)
    assert data.train.column("image")[2, 0, 0].tolist() == [80, 0, 175]


def test_pictures_of_different_sizes_get_one_size(tmp_path):
    for name, size in (("a", (8, 6)), ("b", (30, 12))):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(png(200, size))
    assert read(".", tmp_path, "image_classification").train.column("image").shape[1:] == (224, 224, 3)
    small = read(".", tmp_path, "image_classification", image_size=10).train.column("image")
    assert small.shape[1:] == (10, 10, 3)
    assert (small[:, 5, 5] == [200, 0, 55]).all()


def test_large_picture_columns_are_decoded_on_demand_and_say_the_same(tmp_path, monkeypatch):
    table = {"image": [{"bytes": png(i), "path": f"{i}"} for i in range(20)], "label": LABELS}
    write_parquet(tmp_path, **table)
    eager = read(".", tmp_path, "image_classification").train
    monkeypatch.setattr(data_images, "EAGER_BYTES", 0)
    lazy = read(".", tmp_path, "image_classification").train
    assert isinstance(lazy.column("image"), LazyImages)
    assert lazy.column("image").shape == eager.column("image").shape
    chosen = [5, 0, 5]
    assert isinstance(lazy.take(chosen).column("image"), LazyImages)
    assert (lazy.take(chosen).column("image")[:] == eager.take(chosen).column("image")).all()
    assert (lazy.column("image")[np.array([1, 2])] == eager.column("image")[[1, 2]]).all()
    assert (lazy.column("image")[3] == eager.column("image")[3]).all()
    assert (np.asarray(lazy.column("image")) == eager.column("image")).all()


def test_digits_are_the_scanned_digits_with_a_fixed_split():
    data = read("builtin:digits", Path("."), "image_classification")
    assert (len(data.train), len(data.validation)) == (1437, 360)
    assert data.train.column("image").shape == (1437, 8, 8, 3)
    assert len(np.unique(data.train.column("image"))) == 17
    assert np.bincount(data.validation.labels, minlength=10).min() > 20
    again = load("builtin:digits", kind="image_classification", base=Path("."), seed=99)
    assert (again.train.column("image") == data.train.column("image")).all()


# Meaning of columns


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        (("sentence1", "sentence2", "label"), "text_classification", ("sentence1", "sentence2")),
        (("question", "sentence", "label"), "text_classification", ("question", "sentence")),
        (("subject", "text", "label"), "text_classification", ("text",)),
        (("question", "answer"), "causal_lm", ("question+answer",)),
        (("instruction", "input", "output"), "causal_lm", ("instruction+input+output",)),
        (("text", "question", "answer"), "masked_lm", ("text",)),
        (("premise", "hypothesis", "label"), "masked_lm", ("premise+hypothesis",)),
    ],
)
def test_text_columns_are_guessed_by_the_documented_rules(tmp_path, columns, kind, expected):
    write_parquet(tmp_path, **{name: LABELS if name == "label" else TEXTS for name in columns})
    assert read(".", tmp_path, kind).text_columns == expected


def test_a_language_model_reads_its_columns_as_one_text(tmp_path):
    write_parquet(tmp_path, instruction=["Add.", "Name one."], input=["1 and 2", ""], output=["3", "Ada"])
    pq.write_table(pq.read_table(tmp_path / "train.parquet"), tmp_path / "validation.parquet")
    data = read(".", tmp_path, "causal_lm")
    assert data.train.column(data.text_columns[0]) == ["Add.\n1 and 2\n3", "Name one.\nAda"]
    assert data.natural_columns == ()


def test_columns_can_be_named(tmp_path):
    write_parquet(tmp_path, text=TEXTS, body=TEXTS, title=TEXTS, label=LABELS, mood=["good", "bad"] * 10)
    data = read(".", tmp_path, text_column="title, body", label_column="mood")
    assert data.text_columns == ("title", "body")
    assert data.label_names == ("bad", "good")
    assert read(".", tmp_path, text_column=["body"]).text_columns == ("body",)
    assert read(".", tmp_path, text_column="", label_column="").text_columns == ("text",)


def test_text_labels_are_numbered_in_sorted_order_of_the_union(tmp_path):
    write_parquet(tmp_path, text=TEXTS[:3], label=["pear", "fig", "pear"])
    pq.write_table(pa.table({"text": ["x"], "label": ["apple"]}), tmp_path / "validation.parquet")
    data = read(".", tmp_path)
    assert data.label_names == ("apple", "fig", "pear")
    assert (data.train.labels.tolist(), data.validation.labels.tolist()) == ([2, 1, 2], [0])


def test_class_names_come_from_the_metadata_or_a_name_column(tmp_path):
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}
    table = pa.table({"text": TEXTS, "label": LABELS}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert read(".", tmp_path).label_names == ("x", "y", "z")
    write_parquet(tmp_path, text=TEXTS, label=LABELS, label_name=["abc"[y] for y in LABELS])
    assert read(".", tmp_path).label_names == ("a", "b", "c")


def test_holding_out_is_decided_by_the_rows_and_the_key_alone(tmp_path):
    write_parquet(tmp_path, text=TEXTS, label=LABELS)
    one, two = (load(".", kind="causal_lm", base=tmp_path, seed=s, validation_fraction=0.25) for s in (1, 2))
    key = RecordKey(bytes(32))
    other = load(".", kind="causal_lm", base=tmp_path, seed=1, validation_fraction=0.25, key=key)
    assert one.validation.column("text") == two.validation.column("text") != other.validation.column("text")
    assert 1 <= len(one.validation) <= 10
    assert one.label_names is None


def test_licence_is_quoted_from_the_readme(tmp_path):
    write_parquet(tmp_path, text=TEXTS, label=LABELS)
    (tmp_path / "README.md").write_text("# data\n\n**Licence:** CC BY 4.0 (read)\n", encoding="utf-8")
    assert read(".", tmp_path).license_note == "CC BY 4.0 (read)"


# Errors


def parquet_with(**columns):
    return lambda folder: write_parquet(folder, **columns)


def file_with(name: str, content: str | bytes):
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def object_array(folder: Path) -> None:
    np.savez(folder / "train.npz", images=np.array([{}, {}], dtype=object), labels=np.arange(2))


def lying_array(folder: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (900000, 900000), }".ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "train.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"12")


def png_bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


TEXT, PICTURE = "text_classification", "image_classification"
BAD = {
    "truncated": (
        TEXT,
        file_with("train.parquet", b"PAR1 and then nothing"),
        r"train.parquet: not a readable parquet",
    ),
    "nothing": (TEXT, lambda folder: None, r"no data found; put train.parquet"),
    "no rows": (
        TEXT,
        parquet_with(text=pa.array([], pa.string()), label=pa.array([], pa.int64())),
        "holds no rows",
    ),
    "bare csv": (TEXT, file_with("train.csv", "text,label\n"), "holds no rows"),
    "one row": (TEXT, parquet_with(text=["a"], label=[0]), "cannot be parted"),
    "no label": (TEXT, parquet_with(text=TEXTS), "no label column among 'text'; set label_column"),
    "no text": (
        TEXT,
        parquet_with(words=TEXTS, label=LABELS),
        "no text column among 'words', 'label'; set text",
    ),
    "no picture": (PICTURE, parquet_with(text=TEXTS, label=LABELS), "no picture column among"),
    "null text": (
        TEXT,
        parquet_with(text=[*TEXTS[:4], None], label=LABELS[:5]),
        "row 4: column 'text' holds nothing",
    ),
    "numbers as text": (
        TEXT,
        parquet_with(text=LABELS, label=LABELS),
        "row .*: column 'text' holds int64, not text",
    ),
    "null label": (
        TEXT,
        parquet_with(text=TEXTS[:5], label=[0, 1, None, 1, 0]),
        "row 2: label \\(nothing\\) in column",
    ),
    "nan label": (
        TEXT,
        parquet_with(text=TEXTS[:5], label=[0, 1, float("nan"), 1, 0]),
        "row 2: label \\(a float64\\) in column",
    ),
    "half label": (
        TEXT,
        parquet_with(text=TEXTS[:5], label=[0, 1, 0.5, 1, 0]),
        "row 2: label \\(a float64\\) in column",
    ),
    "negative": (
        TEXT,
        parquet_with(text=TEXTS[:5], label=[0, 1, -1, 1, 0]),
        "row 2: a label in column 'label' is out",
    ),
    "identifiers": (
        TEXT,
        parquet_with(text=TEXTS[:5], label=[0, 1, 10**9, 1, 0]),
        "row 2: a label in column 'label' is outside",
    ),
    "broken line": (
        TEXT,
        file_with("train.jsonl", '{"text": "a", "label": 0}\n{"text": \n'),
        "line 2 is not JSON",
    ),
    "not an object": (TEXT, file_with("train.jsonl", "[1]\n"), "line 1 is a list"),
    "other keys": (
        TEXT,
        file_with("train.jsonl", '{"text": "a"}\n\n{"label": 0}\n'),
        "line 3 lacks 'text' and has 1 more key than line 1",
    ),
    "NaN in JSON": (TEXT, file_with("train.jsonl", '{"text": "a", "label": NaN}\n'), "NaN is not JSON"),
    "deep JSON": (TEXT, file_with("train.jsonl", "[" * 100_000 + "\n"), "line 1 is not JSON"),
    "null in JSON": (
        TEXT,
        file_with("train.jsonl", '{"text":null,"label":0}\n{"text":"b","label":1}\n'),
        "line 1: column",
    ),
    "not UTF-8": (TEXT, file_with("train.csv", b"text,label\n\xff\xfe,1\n"), "line 2 is not UTF-8"),
    "ragged csv": (
        TEXT,
        file_with("train.csv", "text,label\na,1\nb,c,2\n"),
        "line 3 has 3 fields, the header 2",
    ),
    "open quote": (TEXT, file_with("train.csv", 'text,label\na,1\n"b,2\n'), "line 3 is not valid"),
    "twin columns": (TEXT, file_with("train.csv", "text,text\na,1\n"), "same name"),
    "pickle": (PICTURE, object_array, "never objects"),
    "lying shape": (PICTURE, lying_array, "is damaged"),
    "float pixels": (
        PICTURE,
        lambda f: np.savez(f / "train.npz", image=np.ones((3, 2, 2)), label=[0, 1, 0]),
        "float64",
    ),
    "uneven npz": (
        PICTURE,
        lambda f: np.savez(f / "train.npz", image=np.ones((3, 2)), label=[0]),
        "differ in length",
    ),
    "bomb": (
        PICTURE,
        parquet_with(image=[png(0), png_bomb(), png(1)], label=[0, 1, 0]),
        "picture claims 100000 x 10|bomb",
    ),
    "no image": (
        PICTURE,
        parquet_with(image=[png(0), b"GIF89a" * 9], label=[0, 1]),
        r"row 1: not a readable picture \(unknown format",
    ),
    "cut image": (
        PICTURE,
        parquet_with(image=[png(0)] * 4 + [png(9)[:-30]], label=[0] * 5),
        "picture is damaged",
    ),
    "path only": (
        PICTURE,
        parquet_with(image=[{"bytes": None, "path": "x.png"}] * 3, label=[0] * 3),
        "holds no picture",
    ),
    "two formats": (
        TEXT,
        lambda f: (
            file_with("train.csv", "text,label\na,1\n")(f),
            write_parquet(f, text=TEXTS, label=LABELS),
        ),
        "train.csv, train.parquet compete",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_gives_one_clear_error(tmp_path, case):
    kind, write, message = BAD[case]
    write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(".", tmp_path, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing/part/file.csv", {}, "there is no .*missing/part/file.csv"),
        ("../nothing here", {}, "there is no"),
        ("builtin:clinic", {}, "there is no such set; there are clinic_notes, digits"),
        ("builtin:clinic_notes?hospitals=0", {}, "hospitals = 0: must lie between 1 and 64"),
        ("builtin:clinic_notes?doctors=4", {}, "no option 'doctors'"),
        ("builtin:clinic_notes?size=many", {}, "is not <option>=<whole number>"),
        ("builtin:digits?size=3", {}, "takes no options"),
        (
            "builtin:clinic_notes?size=50&validation=5",
            {"text_column": "body"},
            "no column 'body'; there are 'text'",
        ),
        ("builtin:digits", {"validation_fraction": 1.5}, "validation_fraction = 1.5"),
        ("bad\0name", {}, "path|there is no"),
        ("train.xlsx", {}, "unknown format '.xlsx'; use one of .csv"),
    ],
)
def test_bad_requests_say_what_to_do(tmp_path, source, options, message):
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=message):
        read(source, tmp_path, **options)


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(DataError, match="must be one of text_classification"):
        read("builtin:digits", tmp_path, kind="regression")


def test_a_hub_name_without_a_network_is_a_quick_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match=r"there is no .*nobody/nothing, and as a Hugging Face data set it cannot be"
    ):
        read("nobody/nothing", tmp_path)


def test_a_hub_data_set_is_read_like_a_file_of_its_own(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["no", "yes", "maybe"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": labels})
    rows = datasets.Dataset.from_dict({"sentence": TEXTS, "label": LABELS}, features=features)
    asked = []

    def transport(name, configuration):
        asked.append((name, configuration))
        return datasets.DatasetDict({"train": rows, "validation": rows.select([4, 5])})

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", transport)
    data = read("someone/moods:small", tmp_path)
    assert asked == [("someone/moods", "small")]
    assert data.label_names == ("no", "yes", "maybe")
    assert data.train.column("sentence") == TEXTS
    assert data.validation.labels.tolist() == [1, 2]


def test_columns_must_agree_in_length():
    with pytest.raises(DataError, match="differ in length"):
        Examples(columns={"text": ["a"], "label": np.zeros(2, dtype=np.int64)})


# A thousand damaged files


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Flip, cut, double or replace bytes somewhere."""
    body = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        start = dice.randrange(len(body))
        end = min(len(body), start + dice.choice((1, 1, 4, 64)))
        damage = dice.randrange(5)
        if damage == 0:
            body[start] ^= 1 << dice.randrange(8)
        elif damage == 1:
            body[start:end] = dice.randbytes(end - start)
        elif damage == 2:
            del body[start:end]
        elif damage == 3:
            body[start:start] = body[start:end]
        else:
            del body[start:]
        body = body or bytearray(b"\0")
    return bytes(body)


@pytest.mark.parametrize(
    ("name", "kind", "rounds"),
    [
        ("train.parquet", TEXT, 300),
        ("pictures.parquet", PICTURE, 150),
        ("train.jsonl", TEXT, 150),
        ("train.csv", TEXT, 150),
        ("train.npz", PICTURE, 250),
    ],
)
def test_damaged_files_never_raise_anything_else(tmp_path, name, kind, rounds):
    if name == "train.npz":
        np.savez_compressed(tmp_path / name, image=np.zeros((9, 3, 3), np.uint8), label=np.arange(9) % 2)
    elif name.endswith("parquet"):
        columns = (
            {"text": TEXTS}
            if kind == TEXT
            else {"image": [{"bytes": png(i), "path": "p"} for i in range(20)]}
        )
        pq.write_table(pa.table({**columns, "label": LABELS}), tmp_path / name, compression="zstd")
    elif name.endswith("jsonl"):
        write_jsonl(tmp_path / name, [{"text": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)])
    else:
        lines = ["text,label"] + [f'"{t}",{y}' for t, y in zip(TEXTS, LABELS, strict=True)]
        (tmp_path / name).write_text("\n".join(lines))
    intact = (tmp_path / name).read_bytes()
    dice = random.Random(name)
    messages: list[str] = []
    for _ in range(rounds):
        (tmp_path / name).write_bytes(damaged(intact, dice))
        try:
            data = read(name, tmp_path, kind)
        except DataError as error:
            messages.append(str(error))
        else:
            assert len(data.train) + len(data.validation) > 0
    assert len(messages) > rounds / 5
    assert all(name in message for message in messages)


def test_unreadable_files_are_named(tmp_path):
    folder = tmp_path / "train.parquet"
    folder.mkdir()
    with pytest.raises(DataError, match="no data found"):
        read(".", tmp_path)
    shutil.rmtree(folder)
