"""Clients in this process, one after another or on a few threads; one frozen backbone serves them all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from defenses.random_source import RandomSource
from ffm_secure.engines.setup import Setup
from ffm_secure.protection.protections import AFTER_UPLOAD
from ffm_secure.records import RoundPlan, RoundSum
from ffm_secure.site.broadcast_guard import Inspection
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.trainable import replicate


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What came of a round: the open sum, or why there is none."""

    sum: RoundSum | None
    dropped: Mapping[int, str] = field(default_factory=dict)
    aborted: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    client_seconds: float = 0.0


class Engine(Protocol):
    """Carry a round's plan to the clients and their sealed updates back."""

    def collect(self, plan: RoundPlan, vector: Tensor, finished: Callable[[int, int], None]) -> RoundResult:
        """Run one round."""

    def close(self) -> None:
        """Let go of threads and processes."""


class LocalEngine:
    """Simulate every client in this process.

    Guarantee: at most `workers + 1` ring vectors exist at a time, so memory does not grow with clients or cohort; what a
    client computes does not depend on the number of workers.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.inspection = Inspection(setup.trainable)
        self.workers = setup.config.speed.workers
        self.free: SimpleQueue[SiteTrainer] = SimpleQueue()
        for number in range(self.workers):
            self.free.put(self._workplace(setup.trainable if number == 0 else replicate(setup.trainable)))
        self.pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None
        self.busy = 0.0

    def _workplace(self, trainable: Any) -> SiteTrainer:
        setup = self.setup
        return SiteTrainer(
            config=setup.config,
            trainable=trainable,
            task=setup.task,
            mechanism=setup.mechanism,
            code=setup.code,
            device=setup.device,
            home=setup.home,
        )

    def collect(self, plan: RoundPlan, vector: Tensor, finished: Callable[[int, int], None]) -> RoundResult:
        """Run one round: train whoever is not lost, seal, open."""
        drop = lost_clients(self.setup, plan)
        never = {client for client, stage in drop.items() if stage not in AFTER_UPLOAD}
        order = [client for client in plan.cohort if client not in never]
        self.busy = 0.0
        inputs = self._inputs(order, plan, vector)
        done = 0

        def contribute(client: int) -> npt.NDArray[Any]:
            nonlocal done
            ring = inputs(client)
            done += 1
            finished(done, len(order))
            return ring

        collected = self.setup.protection.collect(plan, contribute=contribute, drop=drop, order=order)
        total = None
        if collected.ring_sum is not None:
            total = self.setup.code.open(collected.ring_sum, round=plan.round, survivors=collected.survivors)
        broadcast = 4 * self.setup.trainable.size * len(plan.cohort)
        return RoundResult(
            sum=total,
            dropped=collected.dropped,
            aborted=collected.aborted,
            bytes_up=collected.bytes_up,
            bytes_down=collected.bytes_down + broadcast,
            client_seconds=self.busy,
        )

    def _inputs(self, order: list[int], plan: RoundPlan, vector: Tensor) -> Callable[[int], npt.NDArray[Any]]:
        """Return a function that gives a client's ring vector; with workers, the next ones are computed ahead."""
        if self.pool is None:
            return lambda client: self._train(client, plan, vector)
        waiting: Iterator[int] = iter(order)
        ahead: deque[tuple[int, Future[npt.NDArray[Any]]]] = deque()

        def refill() -> None:
            while len(ahead) < self.workers and (client := next(waiting, None)) is not None:
                ahead.append((client, self.pool.submit(self._train, client, plan, vector)))  # type: ignore[union-attr]

        def take(client: int) -> npt.NDArray[Any]:
            refill()
            expected, future = ahead.popleft()
            if expected != client:
                raise RuntimeError("clients were asked for in another order than announced")
            refill()
            return future.result()

        return take

    def _train(self, client: int, plan: RoundPlan, vector: Tensor) -> npt.NDArray[Any]:
        workplace = self.free.get()
        began = time.perf_counter()
        try:
            self.inspection.accept(vector)  # all simulated clients get one vector, so it is judged once
            source = self.setup.client_source(plan, client)
            return workplace.contribute(self.setup.clients[client], plan, vector, source)
        finally:
            self.busy += (time.perf_counter() - began) / self.workers
            self.free.put(workplace)

    def close(self) -> None:
        """Stop the worker threads."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


def lost_clients(setup: Setup, plan: RoundPlan) -> dict[int, str]:
    """Draw which clients a simulated round loses, and where; the same for every resume of the round."""
    dropout = setup.config.federation.dropout
    if dropout.rate == 0.0 or not dropout.stages:
        return {}
    draw = RandomSource.seeded(setup.config.seed).derive("dropout", plan.round)
    chances = draw.uniform(len(plan.cohort))
    return {
        client: dropout.stages[draw.below(len(dropout.stages))]
        for client, chance in zip(plan.cohort, np.asarray(chances), strict=True)
        if chance < dropout.rate
    }
