"""Candidates that a server made to single out records, read from the opened votes.

Whoever chooses what private records vote on can put a near-copy of one record among it and see whether
anybody votes for it. `prior.candidates` names for every suspected record where its copy stands ("places")
and the label it would vote under ("labels"); the observation holds the opened table "votes".
"""

from __future__ import annotations

from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.observation import Observation


def _crafted(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    table = observation.tensors.get("votes")
    if table is None or table.dim() != 2:
        raise NotApplicable("no table of votes [labels, candidates] was observed")
    crafted = prior.candidates or {}
    if {"places", "labels"} - set(crafted):
        raise NotApplicable("prior.candidates must say 'places' and 'labels' of the copies")
    places, labels = crafted["places"], crafted["labels"]
    outside = (places < 0) | (places >= table.shape[1]) | (labels < 0) | (labels >= table.shape[0])
    if bool(outside.any()):
        raise NotApplicable("a copy stands outside the table")
    scores: Tensor = table[labels, places].double()
    deviation = observation.known("noise_deviation")
    noise = float(deviation) if isinstance(deviation, int | float) else 0.0
    sure = 1.0 / (1.0 + noise**2)  # share of the variance of a score that one vote would be
    return Finding(
        items=(Item(kind="scores", value=scores, confidence=sure),),
        confidence=sure,
        details={"copies": len(scores)},
    )


def crafted_candidates() -> Attack:
    """Return the attack: score suspected records by the votes for copies of them.

    Source: the differencing adversary of the definition of differential privacy, here with the choice of
    the question; compare `attacks.canary.lower_bound` of its scores with the ledger.
    """
    return PlainAttack(
        name="crafted_candidates",
        family="membership",
        attempt=_crafted,
        requires=("prior.candidates",),
        summary="membership of suspected records, by the votes for copies put among the candidates",
    )
