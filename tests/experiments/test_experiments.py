"""Grids: what they run, that nothing runs twice, intervals and paired differences,
and the quick form of every grid we ship.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from defenses.dp import Ledger
from ffm_secure.cli import commands
from ffm_secure.engines import simulated_data
from ffm_secure.errors import BudgetExhausted, ConfigError, FfmError, Interrupted, StoreError
from ffm_secure.experiments import grid as experiments
from ffm_secure.experiments.grid_report import Row, interval, paired, results, to_html, to_json
from ffm_secure.experiments.grid_summary import to_markdown, to_svg
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.storage.run_directory import Store

ROOT = Path(__file__).resolve().parents[2]
GRIDS = sorted((ROOT / "experiments").glob("*.toml"))
GRID = """
format = 1
name = "tiny"
about = "Does it run?"
seeds = [1]
compare = "rank"
references = ["one"]

[run]
task = { kind = "image_classification", data = "builtin:digits", clients = 3, evaluation_examples = 20 }
model = { name = "builtin:tiny-vit", trainable = { kind = "lora" } }
federation = { rounds = 1, cohort = 3, lifecycle = LIFECYCLE }
privacy = { ledger = "run", unit = "none", reason = "test data" }
protection = { kind = "none" }

[[axes]]
name = "rank"
values = [
    { label = "one", set = ["model.trainable.rank=1"] },
    { label = "two", set = ["model.trainable.rank=2"] },
]

[quick]
seeds = [5]
only = ["rank=two"]
""".replace("LIFECYCLE", '{ kind = "finetune", local_steps = 1, batch_size = 4, learning_rate = 0.1 }')


def row(label: str, seed: int, metric: float, **values: Any) -> Row:
    base: dict[str, Any] = {
        "labels": (("data", "A & B"), ("rule", label)),
        "seed": seed,
        "run": f"{label}-{seed}",
        "status": "complete",
        "metric_name": "accuracy",
        "higher_is_better": True,
        "metric": metric,
        "before": 0.1,
        "majority": 0.5,
        "curve": (0.1, metric),
        "phases": ("private", "private"),
        "epsilon": math.inf,
        "bytes_up": 100,
        "numbers_sent": 10,
        "seconds": 1.0,
    }
    return Row(**{**base, **values})


# --- what is computed ---------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    """Published quantile: t(0.975, 2 degrees of freedom) = 4.303; and one seed says nothing about spread."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 * 1.0 / math.sqrt(3), rel=1e-3)
    assert interval([1.0]).low == -math.inf


def test_the_interval_holds_its_level() -> None:
    """Both ways: 95 % intervals of a known mean cover it about 95 times in 100, and not always."""
    draws = np.random.default_rng(3).normal(0.7, 0.05, size=(600, 3))
    covered = np.mean([(i := interval(list(line))).low <= 0.7 <= i.high for line in draws])
    assert 0.91 < covered < 0.985


def test_differences_are_paired_by_seed() -> None:
    one = [row("a", seed, 0.5 + seed / 10 + 0.02) for seed in (1, 2, 3)]
    two = [row("b", seed, 0.5 + seed / 10 + 0.001 * seed) for seed in (3, 1, 2)]
    found = paired(one, two, against="b")
    assert found["mean"] == pytest.approx(0.018)
    assert found["better"] is True, "the seeds differ far more than the rules, and the pairs take that out"
    assert paired(two, one, against="a")["better"] is False
    lower = [row("a", seed, 3.0 + 0.01 * seed, higher_is_better=False) for seed in (1, 2, 3)]
    higher = [row("b", seed, 4.0, higher_is_better=False) for seed in (1, 2, 3)]
    assert paired(lower, higher, against="b")["better"] is True
    assert paired(one[:1], two[:1], against="b")["better"] is None


def test_results_are_plain_and_the_page_escapes_them() -> None:
    rows = [row(label, seed, 0.6 + 0.01 * seed) for label in ("plain <b>", "other") for seed in (1, 2)]
    found = results(
        name="grid",
        about="Which?",
        command="ffm-secure experiment grid.toml",
        rows=rows,
        wanted=6,
        compare="rule",
        references=["other"],
    )
    assert json.loads(to_json(found))["cells"][0]["epsilon"] == "infinity"
    assert [len(cell["differences"]) for cell in found["cells"]] == [1, 0]
    html = to_html(found)
    assert html == to_html(found)
    assert "plain &lt;b&gt;" in html
    assert "<script" not in html
    assert "Not complete: 4 of 6 runs" in html
    assert "<svg" in html


