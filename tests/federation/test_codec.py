"""What a codec seals: what a mechanism let out, and nothing that lacks the noise a grid promises."""

from __future__ import annotations

import numpy as np
import pytest

from defenses.random_source import RandomSource
from ffm_secure.privacy.mechanism import MechanismOutput
from ffm_secure.protection.codec import grid_codec, real_codec

SOURCE = RandomSource.seeded(3)


def test_only_what_a_mechanism_let_out_is_sealed() -> None:
    codec = real_codec(size=3, clients=3, value_bits=8, bound=1.0, max_weight=1, carries_loss=False)
    codec.quantise(MechanismOutput(values=np.zeros(3), loss=0.0, weight=1), source=SOURCE)
    with pytest.raises(TypeError, match="only an update that a mechanism protected"):
        codec.quantise(np.zeros(3), source=SOURCE)


def test_a_grid_takes_no_real_numbers_which_bear_no_noise() -> None:
    codec = grid_codec(size=3, clients=3, value_bits=8, bound=1.0, grid_scale=100.0, noise_bound=1000)
    whole = np.array([1, 2, 3], dtype=np.int64)
    codec.quantise(MechanismOutput(values=whole, loss=0.0, weight=1), source=SOURCE)
    with pytest.raises(TypeError, match="only whole numbers bear the noise"):
        codec.quantise(MechanismOutput(values=whole / 1.0, loss=0.0, weight=1), source=SOURCE)
