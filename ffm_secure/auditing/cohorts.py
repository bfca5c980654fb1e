"""Whose words a secure sum holds: the run's own rounds are replayed, each sum is read, and the readings are
held together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from attacks import steps
from attacks.cohort import MEASURE, OpenedSum, attribution_score
from attacks.contract import Budget, Prior, Reconstruction, not_applicable
from attacks.judge import Question, Result
from attacks.observation import Knowledge, Observation
from attacks.registry import build
from attacks.scoring import Score, read_tokens
from defenses.random_source import RandomSource
from ffm_secure.auditing import replayed
from ffm_secure.auditing.step import tokens_of
from ffm_secure.engines import simulation
from ffm_secure.records import LeakCurve, Observer, RoundRecord

NAME = "cohort_reader"
READ_BY = "token_presence"  # what reads each sum
_MOST = 64  # records of one client in one round; more would only make it slower
ROUNDS = (5, 10, 20, 40)
STEPS = {"quick": 5_000, "standard": 60_000, "exhaustive": 1_200_000}
WITNESSES: tuple[Observer, ...] = ("server", "colluding_server")  # who know which clients took part
Content = Literal["sent", "raw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRounds:
    """Hold what was read of each round's sum as it is sent and undefended, and which tokens one client alone
    brought.
    """

    sent: tuple[OpenedSum, ...]
    raw: tuple[OpenedSum, ...]
    owners: dict[int, int]
    clients: int
    recorded: int  # rounds of the run itself; further ones are drawn like them
    refused: str = ""


def read_rounds(
    prepared: simulation.Prepared,
    model: nn.Module,
    records: Sequence[RoundRecord],
    budget: str,
    *,
    seed: int = 0,
) -> ReadRounds:
    """Replay the cohorts of a run, then more drawn like them, and read every sum, within the steps of a
    budget.

    A client learns one step on a batch drawn from its own records, which is the worst case for it.
    """
    stop, noise = steps.so_far() + STEPS[budget], RandomSource.seeded(seed).derive("cohorts")
    brought: dict[int, set[int]] = {}
    sums: dict[Content, list[OpenedSum]] = {"sent": [], "raw": []}
    recorded = []
    for record in records:
        if record.phase == "private" and not record.aborted:
            recorded.append(record.survivors)
    if refusal := _refusal(prepared, model):
        return ReadRounds(sent=(), raw=(), owners={}, clients=0, recorded=0, refused=refusal)
    for number, cohort in enumerate(_cohorts(prepared, recorded)):
        if steps.so_far() > stop and number >= min(len(recorded), ROUNDS[0]):
            break
        totals = _totals(prepared, cohort, number, brought, noise.derive(number))
        for content, tensors in totals.items():
            observation = _seen(prepared, tensors, len(cohort), content)
            reading = build(READ_BY).run(observation, model, Prior(), Budget.quick(), 0)
            if not reading.applicable:
                return ReadRounds(sent=(), raw=(), owners={}, clients=0, recorded=0, refused=reading.reason)
            tokens = read_tokens(reading) or set()
            sums[content].append(OpenedSum(tokens=frozenset(tokens), cohort=tuple(cohort)))
    holders: dict[int, list[int]] = {}
    for client, tokens in brought.items():
        for token in tokens:
            holders.setdefault(token, []).append(client)
    return ReadRounds(
        sent=tuple(sums["sent"]),
        raw=tuple(sums["raw"] or sums["sent"]),
        owners={token: who[0] for token, who in holders.items() if len(who) == 1},
        clients=len(prepared.parts),
        recorded=len(recorded),
    )


def _refusal(prepared: simulation.Prepared, model: nn.Module) -> str:
    """Say why no sum of these tensors can be read, asked of one record's bare step; nothing where it can."""
    client = replayed.largest(prepared)
    batch = replayed.records_of(prepared, client, np.arange(1))
    points = replayed.gradients(prepared, {name: value.to(prepared.device) for name, value in batch.items()})
    reading = build(READ_BY).run(_seen(prepared, points["raw"], 1, "raw"), model, Prior(), Budget.quick(), 0)
    if reading.applicable:
        return ""
    return reading.reason


