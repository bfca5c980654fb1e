"""Two cohorts that differ by one owner, asked one question: the difference of the answers is that owner's.

The observation holds the opened sums of both cohorts as "larger" and "smaller". `prior.candidates["answers"]`
holds what every suspected record would have answered, [n, size]: whoever asks the question can work it out.
"""

from __future__ import annotations

from torch import Tensor, nn

from attacks.contract import Attack, Budget, Finding, Item, NotApplicable, PlainAttack, Prior
from attacks.observation import Observation


def _difference(
    observation: Observation, model: nn.Module | None, prior: Prior, budget: Budget, seed: int
) -> Finding:
    larger, smaller = (observation.tensors.get(name) for name in ("larger", "smaller"))
    if larger is None or smaller is None or larger.shape != smaller.shape or larger.dim() != 1:
        raise NotApplicable("no two opened sums of one question, 'larger' and 'smaller', were observed")
    answers = (prior.candidates or {}).get("answers")
    if answers is None or answers.dim() != 2 or answers.shape[1] != len(larger):
        raise NotApplicable(f"prior.candidates must hold 'answers' [n, {len(larger)}]")
    own = larger.double() - smaller.double()
    lengths = answers.double().norm(dim=1).clamp_min(1e-12)
    scores: Tensor = answers.double() @ own / lengths
    deviation = observation.known("noise_deviation")
    noise = float(deviation) if isinstance(deviation, int | float) else 0.0
    sure = 1.0 / (1.0 + 2.0 * noise**2)  # both sums carry the noise
    return Finding(
        items=(Item(kind="scores", value=scores, confidence=sure),),
        confidence=sure,
        details={"suspected": len(scores)},
    )


def differencing() -> Attack:
    """Return the attack: take the answer of a cohort from that of the same cohort and one owner more.

    Source: Dinur and Nissim 2003, "Revealing information while preserving privacy", section 1; compare
    `attacks.canary.lower_bound` of its scores with the ledger, which charges both answers.
    """
    return PlainAttack(
        name="differencing",
        family="membership",
        attempt=_difference,
        requires=("prior.candidates",),
        summary="membership of suspected records, by the difference of two cohorts' answers",
    )
