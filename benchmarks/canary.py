"""Audit a whole federated run with canaries, and the same run with one mistake in it.

    python -m benchmarks.canary --json [--quick] [--seeded]

Four clients train a small text model under record-level privacy and secure aggregation; the ledger allows
epsilon 8.
One client also holds canaries: records whose gradient is one coordinate, ten times as long as the clipping
bound, each put among its records by its own fair coin. They take the run's own way: its sampler, clipping,
noise, divisor, rounding, mask and sum. The observer is a server that colludes with the other clients: it
takes their updates off every opened sum and adds up, over the rounds, what is left at each canary's
coordinate.

A bound above the ledger's epsilon refutes the claim; each is wrong with probability at most 2.5 %. "one-run"
holds for any mechanism, "f-DP" refutes Gaussian trade-off curves and is compared with the Gaussian curve that
covers the ledger's claim, "Gaussian" is the sharpest and takes the scores for Gaussian. The broken runs
charge the ledger what the honest one does, and differ from it in one place.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers.utils import logging

from attacks.canary import Canaries, gaussian_epsilon
from defenses.dp import Accountant, ClippedSum, Clipping, Event
from defenses.dp.accountant import gaussian_delta
from defenses.random_source import RandomSource
from ffm_secure.config import run_file as config
from ffm_secure.engines import simulation
from ffm_secure.lifecycle.finetune import GradientRule, PrivateGradient
from ffm_secure.records import RoundPlan, RoundRecord, RoundSum
from ffm_secure.server import rounds
from ffm_secure.site.noise_memory import NoiseMemory
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.storage.run_directory import Store

VICTIM, SIGNIFICANCE, LENGTH = 0, 0.025, 10.0
METHODS = {"one-run": "one_run", "f-DP": "one_run_fdp", "Gaussian": "gaussian"}
FLAWS = {
    "none": "as shipped",
    "half noise": "noise with half the standard deviation that was charged",
    "noise of a mean": "noise divided by the number of clients",
    "no clipping": "gradients added as they are",
    "batch clipping": "the batch's mean clipped once, instead of every gradient",
    "full batches": "every record in every step, charged as Poisson samples",
    "replayed noise": "noise from a seed the observer knows",
}


def run_file(*, quick: bool, seeded: bool) -> dict[str, Any]:
    """Return the run: 80 steps at rate 0.5, where the sum over steps is nearly all an observer can use."""
    return {
        "format": 1,
        "name": "canary",
        "seed": 3,
        "task": {
            "kind": "text_classification",
            "data": "builtin:clinic_notes?size=96&validation=60",
            "clients": 4,
            "split": {"kind": "iid"},
            "max_length": 24,
            "nominal_examples": 24,
            "evaluation_examples": 60,
        },
        "model": {"name": "builtin:tiny-bert", "trainable": {"kind": "full"}},
        "federation": {
            "rounds": 2 if quick else 10,
            "cohort": 4,
            "lifecycle": {
                "kind": "finetune",
                "local_steps": 4 if quick else 8,
                "batch_size": 12,
                "learning_rate": 0.05,
                "optimizer": "sgd",
            },
        },
        "privacy": {
            "ledger": "run",
            "unit": "record",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip_norm": 0.5,
            "noise": "seeded" if seeded else "system",
        },
        "protection": {"kind": "secagg", "threshold": 3},
    }


# --------------------------------------------------------------------------------------- canaries in a client


@dataclass(kw_only=True)
class Planted:
    """The canaries of the audited client, the flaw of its training, and what an observer may know of it."""

    coins: Canaries
    flaw: str
    known_noise: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def present(self) -> Tensor:
        """Return the coordinates of the canaries that are among the client's records."""
        return self.coins.coordinates[self.coins.included]


