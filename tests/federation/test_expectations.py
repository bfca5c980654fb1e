"""What noise alone does to an update is told before a run;
what a run is compared with is counted on the rows it is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from defenses.dp import RecordMechanism
from ffm_secure.config.run_file import Lifecycle
from ffm_secure.engines import simulation
from ffm_secure.privacy.expectations import bound_warnings, share_cut, update_noise
from tests.federation.helpers import RECORD, call, make, prepared


def mechanism(steps: int) -> RecordMechanism:
    return RecordMechanism(
        sampling_rate=0.1, noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=8.0, steps=steps
    )


def lifecycle(**options: object) -> Lifecycle:
    return Lifecycle(kind="finetune", batch_size=8, learning_rate=0.1, local_steps=4, **options)


def simulated(steps: int, spec: Lifecycle) -> float:
    """Return the size of updates of pure noise, by really taking the steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(20_000))
    kinds = {
        "sgd": lambda: torch.optim.SGD([weight], lr=spec.learning_rate, momentum=spec.momentum),
        "adam": lambda: torch.optim.Adam([weight], lr=spec.learning_rate),
    }
    optimizer = kinds[spec.optimizer]()
    for _ in range(steps):
        weight.grad = torch.randn(20_000, generator=generator) * (2.0 * 0.5 / 8.0)
        optimizer.step()
    return float(weight.detach().std())


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_noise_of_an_update_is_that_of_the_steps_it_takes(steps: int, momentum: float) -> None:
    spec = lifecycle(momentum=momentum)
    assert update_noise(mechanism(steps), spec) == pytest.approx(simulated(steps, spec), rel=0.03)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_adam_walks_about_as_far_whatever_the_noise(steps: int) -> None:
    spec = lifecycle(optimizer="adam")
    assert 0.5 < update_noise(mechanism(steps), spec) / simulated(steps, spec) < 2.0


@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0])
def test_the_share_that_is_cut_is_that_of_a_normal_law(ratio: float) -> None:
    draws = np.abs(np.random.default_rng(0).normal(size=200_000))
    assert share_cut(1.0, ratio) == pytest.approx(float(np.mean(draws > ratio)), abs=0.005)


def warned(**protection: object) -> list[str]:
    made = make(
        privacy={**RECORD, "noise": "system"}, protection={"kind": "secagg", "threshold": 3, **protection}
    )
    return bound_warnings(made, mechanism(4))


def test_a_bound_that_noise_fills_is_warned_of_with_its_figure() -> None:
    (said,) = warned(coordinate_bound=1e-6)
    noise = update_noise(mechanism(4), make().federation.lifecycle)
    for words in (
        "coordinate_bound = 1e-06",
        f"about {noise:.2g}",
        "all of the coordinates",
        f"{4 * noise:.2g} or more",
    ):
        assert words in said
    assert warned(coordinate_bound=4.1 * noise) == []
    assert warned() == []


def test_a_bound_whose_levels_are_coarser_than_the_noise_is_warned_of() -> None:
    (said,) = warned(coordinate_bound=1e6)
    assert "lost in rounding" in said


@pytest.mark.parametrize(
    ("bound", "optimizer", "count"), [(1e-3, "adam", 1), (1.0, "adam", 0), (1e-3, "sgd", 0)]
)
def test_a_bound_below_one_step_is_warned_of_without_any_noise(
    bound: float, optimizer: str, count: int
) -> None:
    lifecycle = {"kind": "finetune", "local_steps": 2, "batch_size": 8, "learning_rate": 0.1}
    chosen = make(
        protection={"kind": "none", "coordinate_bound": bound},
        federation={"lifecycle": {**lifecycle, "optimizer": optimizer}},
    )
    warnings = bound_warnings(chosen, None)
    assert len(warnings) == count
    assert all("learning rate of 0.1" in warning and "0.4 or more" in warning for warning in warnings)


def test_the_plan_says_so(tmp_path: Path) -> None:
    from ffm_secure.engines.summary import describe

    made = make(privacy=RECORD, protection={"kind": "none", "coordinate_bound": 1e-6})
    assert any("noise alone" in warning for warning in describe(prepared(made)).warnings)


# What accuracy is compared with


def test_the_commonest_class_is_counted_on_the_rows_that_accuracy_is_counted_on(tmp_path: Path) -> None:
    for part, labels in (
        ("train", [i % 2 for i in range(40)]),
        ("validation", [int(i >= 40) for i in range(60)]),
    ):
        lines = [{"text": f"{part} {i}", "label": label} for i, label in enumerate(labels)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = make(
        task={
            "kind": "text_classification",
            "data": str(tmp_path),
            "clients": 4,
            "max_length": 8,
            "evaluation_examples": 7,
        },
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
        federation={"rounds": 0, "cohort": 4},
    )
    shown = simulation.evaluation_examples(prepared(made)).labels
    assert len(shown) == 7
    from ffm_secure.config import run_file

    (tmp_path / "run.toml").write_text(run_file.dump(made))
    done = call("run", "run.toml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    majority = json.loads(done.stdout)["metric_majority"]
    assert majority == pytest.approx(np.bincount(shown).max() / 7)
    assert not math.isclose(majority, 40 / 60)
