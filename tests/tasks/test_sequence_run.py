"""A run that learns to write: planned, trained under noise and masks, extended, asked and audited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import ffm_secure as ffm
from ffm_secure.config import compatibility, run_file
from ffm_secure.errors import PlanRefused
from tests.federation.helpers import RECORD, SECAGG, call, make

WORDS = ("room", "food", "soup", "tea", "view", "light")


def write(folder: Path) -> None:
    """Write prompts whose answer follows from their first word."""
    for part, count in (("train", 96), ("validation", 16)):
        rows = []
        for row in range(count):
            prompt = f"{('bad', 'good')[row % 2]} {WORDS[row % 6]} {WORDS[row // 6 % 6]} {row}"
            rows.append({"prompt": prompt, "completion": ("no", "yes")[row % 2]})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SECTIONS: dict[str, dict[str, Any]] = {
    "task": {
        "kind": "sequence_to_sequence",
        "data": ".",
        "clients": 4,
        "max_length": 16,
        "evaluation_examples": 16,
    },
    "model": {"name": "builtin:tiny-t5", "trainable": {"kind": "lora", "rank": 2}},
    "federation": {"rounds": 1},
    "privacy": RECORD,
    "protection": SECAGG,
}


@pytest.mark.slow
def test_from_a_plan_to_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    chosen = make(**{**SECTIONS, "task": {**SECTIONS["task"], "data": str(tmp_path)}})
    (tmp_path / "run.toml").write_text(run_file.dump(chosen))
    monkeypatch.chdir(tmp_path)
    run = ffm.load("run.toml")
    assert "q, v" in run.plan().trains
    first = run.start().summary
    more = ffm.load("run.toml", ("federation.rounds=2",)).start().summary
    assert [record.round for record in more.rounds] == [1, 2]
    assert more.rounds[0] == first.rounds[0]
    assert first.metric_name == "perplexity"
    folder = tmp_path / "runs" / "test"
    asked = ("good soup tea 3", "bad room view 4")
    words = [word for text in asked for word in ("--text", text)]
    done = call("predict", str(folder), *words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [item["answer"] for item in json.loads(done.stdout)] == written_elsewhere(
        folder / "adapter", asked
    )
    audited = ffm.audit(folder)
    assert audited.sentence
    assert all(item.reason or item.verdict in ("leaked", "not leaked") for item in audited.findings)


def written_elsewhere(adapter: Path, texts: tuple[str, ...]) -> list[str]:
    """Ask transformers and PEFT, as the model card says."""
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(adapter / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    answers = []
    for text in texts:
        out = model.generate(**tokenizer([text], return_tensors="pt"), max_new_tokens=32, do_sample=False)
        answers.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"loss_on": "all"}}, "must be 'answer'"),
        ({"model": {"trainable": {"kind": "prefix"}}}, "an encoder-decoder has two"),
        ({"model": {"trainable": {"kind": "head"}}}, "no classification head"),
        ({"federation": {"lifecycle": {"kind": "class_sums"}}}, "need classes"),
        ({"evaluation": {"rows": "held_back", "epsilon": 1.0}}, "need classes"),
    ],
    ids=str,
)
def test_what_does_not_go_with_writing_is_refused(changes: dict[str, Any], words: str) -> None:
    table: dict[str, Any] = {}
    for section, keys in {**SECTIONS, **changes}.items():
        table[section] = {**SECTIONS.get(section, {}), **keys}
    chosen = make(**table)
    with pytest.raises(PlanRefused, match=words):
        compatibility.check(chosen)
