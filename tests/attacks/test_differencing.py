"""Answers of two cohorts that differ by one owner: read whole without noise, within the ledger with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks import Budget, Observation, Prior
from attacks.canary import lower_bound
from attacks.differencing import differencing
from attacks.metrics import auc
from defenses.dp import SumMechanism
from defenses.random_source import RandomSource
from ffm_secure.queries.class_sums import unit_rows
from tests.federation.helpers import RECORD, SECAGG
from tests.queries.test_audit import answers_of

WIDTH, TRIALS = 64, 200


def noise_of(share: float) -> SumMechanism | None:
    """Return a share of the noise that epsilon 2 asks for."""
    if not share:
        return None
    asked = answers_of(privacy={**RECORD, "noise": "system", "epsilon": 2.0}, protection=SECAGG).inner
    return type(asked)(
        noise_multiplier=asked.noise_multiplier * share, bound=1.0, scale=1024.0,
        dimension=WIDTH, honest_survivors=1, whole_numbers=False,
    )  # fmt: skip


def opened(total: torch.Tensor, noise: SumMechanism | None, source: RandomSource) -> torch.Tensor:
    """Return a sum as the server reads it."""
    if noise is None:
        return total
    shared = noise.share(noise.bounded_sum(total.numpy()[None]), source)
    return torch.from_numpy(np.asarray(shared, dtype=np.float64)) / 1024.0


def played(share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of records that were in the larger cohort and of such that were in neither."""
    draw, source = np.random.default_rng(seed), RandomSource.seeded(seed)
    noise = noise_of(share)
    inside, outside = [], []
    for trial in range(TRIALS):
        suspected = unit_rows(torch.from_numpy(draw.normal(size=(1, WIDTH))))
        took_part = draw.random() < 0.5
        larger = opened(suspected[0] * float(took_part), noise, source.derive(f"larger {trial}"))
        smaller = opened(torch.zeros(WIDTH, dtype=torch.float64), noise, source.derive(f"smaller {trial}"))
        others = 3.0 * torch.from_numpy(draw.normal(size=WIDTH))  # the same owners, the same rows, twice
        observation = Observation(
            kind="sum",
            tensors={"larger": larger + others, "smaller": smaller + others},
            metadata={"summand": "delta"},
            contributors=4,
        )
        finding = differencing().run(
            observation, None, Prior(candidates={"answers": suspected}), Budget.quick(), 0
        )
        assert finding.applicable, finding.reason
        (scores,) = finding.of("scores")
        (inside if took_part else outside).append(float(scores[0]))
    return np.array(inside), np.array(outside)


def test_an_owner_is_read_without_noise_and_stays_below_the_ledger_with_it() -> None:
    inside, outside = played(0.0, 1)
    assert auc(inside, outside) == 1.0
    inside, outside = played(1.0, 2)
    assert auc(inside, outside) < 0.9
    assert lower_bound(inside, outside, 1e-5, 0.01).epsilon <= 2.0
    inside, outside = played(0.15, 3)
    assert lower_bound(inside, outside, 1e-5, 0.01).epsilon > 2.0, "a seventh of the noise is found out"


@pytest.mark.parametrize(
    ("tensors", "answers", "words"),
    [
        ({"larger": torch.zeros(3)}, torch.zeros(1, 3), "no two opened sums"),
        ({"larger": torch.zeros(3), "smaller": torch.zeros(4)}, torch.zeros(1, 3), "no two opened sums"),
        ({"larger": torch.zeros(3), "smaller": torch.zeros(3)}, torch.zeros(1, 4), "'answers' [n, 3]"),
    ],
)
def test_what_is_missing_is_said(tensors: dict[str, torch.Tensor], answers: torch.Tensor, words: str) -> None:
    observation = Observation(kind="delta", tensors=tensors)
    finding = differencing().run(observation, None, Prior(candidates={"answers": answers}), Budget.quick(), 0)
    assert not finding.applicable
    assert words in finding.reason
