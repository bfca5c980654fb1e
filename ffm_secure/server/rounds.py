"""One round as the server sees it: plan, collect sealed updates, open the sum, step, evaluate in public,
record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from defenses.errors import ProtocolError
from defenses.secagg import ring
from ffm_secure import record_codec
from ffm_secure.aggregation import aggregate_of
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import FfmError, RecordError
from ffm_secure.models.backbone import vector_fingerprint
from ffm_secure.privacy.expectations import site_noise_variance
from ffm_secure.protection.base import UPLOAD, AggregationResult, too_few
from ffm_secure.protection.masked import fewest_to_open
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Opened, Rows, Viewed, keep_answers, of_classes, remember, settled
from ffm_secure.records import (
    ABSENT,
    DECLINED,
    LEARN,
    NOT_ASKED,
    NOT_BEGUN,
    REFUSED,
    Acceptance,
    Receipt,
    RoundPlan,
    RoundRecord,
    RoundSum,
    StageScore,
)
from ffm_secure.server.context import ServerContext
from ffm_secure.server.root_trust import root_update
from ffm_secure.server.sum_check import why_answer_too_large, why_too_large
from ffm_secure.strategies import ServerState
from ffm_secure.strategies.tail import average_tail
from ffm_secure.tasks.base import Evaluation, Task
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.stages import (
    BEGIN,
    CLOSED,
    EVALUATE,
    FINISH,
    OPENED,
    PLAN,
    encode_vector,
    join_plan,
)

_LARGEST_MEASURE = 1e6  # of a mean loss or a perplexity; whoever states more counts as no answer

ClientFinished = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What came of a round: the open sum, or why there is none."""

    sum: RoundSum | None  # over everybody: the sum of the groups' sums where there are several
    groups: tuple[RoundSum, ...] = ()  # of every group that was opened, where a round opens several
    closed: tuple[str, ...] = ()  # why further groups' sums stayed closed, or were refused
    dropped: Mapping[int, str] = field(default_factory=dict)
    aborted: str = ""
    cannot_pay: tuple[int, ...] = ()  # who says so, where that left too few to begin the round
    bytes_up: int = 0
    bytes_down: int = 0
    client_seconds: float = 0.0
    evidence: Mapping[int, str] = field(default_factory=dict)  # site -> SHA-256 of the upload that is kept

    @property
    def opened(self) -> tuple[RoundSum, ...]:
        """Return every sum that was opened."""
        return self.groups or (() if self.sum is None else (self.sum,))


def plan_round(
    server: ServerContext,
    number: int,
    state: ServerState,
    records: tuple[RoundRecord, ...] = (),
    *,
    attempt: int = 0,
) -> RoundPlan:
    """Say who takes part in a round, in which exact model, under which mechanism; nobody in a public phase.

    `attempt` counts how often the round was begun before: sites enter none of them twice.
    """
    spec = server.spec
    turn = agenda.next_turn(spec.config, records)
    assert turn is not None, "the run is over"
    query = turn.item.query
    learns = query == LEARN
    phase = spec.algorithm.next_phase(agenda.learned(records), spec.config) if learns else "private"
    agreed = spec.message(query)
    return RoundPlan(
        run_id=server.run_id,
        round=number,
        cohort=agreed.schedule[turn.turn] if phase == "private" else (),
        phase=phase,
        fingerprint=vector_fingerprint(spec.algorithm.broadcast(state)),
        mechanism=agreed.mechanism,
        step=state.round,
        turn=turn.turn,
        layout=agreed.layout,
        attempt=attempt,
        query=query,
        asked=spec.asked(query, state),
    )


