"""An owner's commands on a ledger:
set a budget once, raise it with a reason, notice that both files were put back.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from defenses.dp import Budget, Ledger
from ffm_secure.cli.patience import patience
from tests.federation.helpers import call


def test_a_budget_is_set_once_and_raised_with_a_reason(tmp_path: Path) -> None:
    file = str(tmp_path / "owner.sqlite")
    assert call("ledger", "init", file, "--epsilon", "4").returncode == 0
    again = call("ledger", "init", file, "--epsilon", "9")
    assert again.returncode == 5
    assert "holds a lifetime budget of 4" in again.stderr
    without = call("ledger", "budget", "raise", file, "--epsilon", "6")
    assert without.returncode == 2
    assert "needs a reason" in without.stderr
    done = call(
        "ledger", "budget", "raise", file, "--epsilon", "6", "--because", "board decision 7", "--json"
    )
    assert json.loads(done.stdout)["before"] == 4.0
    with Ledger.open(file, create=False) as ledger:
        budget = ledger.lifetime("record")
        assert budget is not None
        assert budget.epsilon == 6.0
        assert [entry.reason for entry in ledger.entries() if entry.reason] == ["board decision 7"]
    shown = call("ledger", file)
    assert "lifetime budget of every row, per record: 6" in shown.stdout


def test_an_owner_may_set_what_runs_only_implied(tmp_path: Path) -> None:
    """A run's epsilon stands in for a budget until its owner says one; then no run moves it."""
    file = tmp_path / "owner.sqlite"
    with Ledger.open(file) as ledger:
        ledger.imply("record", 2.0, 1e-5)
        ledger.imply("record", 1.0, 1e-5)
        assert ledger.lifetime("record") == Budget(epsilon=2.0, delta=1e-5)
        ledger.imply("record", 8.0, 1e-5)
        assert ledger.lifetime("record") == Budget(epsilon=8.0, delta=1e-5)
        assert ledger.is_implied("record")
    assert call("ledger", "init", str(file), "--epsilon", "8").returncode == 0
    with Ledger.open(file, create=False) as ledger:
        assert not ledger.is_implied("record")
        ledger.imply("record", 20.0, 1e-5)
        assert ledger.lifetime("record") == Budget(epsilon=8.0, delta=1e-5)
    assert call("ledger", "init", str(file), "--epsilon", "9").returncode == 5


def test_without_a_name_the_ledger_of_this_user_is_meant(data_home: Path) -> None:
    assert call("ledger", "init", "--epsilon", "3", "--delta", "1e-6").returncode == 0
    assert (data_home / "ledger.sqlite").is_file()
    assert (data_home / "ledger.sqlite.key").stat().st_mode & 0o077 == 0
    assert "authentic" in call("ledger", "verify").stdout


def test_both_files_put_back_are_noticed_against_an_anchor(tmp_path: Path) -> None:
    """Whoever may write both files can take a charge back; only what was kept elsewhere tells."""
    file = tmp_path / "owner.sqlite"
    call("ledger", "init", str(file), "--epsilon", "4")
    older = tmp_path / "older"
    shutil.copytree(tmp_path, older, ignore=shutil.ignore_patterns("older"))
    call("ledger", "budget", "raise", str(file), "--epsilon", "5", "--because", "a test")
    anchor = json.loads(call("ledger", "verify", str(file), "--json").stdout)["anchor"]
    report = tmp_path / "report.json"
    number, _, digest = anchor.partition(":")
    report.write_text(json.dumps({"ledger_entries": int(number), "ledger_head": digest}))
    for kept in (anchor, str(report)):
        assert call("ledger", "verify", str(file), "--anchor", kept).returncode == 0
    for name in ("owner.sqlite", "owner.sqlite.head"):
        shutil.copy(older / name, tmp_path / name)
    assert call("ledger", "verify", str(file)).returncode == 0
    for kept in (anchor, str(report)):
        refused = call("ledger", "verify", str(file), "--anchor", kept)
        assert refused.returncode == 5
        assert "not authentic" in refused.stderr
    assert call("ledger", "verify", str(file), "--anchor", "nonsense").returncode == 2


def test_the_best_of_many_runs_is_priced() -> None:
    words = ("epsilon", "--q", "0.01", "--sigma", "1.0", "--steps", "500", "--json")
    one = json.loads(call(*words).stdout)["epsilon"]
    best = json.loads(call(*words, "--best-of", "poisson:10").stdout)
    assert best["one_run"] == pytest.approx(one)
    assert one < best["epsilon"] < 10 * one
    assert call(*words, "--best-of", "many").returncode == 2


def test_the_first_interrupt_waits_and_the_second_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with patience() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    assert "finishing this round" in capsys.readouterr().err
