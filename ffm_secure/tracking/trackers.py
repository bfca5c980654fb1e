"""Several trackers behind the one callback of the loop."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from ffm_secure.errors import ConfigError
from ffm_secure.records import RoundPlan, RoundRecord
from ffm_secure.registry import TRACKERS
from ffm_secure.storage.durable import create_folder
from ffm_secure.tracking.base import TrackedRun, Tracker

_LOG = logging.getLogger(__name__)
_LIBRARIES: Final = {  # kind and extra -> package
    "tensorboard": "tensorboardX",
    "mlflow": "mlflow",
    "wandb": "wandb",
}


def require_trackers(kinds: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed; nothing is imported for it.

    Raises:
      ConfigError: with every such kind.
    """
    problems = []
    for kind in kinds:
        package = _LIBRARIES.get(kind, "")
        if kind not in TRACKERS:
            problems.append(f"track = {kind!r}: must be one of {', '.join(map(repr, TRACKERS))}")
        elif package and importlib.util.find_spec(package) is None:
            problems.append(f"track = {kind!r}: is not installed; pip install 'ffm-secure[{kind}]'")
    if problems:
        raise ConfigError("tracking", problems)


class Trackers:
    """Tell every tracker of a run's rounds; a callback of the loop, to be closed at the end.

    Guarantee: a tracker that fails stops no round; it is left out from then on, `problems` says so, and the
    next start adds what it missed.
    """

    def __init__(self, kinds: Sequence[str], folder: Path, *, name: str, run_id: bytes) -> None:
        require_trackers(kinds)
        self.problems: list[str] = []
        self._trackers: dict[str, Tracker] = {}
        for kind in dict.fromkeys(kinds):
            place = folder / kind
            create_folder(place)
            tracked = TrackedRun(folder=place, name=name, run_id=run_id.hex())
            self._trackers[kind] = TRACKERS.load(kind)(tracked)

    def begin(self, records: Sequence[RoundRecord]) -> None:
        """Bring every tracker to where the run is."""
        for tracker in self._trackers.values():
            tracker.begin(records)

    def round_started(self, plan: RoundPlan, total: int) -> None:
        """Ignore: a plan is no result."""

    def client_finished(self, finished: int, total: int) -> None:
        """Ignore: what one client does is nobody's to track."""

    def round_finished(self, record: RoundRecord) -> None:
        """Show a durable round everywhere."""
        for kind, tracker in tuple(self._trackers.items()):
            try:
                tracker.log(record)
            except Exception as error:  # whatever a library raises, the round it is told of was paid for
                del self._trackers[kind]
                problem = (
                    f"{kind}: stopped at round {record.round} ({type(error).__name__}); the run goes on, and "
                    "its next start adds what is missing"
                )
                self.problems.append(problem)
                _LOG.warning(problem)

    def close(self) -> None:
        """Let go of every tracker."""
        for tracker in self._trackers.values():
            tracker.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
