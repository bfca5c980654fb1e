"""A plan says when noise drowns whatever could be learned, and is silent where it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defenses.dp import RecordMechanism
from defenses.dp import ClientMechanism
from ffm_secure.privacy.expectations import client_warnings, noise_warnings, walk_ratio
from ffm_secure.privacy.mechanism import ClientNoise
from tests.federation.helpers import CLIENT, RECORD, SECAGG, make

QUIET = RecordMechanism(
    noise_multiplier=0.5, sampling_rate=0.02, clip_norm=1.0, expected_batch_size=16.0, steps=2
)


def test_the_ratio_is_that_of_steps_drawn_one_by_one() -> None:
    rng, size, rounds, cohort = np.random.default_rng(1), 4000, 5, 4
    walk = np.zeros(size)
    for _ in range(rounds * QUIET.steps):
        walk += rng.normal(0.0, QUIET.noise_multiplier / 16.0, (cohort, size)).mean(axis=0)
    drawn = float(np.linalg.norm(walk)) / (rounds * QUIET.steps)
    assert walk_ratio(QUIET, rounds=rounds, cohort=cohort, size=size) == pytest.approx(drawn, rel=0.05)


def test_hopeless_noise_is_warned_of_and_useful_noise_is_not() -> None:
    config = make(privacy=RECORD)
    assert noise_warnings(config, QUIET, size=1700) == []
    assert noise_warnings(config, None, size=1700) == []
    (warning,) = noise_warnings(config, replace(QUIET, noise_multiplier=33.0), size=1700)
    assert "noise of 33 x clip" in warning
    assert "expect to learn nothing" in warning


def test_noise_of_whole_clients_is_weighed_like_a_walk_drawn_one_by_one() -> None:
    config = make(privacy=CLIENT, protection=SECAGG)
    rounds, cohort, size = config.federation.rounds, config.federation.cohort, 500
    inner = ClientMechanism(
        noise_multiplier=4.0, clip_norm=1.0, honest_survivors=cohort, participations=rounds
    )
    noise = ClientNoise(inner=inner, scale=2.0**16, dimension=size)
    rng, walk = np.random.default_rng(1), np.zeros(size)
    for _ in range(rounds):
        walk += rng.normal(0.0, noise.share_deviation, (cohort, size)).sum(axis=0)
    drawn = float(np.linalg.norm(walk)) / (cohort * rounds)
    (warning,) = client_warnings(config, noise)
    stated = float(warning.split("trained numbers ")[1].split(" x as far")[0])
    assert stated == pytest.approx(drawn, rel=0.1)
    assert "expect to learn nothing" in warning
    quiet = replace(noise, inner=replace(inner, noise_multiplier=0.01))
    assert client_warnings(config, quiet) == client_warnings(config, None) == []
