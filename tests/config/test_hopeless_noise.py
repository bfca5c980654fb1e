"""A plan says when noise drowns whatever could be learned, and is silent where it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defenses.dp import RecordMechanism
from ffm_secure.privacy.expectations import noise_warnings, walk_ratio
from tests.federation.helpers import RECORD, make

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
