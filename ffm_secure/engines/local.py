"""The sites of a simulation, in this process: asked one after another, or on a few threads, in the order of
the messages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue

import numpy as np

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from ffm_secure.config.run_file import RunConfig
from ffm_secure.protection.base import UPLOAD
from ffm_secure.site.broadcast import plan_of
from ffm_secure.site.site import Site
from ffm_secure.site.trainer import SiteTrainer
from ffm_secure.transport.courier import Lost, Reply
from ffm_secure.transport.stages import BEGIN, EVALUATE, FINISH, PLAN

_OUTSIDE = frozenset({PLAN, BEGIN, EVALUATE})  # stages of no protocol: simulated losses happen inside one
_ORDER = ("advertise", "share", "train", UPLOAD, "confirm", "unmask")
_AT_UPLOAD = frozenset({"train", UPLOAD})


class TrainerPool:
    """The replicas of the model that a simulation's sites take turns with."""

    def __init__(self, trainers: Sequence[SiteTrainer]) -> None:
        self._busy = 0.0
        self.replace(trainers)

    def replace(self, trainers: Sequence[SiteTrainer]) -> None:
        """Lend these replicas from now on; for an audit that watches a site from within."""
        self._free: SimpleQueue[SiteTrainer] = SimpleQueue()
        self._count = len(trainers)
        for trainer in trainers:
            self._free.put(trainer)

    @contextmanager
    def borrow(self) -> Iterator[SiteTrainer]:
        """Lend one replica; wait until one is free."""
        trainer = self._free.get()
        began = time.perf_counter()
        try:
            yield trainer
        finally:
            self._busy += (time.perf_counter() - began) / self._count
            self._free.put(trainer)

    def seconds(self) -> float:
        """Return the wall seconds spent since this was last asked, shared among the replicas."""
        spent, self._busy = self._busy, 0.0
        return spent


class LocalEngine:
    """Carry messages by calling the sites.

    Guarantee: at most `workers + 1` uploads exist at a time, so memory does not grow with the cohort; what a
    site computes does not depend on the number of workers.
    """

    def __init__(self, config: RunConfig, sites: Sequence[Site], trainers: TrainerPool) -> None:
        self._config, self._sites, self.trainers = config, sites, trainers
        self._workers = config.speed.workers
        self._pool = ThreadPoolExecutor(self._workers) if self._workers > 1 else None
        self._lost: dict[int, str] = {}

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        """Call each site in turn; with workers, the next uploads are computed ahead."""
        if stage == PLAN:
            self._begin_round(messages)
        if stage == UPLOAD and self._pool is not None:
            yield from self._ahead(stage, messages)
            return
        for site, message in messages.items():
            yield self._ask(stage, site, message)

    def seconds_at_sites(self) -> float:
        """Return the wall seconds sites have spent learning since this was last asked."""
        return self.trainers.seconds()

    def close(self) -> None:
        """Stop the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin_round(self, messages: Mapping[int, bytes]) -> None:
        """Draw whom this round loses; the number of the round is what the sites are sent, not what is counted
        here.
        """
        message = next(iter(messages.values()), b"")
        plan = None
        if message:
            plan = plan_of(message)
        self._lost = {} if plan is None else lost_clients(self._config, plan.round, plan.cohort)

    def _ask(self, stage: str, site: int, message: bytes) -> Reply:
        lost = self._lost.get(site, "")
        if lost and stage not in _OUTSIDE and _is_over(lost, stage):
            return Reply(site=site, content=Lost(stage=lost))
        try:
            return Reply(site=site, content=self._sites[site].handle(stage, message))
        except ProtocolError:
            return Reply(site=site, content=Lost(stage=stage))

    def _ahead(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        assert self._pool is not None
        waiting = iter(messages.items())
        running: deque[Future[Reply]] = deque()
        for site, message in islice(waiting, self._workers):
            running.append(self._pool.submit(self._ask, stage, site, message))
        while running:
            reply = running.popleft().result()
            for site, message in islice(waiting, 1):
                running.append(self._pool.submit(self._ask, stage, site, message))
            yield reply


def _is_over(lost: str, stage: str) -> bool:
    """Tell whether a site that is lost at one stage answers another no more."""
    if stage == FINISH:
        return True
    if lost in _AT_UPLOAD and stage == UPLOAD:
        return True
    if stage not in _ORDER:
        return lost in _AT_UPLOAD
    return _ORDER.index(stage) >= _ORDER.index(lost)


def lost_clients(config: RunConfig, round: int, cohort: Sequence[int]) -> dict[int, str]:
    """Draw which clients a simulated round loses, and where; the same for every resume of the round."""
    dropout = config.federation.dropout
    if dropout.rate == 0.0 or not dropout.stages:
        return {}
    draw = RandomSource.seeded(config.seed).derive("dropout", round)
    chances = draw.uniform(len(cohort))
    lost_clients: dict[int, str] = {}
    for client, chance in zip(cohort, np.asarray(chances), strict=True):
        if chance < dropout.rate:
            lost_clients[client] = dropout.stages[draw.below(len(dropout.stages))]
    return lost_clients
