"""Accountants side by side: epsilon and time on the reference vectors, and what only a running ledger asks
for.

    python -m benchmarks.accountant --json [--quick]

Every accountant gets the same vectors, one after the other, each in its own process with a limit on CPU
time; processes are forked from one that has imported the accountant, so times are CPU seconds without
imports. `declined` means it raised or returned no finite number, `over limit` that it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "dp" / "vectors" / "accounting.json"
ACCOUNTANTS = ("ours", "dp-accounting PLD", "Opacus PRV", "Opacus RDP")
QUICK = ("base_q01_s1_T1000", "sst2_lora", "delta_1e-15", "het_2")


def main() -> None:
    """Print the tables and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line (always done)"
    )
    parser.add_argument("--quick", action="store_true", help="four vectors and small histories")
    parser.add_argument(
        "--limit", type=float, default=90.0, help="CPU seconds one accountant may take for one vector"
    )
    parser.add_argument("--worker", nargs="+", metavar="ACCOUNTANT VECTOR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker[0], options.worker[1:], options.limit)
        return
    vectors = [v for v in json.loads(VECTORS.read_text())["vectors"] if not options.quick or v["id"] in QUICK]
    measured = {name: _in_process(name, [v["id"] for v in vectors], options.limit) for name in ACCOUNTANTS}
    rows = [_row(vector, {name: measured[name][vector["id"]] for name in ACCOUNTANTS}) for vector in vectors]
    running = _running(100 if options.quick else 1000)
    ledger = _ledger(20 if options.quick else 1000)
    calibration = _calibration()
    _print(rows, running, ledger, calibration)
    summary = {
        "benchmark": "accountant",
        "vectors": rows,
        "running": running,
        "ledger": ledger,
        "calibration": calibration,
    }
    print(json.dumps(summary))


def _row(vector: dict[str, Any], measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": vector["id"],
        "delta": vector["delta"],
        "reference": vector["eps"],
        **measured,
    }
    for cell in measured.values():
        value = cell.get("epsilon")
        if value is not None:
            cell["relative"] = value / vector["eps"] - 1
            cell["below_reference"] = value < vector["eps"] - vector["abs_tol"]
    return row


def _in_process(name: str, vectors: list[str], limit: float) -> dict[str, dict[str, Any]]:
    """Let one accountant answer every vector in a process of its own; progress goes to the error stream."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accountant"]
    command += ["--limit", str(limit), "--worker", name, *vectors]
    values = {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith('{"vector"'):
                answer = json.loads(line)
                values[answer.pop("vector")] = answer
                print(name, line.strip(), file=sys.stderr, flush=True)
    return values


def _work(name: str, vectors: list[str], limit: float) -> None:
    """Import once, then fork a process for each vector, so that limits and crashes stay its own."""
    _measure(name, QUICK[0])
    context = multiprocessing.get_context("fork")
    for vector in vectors:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(name, vector, limit, there))
        process.start()
        there.close()
        try:
            answer = here.recv()
        except EOFError:
            process.join()
            stopped = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            answer = (
                {"status": "over limit", "seconds": limit}
                if stopped
                else {"status": "declined", "reason": "crashed"}
            )
        process.join()
        print(json.dumps({"vector": vector, **answer}), flush=True)


def _answer(name: str, vector: str, limit: float, there: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
    there.send(_measure(name, vector))


def _measure(name: str, identity: str) -> dict[str, Any]:
    vector = next(v for v in json.loads(VECTORS.read_text())["vectors"] if v["id"] == identity)
    compute = {
        "ours": _ours,
        "dp-accounting PLD": _dp_accounting,
        "Opacus PRV": _opacus_prv,
        "Opacus RDP": _opacus_rdp,
    }[name]
    run = compute(vector["segments"], vector["delta"])
    start = time.process_time()
    try:
        value = float(run())
    except Exception as error:
        return {"status": "declined", "reason": type(error).__name__, "seconds": time.process_time() - start}
    seconds = time.process_time() - start
    if not math.isfinite(value):
        return {"status": "declined", "reason": "not finite", "seconds": seconds}
    return {"status": "ok", "epsilon": value, "seconds": seconds}


def _ours(segments: list[dict[str, Any]], delta: float) -> Any:
    from defenses.dp.accountant import epsilon

    events = [_event(s["q"], s["sigma"], s["steps"]) for s in segments]
    return lambda: epsilon(events, delta).epsilon


def _dp_accounting(segments: list[dict[str, Any]], delta: float) -> Any:
    import dp_accounting
    from dp_accounting import pld

    def run() -> float:
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        for s in segments:
            gaussian = dp_accounting.GaussianDpEvent(s["sigma"])
            sampled = dp_accounting.PoissonSampledDpEvent(s["q"], gaussian) if s["q"] < 1 else gaussian
            accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, s["steps"]))
        return float(accountant.get_epsilon(delta))

    return run


def _opacus_prv(segments: list[dict[str, Any]], delta: float) -> Any:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(s["sigma"], s["q"], s["steps"]) for s in segments]
    return lambda: accountant.get_epsilon(delta)


def _opacus_rdp(segments: list[dict[str, Any]], delta: float) -> Any:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(s["sigma"], s["q"], s["steps"]) for s in segments]
    return lambda: accountant.get_epsilon(delta)


def _event(rate: float, sigma: float, steps: int) -> Any:
    from defenses.dp.events import GaussianEvent

    return GaussianEvent(
        unit="record",
        adjacency="add_remove",
        sampling="poisson",
        sampling_rate=rate,
        noise_multiplier=sigma,
        steps=steps,
        clip_norm=1.0,
        release="benchmark",
    )


def _running(rounds: int) -> dict[str, Any]:
    """Compose many different rounds at once, then price one further round."""
    from defenses.dp.accountant import Accountant

    accountant = Accountant()
    for index in range(rounds):
        accountant.compose(_event(0.01 + 1e-5 * index, 1.0 + 5e-4 * index, 2))
    start = time.process_time()
    bound = accountant.epsilon(1e-5)
    whole = time.process_time() - start
    times = []
    for index in range(9):
        start = time.process_time()
        accountant.epsilon_with(_event(0.0123 + 1e-4 * index, 1.1, 3), 1e-5)
        times.append(time.process_time() - start)
    return {
        "rounds": rounds,
        "epsilon": bound.epsilon,
        "all_seconds": whole,
        "one_more_ms": 1e3 * sorted(times)[4],
    }


def _ledger(owners: int) -> dict[str, Any]:
    """Reserve one release for many owners who share a history, then for twenty of them."""
    from defenses.dp import Charge, Ledger

    def charges(count: int, number: int) -> list[Charge]:
        event = _event(0.01 + 1e-6 * number, 1.0, 1)
        return [
            Charge(owner=f"o{index}", dataset="d", event=event, run="r", round=number, release="u")
            for index in range(count)
        ]

    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.db") as ledger:
        ledger.set_budgets([f"o{index}" for index in range(owners)], "d", "record", 8.0, 1e-5)
        ledger.reserve(charges(owners, 0))
        start = time.perf_counter()
        ledger.reserve(charges(owners, 1))
        many = time.perf_counter() - start
        times = []
        for number in range(2, 12):
            start = time.perf_counter()
            ledger.reserve(charges(20, number))
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        ledger.verify()
        verified = time.perf_counter() - start
    result = {
        "owners": owners,
        "all_ms": 1e3 * many,
        "twenty_ms": 1e3 * sorted(times)[5],
        "verify_ms": 1e3 * verified,
    }
    return result | _reopened(owners)


def _reopened(rounds: int) -> dict[str, float]:
    """Open a ledger that holds many different rounds of one owner, and reserve one more, then another."""
    from defenses.dp import Charge, Ledger

    def charge(index: int) -> Charge:
        event = _event(0.01 + 1e-5 * index, 1.0 + 5e-4 * index, 2)
        return Charge(owner="o", dataset="d", event=event, run="r", round=index, release="u")

    with tempfile.TemporaryDirectory() as folder:
        path, times = Path(folder) / "ledger.db", []
        with Ledger.open(path) as ledger:
            ledger.set_budget("o", "d", "record", 8.0, 1e-5)
            ledger.reserve([charge(index) for index in range(rounds)])
        start = time.process_time()
        with Ledger.open(path, create=False) as ledger:
            for index in (rounds, rounds + 1):
                ledger.reserve([charge(index)])
                times.append(time.process_time() - start)
    return {"reopened_first_seconds": times[0], "reopened_next_ms": 1e3 * (times[1] - times[0])}


def _calibration() -> list[dict[str, float]]:
    from defenses.dp.calibration import noise_multiplier

    result = []
    for target, delta, rate, steps in (
        (8.0, 1e-5, 0.01, 1000),
        (1.0, 1e-5, 0.0152, 660),
        (0.1, 1e-8, 0.001, 10_000),
    ):
        start = time.process_time()
        sigma = noise_multiplier(epsilon=target, delta=delta, sampling_rate=rate, steps=steps)
        result.append(
            {
                "epsilon": target,
                "delta": delta,
                "q": rate,
                "steps": steps,
                "sigma": sigma,
                "seconds": time.process_time() - start,
            }
        )
    return result


def _print(
    rows: list[dict[str, Any]], running: dict[str, Any], ledger: dict[str, Any], calibration: list[Any]
) -> None:
    print(f"{'vector':22s}{'delta':>9s}{'reference':>12s}" + "".join(f"{name:>28s}" for name in ACCOUNTANTS))
    for row in rows:
        print(
            f"{row['id']:22s}{row['delta']:9.0e}{row['reference']:12.5g}"
            + "".join(_cell(row[n]) for n in ACCOUNTANTS)
        )
    print(
        "cells: epsilon, difference to the reference, seconds; '<' marks a value "
        "below the reference's tolerance"
    )
    print(
        f"{running['rounds']} different rounds: {running['all_seconds']:.2f} s; one more: "
        f"{running['one_more_ms']:.1f} ms"
    )
    print(
        f"ledger: {ledger['owners']} owners with one history {ledger['all_ms']:.0f} ms; twenty "
        f"{ledger['twenty_ms']:.0f} ms; verify {ledger['verify_ms']:.0f} ms; reopened with "
        f"{ledger['owners']} different rounds, first reserve {ledger['reopened_first_seconds']:.2f} s, "
        f"next {ledger['reopened_next_ms']:.0f} ms"
    )
    for row in calibration:
        print(f"sigma for epsilon {row['epsilon']:g}: {row['sigma']:.4f} in {row['seconds']:.2f} s")


def _cell(cell: dict[str, Any]) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']:>28s}"
    mark = "<" if cell["below_reference"] else " "
    return f"{cell['epsilon']:12.5g}{mark}{cell['relative']:+8.0e}{cell['seconds']:6.2f}s"


if __name__ == "__main__":
    main()