def test_results_are_also_a_markdown_table_and_a_picture_of_their_own() -> None:
    rows = [
        row(label, seed, 0.6 + 0.1 * (label == "plain <b>") + 0.01 * seed)
        for label in ("plain <b>", "a|b")
        for seed in (1, 2, 3)
    ]
    found = results(
        name="grid", about="", command="", rows=rows, wanted=6, compare="rule", references=["a|b"]
    )
    lines = to_markdown(found).splitlines()
    assert lines[0].startswith("accuracy, 6 runs")
    assert lines[2].startswith(
        "| data | rule | seed 1 | seed 2 | seed 3 | mean ± 95 % | minus a\\|b | epsilon spent |"
    )
    assert "| 0.710 | 0.720 | 0.730 | 0.720 ± 0.025 | **+0.100 [+0.100, +0.100]** | none |" in lines[4]
    assert len({line.replace("\\|", "").count("|") for line in lines[2:]}) == 1
    drawn = ElementTree.fromstring(to_svg(found))
    dots = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 6
    assert [float(dot.attrib["cx"]) for dot in dots] == sorted(
        float(dot.attrib["cx"]) for dot in dots[:3]
    ) + sorted(float(dot.attrib["cx"]) for dot in dots[3:])
    assert "plain <b>" in {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert (
        to_markdown(results(name="g", about="", command="", rows=[], wanted=1, compare="", references=[]))
        == "No run has finished.\n"
    )


def test_a_run_that_ended_early_is_no_result() -> None:
    """It is named in every form, and every figure is what it would be without it;
    a cell of such runs alone has none.
    """
    kept = [
        row(label, seed, 0.6 + 0.1 * (label == "a") + 0.01 * seed) for label in "ab" for seed in (1, 2, 3)
    ]
    early = [
        row("a", 4, 0.0, status="budget exhausted", curve=(0.0,), seconds=100.0),
        row("b", 4, 0.9),
        *[row("c", seed, 0.0, status="budget exhausted", curve=(0.0,)) for seed in (1, 2)],
    ]
    made: dict[str, Any] = {
        "name": "grid",
        "about": "",
        "command": "",
        "compare": "rule",
        "references": ["b", "c"],
    }
    found, without = (results(rows=rows, wanted=10, **made) for rows in ([*kept, *early], [*kept, early[1]]))
    for key in ("metric", "before", "bytes_up", "seconds", "public_phases"):
        assert [cell[key] for cell in found["cells"][:2]] == [cell[key] for cell in without["cells"]], key
    first, second, third = (cell["differences"] for cell in found["cells"])
    assert first[0] == without["cells"][0]["differences"][0]
    assert first[0]["count"] == 3
    assert {item["count"] for item in (first[1], second[0], third[0])} == {0}
    assert (found["complete"], found["runs"], found["wanted"]) == (False, 7, 10)
    assert found["stopped"] == [
        {"run": run, "status": "budget exhausted", "rounds": 1} for run in ("a-4", "c-1", "c-2")
    ]
    assert json.loads(to_json(found))["complete"] is False
    lines = to_markdown(found).splitlines()
    assert "Not complete: 7 of 10 runs." in lines[0]
    assert "| 0.730 | budget exhausted | 0.720 ± 0.025 (3 seeds) | **+0.100" in lines[4]
    assert "| budget exhausted | budget exhausted | – | – | – | – | – | none | 10 B | – |" in lines[6]
    assert lines[-1] == "- c-2: budget exhausted after 1 rounds"
    page = to_html(found)
    assert "<li>a-4: budget exhausted after 1 rounds</li>" in page
    assert "0.7200 ± 0.0248 (1 stopped early, left out)" in page
    assert "– (2 stopped early, left out)" in page
    assert "nan" not in page + to_markdown(found)
    assert to_svg(found).count("<circle") == 7
    all_stopped = results(rows=early[2:], wanted=2, **made)
    assert "<circle" not in to_svg(all_stopped)
    assert to_markdown(all_stopped).count("budget exhausted") == 4
    assert to_html(all_stopped)


# --- running ------------------------------------------------------------------------------------------------


def test_a_grid_runs_resumes_and_refuses_foreign_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    _, cells = experiments.load(file)
    assert [(dict(cell.labels)["rank"], cell.seed, cell.config.model.trainable.rank) for cell in cells] == [
        ("one", 1, 1),
        ("two", 1, 2),
    ]
    lines: list[str] = []
    html, found = experiments.run(file, out=tmp_path / "out", quick=True, say=lines.append)
    assert html == tmp_path / "out" / "tiny-quick" / "report.html"
    assert [(item["labels"], item["seed"]) for item in found["rows"]] == [({"rank": "two"}, 5)]
    assert found["complete"]
    assert "known" not in lines[0]

    def never(self: object, **options: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(experiments.Run, "start", never)
    _, again = experiments.run(file, out=tmp_path / "out", quick=True, say=lines.append)
    assert "(known)" in lines[-1]
    assert again["rows"] == found["rows"]
    file.write_text(GRID.replace("learning_rate = 0.1", "learning_rate = 0.2"))
    with pytest.raises(StoreError, match="other settings"):
        experiments.run(file, out=tmp_path / "out", quick=True)


def test_a_cell_without_budget_for_its_last_round_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that was begun is paid for;
    stopped in it, a private run has one round too few to go on with.
    """
    file = tmp_path / "grid.toml"
    file.write_text(
        GRID.replace("rounds = 1", "rounds = 3").replace(
            'unit = "none", reason = "test data"',
            'unit = "record", epsilon = 2.0, delta = 1e-5, clip_norm = 1.0',
        )
    )
    run_round, calls = SiteTrainer.run_round, []

    def stopped_in_round_two(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_round(*arguments)

    monkeypatch.setattr(SiteTrainer, "run_round", stopped_in_round_two)
    with pytest.raises(Interrupted):
        experiments.run(file, out=tmp_path)
    lines: list[str] = []
    html, found = experiments.run(file, out=tmp_path, say=lines.append)
    assert [(item["run"], item["status"]) for item in found["rows"]] == [
        ("one_s1", "budget exhausted"),
        ("two_s1", "complete"),
    ]
    assert not found["complete"]
    assert [cell["metric"]["count"] for cell in found["cells"]] == [0, 1]
    folder = html.parent / "runs" / "one_s1"
    remedy = "one_s1: budget exhausted after 2 of 3 rounds, left out of means and differences"
    assert remedy in lines
    assert experiments.run(file, out=tmp_path, say=lines.append)[1] == found
    assert lines.count(remedy) == 2, "also where it is already known"
    with pytest.raises(BudgetExhausted, match=r"not complete: one_s1; run the grid anew with another --out"):
        commands.experiment(file, out=tmp_path, quick=False, jobs=1, json=False, quiet=True)
    shutil.rmtree(folder)
    assert experiments.run(file, out=tmp_path)[1]["complete"]


def _write_rows(folder: Path, *, flipped: str = "", validation: bool = True) -> None:
    """Write a small set of texts; in the flipped part some labels are others."""
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 40), ("validation", 12) if validation else ("train", 40)):
        lines = [f"note {i},{'a' if (i + (part == flipped and i == 3)) % 2 else 'b'}" for i in range(count)]
        (folder / f"{part}.csv").write_text("\n".join(["text,label", *lines]) + "\n")


def _text_grid(tmp_path: Path, seeds: str = "[1]") -> Path:
    file = tmp_path / "grid.toml"
    task = (
        'task = { kind = "text_classification", data = "rows", clients = 3, max_length = 8, '
        "evaluation_examples = 10 }"
    )
    lines = [task if line.startswith("task =") else line for line in GRID.splitlines()]
    text = "\n".join(lines).replace("tiny-vit", "tiny-bert").replace("seeds = [1]", f"seeds = {seeds}", 1)
    file.write_text(text)
    return file


@pytest.mark.parametrize(("part", "words"), [("train", "training"), ("validation", "validation")])
def test_a_finished_cell_of_other_rows_is_refused(part: str, words: str, tmp_path: Path) -> None:
    """The run file says the same; its figure would stand for data it never saw. Nothing is deleted."""
    file = _text_grid(tmp_path)
    _write_rows(tmp_path / "rows")
    found = experiments.run(file, out=tmp_path / "out")[1]
    _write_rows(tmp_path / "rows")
    assert experiments.run(file, out=tmp_path / "out")[1] == found, "the same rows, written anew"
    _write_rows(tmp_path / "rows", flipped=part)
    with pytest.raises(StoreError, match=f"one_s1: its {words} rows have changed .* restore them"):
        experiments.run(file, out=tmp_path / "out")
    assert (tmp_path / "out" / "tiny" / "runs" / "one_s1" / "report.json").is_file()
    _write_rows(tmp_path / "rows")
    assert experiments.run(file, out=tmp_path / "out")[1] == found


def test_a_finished_cell_without_noted_rows_is_known_by_its_ledger(tmp_path: Path) -> None:
    file = _text_grid(tmp_path)
    _write_rows(tmp_path / "rows")
    found = experiments.run(file, out=tmp_path / "out")[1]
    for noted in (tmp_path / "out").rglob("data.json"):
        rows = simulated_data.contents(Store.read(noted.parent).config(), tmp_path)
        noted.unlink()
        with Ledger.open(
            noted.parent / "ledger.sqlite", create=False
        ) as ledger:  # as earlier software named rows
            ledger.set_budget("client-1", rows.account, "record", math.inf, 1e-5)
    assert experiments.run(file, out=tmp_path / "out")[1] == found
    _write_rows(tmp_path / "rows", flipped="train")
    with pytest.raises(StoreError, match="its training rows have changed"):
        experiments.run(file, out=tmp_path / "out")


@pytest.mark.parametrize(("validation", "loads"), [(True, 1), (False, 1)])
def test_a_finished_grid_reads_a_data_set_once(
    validation: bool, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cells, one set; the seed has no say in which rows are held out."""
    file = _text_grid(tmp_path, seeds="[1, 2]")
    _write_rows(tmp_path / "rows", validation=validation)
    found = experiments.run(file, out=tmp_path / "out")[1]
    load, calls = simulated_data.load_dataset, []
    monkeypatch.setattr(
        simulated_data,
        "load_dataset",
        lambda *arguments, **named: (calls.append(1), load(*arguments, **named))[1],
    )
    assert experiments.run(file, out=tmp_path / "out")[1] == found
    assert len(calls) == loads


@pytest.mark.slow
def test_cells_in_processes_of_their_own_give_the_same_table(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    one = experiments.run(file, out=tmp_path / "one")[1]
    two = experiments.run(file, out=tmp_path / "two", jobs=2)[1]
    for left, right in zip(one["rows"], two["rows"], strict=True):
        assert left["labels"] == right["labels"]
        assert left["metric"] == pytest.approx(right["metric"], abs=0.06), (
            "one answer of twenty may fall on the other side"
        )
    assert two["complete"]
    assert {"results.json", "results.md", "results.svg", "report.html"} <= {
        p.name for p in (tmp_path / "two" / "tiny").iterdir()
    }
    with pytest.raises(ConfigError, match="at least 1"):
        experiments.run(file, out=tmp_path / "one", jobs=0)


@pytest.mark.slow
def test_what_stops_a_cell_in_another_process_is_said(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GRID.replace("builtin:digits", "nowhere.parquet"))
    with pytest.raises(FfmError, match=r"nowhere\.parquet"):
        experiments.run(file, out=tmp_path / "out", jobs=2)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see child processes")
def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GRID.replace("rounds = 1", "rounds = 5000"))
    words = (
        "import pathlib, sys; from ffm_secure.experiments import grid as experiments; file, out = "
        "map(pathlib.Path, sys.argv[1:]); "
    )
    command = [
        sys.executable,
        "-c",
        f"{words}experiments.run(file, out=out, jobs=2)",
        str(file),
        str(tmp_path),
    ]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        folders = [tmp_path / "tiny" / "runs" / f"{label}_s1" for label in ("one", "two")]
        _until(lambda: all(folder.is_dir() for folder in folders), seconds=120.0)
        workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    finally:
        parent.kill()
        parent.wait()
    assert len(workers) >= 2
    _until(lambda: not any(Path(f"/proc/{worker}").is_dir() for worker in workers), seconds=30.0)


def _until(true: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('references = ["one"]', 'references = ["three"]', "must be a label of the axis"),
        ('compare = "rank"', 'compare = "size"', "must be the name of an axis"),
        ("model.trainable.rank=2", "model.trainable.rnk=2", "did you mean 'rank'"),
        ("model.trainable.rank=2", "federation.strategy.kind=krum", "one_s1|two_s1"),
        ('only = ["rank=two"]', 'only = ["rank=five"]', "names no axis with such a label"),
        ("seeds = [1]", "seeds = []", "must not be empty"),
        ('{ label = "two"', '{ label = "one"', "must differ"),
    ],
)
def test_every_cell_is_checked_before_the_first_runs(old: str, new: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    assert old in GRID
    file.write_text(GRID.replace(old, new, 1))
    with pytest.raises(ConfigError, match=words):
        experiments.load(file)


def test_a_mistake_in_the_shared_part_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        GRID.replace("seeds = [1]", "seeds = [1, 2, 3]", 1).replace("local_steps = 1", "local_stepz = 1")
    )
    with pytest.raises(ConfigError) as caught:
        experiments.load(file)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("one_s1 and 5 more: federation.lifecycle.local_stepz")


def test_combinations_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GRID.replace("seeds = [1]", 'seeds = [1]\nskip = ["rank=two"]', 1))
    assert [dict(cell.labels)["rank"] for cell in experiments.load(file)[1]] == ["one"]


