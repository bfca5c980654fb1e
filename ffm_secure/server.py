"""One server round after the sum is open: turn it into a mean change, evaluate in public, write the record."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ffm_secure.engines import Outcome
from ffm_secure.models import fingerprint
from ffm_secure.setup import Setup
from ffm_secure.strategies import ServerState
from ffm_secure.types import RoundPlan, RoundRecord, RoundSum


def plan_round(setup: Setup, number: int, state: ServerState) -> RoundPlan:
    """Say who takes part in a round, in which exact model, under which mechanism."""
    return RoundPlan(
        run_id=setup.run_id,
        round=number,
        cohort=setup.schedule[number - 1],
        fingerprint=fingerprint({"trainable": state.vector}),
        mechanism=setup.mechanism_digest,
    )


def mean_change(setup: Setup, total: RoundSum) -> Tensor:
    """Divide the sum by what may be divided by.

    Guarantee: with a client unit the divisor is the public cohort size, never the number that answered; otherwise it is the
    public number of survivors, or the summed public weights of a run without privacy unit.
    """
    divisor = float(setup.config.federation.cohort) if setup.config.privacy.unit == "client" else total.weight_sum
    return torch.from_numpy(total.values) / divisor


def record(
    setup: Setup,
    plan: RoundPlan,
    outcome: Outcome,
    state: ServerState,
    earlier: tuple[RoundRecord, ...],
    *,
    began: float,
) -> RoundRecord:
    """Evaluate the new model on the public validation rows and note what the round did, cost and revealed."""
    every, last = setup.config.federation.evaluate_every, plan.round == setup.config.federation.rounds
    evaluation_began = time.perf_counter()
    if earlier and not last and (plan.round % every or outcome.sum is None):
        loss, metric = earlier[-1].loss, earlier[-1].metric
    else:
        evaluation = setup.evaluate(state.vector)
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
        epsilon_spent=setup.charges.epsilon() if setup.claims else math.inf,
        bytes_up=outcome.bytes_up,
        bytes_down=outcome.bytes_down,
        client_seconds=outcome.client_seconds,
        evaluation_seconds=evaluated,
        seconds=time.perf_counter() - began,
    )
