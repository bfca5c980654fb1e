"""Attacks on answers: canaries with a cell of their own, two cohorts compared, and what an audit says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ffm_secure as ffm
from attacks import canary
from defenses.random_source import RandomSource
from ffm_secure.auditing.canary_rounds import answer_canaries
from ffm_secure.auditing.lower_bound import bounds_over_rounds, strongest
from ffm_secure.auditing.run_audit import audit_run
from ffm_secure.privacy.query_noise import RecordAnswers
from tests.federation.helpers import RECORD, SECAGG, prepared
from tests.queries.helpers import one_shot, with_start

PRIVATE = {**RECORD, "noise": "system"}


def answers_of(**sections: object) -> RecordAnswers:
    (question,) = prepared(one_shot(**sections)).spec.questions.values()
    assert isinstance(question.mechanism, RecordAnswers)
    return question.mechanism


def measured(noise: RecordAnswers) -> float:
    """Return the largest epsilon that canaries prove of one answer."""
    coins = canary.Canaries(count=1000, dimension=2000, norm=noise.clip_norm, seed=1, kind="dirac")
    total = next(answer_canaries(noise, coins, RandomSource.seeded(2)))
    scores, included = coins.scores(total).double().numpy(), coins.included.numpy()
    return strongest(canary.bounds(scores[included], scores[~included], 1e-5, gaussian=True)).epsilon


@pytest.mark.parametrize("shares", ["site", "sum"])
def test_canaries_with_a_cell_of_their_own_stay_below_the_ledger(shares: str) -> None:
    privacy = {**PRIVATE, "epsilon": 4.0, "noise_shares": shares}
    noise = answers_of(privacy=privacy, protection=SECAGG)
    assert 0.5 < measured(noise) <= 4.0
    broken = replace(noise, inner=replace(noise.inner, noise_multiplier=noise.noise_multiplier / 4))
    assert measured(broken) > 4.0, "a quarter of the noise is found out"
    too_many = replace(noise, inner=replace(noise.inner, honest_survivors=16 * noise.inner.honest_survivors))
    alone = replace(too_many.inner, honest_survivors=1, noise_multiplier=noise.noise_multiplier / 4)
    assert measured(replace(noise, inner=alone)) > 4.0, "one share of sixteen protects nobody"


def test_two_cohorts_that_differ_by_one_site_tell_it_apart_only_without_noise() -> None:
    """Whoever gets the answers of two cohorts subtracts them: the ledger charges both."""
    draw = np.random.default_rng(3)
    parts = [torch.from_numpy(draw.normal(size=(30, 40))) for _ in range(4)]
    parts = [part / part.norm(dim=1, keepdim=True) for part in parts]

    def difference(noise: RecordAnswers) -> float:
        """Return how alike the difference of both answers and the fourth site's true sum are, as a cosine."""
        wide = replace(noise, inner=replace(noise.inner, dimension=40))
        source = RandomSource.seeded(4)

        def opened(sites: range) -> np.ndarray:
            totals = [wide.total([parts[site]]) for site in sites]
            return np.sum([wide.protect_total(total, source).values for total in totals], axis=0) / wide.scale

        found = opened(range(4)) - opened(range(3))
        true = parts[3].sum(dim=0).numpy()
        return float(found @ true / np.linalg.norm(found) / np.linalg.norm(true))

    assert difference(answers_of()) > 0.99, "the control: without a unit the difference is the site's sum"
    assert difference(answers_of(privacy={**PRIVATE, "epsilon": 0.5})) < 0.6


def test_an_audit_of_a_head_from_sums_attacks_what_there_is(tmp_path: Path) -> None:
    config = replace(one_shot(privacy=PRIVATE, protection=SECAGG), name="audited")
    ffm.Run(config, runs=tmp_path).start(fairness=False, complete=False)
    summary = audit_run(tmp_path / "audited")
    assert summary.audit is not None
    assert summary.audit.findings == ()
    assert summary.audit.epsilon_lower is not None
    assert 0.0 <= summary.audit.epsilon_lower <= 8.0
    assert "No update of a model crosses the wire" in summary.audit.sentence


def test_what_a_query_left_on_the_wire_is_no_change_that_steps_have_made(tmp_path: Path) -> None:
    """An audit of recorded observations passes answers by, and attacks the updates beside them."""
    watched = {"observers": ["public", "client", "server"], "attacks": ["label_identity"]}
    alone = replace(one_shot("ridge_sums", privacy=PRIVATE, protection=SECAGG, audit=watched), name="alone")
    ffm.Run(alone, runs=tmp_path).start(fairness=False, complete=False)
    assert any((tmp_path / "alone" / "observations").glob("round-*"))
    summary = audit_run(tmp_path / "alone")
    assert summary.audit is not None
    assert summary.audit.findings == ()
    mixed = replace(with_start(privacy=PRIVATE, protection=SECAGG, audit=watched), name="mixed")
    ffm.Run(mixed, runs=tmp_path).start(fairness=False, complete=False)
    audited = audit_run(tmp_path / "mixed").audit
    assert audited is not None
    rounds = {finding.round for finding in audited.findings if finding.source == "recorded"}
    assert 1 not in rounds
    assert rounds


def test_bounds_follow_the_mechanism_of_the_run() -> None:
    bounds = bounds_over_rounds(prepared(one_shot(privacy=PRIVATE)))
    assert set(bounds) == {1}
    assert 0.0 < strongest(bounds[1]).epsilon <= 8.0
