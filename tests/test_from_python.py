"""Runs from Python: rows and models in memory, several callbacks, what a notebook shows."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

import pytest
import torch

import ffm_secure as ffm
from ffm_secure.display import notebook
from ffm_secure.errors import ConfigError
from ffm_secure.api import Run
from ffm_secure.federation import NullCallback
from ffm_secure.models.backbone import load_backbone
from ffm_secure.records import RoundRecord
from tests.federation.helpers import RECORD, call, make

WORDS = (("bad", "cold soup"), ("good", "warm bread"))
ROWS = [{"text": f"{WORDS[i % 2][1]} {i}", "label": i % 2} for i in range(64)]


def config(**sections):
    sections = {"privacy": {"unit": "none", "reason": "invented rows"}, **sections}
    task = {"kind": "text_classification", "data": "unread", "clients": 4, "max_length": 8}
    return make(
        task={**task, **sections.pop("task", {})},
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        federation={"rounds": 1, "cohort": 4},
        **sections,
    )


class Heard(NullCallback):
    def __init__(self) -> None:
        self.rounds: list[int] = []

    def round_finished(self, record: RoundRecord) -> None:
        self.rounds.append(record.round)


def test_rows_in_memory_train_as_the_same_rows_in_a_file(tmp_path: Path) -> None:
    import json

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    filed = dataclasses.replace(
        config(), task=dataclasses.replace(config().task, data=str(tmp_path / "train.jsonl"))
    )
    from_file = Run(filed, runs=tmp_path / "a").start(complete=False)
    heard = Heard(), Heard()
    from_memory = ffm.Run(config(), runs=tmp_path / "b", data=ROWS).start(callback=heard, complete=False)
    assert from_memory.summary.rounds[0].loss == from_file.summary.rounds[0].loss
    assert [listener.rounds for listener in heard] == [[1], [1]]


def test_a_run_with_rows_in_memory_is_audited_with_them_and_says_so_without(tmp_path: Path) -> None:
    held_out = {"task": {"validation": "hold_out"}}
    made = config(privacy=RECORD, audit={"observers": ["server"], "attacks": ["label_identity"]}, **held_out)
    result = ffm.Run(made, runs=tmp_path, data=ROWS).start(complete=False)
    assert "given from Python and lie in no file; give them again" in ffm.audit(result).sentence
    again = ffm.audit(result, data=ROWS)
    assert "given from Python" not in again.sentence
    assert again.findings
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"warm bread" in path.read_bytes()]


def test_a_model_in_memory_is_written_once_and_trained_as_it_is(tmp_path: Path) -> None:
    backbone = load_backbone("builtin:tiny-bert", kind="text_classification", labels=2, base=tmp_path, seed=5)
    with torch.no_grad():
        backbone.model.classifier.bias.fill_(0.5)
    run = ffm.Run(config(), runs=tmp_path, data=ROWS, model=backbone.model, tokenizer=backbone.tokenizer)
    assert not (tmp_path / ".models").exists()  # nothing is written before it is asked for
    loaded = run.prepared().backbone.model
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    run.start(complete=False)
    (folder,) = (tmp_path / ".models").iterdir()
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    again = ffm.Run(config(), runs=tmp_path, data=ROWS, model=backbone.model, tokenizer=backbone.tokenizer)
    assert again.config == run.config
    again.prepared()
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    assert "test" in call("runs", "--runs", str(tmp_path), cwd=tmp_path).stdout


def test_a_config_that_no_file_could_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wrong = dataclasses.replace(
        config(),
        speed=dataclasses.replace(config().speed, workers=0),
        federation=dataclasses.replace(config().federation, rounds=-1, cohort=9),
    )
    with pytest.raises(ConfigError) as refused:
        Run(wrong, runs=tmp_path, data=ROWS)
    for named in ("speed.workers", "federation.rounds"):
        assert named in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "tokenizer"), [(3, None), (torch.nn.Linear(2, 2), None)])
def test_what_is_no_model_is_refused(model: object, tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(ffm.ModelError, match="must be a PreTrainedModel"):
        ffm.Run(config(), runs=tmp_path, data=ROWS, model=model, tokenizer=tokenizer)


def test_results_show_themselves(tmp_path: Path) -> None:
    made = dataclasses.replace(config(), name="shown")
    run = ffm.Run(made, runs=tmp_path, data=ROWS)
    assert repr(run).startswith("<Run shown: text_classification, 4 owners, 1 rounds")
    result = run.start(complete=False)
    assert "accuracy" in repr(result)
    shown = result._repr_html_()
    assert shown.startswith("<table>")
    assert html.escape(str(result.folder / "report.html")) in shown
    assert "epsilon" in shown


def test_every_text_of_a_table_is_escaped() -> None:
    assert "<script>" not in notebook.table([("<script>", "<script>")])


def test_a_bar_is_shown_in_notebooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    assert not notebook.in_notebook()
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    assert notebook.in_notebook()
    terminal = type("TerminalInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: terminal))
    assert not notebook.in_notebook()
