"""`generate` draws a data set from a run's model, behind labels, and describes it with what it cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ffm_secure as ffm
from ffm_secure.cli.generate import generate
from ffm_secure.errors import ConfigError, StoreError
from tests.federation.helpers import RECORD, make

LABELS = ("cough", "fever")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ffm.Run:
    """A model that learned texts behind their labels, with real noise."""
    folder = tmp_path_factory.mktemp("generate")
    data = folder / "notes"
    data.mkdir()
    for part, rows in (("train", 40), ("validation", 10)):
        lines = []
        for number in range(rows):
            label = LABELS[number % 2]
            lines.append(
                json.dumps({"prompt": label, "completion": f"patient {part} {number} with {label} today"})
            )
        (data / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "kind": "causal_lm", "data": str(data), "text_column": "prompt, completion", "clients": 4,
        "max_length": 24, "evaluation_examples": 5,
    }  # fmt: skip
    model = {"name": "builtin:tiny-gpt2", "trainable": {"kind": "lora", "rank": 2}}
    config = make(
        task=task,
        model=model,
        federation={"rounds": 1, "cohort": 4},
        privacy={**RECORD, "noise": "system"},
    )
    started = ffm.Run(config, runs=folder / "runs")
    started.start(fairness=False)
    return started


def drawn(run: ffm.Run, out: Path, **changed: object) -> list[dict[str, str]]:
    options = {"labels": "cough,fever", "count": 5, "longest": 8, "temperature": 1.0, "seed": 1, **changed}
    generate(run.folder, out, json=True, **options)  # type: ignore[arg-type]
    return [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


def test_texts_are_dealt_evenly_to_labels_and_described_with_what_the_model_cost(
    run: ffm.Run, tmp_path: Path
) -> None:
    rows = drawn(run, tmp_path / "set")
    assert [row["label"] for row in rows] == ["cough"] * 3 + ["fever"] * 2
    assert any(row["text"] for row in rows)
    described = json.loads((tmp_path / "set" / "croissant.json").read_text())
    spent = json.loads((run.folder / "report.json").read_text())["statements"]
    public = next(one for one in spent if one["observer"] == "public")
    assert f"at delta {public['delta']:g}".replace("e-05", "e-5")[:12] in described["description"].replace(
        "e-05", "e-5"
    )
    assert "record" in described["rai:personalSensitiveInformation"]
    assert [field["name"] for field in described["recordSet"][0]["field"]] == ["text", "label"]


def test_the_same_seed_draws_the_same_texts_and_another_seed_others(run: ffm.Run, tmp_path: Path) -> None:
    first = drawn(run, tmp_path / "first")
    assert drawn(run, tmp_path / "again") == first
    assert drawn(run, tmp_path / "other", seed=2) != first


def test_all_that_cannot_be_drawn_is_said_at_once(run: ffm.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        drawn(run, tmp_path / "out", labels="cough,cough,", count=2, longest=99_999)
    for words in ("each must be there once", "count = 2: must be at least 3", "longest = 99999"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="name at least one"):
        drawn(run, tmp_path / "out", labels="")
    assert not (tmp_path / "out").exists(), "nothing is written before all is right"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        drawn(run, tmp_path / "full")
