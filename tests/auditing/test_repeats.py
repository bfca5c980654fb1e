"""An audit says the same beside busy loops, and the tool that compares audits names what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ffm_secure as ffm
from benchmarks.audit_repeats import differences, repeat

RUN = Path(__file__).resolve().parents[2] / "examples" / "audit" / "text.toml"
SMALL = (
    "task.data=builtin:clinic_notes?size=400&validation=80",
    "task.clients=4",
    "federation.cohort=4",
    "federation.rounds=1",
    "task.evaluation_examples=20",
    "audit.attacks=['token_presence', 'idlg_label']",
    "federation.lifecycle={kind='finetune',local_steps=1,batch_size=4,learning_rate=0.05}",
    "privacy={unit='record',epsilon=8.0,delta=1e-5,clip_norm=0.5}",
)


@pytest.mark.parametrize("busy", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_attacks_are_tried_and_say_the_same_beside_busy_loops(busy: int, tmp_path: Path) -> None:
    run = ffm.load(RUN, SMALL, runs=tmp_path).start().folder
    quiet, loaded = repeat(run, "quick", 0, 0), repeat(run, "quick", 0, busy)
    assert quiet.tried
    assert quiet.tried == loaded.tried
    assert quiet.verdicts == loaded.verdicts
    assert list(differences([quiet, loaded])) == []
    place = min(quiet.tried)
    other = replace(loaded, tried=loaded.tried - {place}, verdicts={**loaded.verdicts, place: "unheard of"})
    (line,) = differences([quiet, other])
    assert "unheard of 1" in line
    assert "tried in 1 of 2" in line
