"""Found a federation on this machine and train with it:
an operator, a coordinator and four hospitals, each in a folder of its own, as docs/deploy.md tells it.

`python examples/federation.py FOLDER` uses the commands that people use, kills one hospital's service in
the middle of a round, starts it again, and shows the report and every hospital's ledger at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ffm_secure.cli import app as cli
from ffm_secure.config import run_file
from ffm_secure.data.clinic_notes.notes import clinic_notes

EXAMPLE = Path(__file__).resolve().with_name("federation.toml")
PATIENCE = 600.0  # seconds


def say(words: str) -> None:
    print(f"-- {words}", flush=True)


def ffm(*words: object) -> str:
    """Run one command in this process, which spares its start; show it, and return what it printed."""
    shown = " ".join(map(str, words))
    say(f"ffm-secure {shown}")
    printed, before, code = io.StringIO(), sys.argv, 0
    try:
        sys.argv = ["ffm-secure", *map(str, words)]
        with contextlib.redirect_stdout(printed):
            cli.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    sys.stdout.write(printed.getvalue())
    if code:
        raise SystemExit(f"ffm-secure {shown} failed")
    return printed.getvalue()


def key_in(printed: str) -> str:
    """Return the key in what a command printed."""
    return next(word for word in printed.split() if word.startswith("ed25519:"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def deal_rows(folder: Path, source: str) -> list[str]:
    """Write each hospital's notes into a file of its own; return the hospitals."""
    options = {}
    for item in source.partition("?")[2].split("&"):
        name, _, value = item.partition("=")
        options[name] = int(value)
    rows, _, classes = clinic_notes(options)
    hospitals = sorted(set(rows["hospital"]))
    for hospital in hospitals:
        with (folder / f"{hospital}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "patient"])
            for place, owner in enumerate(rows["hospital"]):
                if owner == hospital:
                    label = classes[int(rows["label"][place])]
                    writer.writerow([rows["text"][place], label, rows["patient"][place]])
    return hospitals


def found(folder: Path, run: Path, hospitals: list[str]) -> None:
    """Let everybody make keys, the operator sign them, and every hospital allow the run."""
    operator, coordinator = folder / "operator", folder / "coordinator"
    trusted = key_in(ffm("operator", "init", operator, "--federation", "clinics"))
    address = ("--host", "localhost", "--port", free_port())
    own = key_in(ffm("coordinator", "init", coordinator, "--operator", trusted, *address))
    ffm("operator", "roster", "add", operator, "coordinator", own)
    for hospital in hospitals:
        settings = ("--name", hospital, "--data", folder / f"{hospital}.csv", "--epsilon", 8)
        printed = ffm("site", "init", folder / hospital, "--operator", trusted, *settings)
        ffm("operator", "roster", "add", operator, hospital, key_in(printed))
    ffm("operator", "roster", "sign", operator)
    for name in ("coordinator", *hospitals):
        shutil.copy(operator / "roster.json", folder / name / "roster.json")
        ffm("operator", "approve", operator, folder / name / "tls-request.json")
        whose = "coordinator" if name == "coordinator" else "site"
        ffm(whose, "enrol", folder / name, operator / f"approval-{name}.json")
    for hospital in hospitals:
        loosen(folder / hospital / "site.toml")
        ffm("site", "allow", folder / hospital, run)


def loosen(file: Path) -> None:
    """Let a hospital take part in a run of four that can lose one: its own people's decision."""
    words = file.read_text()
    assert "colluders = 1" in words
    file.write_text(words.replace("colluders = 1", "colluders = 0"))


def serve(folder: Path, hospital: str) -> subprocess.Popen[bytes]:
    """Start a hospital's service; what it prints goes into its own folder."""
    with (folder / hospital / "service.out").open("ab") as out:
        words = [sys.executable, "-m", "ffm_secure", "site", "start", str(folder / hospital)]
        return subprocess.Popen(words, stdout=out, stderr=out)


def state(folder: Path) -> dict[str, object]:
    try:
        words: dict[str, object] = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return words


def wait_for(what: str, holds: object, process: subprocess.Popen[bytes]) -> None:
    """Wait until something holds, as long as a process lives."""
    assert callable(holds)
    ends = time.monotonic() + PATIENCE
    while not holds():
        if process.poll() is not None:
            raise SystemExit(f"a process ended before {what}")
        if time.monotonic() > ends:
            raise SystemExit(f"{what} did not come about in {PATIENCE:.0f} s")
        time.sleep(0.05)


def train(folder: Path, run: Path, hospitals: list[str]) -> None:
    """Start everybody, kill the last hospital's service while it learns in round 2, let the run finish."""
    services = {hospital: serve(folder, hospital) for hospital in hospitals}
    words = [
        sys.executable,
        "-m",
        "ffm_secure",
        "coordinator",
        "start",
        str(folder / "coordinator"),
        str(run),
    ]
    say("ffm-secure coordinator start, and four times ffm-secure site start")
    coordinator = subprocess.Popen(words)
    try:
        last = hospitals[-1]

        def is_learning() -> bool:
            now = state(folder / "coordinator")
            return now.get("round") == 2 and now.get("stage") == "upload"

        wait_for("round 2", is_learning, coordinator)
        services[last].send_signal(signal.SIGKILL)
        services[last].wait()
        say(f"kill -9 of the service of {last} while round 2 learns; it is started again")
        services[last] = serve(folder, last)
        if coordinator.wait(PATIENCE):
            raise SystemExit("the run failed")
    finally:
        for process in (coordinator, *services.values()):
            process.terminate()
        for process in services.values():
            process.wait(30)


def show(folder: Path, hospitals: list[str]) -> None:
    """Show what every party has in the end."""
    for hospital in hospitals:
        ffm("ledger", "verify", folder / hospital / "ledger.sqlite")
        ffm("site", "status", folder / hospital)
    report = json.loads((folder / "coordinator" / "runs" / "clinics" / "report.json").read_text())
    for item in report["rounds"]:
        lost = ", ".join(f"{hospitals[int(site)]} ({stage})" for site, stage in item["dropped"].items())
        outcome = item["aborted"] or f"{len(item['survivors'])} hospitals in the sum"
        print(f"round {item['round']}: {outcome}; lost: {lost or 'nobody'}; accuracy {item['metric']:.3f}")
    print(f"report: {folder / 'coordinator' / 'runs' / 'clinics' / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, default=EXAMPLE)
    asked = parser.parse_args()
    folder, began = asked.folder.resolve(), time.monotonic()
    if folder.exists():
        raise SystemExit(f"{folder} exists; remove it, or name another")
    folder.mkdir(parents=True, mode=0o700)
    hospitals = deal_rows(folder, run_file.load(asked.run).task.data)
    found(folder, asked.run, hospitals)
    train(folder, asked.run, hospitals)
    show(folder, hospitals)
    say(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
