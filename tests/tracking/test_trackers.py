"""Every tracker shows every round once, also of a run that was killed, and reaches no other machine."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.records import RoundRecord
from ffm_secure.registry import TRACKERS
from ffm_secure.tracking import trackers as tracking
from ffm_secure.tracking.base import numbers, report_nothing
from ffm_secure.tracking.tensorboard import events
from ffm_secure.tracking.trackers import Trackers, require_trackers
from tests.tracking.helpers import CURVES, KINDS, RUN_ID, assert_shows, record, rounds

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE", "CI", "PYTEST_CURRENT_TEST")


def outside(kind: str, folder: Path, first: int, last: int, wait: float = 0.0) -> list[str]:
    """Return the command that logs rounds in a process of its own, which knows no test and no setting."""
    numbers_ = [str(first), str(last), str(wait)]
    return [sys.executable, "-m", "tests.tracking.log_rounds", kind, str(folder), *numbers_]


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in HIDDEN}


def test_every_kind_has_a_test_here() -> None:
    assert tuple(TRACKERS) == KINDS == tuple(CURVES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_continues_what_is_shown(kind: str, tmp_path: Path) -> None:
    """Stopped after round 3 with round 4 told to nobody, and again after round 6."""
    for records, logged in (((), 3), (rounds(4), 2), (rounds(6), 0)):
        with Trackers([kind], tmp_path, name="demo", run_id=RUN_ID) as trackers:
            trackers.begin(records)
            for number in range(len(records) + 1, len(records) + logged + 1):
                trackers.round_finished(record(number))
            assert not trackers.problems
    assert_shows(kind, tmp_path, rounds(6))


@pytest.mark.parametrize("kind", KINDS)
def test_another_run_in_the_same_folder_is_another_curve(kind: str, tmp_path: Path) -> None:
    for name, run_id, last in (("demo", RUN_ID, 3), ("other", bytes(16), 2)):
        with Trackers([kind], tmp_path, name=name, run_id=run_id) as trackers:
            trackers.begin(rounds(last))
    assert_shows(kind, tmp_path, rounds(3))
    assert_shows(kind, tmp_path, rounds(2), name="other")


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_in_between_keeps_one_continuous_run(kind: str, tmp_path: Path) -> None:
    """Killed while it writes round after round; the run directory had one more round than was told."""
    reached = 0
    for _ in range(2):
        command = outside(kind, tmp_path, reached + 1, 100_000)
        with subprocess.Popen(
            command, cwd=ROOT, env=plain_environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                reached = int(line)
                if reached % 37 == 0:
                    process.send_signal(signal.SIGKILL)
                    break
            told = [int(line) for line in process.stdout.read().split()]
        assert process.returncode == -signal.SIGKILL
        reached = max([reached, *told]) + 1
    with Trackers([kind], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(rounds(reached))
    assert_shows(kind, tmp_path, rounds(reached))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tracker_reaches_another_machine(kind: str, tmp_path: Path) -> None:
    """Every attempt is noted in the process itself, reporting threads included, for two seconds after."""
    done = subprocess.run(
        outside(kind, tmp_path, 1, 3, 2.0),
        cwd=ROOT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "attempts []"


# everything that this program and its children send goes out through a loopback that is listened to
LISTENED = """
import socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "route", "add", "default", "dev", "lo"], check=True)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.settimeout(0.5)
process, packets = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL), 0
while True:
    try:
        wire.recv(2000)
        packets += 1
    except TimeoutError:
        if process.poll() is not None:
            break