class CanaryGradient(PrivateGradient):
    """The shipped rule, with canaries among the records, and perhaps one mistake."""

    def __init__(self, planted: Planted, round_number: int, **shipped: Any) -> None:
        super().__init__(**shipped)
        self.planted, self.round = planted, round_number

    def steps(self) -> Iterator[Mapping[str, Tensor]]:
        run, planted = self.mechanism.start(), self.planted
        everyone = len(self.encoded) + len(planted.present)
        noise = RandomSource.seeded(self.round) if planted.flaw == "replayed noise" else self.noise
        for _ in range(self.mechanism.steps):
            indices = run.sample(everyone, self.sampling)
            if planted.flaw == "full batches":
                indices = np.arange(everyone)
            total = self._sum(indices, run.bound)
            yield self._weakened(run.privatise(total, noise), total)
        if planted.flaw == "replayed noise":
            self._replay()

    def _replay(self) -> None:
        """Draw again what the observer can draw again."""
        replayed, nothing = RandomSource.seeded(self.round), self.engine.empty(self.mechanism.bound)
        for _ in range(self.mechanism.steps):
            noise = self.mechanism.privatise(nothing, replayed)
            self.planted.known_noise = self.planted.known_noise + _flat(noise)

    def _sum(self, indices: np.ndarray, bound: Clipping) -> ClippedSum:
        """Return the clipped sum over records and canaries, by the run's own clipping."""
        flaw, real = self.planted.flaw, len(self.encoded)
        unclipped = flaw in ("no clipping", "batch clipping")
        total = self._clipped_sum(indices[indices < real], Clipping(clip_norm=1e30) if unclipped else bound)
        present = self.planted.present[torch.from_numpy(indices[indices >= real] - real)]
        norms = torch.full((len(present),), LENGTH * bound.clip_norm)
        factors = torch.ones_like(norms) if unclipped else bound.factors({"canary": norms.square()})["canary"]
        flat = torch.zeros(self.trainable.size).index_add_(0, present, norms * factors)
        joined = _flat(total.gradients) + flat
        if flaw == "batch clipping":
            mean = joined / max(1, len(indices))
            joined = mean * min(1.0, bound.clip_norm / float(mean.norm())) * len(indices)
        parts = torch.split(joined, [value.numel() for value in total.gradients.values()])
        gradients = {
            name: part.view_as(old) for (name, old), part in zip(total.gradients.items(), parts, strict=True)
        }
        return ClippedSum(gradients=gradients, batch_size=len(indices), clip=bound)

    def _weakened(self, released: Mapping[str, Tensor], total: ClippedSum) -> Mapping[str, Tensor]:
        """Return the release with the noise a flaw leaves of it."""
        left = {"half noise": 0.5, "noise of a mean": 0.25}.get(self.planted.flaw, 1.0)
        exact = {name: value / self.mechanism.expected_batch_size for name, value in total.gradients.items()}
        return {name: exact[name] + left * (value - exact[name]) for name, value in released.items()}


def _flat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in parts.values()])


# ------------------------------------------------------------------------------------- a run with an observer


class CanaryTrainer(SiteTrainer):
    """Where the audited client trains with canaries, and what every client sends is seen by the colluders'
    server.
    """

    planted: Planted
    sent: dict[int, np.ndarray]

    def run_round(
        self,
        data: SiteData,
        plan: RoundPlan,
        start: Tensor,
        source: RandomSource,
        noise: NoiseMemory | None = None,
    ) -> np.ndarray:
        self.sent[data.index] = super().run_round(data, plan, start, source, noise)
        return self.sent[data.index]

    def rule(self, data: SiteData, plan: RoundPlan, source: RandomSource) -> GradientRule:
        shipped = super().rule(data, plan, source)
        if data.index != VICTIM:
            return shipped
        assert isinstance(shipped, PrivateGradient)
        return CanaryGradient(
            self.planted,
            plan.round,
            trainable=shipped.trainable,
            task=shipped.task,
            encoded=shipped.encoded,
            mechanism=shipped.mechanism,
            engine=shipped.engine,
            source=source,
            device=shipped.device,
            microbatch=shipped.microbatch,
        )


class ColludingServer:
    """Run the rounds as shipped; keep what the opened sums say about the audited client."""

    def __init__(self, built: simulation.Simulation, planted: Planted) -> None:
        self.made, self.planted = built, planted
        self.sent: dict[int, np.ndarray] = {}
        self.seen = np.zeros(built.trainable.size)
        trainer = CanaryTrainer(
            spec=built.spec, trainable=built.trainable, task=built.task, states=built.states
        )
        trainer.planted, trainer.sent = planted, self.sent
        built.courier.trainers.replace([trainer])

    def run(self, store: Store) -> tuple[RoundRecord, ...]:
        """Do what the loop does, and look at every sum it opens."""
        server, courier = self.made.server, self.made.courier
        state, records = self.made.begin(store)
        while len(records) < server.spec.config.federation.rounds:
            began = time.perf_counter()
            plan = rounds.plan_round(server, len(records) + 1, state, records)
            result = rounds.collect(server, plan, state, courier, lambda finished, total: None)
            assert result.sum is not None
            self.add(result.sum)
            state, result = rounds.advance(server, plan, state, result, records)
            record = rounds.record(server, plan, result, state, records, courier, began=began)
            store.commit(state, record, run_id=server.run_id)
            records = (*records, record)
        return records

    def add(self, opened: RoundSum) -> None:
        """Take the others off an opened sum: they collude."""
        codec = self.made.spec.codec
        others = [
            codec.open(ring, round=opened.round, survivors=(client,)).values
            for client, ring in self.sent.items()
            if client != VICTIM
        ]
        self.seen += opened.values - sum(others)