def collect(
    server: ServerContext, plan: RoundPlan, state: ServerState, courier: Courier, finished: ClientFinished
) -> RoundResult:
    """Ask the cohort, and open the sum of what it sends; a site that does not answer properly is left out.

    Guarantee: no site pays before enough of them have accepted; what is opened covers at least the fewest
    survivors of the run file, or stays closed.
    """
    if plan.phase == "public":
        return RoundResult(sum=None)
    broadcast = server.spec.algorithm.broadcast(state)
    message = join_plan(record_codec.canonical_bytes(plan), encode_vector(broadcast))
    broadcast_bytes = len(message) * len(plan.cohort)
    if server.transcript is not None:
        server.transcript.begin(plan, broadcast)
    lost: dict[int, str] = {}
    cannot_pay = _ask(server, courier, PLAN, dict.fromkeys(plan.cohort, message), lost)
    members, reason = _who_begins(server, plan, lost)
    if reason:  # nobody has paid yet, so nothing is lost
        return RoundResult(
            sum=None, dropped=lost, aborted=reason, cannot_pay=cannot_pay, bytes_down=broadcast_bytes
        )
    _ask(server, courier, BEGIN, dict.fromkeys(members, b""), lost)
    aggregation = _aggregate(server, plan, state, courier, lost, finished)
    result = _open_sums(server, plan, state, aggregation)
    counted = {site for opened in result.opened for site in opened.survivors}
    _finish(server, courier, plan, lost, counted)
    return replace(
        result,
        bytes_up=aggregation.bytes_up,
        bytes_down=aggregation.bytes_down + broadcast_bytes,
        client_seconds=courier.seconds_at_sites(),
    )


def _who_begins(server: ServerContext, plan: RoundPlan, lost: dict[int, str]) -> tuple[tuple[int, ...], str]:
    """Return who is asked to pay, and why nobody is where too few have accepted.

    Of a group with too few the others are not asked either: their sum could not be opened.
    """
    spec = server.spec
    groups, minimum = spec.groups_of(plan), fewest_to_open(spec.config)
    willing, complete = {site for site in plan.cohort if site not in lost}, 0
    beginning: set[int] = set()
    for group in groups:
        members = willing & set(group)
        if len(members) >= minimum:
            complete += 1
            beginning |= members
    needed = spec.fewest_groups(plan.query)
    if complete < needed:
        if len(groups) == 1:
            return (), too_few(len(willing), minimum)
        return (), f"{complete} of at least {needed} groups have {minimum} clients that answered"
    for site in willing - beginning:
        lost[site] = NOT_ASKED
    return tuple(site for site in plan.cohort if site in beginning), ""


def _kept(server: ServerContext, plan: RoundPlan, reason: str) -> Mapping[int, str]:
    """Keep the signed uploads behind a sum that was refused; nothing where uploads are not signed."""
    return {} if server.evidence is None else server.evidence.keep(plan, reason)


def _ask(
    server: ServerContext, courier: Courier, stage: str, messages: Mapping[int, bytes], lost: dict[int, str]
) -> tuple[int, ...]:
    """Put a question that is answered by an `Acceptance`; return who says its budget does not pay."""
    cannot_pay: list[int] = []
    for reply in courier.send(stage, messages):
        if isinstance(reply.content, Lost):
            lost[reply.site] = ABSENT
            continue
        answer = _read(Acceptance, reply.content)
        if answer is None:
            lost[reply.site] = DECLINED
            continue
        if answer.receipt is not None:
            server.note({reply.site: answer.receipt})
        if not answer.accepted:
            lost[reply.site] = DECLINED
            cannot_pay += [] if answer.affordable else [reply.site]
    return tuple(cannot_pay)


def _aggregate(
    server: ServerContext,
    plan: RoundPlan,
    state: ServerState,
    courier: Courier,
    lost: dict[int, str],
    finished: ClientFinished,
) -> AggregationResult:
    """Carry the protocol of one round, stage by stage."""
    side, groups = server.protection_of(plan.query), server.spec.groups_of(plan)
    session = side.open_round(plan) if len(groups) == 1 else side.open_groups(plan, groups)
    if server.evidence is not None:
        server.evidence.begin()
    for stage in session.stages:
        try:
            messages = session.messages(stage)
        except ProtocolError:
            break  # too few are left, or the sum cannot be opened: `close` says which
        asked = {}
        for site, message in messages.items():
            if site not in lost:
                asked[site] = message
        for number, reply in enumerate(courier.send(stage, asked), start=1):
            if isinstance(reply.content, Lost):
                lost[reply.site] = reply.content.stage
                continue
            try:
                if stage == UPLOAD and not _is_honest(server, plan, state, reply):
                    lost[reply.site] = REFUSED
                else:
                    session.receive(stage, reply.site, reply.content)
            except ProtocolError:
                lost[reply.site] = stage
            if stage == UPLOAD:
                finished(number, len(asked))
                if server.transcript is not None and reply.site not in lost:
                    server.transcript.upload(plan, reply.site, reply.content)
                if server.evidence is not None and reply.site not in lost:
                    server.evidence.upload(reply.site, reply.content)
    return session.open_sum(lost)


