"""`predict` answers with what a run trained, for people and for machines,
and says clearly what it cannot read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from ffm_secure.config import run_file as config
from tests.federation.helpers import call, make

TEXTS = ("chest pain for two days", "a normal day at home")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    data = "builtin:clinic_notes?size=60&validation=20"
    task = {"kind": "text_classification", "data": data, "clients": 4, "max_length": 16}
    model = {"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}}
    chosen = make(task=task, model=model, federation={"rounds": 1, "cohort": 4})
    (folder / "run.toml").write_text(config.dump(chosen))
    done = call("run", "run.toml", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "test"


def test_answers_are_those_of_the_exported_model(run: Path) -> None:
    words = [word for text in TEXTS for word in ("--text", text)]
    done = call("predict", str(run), *words, "--json", cwd=run)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    folder = run / "adapter"
    auto = transformers.AutoModelForSequenceClassification
    model = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), str(folder)).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        scores, places = model(**batch).logits.softmax(dim=1).max(dim=1)
    labels = json.loads((folder / "export.json").read_text())["labels"]
    assert [item["answer"] for item in answers] == [labels[place] for place in places]
    assert [item["score"] for item in answers] == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_file_is_answered_row_by_row(run: Path, tmp_path: Path) -> None:
    wanted = call("predict", str(run), "--text", TEXTS[0], "--text", TEXTS[1], cwd=run).stdout
    column = json.loads((run / "adapter" / "export.json").read_text())["text_columns"][0]
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "a.csv").write_text("\n".join([column, *TEXTS]))
    for name in ("a.txt", "a.csv"):
        assert call("predict", str(run), "--file", str(tmp_path / name), cwd=run).stdout == wanted


def test_the_card_says_what_the_model_is_and_hides_the_machine(run: Path) -> None:
    card = (run / "adapter" / "README.md").read_text()
    for words in (
        "pipeline_tag: text-classification",
        "PeftModel.from_pretrained",
        "| adjacency |",
        "base digest",
        "- labels: ",
    ):
        assert words in card
    assert str(run.parents[1]) not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "exactly one of them"),
        (("--text", "a", "--file", "b"), "exactly one of them"),
        (("--file", "absent.csv"), "does not exist"),
    ],
)
def test_wrong_input_is_one_clear_error(words: tuple[str, ...], message: str, run: Path) -> None:
    done = call("predict", str(run), *words, cwd=run)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_without_the_column_names_what_it_has(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body\nhello\n")
    done = call("predict", str(run), "--file", str(tmp_path / "a.csv"), cwd=run)
    assert done.returncode == 2
    assert "which the model reads; it has body" in done.stderr


def test_a_run_without_an_adapter_says_to_finish_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text((run / "run.toml").read_text())
    done = call("predict", str(tmp_path), "--text", "a", cwd=tmp_path)
    assert done.returncode != 0
    assert "finish the run first" in done.stderr
