"""Rounds for trackers, and what each tracker shows of them when it is read back."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path

from ffm_secure.records import RoundRecord
from ffm_secure.tracking.tensorboard import events

KINDS = ("csv", "tensorboard", "mlflow", "wandb")
RUN_ID = bytes(range(16))
Curve = list[tuple[int, float]]


def record(number: int, **changes: object) -> RoundRecord:
    """Return one plausible round."""
    values: dict[str, object] = {
        "round": number,
        "phase": "private",
        "cohort": (0, 1, 2),
        "survivors": (0, 2),
        "dropped": {1: "train"},
        "loss": 2.0 / number,
        "metric": 1.0 - 1.0 / number,
        "metric_name": "accuracy",
        "epsilon_spent": 0.1 * number,
        "bytes_up": 1000 + number,
        "bytes_down": 2000,
        "seconds": 1.5,
        "client_seconds": 1.0,
        "norm": 0.25,
    }
    return RoundRecord(**{**values, **changes})  # type: ignore[arg-type]


def rounds(last: int) -> tuple[RoundRecord, ...]:
    return tuple(record(number) for number in range(1, last + 1))


def csv_curve(folder: Path, name: str) -> Curve:
    with open(folder / "csv" / f"{name}.csv", newline="") as file:
        return [(int(row["round"]), float(row["loss"])) for row in csv.DictReader(file)]


def tensorboard_curve(folder: Path, name: str) -> Curve:
    """Read as TensorBoard does: a session that starts at a step hides that step and all later ones."""
    curve: Curve = []
    for event in events(folder / "tensorboard" / name):
        if event.HasField("session_log"):
            curve = [(step, value) for step, value in curve if step < event.step]
        for value in event.summary.value:
            if value.tag == "loss":
                curve.append((event.step, value.simple_value))
    return curve


def mlflow_curve(folder: Path, name: str) -> Curve:
    """Read with MLflow's own client; more than one run of this name is a failure."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("ffm-secure")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if run.info.run_name == name]
    history = client.get_metric_history(run.info.run_id, "loss")
    return sorted((metric.step, metric.value) for metric in history)


def wandb_curve(folder: Path, name: str) -> Curve:
    """Read the offline records of every start; a sync adds them up under the run's one id."""
    from ffm_secure.tracking.wandb_run import histories

    return sorted((step, float(values["loss"])) for step, values in histories(folder / "wandb" / name))


CURVES: dict[str, Callable[[Path, str], Curve]] = {
    "csv": csv_curve,
    "tensorboard": tensorboard_curve,
    "mlflow": mlflow_curve,
    "wandb": wandb_curve,
}


def assert_shows(kind: str, folder: Path, records: tuple[RoundRecord, ...], name: str = "demo") -> None:
    """Hold a tracker's loss against the rounds: each once, none missing, in order."""
    curve = CURVES[kind](folder, name)
    assert [step for step, _ in curve] == [item.round for item in records]
    for (_, value), item in zip(curve, records, strict=True):
        assert math.isclose(value, item.loss, rel_tol=1e-6)
