"""Whether an audit says the same twice: over seeds of records and noise, and beside busy loops.

python -m benchmarks.audit_repeats RUN [--budget quick] [--seeds 20] [--busy 2]
 RUN is the directory of a finished run; every audit works on a copy. Printed are CPU seconds, how many
attacks were tried, and each verdict that is not the same in all audits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ffm_secure.auditing.run_audit import audit_run

Place = tuple[str, str, str]  # observer, point, attack


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One audit of a run: what it cost, what it tried, and what it said."""

    seed: int
    busy: int
    seconds: float
    tried: frozenset[Place]
    verdicts: dict[Place, str]


def _spin() -> None:
    while True:
        pass


@contextmanager
def beside(count: int) -> Iterator[None]:
    """Keep that many processes busy."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in others:
        process.start()
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.join()


def repeat(run: Path, budget: str, seed: int, busy: int) -> Repeat:
    """Audit a copy of a run once."""
    with tempfile.TemporaryDirectory() as folder, beside(busy):
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        began = time.process_time()
        audit = audit_run(copy, budget=budget, seed=seed).audit
    assert audit is not None
    verdicts, attempted = {}, set()
    for finding in audit.findings:
        place = (finding.observer, finding.point, finding.attack)
        verdicts[place] = finding.verdict
        if finding.measure != "not run":
            attempted.add(place)
    return Repeat(
        seed=seed,
        busy=busy,
        seconds=time.process_time() - began,
        tried=frozenset(attempted),
        verdicts=verdicts,
    )


def differences(repeats: list[Repeat]) -> Iterator[str]:
    """Yield a line for every verdict that audits disagree on, and every attack that not all of them tried."""
    places = sorted({place for one in repeats for place in one.verdicts})
    for place in places:
        verdicts = Counter(one.verdicts.get(place, "missing") for one in repeats)
        attempted = sum(place in one.tried for one in repeats)
        if len(verdicts) > 1 or attempted not in (0, len(repeats)):
            words = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
            yield f"{' / '.join(place)}: {words}; tried in {attempted} of {len(repeats)}"


def main() -> None:
    """Audit a run again and again and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside one more audit of seed 0")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    repeats = []
    for seed in range(chosen.seeds):
        repeats.append(repeat(chosen.run, chosen.budget, seed, 0))
        print(f"seed {seed}: {len(repeats[-1].tried)} tried, {repeats[-1].seconds:.1f} CPU s", flush=True)
    print(
        f"over {chosen.seeds} seeds:", *(list(differences(repeats)) or ["all the same"]), sep="\n", flush=True
    )
    loaded = repeat(chosen.run, chosen.budget, 0, chosen.busy)
    print(f"beside {chosen.busy} busy loops: {len(loaded.tried)} tried, {loaded.seconds:.1f} CPU s")
    print(*(list(differences([repeats[0], loaded])) or ["all the same"]), sep="\n")


if __name__ == "__main__":
    main()