def _cohorts(prepared: simulation.Prepared, recorded: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Yield the cohorts of the run, then more of their size, drawn evenly; where all always take part, of
    half of them.

    Rounds that differ show that the reading works: without them its silence on one cohort would prove
      nothing.
    """
    yield from recorded[: ROUNDS[-1]]
    order = np.random.default_rng(0)
    able = []
    for index, part in enumerate(prepared.parts):
        if len(part):
            able.append(index)
    if recorded:
        size = len(recorded[-1])
    else:
        size = prepared.config.federation.cohort
    if size < len(able):
        size = size
    else:
        size = max(1, len(able) // 2)
    for _ in range(len(recorded), ROUNDS[-1]):
        yield sorted(order.choice(able, size=size, replace=False).tolist())


def _totals(
    prepared: simulation.Prepared,
    cohort: Sequence[int],
    number: int,
    brought: dict[int, set[int]],
    noise: RandomSource,
) -> dict[Content, dict[str, Tensor]]:
    """Return the sum of one step of a cohort as it is sent, and undefended where that is another; note who
    brought which token.
    """
    order, totals = np.random.default_rng(1_000 + number), dict[Content, dict[str, Tensor]]()
    for client in cohort:
        rows = order.permutation(len(prepared.parts[client]))[: _records(prepared)]
        batch = replayed.records_of(prepared, client, rows)
        brought.setdefault(client, set()).update(*tokens_of(batch))
        points = replayed.gradients(
            prepared,
            {name: value.to(prepared.device) for name, value in batch.items()},
            source=noise.derive(client),
        )
        shares: dict[Content, dict[str, Tensor]] = {"sent": points.get("noised", points["raw"])}
        if "noised" in points:
            shares["raw"] = points["raw"]
        for content, tensors in shares.items():
            total = totals.setdefault(content, {name: value * 0 for name, value in tensors.items()})
            for name, value in tensors.items():
                total[name] += value
    return totals


def _records(prepared: simulation.Prepared) -> int:
    """Return how many records a client learns from in one round, all of them at once here."""
    spec = prepared.config.federation.lifecycle
    if spec.local_steps:
        return min(_MOST, spec.local_steps * spec.batch_size)
    return _MOST


def _seen(
    prepared: simulation.Prepared, tensors: dict[str, Tensor], clients: int, content: Content
) -> Observation:
    names = replayed.own_names(prepared)
    if content == "sent":
        facts = replayed.noise_facts(prepared, "aggregated", clients)
    else:
        facts = {}
    return Observation(
        kind="sum" if clients > 1 else "gradient",
        tensors={names[name]: tensor.detach().cpu() for name, tensor in tensors.items()},
        contributors=clients,
        metadata={"point": "aggregated", **({"summand": "gradient"} if clients > 1 else {}), **facts},
        knowledge=Knowledge(task=prepared.config.task.kind),
    )


def attribution_question(rounds: ReadRounds) -> Question:
    """Ask whether the words of the run's own rounds can be given to their clients, beside the same rounds
    undefended.
    """
    if rounds.refused:
        return Question(seen=(not_applicable(rounds.refused, attack=NAME), None))
    count = max(1, rounds.recorded)
    if not any(one.tokens for one in rounds.sent):
        silent = _result(None, "no word was read off any sum")
        return Question(seen=silent, control=_result(_read_undefended(rounds.raw)))
    control = attribution_score(rounds.raw, rounds.owners, rounds.clients)
    attributed = _attributed(rounds, rounds.sent[:count])
    cohorts = set()
    for one in rounds.sent[:count]:
        cohorts.add(one.cohort)
    note = f"over {min(count, len(rounds.sent))} rounds, by who took part"
    if len(cohorts) == 1:
        note = "the same clients took part in every round, so no round tells them apart"
    return Question(seen=attributed, control=_result(control), notes=(note,))


def _attributed(rounds: ReadRounds, sums: Sequence[OpenedSum]) -> Result:
    scored = None
    if any(one.tokens for one in sums):
        scored = attribution_score(sums, rounds.owners, rounds.clients)
    return _result(scored)


def _read_undefended(sums: Sequence[OpenedSum]) -> Score:
    """Score the reading of undefended sums: the share of them that words were read off."""
    share = sum(bool(one.tokens) for one in sums) / max(1, len(sums))
    passed = share > 0.5
    return Score(
        measure="share of sums read", value=share, baseline=0.0, succeeded=passed, luck=0.0 if passed else 1.0
    )


def _result(scored: Score | None, reason: str = "no word is one client's alone") -> Result:
    return Reconstruction(
        attack=NAME,
        items=(),
        confidence=0.0,
        seconds=0.0,
        knowledge_used=("who took part",),
        applicable=True,
        reason="" if scored is not None else reason,
    ), scored


def attribution_curve(rounds: ReadRounds) -> LeakCurve:
    """Draw how attribution grows with the rounds an observer sees."""
    places = []
    for count in ROUNDS:
        if count <= len(rounds.sent):
            places.append(count)
    scores = []
    for count in places:
        scores.append(_attributed(rounds, rounds.sent[:count])[1])
    chance = None
    if rounds.clients:
        chance = 1 / rounds.clients
    values = tuple(chance or 0.0 if one is None else one.value for one in scores)
    reason = rounds.refused or ("" if len(places) == len(ROUNDS) else "the steps of this budget were used up")
    return LeakCurve(
        attack=NAME,
        axis="rounds",
        measure=MEASURE,
        x=tuple(map(float, places)),
        y=values,
        baseline=chance,
        here=float(rounds.recorded) if places else None,
        reason=reason,
    )


def with_curve(rounds: ReadRounds | None) -> tuple[LeakCurve, ...]:
    """Return the curve of attribution where sums were read."""
    if rounds is None:
        return ()
    return (attribution_curve(rounds),)
