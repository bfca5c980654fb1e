"""Every stage of a foundation model's life goes through every command:
plan, run, the same again, audit, ledger, report.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_secure.auditing import replayed as client_replay
from ffm_secure.config.compatibility import LORA_RULES
from tests.federation.helpers import CLIENT, ROOT, SECAGG, call, make, prepared

SMALL = (
    "task.data=builtin:clinic_notes?size=240&validation=40",
    "task.evaluation_examples=40",
    "task.max_length=16",
    "federation.rounds=2",
    "federation.lifecycle.batch_size=8",
)
PUBLIC = ("federation.lifecycle.public_examples=60", "federation.lifecycle.controller={kind='fixed'}")
FACTORS = "model.trainable={kind='lora', rank=2}"
STAGES = {
    "pretrain": ("pretrain", *PUBLIC),
    "pretrain from scratch": (
        "pretrain",
        *PUBLIC,
        "model.weights=random",
        "model.name=builtin:tiny-gpt2",
        "task.kind=causal_lm",
    ),
    "prompt generator": ("prompt-generator",),
    "flora": ("lora-exact",),
    **{
        kind: ("lora-exact", FACTORS, f"federation.strategy={{kind='{kind}'}}")
        for kind in LORA_RULES
        if kind != "flora"
    },
}
CASES = [pytest.param(name, marks=() if name == "pretrain" else pytest.mark.slow) for name in STAGES]


@pytest.mark.parametrize("name", CASES)
def test_a_stage_goes_through_every_command(name: str, tmp_path: Path) -> None:
    example, *more = STAGES[name]
    file = str(ROOT / "examples" / f"{example}.toml")
    words = [word for change in (*SMALL, *more) for word in ("--set", change)]
    folder = tmp_path / "runs" / example

    def done(*command: str) -> str:
        result = call(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert json.loads(done("plan", file, *words, "--json"))["bytes_up_per_client_round"] > 0
    first, again = (json.loads(done("run", file, *words, "--json")) for _ in range(2))
    assert first["status"] == again["status"] == "complete"
    assert first["metric"] == again["metric"]
    assert first["epsilon"] == pytest.approx(again["epsilon"], rel=1e-3)
    assert 0 < first["epsilon"] <= 8.0
    found = json.loads(done("audit", str(folder), "--json"))
    assert {item["verdict"] for item in found["findings"]} <= {
        "leaked",
        "not leaked",
        "inconclusive",
        "not applicable",
    }
    assert found["epsilon_lower"] <= first["epsilon"]
    ledger = json.loads(done("ledger", str(folder), "--json"))
    private = sum(
        json.loads(line)["phase"] == "private" for line in (folder / "rounds.jsonl").read_text().splitlines()
    )
    assert ledger["entries"] >= 4 * private > 0
    (folder / "report.html").unlink()
    done("report", str(folder))
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("kind", LORA_RULES)
def test_an_audit_attacks_what_the_rule_sends_and_nothing_else(kind: str) -> None:
    made = make(
        task={
            "kind": "text_classification",
            "data": SMALL[0].removeprefix("task.data="),
            "clients": 4,
            "max_length": 16,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        federation={
            "rounds": 1,
            "cohort": 4,
            "lifecycle": {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1},
            "strategy": {"kind": kind},
        },
        privacy=CLIENT
        if kind == "ffa"
        else {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
        protection=SECAGG,
    )
    ready = prepared(made)
    rule = ready.strategy
    encoded = ready.task.encode(ready.dataset.train.take(ready.parts[0]))
    points = client_replay.gradients(ready, ready.task.batch(encoded, np.arange(4), device="cpu"))
    factors = {"ffa": rule.b, "rolora": rule.b, "fedsvd": rule.b, "fedsa": rule.a}.get(
        kind, (*rule.a, *rule.b)
    )
    assert set(points) == {"raw", "clipped", "noised"}
    for tensors in points.values():
        assert set(tensors) == {*factors, *rule.head}
    start = ready.trainable.flatten()
    if rule.merges_into_base:
        with pytest.raises(ValueError, match="products are sent"):
            client_replay.wire_change(ready, start, encoded.take(range(4)), 0)
    else:
        others = client_replay.companions(ready, 0, clients=3, records=4, seed=0)
        wire = client_replay.wire_change(ready, start, encoded.take(range(4)), 0, others)
        assert {name: tuple(value.shape) for name, value in wire.items()} == {
            name: rule.shapes[name] for name in (*factors, *rule.head)
        }
        assert all(bool(torch.isfinite(value).all()) for value in wire.values())