def _is_honest(server: ServerContext, plan: RoundPlan, state: ServerState, reply: Reply) -> bool:
    """Tell whether an honest site can have sent an update; where updates are sealed, nobody can tell.

    Raises:
      ProtocolError: it is malformed.
    """
    if server.protection_of(plan.query).kind != "none":
        return True
    assert not isinstance(reply.content, Lost)
    codec = server.spec.message(plan.query).codec
    if len(reply.content) != ring.packed_bytes(codec.length, codec.modulus_bits):
        raise ProtocolError
    vector = ring.unpack(reply.content, codec.modulus_bits)
    alone = AggregationResult(ring_sum=vector, survivors=(reply.site,))
    return not _judge_sum(server, plan, state, alone)[1]


def _open_sums(
    server: ServerContext, plan: RoundPlan, state: ServerState, aggregation: AggregationResult
) -> RoundResult:
    """Decode and check every sum; one that no honest clients can have sent counts as closed.

    Guarantee: where a round opens several sums, a refused one closes its own group alone; with too few left
    for the strategy the round is given up.
    """
    opened, closed, impossible = [], [], []
    for number, part in enumerate(aggregation.parts):
        group = number if aggregation.groups else -1
        one, reason = _judge_sum(server, plan, state, part)
        if one is not None:
            opened.append((group, one))
            continue
        closed.append(reason)
        impossible += [reason] if part.ring_sum is not None else []
    evidence = _kept(server, plan, "; ".join(impossible)) if impossible else {}
    needed = server.spec.fewest_groups(plan.query)
    if len(opened) < needed:
        reason = closed[0]
        if aggregation.groups:
            reason = (
                f"{len(opened)} of at least {needed} groups were opened: {'; '.join(sorted(set(closed)))}"
            )
        return RoundResult(sum=None, dropped=aggregation.dropped, aborted=reason, evidence=evidence)
    if server.transcript is not None:
        for group, one in opened:
            server.transcript.opened(plan, one, group=group)
    sums = tuple(one for _, one in opened)
    return RoundResult(
        sum=added(sums),
        groups=sums if aggregation.groups else (),
        closed=tuple(closed),
        dropped=aggregation.dropped,
        evidence=evidence,
    )


def added(sums: Sequence[RoundSum]) -> RoundSum:
    """Return the sum over several groups as one; of a single one, itself."""
    if len(sums) == 1:
        return sums[0]
    losses = [one.loss_sum for one in sums if one.loss_sum is not None]
    return RoundSum(
        round=sums[0].round,
        survivors=tuple(sorted(site for one in sums for site in one.survivors)),
        values=np.sum([one.values for one in sums], axis=0),
        loss_sum=sum(losses) if losses else None,
        weight_sum=sum(one.weight_sum for one in sums),
    )


def _judge_sum(
    server: ServerContext, plan: RoundPlan, state: ServerState, result: AggregationResult
) -> tuple[RoundSum | None, str]:
    """Return what a sum says, or why no honest survivors can have sent it."""
    if result.ring_sum is None:
        return None, result.aborted
    try:
        codec = server.spec.message(plan.query).codec
        opened = codec.open(result.ring_sum, round=plan.round, survivors=result.survivors)
    except ProtocolError:
        return None, "the opened sum is impossible for its survivors"
    if plan.query == LEARN:
        too_large = why_too_large(opened, server.spec, state.vector, turns=plan.round)
    else:
        too_large = why_answer_too_large(opened, server.spec.questions[plan.query], server.spec)
    if too_large:
        return None, too_large
    return opened, ""


def _finish(
    server: ServerContext,
    courier: Courier,
    plan: RoundPlan,
    lost: Mapping[int, str],
    counted: Collection[int],
) -> None:
    """Tell every site that paid whether the sum it belongs to was opened, and keep its receipt."""
    opened = set()
    for group in server.spec.groups_of(plan):
        if not set(group).isdisjoint(counted):
            opened |= set(group)
    messages = {}
    for site in plan.cohort:
        if lost.get(site) not in NOT_BEGUN:
            messages[site] = OPENED if site in opened else CLOSED
    receipts: dict[int, Receipt] = {}
    for reply in courier.send(FINISH, messages):
        if not isinstance(reply.content, Lost):
            receipt = _read(Receipt, reply.content)
            if receipt is not None:
                receipts[reply.site] = receipt
    server.note(receipts)


T = TypeVar("T")


