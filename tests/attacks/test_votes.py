"""Attacks on votes and on the texts that were kept: each with a control that succeeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks import Budget, Observation, Prior
from attacks.canary import lower_bound
from attacks.extraction import Secret, draw_secret
from attacks.metrics import auc
from attacks.released_texts import extract_from_texts
from attacks.votes import crafted_candidates
from defenses.random_source import RandomSource
from ffm_secure.queries.candidate_votes import one_hot_votes
from ffm_secure.queries.class_sums import unit_rows
from tests.queries.test_audit import answers_of
from tests.federation.helpers import RECORD, SECAGG

COUNT = 400


def secrets(count: int, repeats: int = 1) -> list[Secret]:
    """Return secrets with the same ordinary beginning and four tokens nobody would guess."""
    return [draw_secret((5, 6, 7), [range(100, 400)] * 4, seed, repeats=repeats) for seed in range(count)]


def ordinary(count: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng(4)
    return [(5, 6, 7, *map(int, draw.integers(100, 400, size=8))) for _ in range(count)]


def test_secrets_are_read_from_texts_that_hold_them_and_from_no_others() -> None:
    planted = secrets(20)
    copies = [(*secret.prefix, *secret.drawn) for secret in planted]
    leaky = extract_from_texts(planted, [*ordinary(60), *copies])
    assert np.mean([found.read for found in leaky]) == 1.0
    assert np.mean([found.leaked for found in leaky]) > 0.9
    clean = extract_from_texts(planted, ordinary(60))
    assert not any(found.read for found in clean)
    assert not any(found.leaked for found in clean)


def test_ties_among_texts_that_say_nothing_are_no_find() -> None:
    extracted = extract_from_texts(secrets(5), [(1, 2, 3)])
    assert [one.exposure for one in extracted] == [0.0] * 5


def played(noise_multiplier: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the attack says of records that voted and of such that were left out by a coin."""
    draw = np.random.default_rng(seed)
    targets = unit_rows(torch.from_numpy(draw.normal(size=(COUNT, 64))))
    coins = draw.random(COUNT) < 0.5
    others = unit_rows(torch.from_numpy(draw.normal(size=(200, 64))))
    labels = torch.from_numpy(draw.integers(0, 2, size=COUNT))
    rows = torch.cat([targets[coins], others])
    said = np.concatenate([labels[coins].numpy(), draw.integers(0, 2, size=200)])
    votes = one_hot_votes(rows, said, targets, classes=2, nearest=1)  # every candidate copies a target
    if noise_multiplier:
        noise = answers_of(privacy={**RECORD, "noise": "system", "epsilon": 2.0}, protection=SECAGG).inner
        noise = type(noise)(
            noise_multiplier=noise.noise_multiplier * noise_multiplier, bound=1.0, scale=1.0,
            dimension=2 * COUNT, honest_survivors=1, whole_numbers=True,
        )  # fmt: skip
        opened = torch.from_numpy(
            np.asarray(
                noise.share(noise.bounded_sum(votes.numpy()), RandomSource.seeded(seed)), dtype=np.float64
            )
        )
    else:
        opened = votes.sum(dim=0)
    observation = Observation(
        kind="sum", tensors={"votes": opened.view(2, COUNT)}, metadata={"summand": "delta"}, contributors=4
    )
    prior = Prior(candidates={"places": torch.arange(COUNT), "labels": labels})
    finding = crafted_candidates().run(observation, None, prior, Budget.quick(), 0)
    assert finding.applicable, finding.reason
    (scores,) = finding.of("scores")
    return scores[torch.from_numpy(coins)].numpy(), scores[torch.from_numpy(~coins)].numpy()


def test_crafted_candidates_single_out_records_without_noise_and_stay_below_the_ledger_with_it() -> None:
    inside, outside = played(0.0, 1)
    assert auc(inside, outside) > 0.9
    inside, outside = played(1.0, 2)
    assert auc(inside, outside) < 0.9
    assert lower_bound(inside, outside, 1e-5, 0.01).epsilon <= 2.0
    inside, outside = played(0.2, 3)
    assert lower_bound(inside, outside, 1e-5, 0.01).epsilon > 2.0, "a fifth of the noise is found out"


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        (Prior(), "candidates"),
        (Prior(candidates={"places": torch.tensor([0])}), "'places' and 'labels'"),
        (Prior(candidates={"places": torch.tensor([9]), "labels": torch.tensor([0])}), "outside the table"),
    ],
)
def test_what_is_missing_is_said(prior: Prior, words: str) -> None:
    observation = Observation(kind="delta", tensors={"votes": torch.zeros(2, 3)})
    finding = crafted_candidates().run(observation, None, prior, Budget.quick(), 0)
    assert not finding.applicable
    assert words in finding.reason
