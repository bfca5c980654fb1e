"""Homomorphic tags: additive, equal to their slow definition, and broken by every manipulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.he.parameters import LARGEST_SUM, _is_prime
from defenses.he.tags import PRIMES, REPETITIONS, Tagger, coordinates, digit_bits
from defenses.random_source import RandomSource
from tests.he.common import PARTIES


def tagger(seed: int = 0) -> Tagger:
    return Tagger(RandomSource.seeded(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**56), st.integers(1, 6), st.integers(1, 300), st.integers(0, 2**32))
def test_sums_of_tags_verify_for_exactly_their_parties(bound, count, length, seed):
    vectors = np.random.default_rng(seed).integers(-bound, bound + 1, (count, length))
    tags = np.array([tagger().tag(vector, PARTIES[index], bound) for index, vector in enumerate(vectors)])
    assert tags.shape == (count, coordinates(bound))
    assert tags.min() >= 0
    assert tags.max() <= bound
    total, tag = vectors.sum(0), tags.sum(0)
    assert tagger().verify(total, tag, PARTIES[:count], bound)
    assert not tagger().verify(total, tag, PARTIES[: count + 1], bound)
    assert not tagger().verify(total, tag, PARTIES[1 : count + 1], bound)
    assert not tagger(1).verify(total, tag, PARTIES[:count], bound)
    total[seed % length] += 1
    assert not tagger().verify(total, tag, PARTIES[:count], bound)


def test_tags_equal_their_slow_definition():
    length, bound = 70_001, 2**40
    values = np.random.default_rng(0).integers(-bound, bound + 1, length)
    source = RandomSource.seeded(5)
    stream, weights = source.derive("weights"), []
    for _ in range(0, length, 1 << 16):
        words = np.empty((REPETITIONS, 1 << 16), dtype=np.uint32)
        stream.fill(words)
        weights.append(words)
    every = np.concatenate(weights, axis=1)[:, :length].tolist()
    pads = source.derive("pad", PARTIES[0].hex())
    expected = []
    for row, prime in zip(every, PRIMES):
        number = (
            sum((word >> 1) * value for word, value in zip(row, values.tolist())) + pads.below(prime)
        ) % prime
        expected.append(number)
    assert digit_bits(bound) == 31
    assert Tagger(source).tag(values, PARTIES[0], bound).tolist() == expected


@pytest.mark.parametrize("factor", [2, 3, -1])
def test_a_scaled_vector_does_not_verify(factor):
    values = np.arange(-50, 50)
    tag = tagger().tag(values, PARTIES[0], 100)
    claimed = PARTIES[: abs(factor)]
    assert not tagger().verify(values * factor, tag * factor, claimed, 100)


def test_reordered_coordinates_do_not_verify():
    values = np.arange(-50, 50)
    tag = tagger().tag(values, PARTIES[0], 100)
    assert tagger().verify(values, tag, PARTIES[:1], 100)
    assert not tagger().verify(values[::-1], tag, PARTIES[:1], 100)
    assert not tagger().verify(np.roll(values, 1), tag, PARTIES[:1], 100)


@pytest.mark.parametrize("shift", [*PRIMES, -PRIMES[0], 2 * PRIMES[1], 2**31, 2**32, 2**58])
def test_a_shift_by_a_multiple_of_a_prime_does_not_verify(shift):
    bound = 2**59
    values = np.random.default_rng(2).integers(-(2**40), 2**40, 100)
    tag = tagger().tag(values, PARTIES[0], bound)
    values[3] += shift
    assert not tagger().verify(values, tag, PARTIES[:1], bound)


def test_the_moduli_are_distinct_primes_and_no_two_divide_a_change_of_a_sum():
    assert len(set(PRIMES)) == REPETITIONS == 3
    assert all(_is_prime(prime) for prime in PRIMES)
    assert min(PRIMES) ** 2 > 2 * LARGEST_SUM


def test_a_tag_hides_its_secret():
    assert repr(tagger()) == "Tagger(<hidden>)"