print(process.returncode, packets)
"""


def packets_of(command: list[str]) -> list[str]:
    """Return the exit code of a program and how many packets it and its children tried to send anywhere."""
    listened = ["unshare", "-rn", sys.executable, "-c", LISTENED]
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    done = subprocess.run(
        [*listened, *command], cwd=ROOT, env=plain_environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.split()


BY_A_CHILD = "wandb"  # writes by a process of its own; the others are listened to in the slow suite


@pytest.mark.parametrize(
    "kind", [kind if kind == BY_A_CHILD else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_no_child_of_a_tracker_sends_a_packet(kind: str, tmp_path: Path) -> None:
    """A library may write by a process of its own, which no hook inside this one sees."""
    assert packets_of(outside(kind, tmp_path, 1, 3, 1.0)) == ["0", "0"]


def test_a_packet_would_be_counted() -> None:
    ask = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    code, packets = packets_of([sys.executable, "-c", ask])
    assert code == "0"
    assert int(packets) > 0


def test_an_attempt_would_be_noted() -> None:
    """The positive control: one line that asks for a name, in a process that watches."""
    script = (
        "from tests.tracking import log_rounds as l; import socket, contextlib; l.watch_the_network()\n"
        "with contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9), timeout=1)\n"
        "print(l.ATTEMPTS)"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "socket.connect" in shown.stdout
    assert "getaddrinfo" in shown.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_works_where_there_is_no_network(kind: str, tmp_path: Path) -> None:
    namespace = ["unshare", "-rn"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    subprocess.run(
        [*namespace, *outside(kind, tmp_path, 1, 3)], cwd=ROOT, env=plain_environment(), check=True
    )
    assert_shows(kind, tmp_path, rounds(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_rounds_take_under_five_seconds_of_work(kind: str, tmp_path: Path) -> None:
    """CPU time, which a busy machine does not stretch; the import is paid once a run and not counted."""
    with Trackers([kind], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(())
        began = time.process_time()
        for number in range(1, 1001):
            trackers.round_finished(record(number))
        assert not trackers.problems
        assert time.process_time() - began < 5.0
    assert_shows(kind, tmp_path, rounds(1000))


# ------------------------------------------------------------------------- what goes out, and what not


def test_only_what_a_record_publishes_goes_out() -> None:
    """The names are those of `RoundRecord`, and no number is of one client."""
    shown = set(numbers(record(2, alignment=0.5)))
    counts = {"survivors", "lost", "aborted", "metric_accuracy"}
    assert shown - counts <= set(RoundRecord.__dataclass_fields__)
    assert numbers(record(2))["survivors"] == 2
    assert "alignment" not in numbers(record(2))
    assert "epsilon_spent" not in numbers(record(2, epsilon_spent=float("inf")))


def test_a_spreadsheet_runs_no_text_of_a_round(tmp_path: Path) -> None:
    with Trackers(["csv"], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(())
        trackers.round_finished(record(1, aborted="=cmd|' /C calc'!A0", metric_name="+1"))
    with open(tmp_path / "csv" / "demo.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["aborted"][:2], row["metric_name"]) == ("'=", "'+1")


def test_what_trackers_write_is_their_owners_alone(tmp_path: Path) -> None:
    with Trackers(["csv", "tensorboard"], tmp_path / "new", name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(rounds(1))
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "csv" / "demo.csv").stat().st_mode & 0o077 == 0


def test_a_tracker_that_fails_stops_no_round(tmp_path: Path) -> None:
    with Trackers(["csv", "tensorboard"], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(())
        trackers.round_finished(record(1))
        path = tmp_path / "csv" / "demo.csv"
        path.unlink()
        path.mkdir()
        trackers.round_finished(record(2))
        trackers.round_finished(record(3))
    (problem,) = trackers.problems
    assert problem.startswith("csv: stopped at round 2 (IsADirectoryError)")
    assert_shows("tensorboard", tmp_path, rounds(3))


def test_what_is_unknown_or_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        require_trackers(["csv", "mlflow", "tensorflow"])
    first, second = caught.value.problems
    assert first == "track = 'mlflow': is not installed; pip install 'ffm-secure[mlflow]'"
    assert "must be one of 'csv', 'tensorboard', 'mlflow'" in second


def test_a_library_that_may_be_reporting_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reporting_library", sys)
    monkeypatch.delenv("REPORT_NOTHING", raising=False)
    with pytest.raises(StoreError, match="set REPORT_NOTHING=1 in the environment"):
        report_nothing("reporting_library", {"REPORT_NOTHING": "1"})
    monkeypatch.setenv("REPORT_NOTHING", "1")
    report_nothing("reporting_library", {"REPORT_NOTHING": "1"})


def test_event_files_are_what_tensorboardx_writes(tmp_path: Path) -> None:
    """The same event framed by the library's own writer gives the same bytes."""
    from tensorboardX.record_writer import RecordWriter

    with Trackers(["tensorboard"], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(rounds(3))
    writer = RecordWriter(str(tmp_path / "peer"))
    for event in events(tmp_path / "tensorboard" / "demo"):
        writer.write(event.SerializeToString())
    writer.flush()
    writer.close()
    (path,) = (tmp_path / "tensorboard" / "demo").iterdir()
    assert path.read_bytes() == (tmp_path / "peer").read_bytes()
    assert path.stat().st_mode & 0o077 == 0


def test_a_file_that_a_kill_tore_is_read_up_to_there(tmp_path: Path) -> None:
    """At every byte of the last round: what was shown whole stays, what was torn is shown anew."""
    with Trackers(["tensorboard"], tmp_path, name="demo", run_id=RUN_ID) as trackers:
        trackers.begin(rounds(2))
        (path,) = (tmp_path / "tensorboard" / "demo").iterdir()
        whole = path.stat().st_size
        trackers.round_finished(record(3))
    content = path.read_bytes()
    for length in range(whole, len(content), 17):
        for other in path.parent.iterdir():
            other.unlink()
        path.write_bytes(content[:length])
        with Trackers(["tensorboard"], tmp_path, name="demo", run_id=RUN_ID) as trackers:
            trackers.begin(rounds(3))
        assert_shows("tensorboard", tmp_path, rounds(3))