# --- the grids we ship --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_every_grid_is_a_sound_run(path: Path) -> None:
    experiment, cells = experiments.load(path)
    assert len(experiment.seeds) >= 3
    assert len(cells) >= 3 * len(experiment.axes[-1].values)
    assert len({cell.config.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_quick_form_of_every_grid_runs(path: Path, tmp_path: Path) -> None:
    html, found = experiments.run(path, out=tmp_path, quick=True)
    assert found["complete"]
    assert found["runs"] == 2
    assert sum(len(cell["differences"]) for cell in found["cells"]) >= 1
    assert html.stat().st_size > 5_000


def test_prompts_are_compared_at_equal_bytes() -> None:
    """Numbers besides the head for MiniLM (d = 384, 6 layers), by the formulas of docs/prompts.md."""
    d, layers = 384, 6
    count = {
        "prompt": lambda t: t.length * d,
        "prompt_generator": lambda t: t.length * (d + t.hidden) + 2 * d * t.hidden + t.hidden,
        "p_tuning": lambda t: t.length * d + 2 * d * t.hidden + t.hidden**2 + d + 2 * t.hidden,
        "deep_prompt": lambda t: layers * t.length * d,
        "prefix": lambda t: 2 * layers * t.length * d,
        "lora": lambda t: len(t.target_modules) * t.rank * 2 * d,
    }
    _, cells = experiments.load(ROOT / "experiments" / "prompts.toml")
    sizes = [count[cell.config.model.trainable.kind](cell.config.model.trainable) for cell in cells]
    assert max(sizes) < 1.02 * min(sizes)


# --- the results we show ------------------------------------------------------------------------------------

SHOWN = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_every_results_page_shows_the_table_of_its_grid(path: Path) -> None:
    """The page holds the table and the picture that its rows give,
    and the rows are those of the grid as it is shipped.
    """
    stored = json.loads(path.read_text())
    rows = [
        Row(
            **{
                **item,
                "labels": tuple(item["labels"].items()),
                "curve": tuple(item["curve"]),
                "phases": tuple(item["phases"]),
            }
            | {key: math.inf for key in ("epsilon",) if item[key] == "infinity"}
        )
        for item in stored["rows"]
    ]
    experiment, cells = experiments.load(ROOT / "experiments" / f"{path.stem}.toml")
    assert {(row.run, row.seed) for row in rows} <= {(cell.config.name, cell.seed) for cell in cells}
    found = results(
        name=experiment.name,
        about=experiment.about,
        command=stored["command"],
        rows=rows,
        wanted=len(cells),
        compare=experiment.compare,
        references=experiment.references,
    )
    page = path.with_suffix(".md").read_text()
    assert to_markdown(found).strip() in page
    assert f"{path.stem}.svg" in page
    assert path.with_suffix(".svg").read_text() == to_svg(found)


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_the_ranges_in_the_text_are_those_of_the_table(path: Path) -> None:
    """Where a page says that the first label is ahead "by a to b of" a reference,
    a and b are the ends of its mean differences.
    """
    stored = json.loads(path.read_text())
    first = stored["cells"][0]["labels"].get(stored["compare"])
    means: dict[str, list[float]] = {}
    for cell in stored["cells"]:
        for item in cell["differences"] if cell["labels"].get(stored["compare"]) == first else ():
            means.setdefault(item["against"], []).append(item["mean"])
    said = re.findall(
        r"by (\d\.\d{3}) to (\d\.\d{3})\s+of\s+([\w -]*?)(?=[,.;]|\s+and\b)",
        path.with_suffix(".md").read_text(),
    )
    assert len(said) == {"ffm-vs-single-source-private": 2}.get(path.stem, 0), (
        "the check reads what the page says"
    )
    for low, high, against in said:
        assert (low, high) == (f"{min(means[against]):.3f}", f"{max(means[against]):.3f}"), against