def audited_run(flaw: str, *, quick: bool, seeded: bool) -> dict[str, Any]:
    """Train once, with or without a flaw, and return what the ledger says and what the canaries prove."""
    checked = config.from_table(run_file(quick=quick, seeded=seeded))
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place, Store.open(Path(place) / "run", checked) as store:
        built = simulation.build(simulation.prepare(checked, Path(place)), Path(place) / "run")
        size, mechanism = built.trainable.size, built.mechanism
        coins = Canaries(
            count=min(12_000, size // 2), dimension=size, norm=mechanism.clip_norm, seed=11, kind="dirac"
        )
        server = ColludingServer(built, Planted(coins=coins, flaw=flaw))
        records = server.run(store)
        account = built.sites[VICTIM].ledger
        spent, events = account.epsilon(), account.events()
    # SGD turned the sum of all noisy gradients into a change; undo its factor, and take off what is known.
    released = torch.from_numpy(server.seen / -checked.federation.lifecycle.learning_rate).float()
    update = released - server.planted.known_noise
    bounds = {
        name: coins.audit(update, checked.privacy.delta, SIGNIFICANCE, method).epsilon
        for name, method in METHODS.items()
    }
    return {
        "flaw": flaw,
        "ledger": spent,
        "cover": gaussian_cover(events, checked.privacy.delta),
        "bounds": bounds,
        "canaries": coins.count,
        "present": int(coins.included.sum()),
        "noise_multiplier": mechanism.noise_multiplier,
        "rounds": len(records),
        "accuracy": records[-1].metric,
        "cpu_seconds": time.process_time() - began,
    }


def gaussian_cover(events: tuple[Event, ...], delta: float) -> float:
    """Return epsilon at delta of the least Gaussian trade-off curve above everything the ledger's events
    allow.

    Compared at losses where delta lies between 1e-10 and 0.5.
    """
    accountant = Accountant()
    for event in events:
        accountant.compose(event)
    largest = 0.0
    for loss in np.linspace(0.0, 2.5 * accountant.epsilon(delta).epsilon, 12):
        allowed = accountant.delta(float(loss))
        if 1e-10 < allowed < 0.5:

            def excess(mu: float, loss: float = loss, allowed: float = allowed) -> float:
                return gaussian_delta(mu, loss) - allowed

            largest = max(largest, brentq(excess, 1e-3, 50.0))
    return gaussian_epsilon(largest, delta)


def verdict(row: Mapping[str, Any]) -> str:
    """Say which bounds refute the ledger's claim."""
    limits = {"one-run": row["ledger"], "f-DP": row["cover"], "Gaussian": row["ledger"]}
    against = [name for name, bound in row["bounds"].items() if bound > limits[name]]
    return f"flagged by {', '.join(against)}" if against else "passes"


def main() -> None:
    """Print the table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 steps instead of 80, one flaw")
    parser.add_argument("--only", choices=list(FLAWS), help="one of the runs")
    parser.add_argument(
        "--seeded", action="store_true", help="replay the noise from the run's seed, for tests"
    )
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is always the last line")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    flaws = [options.only] if options.only else list(FLAWS)[:2] if options.quick else list(FLAWS)
    print(
        f"{'run':16}{'ledger':>8}{'cover':>8}" + "".join(f"{name:>10}" for name in METHODS) + "  verdict",
        flush=True,
    )
    rows = []
    for flaw in flaws:
        row = audited_run(flaw, quick=options.quick, seeded=options.seeded)
        row["verdict"] = verdict(row)
        rows.append(row)
        print(
            f"{flaw:16}{row['ledger']:8.3f}{row['cover']:8.3f}"
            + "".join(f"{bound:10.3f}" for bound in row["bounds"].values())
            + f"  {row['verdict']}",
            flush=True,
        )
    first = rows[0]
    print(
        "ledger: upper bound on epsilon at delta 1e-5, add/remove one record; bounds: lower, each wrong "
        f"with probability at most {SIGNIFICANCE:.1%}; {first['canaries']} canaries, {first['present']} of "
        f"them present; {sum(row['cpu_seconds'] for row in rows):.0f} CPU seconds"
    )
    print(
        json.dumps(
            {"benchmark": "canary", "machine": platform.machine(), "significance": SIGNIFICANCE, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
