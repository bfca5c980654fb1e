"""One server round after the sum is open: turn it into a mean change, evaluate in public, write the record."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from ffm_secure.config import compatibility
from ffm_secure.engines import RoundResult
from ffm_secure.engines.setup import Setup
from ffm_secure.lifecycle import pretrain
from ffm_secure.models.backbone import fingerprint
from ffm_secure.records import RoundPlan, RoundRecord, RoundSum
from ffm_secure.strategies import ServerState


def plan_round(
    setup: Setup, number: int, state: ServerState, records: tuple[RoundRecord, ...] = ()
) -> RoundPlan:
    """Say who takes part in a round, in which exact model, under which mechanism; nobody in a public phase."""
    config = setup.config
    phase = pretrain.next_phase(
        records, config.federation.lifecycle, private_rounds=compatibility.private_rounds(config)
    )
    public = sum(record.phase == "public" for record in records)
    return RoundPlan(
        run_id=setup.run_id,
        round=number,
        cohort=setup.schedule[number - 1 - public] if phase == "private" else (),
        phase=phase,
        fingerprint=fingerprint({"trainable": state.vector}),
        mechanism=setup.mechanism_digest,
        step=state.round,
    )


def mean_change(setup: Setup, total: RoundSum) -> Tensor:
    """Divide the sum by what may be divided by.

    Guarantee: with a client unit the divisor is the public cohort size, never the number that answered; otherwise it is the
    public number of survivors, or the summed public weights of a run without privacy unit.
    """
    divisor = (
        float(setup.config.federation.cohort) if setup.config.privacy.unit == "client" else total.weight_sum
    )
    return torch.from_numpy(total.values) / divisor


def advance(setup: Setup, plan: RoundPlan, state: ServerState, outcome: RoundResult) -> ServerState:
    """Return the state after a round: a step by the opened sum, public gradient steps, or nothing if the sum stayed closed."""
    config, strategy = setup.config, setup.prepared.strategy
    if plan.phase == "public":
        with setup.trainable.training_only(strategy.trains(state.round)):
            vector = pretrain.learn_in_public(
                trainable=setup.trainable,
                task=setup.task,
                public=setup.public,
                start=state.vector,
                spec=config.federation.lifecycle,
                seed=(config.seed, plan.round, config.task.clients),
                device=setup.device,
                microbatch=config.speed.microbatch,
            )
        vector = strategy.after_public(vector, plan.round)
        return pretrain.remember(strategy, state, replace(state, vector=vector), plan.phase)
    if outcome.sum is None:
        return state
    after = strategy.step(state, mean_change(setup, outcome.sum))
    if config.federation.lifecycle.kind != "pretrain":
        return after
    return pretrain.remember(strategy, state, after, plan.phase)


def record(
    setup: Setup,
    plan: RoundPlan,
    outcome: RoundResult,
    state: ServerState,
    earlier: tuple[RoundRecord, ...],
    *,
    began: float,
) -> RoundRecord:
    """Evaluate the new model on the public validation rows and note what the round did, cost and revealed."""
    every, last = setup.config.federation.evaluate_every, plan.round == setup.config.federation.rounds
    evaluation_began = time.perf_counter()
    closed = outcome.sum is None and plan.phase == "private"
    if earlier and not last and (plan.round % every or closed):
        loss, metric = earlier[-1].loss, earlier[-1].metric
    else:
        evaluation = setup.evaluate_all(state.vector, before=plan.round + 1)
        loss, metric = evaluation.loss, evaluation.metric
    evaluated = time.perf_counter() - evaluation_began
    return RoundRecord(
        round=plan.round,
        phase=plan.phase,
        cohort=plan.cohort,
        survivors=outcome.sum.survivors if outcome.sum else (),
        dropped=outcome.dropped,
        aborted=outcome.aborted,
        loss=loss,
        metric=metric,
        metric_name=setup.task.metric_name,
        epsilon_spent=setup.charges.epsilon() if setup.has_dp_guarantee else math.inf,
        bytes_up=outcome.bytes_up,
        bytes_down=outcome.bytes_down,
        client_seconds=outcome.client_seconds,
        evaluation_seconds=evaluated,
        alignment=pretrain.alignment(setup.prepared.strategy, state.optimizer_state),
        seconds=time.perf_counter() - began,
    )