def _read(kind: type[T], content: bytes | memoryview) -> T | None:
    """Return what a site wrote; None where it is no such record, for one site's nonsense ends no run."""
    try:
        return record_codec.from_bytes(kind, bytes(content), "an answer")
    except RecordError:
        return None


def advance(
    server: ServerContext,
    plan: RoundPlan,
    state: ServerState,
    result: RoundResult,
    earlier: tuple[RoundRecord, ...] = (),
) -> tuple[ServerState, RoundResult]:
    """Return the state after a round, and the result:
    an aborted one where the new model would not be finite.
    """
    after = _step(server, plan, state, result)
    if plan.query == LEARN:
        learned = 1 + len(agenda.learned(earlier))
        after = _with_tail(server.spec.config, state, after, learned)
        if learned == server.spec.config.federation.rounds:
            after = settled(after, [question.query for question in server.spec.questions.values()])
    if bool(torch.isfinite(after.vector).all()):
        if server.evidence is not None:
            server.evidence.begin()
        return after, result
    evidence = _kept(server, plan, NOT_FINITE) if plan.phase == "private" else {}
    return state, replace(result, sum=None, groups=(), aborted=NOT_FINITE, evidence=evidence)


NOT_FINITE = "the new model would hold numbers that are not finite"


def _step(server: ServerContext, plan: RoundPlan, state: ServerState, result: RoundResult) -> ServerState:
    """Take a step by the opened sum, do a phase of the server's own, or leave the state as it was."""
    spec = server.spec
    if plan.phase == "public":
        after = _learn_in_public(server, plan, state)
    elif result.sum is None:
        return state
    elif plan.query != LEARN:
        return _use_answer(server, plan, state, result.sum)
    else:
        known = site_noise_variance(spec.mechanism, spec.config.federation.lifecycle)
        sums = []
        for opened in result.opened:
            sums.append(spec.restored(opened, plan, state.vector))
        aggregate = aggregate_of(
            spec.config,
            sums,
            site_noise_variance=known * spec.compression.noise_share,
            reference=root_update(server, plan, state),
        )
        after = spec.algorithm.step(server.phase(plan.round), spec.strategy, state, aggregate)
        if server.transcript is not None:
            server.transcript.stepped(plan, result.sum, spec.algorithm.broadcast(after))
    return keep_answers(state, spec.algorithm.remember(spec.strategy, state, after, plan.phase))


def _with_tail(config: RunConfig, before: ServerState, after: ServerState, round: int) -> ServerState:
    """Average the models of the last rounds of learning into the last one, where the run file asks for it;
    questions asked before count for none.
    """
    federation = config.federation
    return average_tail(
        before,
        after,
        last=federation.strategy.average_last,
        round=round,
        rounds=federation.rounds,
    )


def _use_answer(server: ServerContext, plan: RoundPlan, state: ServerState, opened: RoundSum) -> ServerState:
    """Add an opened answer to those of earlier cohorts and stages, and let the query make something of the
    whole.
    """
    question = server.spec.questions[plan.query]
    survivors = len(opened.survivors)
    answer = Opened(
        values=opened.values,
        deviation=question.mechanism.deviation(survivors),
        sites=survivors,
    )
    if server.stages is not None:
        stage = agenda.stage_of(server.spec.config, plan.turn)
        answer = of_classes(question.query, answer, server.stages.classes[stage])
    remembering, whole = remember(state, question.query.name, answer)
    return question.query.use(remembering, whole)


def _learn_in_public(server: ServerContext, plan: RoundPlan, state: ServerState) -> ServerState:
    spec, phase = server.spec, server.phase(plan.round)
    with server.trainable.training_only(spec.strategy.trains(state.round)):
        vector = spec.algorithm.learn_in_public(phase, state)
    return replace(state, vector=spec.strategy.after_public(vector, plan.round))


