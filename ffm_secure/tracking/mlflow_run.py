"""Rounds as metrics of an MLflow run, in a folder on this disk and on no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ffm_secure.foreign import LibraryObject
from ffm_secure.records import RoundRecord
from ffm_secure.tracking.base import TrackedRun, numbers, report_nothing

EXPERIMENT: Final = "ffm-secure"
RUN_TAG: Final = "ffm_secure.run_id"
_SETTINGS: Final[Mapping[str, str]] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder needs neither a database nor its migrations
}
_MOST_AT_ONCE: Final = 1000


class MlflowRun:
    """Keep one MLflow run for one run of ours, however often it is stopped."""

    def __init__(self, tracked: TrackedRun, clock: Callable[[], float] = time.time) -> None:
        self._tracked, self._clock = tracked, clock
        self._client = _client(tracked.folder)
        self._run = ""

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Find the run this one continues, or create it, and add what a kill left out of it."""
        self._run = self._existing() or self._created()
        self._client.update_run(self._run, status="RUNNING")
        shown: dict[str, set[int]] = {}
        missing = []
        for record in records:
            for name, value in numbers(record).items():
                if name not in shown:
                    shown[name] = self._steps(name)
                if record.round not in shown[name]:
                    missing.append(self._metric(name, value, record.round))
        for start in range(0, len(missing), _MOST_AT_ONCE):
            self._client.log_batch(self._run, metrics=missing[start : start + _MOST_AT_ONCE])

    def log(self, record: RoundRecord) -> None:
        """Add the numbers of one round."""
        metrics = []
        for name, value in numbers(record).items():
            metrics.append(self._metric(name, value, record.round))
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Say that no process works on the run."""
        if self._run:
            self._client.set_terminated(self._run)

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(EXPERIMENT)
        if known is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(EXPERIMENT))

    def _existing(self) -> str:
        query = f"tags.`{RUN_TAG}` = '{self._tracked.run_id}'"
        runs = self._client.search_runs([self._experiment()], query, max_results=1)
        return str(runs[0].info.run_id) if runs else ""

    def _created(self) -> str:
        tags = {RUN_TAG: self._tracked.run_id, "mlflow.user": "ffm-secure"}
        run = self._client.create_run(self._experiment(), run_name=self._tracked.name, tags=tags)
        return str(run.info.run_id)

    def _steps(self, name: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self._run, name)}

    def _metric(self, name: str, value: float, step: int) -> LibraryObject:
        from mlflow.entities import Metric

        return Metric(name, value, int(self._clock() * 1000), step)


def _client(folder: Path) -> LibraryObject:
    report_nothing("mlflow", _SETTINGS)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=folder.resolve().as_uri())
