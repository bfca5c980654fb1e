"""Digits and lanes: sums of packed vectors unpack to sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.he import choose
from defenses.he.packing import pack, unpack


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["bfv", "ckks"]),
    st.integers(1, 300),
    st.integers(1, 2**50),
    st.integers(0, 2**32),
    st.data(),
)
def test_packing_is_linear_and_undone_at_the_extremes(scheme, parties, bound, seed, data):
    parameters = choose(scheme, parties=parties, value_bound=bound)
    length = data.draw(st.integers(1, parameters.values_per_chunk))
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-bound, bound + 1, (min(parties, 4), length))
    vectors[0, :] = generator.choice([-bound, bound], length)
    weights = np.ones(len(vectors), dtype=np.int64)
    weights[0] = parties - len(vectors) + 1  # the first vector stands for many equal parties
    packed = sum(int(weight) * pack(vector, parameters) for weight, vector in zip(weights, vectors))
    assert np.abs(packed).max() < parameters.packed_limit
    opened = unpack(packed, parameters)
    np.testing.assert_array_equal(opened[:length], (weights[:, None] * vectors).sum(0))
    assert not opened[length:].any()


def test_packing_is_the_sum_of_shifted_lanes():
    parameters = choose("bfv", parties=3, value_bound=7)
    values = np.random.default_rng(1).integers(-7, 8, parameters.values_per_chunk)
    lanes = values.reshape(parameters.lanes, parameters.slots)
    slow = [
        sum(int(lane[slot]) << (parameters.lane_bits * place) for place, lane in enumerate(lanes))
        for slot in range(9)
    ]
    assert parameters.lanes > 1
    assert pack(values, parameters)[:9].tolist() == slow
