"""What a site recomputes of a plan before it takes part; anything that differs from what it agreed to is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from ffm_secure.queries import agenda
from ffm_secure.records import RoundPlan
from ffm_secure.agreed.run_spec import RunSpec

RUN_BYTES = 16
MOST_ATTEMPTS = 1 << 32


def differences(plan: RoundPlan, spec: RunSpec, *, site: int, fingerprint: str) -> tuple[str, ...]:
    """Return in words what a plan says otherwise than the run file that a site agreed to; empty when it may
    take part.

    `fingerprint` is the hash of the broadcast tensors as they came.
    """
    return tuple(_differences(plan, spec, site, fingerprint))


def _differences(plan: RoundPlan, spec: RunSpec, site: int, fingerprint: str) -> Iterator[str]:
    if len(plan.run_id) != RUN_BYTES:
        yield f"the run's id has {len(plan.run_id)} bytes, not {RUN_BYTES}"
    if plan.query not in spec.kinds:
        yield f"query = {plan.query[:40]!a}: this run asks {', '.join(spec.kinds)} alone"
        return
    agreed = spec.message(plan.query)
    if plan.phase != "private":
        yield f"phase = {plan.phase!r}: a site takes part in private rounds alone"
    if not 0 <= plan.turn < len(agreed.schedule):
        yield f"turn = {plan.turn}: the schedule has {len(agreed.schedule)} rounds"
    elif plan.cohort != agreed.schedule[plan.turn]:
        yield f"cohort of turn {plan.turn} is not the schedule's"
    if site not in plan.cohort:
        yield "this site is not in the cohort"
    last = agenda.last_round(spec.config)
    if plan.round < plan.turn + 1 or plan.round > last:
        yield f"round = {plan.round}: must be from {plan.turn + 1} to {last}"
    if not 0 <= plan.attempt < MOST_ATTEMPTS:
        yield f"attempt = {plan.attempt}: must be from 0 to {MOST_ATTEMPTS - 1}"
    if not 0 <= plan.step <= plan.round:
        yield f"step = {plan.step}: must be from 0 to the round"
    if plan.fingerprint != fingerprint:
        yield "the broadcast model is not the one the plan names"
    if plan.mechanism != agreed.mechanism:
        yield "the mechanism is not the one that was agreed on"
    if not _choosable(plan, spec):
        yield "what is asked about is not a choice that this run has"
    if plan.layout != agreed.layout:
        yield "names, shapes or codec of what is sent are not those that were agreed on"


def _choosable(plan: RoundPlan, spec: RunSpec) -> bool:
    """Tell whether a plan asks about as many choices as the answer has room for, each once and in order."""
    question = spec.questions.get(plan.query)
    if question is None or question.query.asks is None:
        return plan.asked == ()
    choices, room = question.query.choices, question.query.room
    if len(plan.asked) != room or sorted(set(plan.asked)) != list(plan.asked):
        return False
    return plan.asked[0] >= 0 and plan.asked[-1] < choices
