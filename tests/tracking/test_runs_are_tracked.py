"""A run shows its rounds in every tracker it is asked for, from the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ffm_secure.api import Run
from ffm_secure.config import run_file
from ffm_secure.errors import Interrupted
from ffm_secure.storage.run_directory import Store
from tests.federation.helpers import call, make
from tests.tracking.helpers import assert_shows


def after(rounds: int) -> Callable[[], bool]:
    """Return what says stop when it is asked for the last of some rounds."""
    asked = iter([False] * (rounds - 1) + [True])
    return lambda: next(asked)


def test_a_stopped_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    kinds = ("csv", "tensorboard", "mlflow", "wandb")
    config = make()
    with pytest.raises(Interrupted):
        Run(config, runs=tmp_path / "runs").start(track=kinds, should_stop=after(2))
    before = Store.read(tmp_path / "runs" / "test").records()
    for kind in kinds:
        assert_shows(kind, tmp_path / "runs" / "test" / "tracking", before, name="test")
    complete = Run(config, runs=tmp_path / "runs").start(track=kinds)
    assert len(complete.summary.rounds) == 3
    for kind in kinds:
        assert_shows(kind, complete.folder / "tracking", complete.summary.rounds, name="test")
    assert before == complete.summary.rounds[:2]


def test_a_finished_run_can_be_shown_later(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(run_file.dump(make()))
    assert call("run", "run.toml", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "runs" / "test" / "tracking").exists()
    again = call("run", "run.toml", "--track", "csv", "--track-to", "shown", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing was trained or charged" in again.stdout
    assert_shows("csv", tmp_path / "shown", Store.read(tmp_path / "runs" / "test").records(), name="test")


def test_trackers_change_nothing_of_a_run(tmp_path: Path) -> None:
    """Which trackers look on is the operator's own: another start may name others."""
    config = make()
    plain = Run(config, runs=tmp_path / "plain").start(fairness=False).summary
    seen = Run(config, runs=tmp_path / "seen").start(fairness=False, track=("csv",)).summary
    assert [record.loss for record in plain.rounds] == [record.loss for record in seen.rounds]
    assert (tmp_path / "plain/test/run.toml").read_text() == (tmp_path / "seen/test/run.toml").read_text()


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(run_file.dump(make()))
    refused = call("run", "run.toml", "--track", "tensorflow", cwd=tmp_path)
    assert refused.returncode == 2
    assert "track = 'tensorflow': must be one of 'csv', 'tensorboard', 'mlflow', 'wandb'" in refused.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("callback", [None, []])
def test_a_run_without_trackers_imports_none(tmp_path: Path, callback: list[object] | None) -> None:
    Run(make(), runs=tmp_path).start(callback=callback, fairness=False)  # type: ignore[arg-type]
    assert not (tmp_path / "test" / "tracking").exists()
