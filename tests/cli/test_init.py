"""`init` looks at data and writes a run file that loads, is checked, and says what it does;
`runs` and `--version`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffm_secure.cli.init import _rounded
from ffm_secure.cli.runs import differences, flat
from ffm_secure.config import compatibility, run_file
from ffm_secure.data.checks import find_problems, owner_column
from ffm_secure.data.dataset import load_task
from tests.data.messy import write_messy_csv
from tests.federation.helpers import call, make


def sound(path: Path) -> run_file.RunConfig:
    """Return the config of a run file whose data no check refuses."""
    config = run_file.load(path)
    compatibility.check(config)
    data = load_task(config.task, base=path.parent, seed=config.seed)
    assert find_problems(data, owner_column=owner_column(config)) == ()
    return config


def test_a_messy_table_gets_a_run_file_that_says_what_is_done_and_counts_no_row(tmp_path: Path) -> None:
    write_messy_csv(tmp_path / "notes.csv")
    done = call("init", "notes.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("blank text, label or owner", "repeat another row", "commonest spelling", "Mercy 2"):
        assert words in done.stdout
    task = sound(tmp_path / "run.toml").task
    assert task.encoding == "mixed"
    assert task.class_names == ("Cardiology", "Dermatology", "Pulmonology")
    assert set(task.clean) == {"blank_rows", "repeated_rows", "label_spelling"}
    assert (task.clients, task.split.column, task.label_column) == (2, "Hospital", "Specialty")
    data = load_task(task, base=tmp_path, seed=7)
    assert not any("�" in text or "Ã" in text for text in data.train.column("Note"))
    comments = [line for line in (tmp_path / "run.toml").read_text().splitlines() if line.startswith("#")]
    assert not any(character.isdigit() for line in comments for character in line)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    write_messy_csv(tmp_path / "notes.csv")
    (tmp_path / "run.toml").write_text("mine")
    done = call("init", "notes.csv", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "run.toml").read_text()) == (2, "mine")
    assert "exists; name another file" in done.stderr


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        ({"a": ["x y z"] * 9, "mood": ["g", "b", "g"] * 3, "tone": ["u", "v", "w"] * 3}, (), "causal_lm"),
        ({"text": [f"x {i}" for i in range(9)], "label": ["same"] * 9}, (), "one class"),
        ({"number": [1, 2] * 9}, (), "which column holds the text?"),
        ({"text": ["x y"] * 9}, ("--kind", "text_classification"), "which column holds the label?"),
        ({"text": ["x y"] * 9}, ("--kind", "poem"), "must be text_classification"),
    ],
)
def test_what_cannot_be_seen_is_asked_for_by_name(columns, words, message, tmp_path: Path) -> None:
    count = len(next(iter(columns.values())))
    rows = [{name: values[row] for name, values in columns.items()} for row in range(count)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    done = call("init", "train.json", *words, cwd=tmp_path)
    assert message in done.stdout + done.stderr
    assert (tmp_path / "run.toml").exists() == (done.returncode == 0)
    assert not list(tmp_path.glob(".run.toml*"))


def test_chats_prompts_and_pictures_are_seen(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"}] for i in range(40)
    ]
    chats = [{"messages": chat} for chat in turns]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    prompts = [{"prompt": f"what is {i}", "completion": f"it is {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    for source, kind in (
        ("chats.json", "causal_lm"),
        ("prompts.json", "causal_lm"),
        ("pictures", "image_classification"),
    ):
        done = call("init", source, "--out", f"{kind}-{Path(source).stem}.toml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        config = sound(tmp_path / f"{kind}-{Path(source).stem}.toml")
        assert (config.task.kind, config.protection.kind, config.task.clients) == (kind, "secagg", 4)


def test_labels_that_leave_classes_out_are_declared(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": (3, 900)[i % 2], "site": "abc"[i % 3]} for i in range(90)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert call("init", "train.json", cwd=tmp_path).returncode == 0
    config = sound(tmp_path / "run.toml")
    assert (config.task.class_names, config.task.clients) == (("3", "900"), 3)


def test_a_declared_size_keeps_two_digits() -> None:
    assert [_rounded(count) for count in (7, 42, 999, 12_345)] == [7, 42, 990, 12_000]


# runs


def test_runs_are_listed_and_compared(tmp_path: Path) -> None:
    for name, rounds in (("first", 1), ("second", 2)):
        made = make(federation={"rounds": rounds, "cohort": 4}, name=name)
        (tmp_path / f"{name}.toml").write_text(run_file.dump(made))
        done = call("run", f"{name}.toml", "--quiet", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    listed = json.loads(call("runs", "--json", cwd=tmp_path).stdout)["runs"]
    assert [(line["name"], line["status"], line["rounds"]) for line in listed] == [
        ("first", "complete", 1),
        ("second", "complete", 2),
    ]
    assert all(line["metric"] is not None and line["best"] >= line["metric"] for line in listed)
    shown = call("runs", "runs/first", "runs/second", cwd=tmp_path).stdout
    assert "federation.rounds" in shown
    assert "task.clients" not in shown
    assert call("runs", "runs/third", cwd=tmp_path).returncode == 5
    assert call("runs", "--runs", "nowhere", cwd=tmp_path).returncode == 5


def test_settings_are_compared_by_their_dotted_names() -> None:
    settings = [
        flat({"name": "a", "task": {"x": 1, "y": 2}}),
        flat({"name": "b", "task": {"x": 1}, "seed": 3}),
    ]
    assert differences(settings) == {"task.y": [2, None], "seed": [None, 3]}


# What a typo costs


def seconds(*words: str, cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return processor seconds of a fresh process, which other work on the machine does not change."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "ffm_secure", *words],
        cwd=cwd,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--version",), 0, "ffm-secure "),
        (("plan", "run.toml", "--set", "privacy.epsilo=3"), 2, "did you mean 'epsilon'?"),
        (("run", "run.toml", "--set", "task.data=data/trian.csv.gz/x y"), 2, "there is no"),
        (
            ("plan", "run.toml", "--set", "protection.kind=secagg", "--set", "federation.cohort=2"),
            3,
            "at least 3",
        ),
        (("plan", "rnu.toml"), 2, "cannot be read"),
        (("predict", "runs/none", "--text", "a"), 5, "is not a run directory"),
        (("audit", "runs/none"), 5, "is not a run directory"),
    ],
)
def test_a_typo_is_said_within_a_second(words, code, message, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(run_file.dump(make()))
    spent, done = min(seconds(*words, cwd=tmp_path), seconds(*words, cwd=tmp_path), key=lambda item: item[0])
    assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done.stderr
    assert spent < 1.0


def test_nothing_heavy_is_imported_before_the_file_is_checked() -> None:
    program = (
        "import sys, ffm_secure.cli.app, ffm_secure.config.locate\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - began < 60
