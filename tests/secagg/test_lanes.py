"""Lanes: words of sums are sums of words, bit for bit, and words that no sum gives are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import Lanes, Quantizer, Stage, drive, frame, from_signed, signed, unframe
from defenses.secagg.ring import largest_sum
from tests.secagg.parties import bring, gather


def written_out(values: list[int], lanes: Lanes) -> list[int]:
    """The slow, obvious definition, in whole numbers."""
    words = lanes.words(len(values))
    return [
        sum(value << lanes.width * lane for lane, value in enumerate(values[word::words])) % 2**64
        for word in range(words)
    ]


@pytest.mark.parametrize(
    "bound, width, count", [(1, 2, 32), (7, 4, 16), (360_437, 20, 3), (2**20 - 1, 21, 3), (2**31, 33, 1)]
)
def test_a_word_has_room_for_every_lane_of_the_sum(bound: int, width: int, count: int):
    lanes = Lanes(bound=bound)
    assert (lanes.width, lanes.count) == (width, count)


@given(st.integers(2, 20), st.integers(1, 12), st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_sums_are_exact_up_to_the_extremes(bits: int, clients: int, length: int, dice: object):
    largest = (1 << (bits - 1)) - 1
    lanes = Lanes(bound=largest_sum(bits, clients=clients))
    vectors = [
        [dice.choice((-largest, largest, 0, dice.randint(-largest, largest))) for _ in range(length)]
        for _ in range(clients)
    ]
    total = np.zeros(lanes.words(length), dtype=np.uint64)
    for vector in vectors:
        words = lanes.pack(np.array(vector, dtype=np.int64))
        assert words.tolist() == written_out(vector, lanes)
        total += words
    assert lanes.unpack(total, length).tolist() == [sum(column) for column in zip(*vectors, strict=True)]


@pytest.mark.parametrize("clients", [1, 11, 100, 5000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("length", [1, 2, 100_000])
def test_quantising_into_lanes_is_quantising_and_packing(clients: int, dtype: type, length: int):
    lanes = Lanes(bound=largest_sum(8, clients=clients, max_weight=3))
    grid = Quantizer(value_bits=8, coordinate_bound=0.7, modulus_bits=64)
    values = np.linspace(-1, 1, length).astype(dtype)
    expected = lanes.pack(signed(grid.encode(values, source=None, weight=3), 64))
    np.testing.assert_array_equal(grid.encode_lanes(values, lanes, source=None, weight=3), expected)


def test_rounding_at_random_in_lanes_is_unbiased():
    grid, lanes = Quantizer(value_bits=4, coordinate_bound=7.0, modulus_bits=64), Lanes(bound=100)
    integers = lanes.unpack(
        grid.encode_lanes(np.full(40_000, 0.3), lanes, source=RandomSource.seeded(2)), 40_000
    )
    assert set(integers.tolist()) == {0, 1}
    assert abs(integers.mean() - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / 40_000)
    assert abs(np.corrcoef(integers[:13_000], integers[13_334:26_334])[0, 1]) < 0.05  # neighbours in a word


def test_words_of_no_sum_are_refused():
    lanes = Lanes(bound=largest_sum(16, clients=3))
    good = lanes.pack(np.arange(-5, 5, dtype=np.int64))
    assert lanes.unpack(good, 10).tolist() == list(range(-5, 5))
    spare = good.copy()
    spare[1] += np.uint64(1 << 62)
    beyond = good.copy()
    beyond[0] += np.uint64(lanes.bound + 6)
    padding = good.copy()
    padding[-1] += np.uint64(
        1 << lanes.width * (lanes.count - 1)
    )  # ten values leave the last lane of the last word empty
    for bad in (spare, beyond, padding, good[:-1], good.astype(np.uint32), good.reshape(1, -1)):
        with pytest.raises(ProtocolError):
            lanes.unpack(bad, 10)


def test_masks_that_did_not_cancel_are_refused():
    lanes, source = Lanes(bound=largest_sum(16, clients=11)), RandomSource.seeded(3)
    refused = 0
    for _ in range(50):
        try:
            lanes.unpack(source.words(40), 120)
        except ProtocolError:
            refused += 1
    assert refused == 50


def test_lanes_too_narrow_for_one_client_are_refused():
    grid = Quantizer(value_bits=16, coordinate_bound=1.0, modulus_bits=64)
    with pytest.raises(ParameterError, match="too small"):
        grid.encode_lanes(np.zeros(3), Lanes(bound=2**15 - 2), source=None)
    for bound in (0, 1 << 63):
        with pytest.raises(ParameterError, match="bound"):
            Lanes(bound=bound)


def test_a_session_over_lanes_gives_the_sum_of_the_survivors():
    """Count and weight keep a word each; the payload shares its words; one client is lost after dealing."""
    source, length = RandomSource.seeded(11), 50
    lanes, grid = (
        Lanes(bound=largest_sum(16, clients=5)),
        Quantizer(value_bits=16, coordinate_bound=2.0, modulus_bits=64),
    )
    parties = gather(5, length=lanes.words(length) + 2, modulus_bits=64)
    reals = {owner: source.uniform(length) * 4 - 2 for owner in parties.people}
    integers = {owner: signed(grid.encode(reals[owner], source=source), 64) for owner in reals}
    lost = next(iter(parties.people))

    def words(owner: bytes) -> np.ndarray:
        return frame(lanes.pack(integers[owner]), weight=1, modulus_bits=64)

    outcome = drive(parties.clients(), parties.server(), bring(parties, words), {lost: Stage.MASK})
    opened = unframe(outcome.sum.vector, survivors=4, modulus_bits=64)
    expected = np.sum([integers[owner] for owner in reals if owner != lost], axis=0)
    np.testing.assert_array_equal(lanes.unpack(opened.payload, length), expected)
    assert np.abs(grid.decode_sum(from_signed(expected, 64)) - expected / grid.scale).max() == 0