def record(
    server: ServerContext,
    plan: RoundPlan,
    result: RoundResult,
    state: ServerState,
    earlier: tuple[RoundRecord, ...],
    courier: Courier,
    *,
    began: float,
) -> RoundRecord:
    """Evaluate the new model on the public validation rows and note what the round did, cost and revealed."""
    spec = server.spec
    federation = spec.config.federation
    evaluation_began = time.perf_counter()
    closed = result.sum is None and plan.phase == "private"
    skipped = plan.round % federation.evaluate_every or closed
    this = agenda.Asked(query=plan.query, phase=plan.phase, aborted=result.aborted)
    over = agenda.next_turn(spec.config, (*earlier, this)) is None
    if earlier and not over and skipped:
        loss, metric = earlier[-1].loss, earlier[-1].metric
    else:
        evaluation = evaluate(server, plan, state, courier)
        loss, metric = evaluation.loss, evaluation.metric
    stage, stages = "", tuple[StageScore, ...]()
    if server.stages is not None:
        stage = server.stages.names[agenda.stage_of(spec.config, plan.turn)]
    if server.stages is not None and _stage_ends(spec.config, plan, (*earlier, this)):
        stages = stage_scores(server, state)
    evaluated = time.perf_counter() - evaluation_began
    return RoundRecord(
        round=plan.round,
        phase=plan.phase,
        cohort=plan.cohort,
        survivors=result.sum.survivors if result.sum else (),
        dropped=result.dropped,
        aborted=result.aborted,
        loss=loss,
        metric=metric,
        metric_name=server.task.metric_name,
        epsilon_spent=server.epsilon(),
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        client_seconds=result.client_seconds,
        evaluation_seconds=evaluated,
        norm=_norm(result),
        alignment=spec.algorithm.alignment(spec.strategy, state),
        query=plan.query,
        seconds=time.perf_counter() - began,
        evidence=result.evidence,
        groups=tuple(one.survivors for one in result.groups),
        closed=result.closed,
        stage=stage,
        stages=stages,
    )


def _stage_ends(config: RunConfig, plan: RoundPlan, records: Sequence[agenda.Done]) -> bool:
    """Tell whether the next round is of another stage, or there is none."""
    following = agenda.next_turn(config, records)
    if following is None:
        return True
    return agenda.stage_of(config, following.turn) != agenda.stage_of(config, plan.turn)


def stage_scores(server: ServerContext, state: ServerState) -> tuple[StageScore, ...]:
    """Return how the model does on the public rows of every stage of a stream."""
    assert server.stages is not None, "asked for where there is a stream alone"
    server.trainable.load_vector(state.vector)
    view = Viewed(trainable=server.trainable, task=server.task, device=server.spec.device)
    rows = Rows(encoded=server.evaluation)
    return server.stages.scores(view.scores(rows).numpy(), rows.labels())


def _norm(result: RoundResult) -> float | None:
    if result.sum is None:
        return None
    return float(np.linalg.norm(result.sum.values) / max(1.0, result.sum.weight_sum))


def evaluate(server: ServerContext, plan: RoundPlan, state: ServerState, courier: Courier) -> Evaluation:
    """Evaluate the global model in public; where sites keep numbers at home, the mean over all sites' own
    models.

    Assumes: what a site keeps is private already, by the unit of the run; the plan refuses the units where it
    is not.
    """
    if not server.spec.strategy.home:
        return server.evaluate(state.vector)
    after = replace(plan, round=plan.round + 1, fingerprint=vector_fingerprint(state.vector))
    message = join_plan(record_codec.canonical_bytes(after), encode_vector(state.vector))
    everybody = dict.fromkeys(range(len(server.spec.owners)), message)
    answers = list(_evaluations(courier, everybody))
    evaluations = [item for item in answers if _is_possible(item, server.task)] or answers
    if not evaluations:
        raise FfmError("no site answered the evaluation")
    return Evaluation(
        loss=sum(item.loss for item in evaluations) / len(evaluations),
        metric=sum(item.metric for item in evaluations) / len(evaluations),
    )


def _is_possible(item: Evaluation, task: Task) -> bool:
    """Tell whether a site can have measured this: one site's nonsense must not stand for all."""
    largest = 1.0 if task.higher_is_better else _LARGEST_MEASURE
    return 0.0 <= item.loss <= _LARGEST_MEASURE and 0.0 <= item.metric <= largest


def _evaluations(courier: Courier, messages: Mapping[int, bytes]) -> Iterator[Evaluation]:
    for reply in courier.send(EVALUATE, messages):
        if not isinstance(reply.content, Lost):
            evaluation = _read(Evaluation, reply.content)
            if evaluation is not None:
                yield evaluation


def is_best(earlier: Sequence[RoundRecord], record: RoundRecord, *, higher: bool) -> bool:
    """Tell whether a round's public metric is better than that of every round before it."""
    measured = []
    for item in earlier:
        if not item.aborted and math.isfinite(item.metric):
            measured.append(item.metric)
    if record.aborted or not math.isfinite(record.metric):
        return False
    return all(record.metric > metric if higher else record.metric < metric for metric in measured)
