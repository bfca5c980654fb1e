"""Malicious sites in a whole simulated run: an attack that breaks the mean, and rules that hold."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.poisoning import rows
from attacks.poisoning.backdoor import Active
from attacks.poisoning.updates import update_attack
from ffm_secure.auditing.adversaries import Adversaries, play
from ffm_secure.engines import simulation
from ffm_secure.federation import TrainingResult
from ffm_secure.tasks.encoded import Encoded, EncodedImages
from tests.federation.helpers import finish, make, prepared

PACKAGE = Path(__file__).resolve().parents[2] / "ffm_secure"
ONE = frozenset({1})


def attacked(folder: Path, adversaries: Adversaries | None, **strategy: Any) -> TrainingResult:
    """Run six sites, every update visible, under an attack."""
    made = make(
        task={"clients": 6},
        federation={
            "rounds": 2,
            "cohort": 6,
            "strategy": strategy or {"kind": "average"},
            "lifecycle": {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": 0.1},
        },
        protection={"kind": "none", "groups": 6 if strategy else 1},
    )
    ready = simulation.build(prepared(made), folder)
    if adversaries is not None:
        play(ready, adversaries)
    return finish(ready, folder)


def flips() -> Adversaries:
    return Adversaries(sites=ONE, update=update_attack("sign_flip", clients=6, attackers=1, factor=200.0))


def test_a_sign_flip_ruins_the_mean_and_not_the_geometric_median(tmp_path: Path) -> None:
    honest = attacked(tmp_path / "honest", None).records[-1].loss
    mean = attacked(tmp_path / "mean", flips()).records[-1].loss
    median = attacked(tmp_path / "median", flips(), kind="geometric_median", attackers=2).records[-1].loss
    assert mean > honest + 0.3
    assert median < honest + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coordinate_median", "trimmed_mean", "krum", "multi_krum"])
def test_other_rules_hold_against_a_sign_flip_too(kind: str, tmp_path: Path) -> None:
    honest = attacked(tmp_path / "honest", None).records[-1].loss
    assert attacked(tmp_path / "rule", flips(), kind=kind, attackers=1).records[-1].loss < honest + 0.2


def test_nobody_malicious_changes_nothing(tmp_path: Path) -> None:
    """The trainer that plays attackers trains honest sites bit for bit as ever, and stops when told to."""
    expected = attacked(tmp_path / "none", None).state.vector
    idle = replace(flips(), active=Active(first=7, last=9))
    assert torch.equal(attacked(tmp_path / "idle", idle).state.vector, expected)


@pytest.mark.slow
def test_poisoned_rows_teach_other_labels(tmp_path: Path) -> None:
    def flipped(encoded: Encoded) -> Encoded:
        assert isinstance(encoded, EncodedImages)
        return EncodedImages(pixels=encoded.pixels, labels=rows.flip_labels(encoded.labels, classes=10))

    honest = attacked(tmp_path / "honest", None)
    all_flipped = Adversaries(sites=frozenset(range(6)), rows=flipped)
    poisoned = attacked(tmp_path / "poisoned", all_flipped)
    assert poisoned.records[-1].metric < honest.records[-1].metric
    assert np.isfinite(poisoned.records[-1].loss)


def test_no_site_of_its_own_has_a_way_to_poisoning() -> None:
    """Only the audit's room knows the attacks, and nothing a real site or its command imports leads there."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        modules = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        names = {module for module in modules if "adversaries" in module or "poisoning" in module}
        if names and path.name != "adversaries.py":
            wrong.append(f"{path}: {names}")
    assert not wrong
