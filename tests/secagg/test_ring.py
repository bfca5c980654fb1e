"""The ring: unbiased bounded rounding, sums that cannot overflow, packing without a wasted bit,
checked headers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import ParameterError, ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import (
    HEADER,
    MODULUS_BITS,
    Quantizer,
    add_into,
    check_overflow,
    frame,
    from_signed,
    modulus_for,
    pack,
    signed,
    unframe,
    unpack,
)
from defenses.secagg.masks import word_type
from defenses.secagg.ring import add_packed, largest_sum, reduce
from defenses.secagg.rotation import Rotation, hadamard

SEEDED = RandomSource.seeded(5)


def quantizer(value_bits: int = 16, coordinate_bound: float = 1.0, modulus_bits: int = 32) -> Quantizer:
    return Quantizer(value_bits=value_bits, coordinate_bound=coordinate_bound, modulus_bits=modulus_bits)


# Quantising


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
@pytest.mark.parametrize("value_bits", [2, 8, 16, 24, 32])
def test_extremes_and_overshoot_saturate_at_the_largest_integer(modulus_bits: int, value_bits: int):
    if value_bits > modulus_bits:
        return
    grid = quantizer(value_bits, 0.37, modulus_bits)
    values = np.array([0.37, -0.37, 1e30, -1e30, 0.0, 0.37 * (1 - 2**-52), -0.0])
    for source in (None, SEEDED):
        integers = signed(grid.encode(values, source=source), modulus_bits)
        assert integers[[0, 1, 2, 3, 4, 6]].tolist() == [
            grid.largest, -grid.largest, grid.largest, -grid.largest, 0, 0,
        ]  # fmt: skip
        assert abs(int(integers[5])) <= grid.largest


def test_rounding_at_random_hits_both_neighbours_with_the_right_frequency():
    grid, source = quantizer(4, 7.0), RandomSource.seeded(2)
    for value in (0.25, -0.25, 3.9, -6.5, 2.0):
        integers = signed(grid.encode(np.full(40_000, value), source=source), 32)
        assert set(integers.tolist()) <= {math.floor(value), math.ceil(value)}
        above = value - math.floor(value)
        deviation = math.sqrt(max(above * (1 - above), 1e-12) / 40_000)
        assert abs(integers.mean() - value) <= 5 * deviation


def test_rounding_to_nearest_is_biased_where_random_rounding_is_not():
    """The other way round: the check above can fail."""
    integers = signed(quantizer(4, 7.0).encode(np.full(40_000, 0.25), source=None), 32)
    assert integers.mean() == 0.0


def test_the_error_of_a_sum_stays_within_its_stated_deviation():
    grid, clients = quantizer(16, 1.0), 10
    source = RandomSource.seeded(9)
    vectors = [source.uniform(20_000) * 2 - 1 for _ in range(clients)]
    total = np.zeros(20_000, dtype=np.uint32)
    for vector in vectors:
        add_into(total, grid.encode(vector, source=source))
    error = grid.decode_sum(reduce(total, 32)) - np.sum(vectors, axis=0)
    bound = math.sqrt(clients) / (2 * grid.scale)
    assert 0.5 * bound < error.std() <= bound
    assert abs(error.mean()) < 5 * bound / math.sqrt(20_000)


def test_a_weight_multiplies_before_rounding():
    grid = quantizer(8, 1.0)
    integers = signed(grid.encode(np.full(30_000, 0.3003), source=RandomSource.seeded(1), weight=100), 32)
    assert abs(integers.mean() - 0.3003 * 100 * 127) < 0.02
    assert integers.max() - integers.min() == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_types_and_tensors_give_the_same_integers(dtype: type):
    values = np.linspace(-1, 1, 33).astype(dtype)
    grid = quantizer()
    expected = np.rint(values.astype(np.float64) * grid.largest).astype(np.int64)
    np.testing.assert_array_equal(signed(grid.encode(values, source=None), 32), expected)
    np.testing.assert_array_equal(signed(grid.encode(torch.from_numpy(values), source=None), 32), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float):
    values = np.zeros(40_000)
    values[33_333] = bad
    with pytest.raises(ParameterError, match="not finite"):
        quantizer().encode(values, source=None)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2)), np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.complex128), np.float64(1.0)]
)
def test_only_flat_real_vectors_are_encoded(bad: np.ndarray):
    with pytest.raises(ParameterError):
        quantizer().encode(bad, source=None)


@pytest.mark.parametrize("bound", [0.1, 0.37, 1 / 3, 7.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_rounding_leaves_the_proven_limit(bound: float, dtype: type):
    """Scaled, the bound itself can come out a last digit above the limit,
    and rounding at random would go beyond.
    """
    for value_bits in (8, 16, 32):
        grid = quantizer(value_bits, bound, 64)
        for weight in (1, 3, (1 << 51) // grid.largest - 1):
            values = np.full(2_000, np.finfo(dtype).max)
            values[::2] = bound
            integers = signed(grid.encode(values, source=SEEDED, weight=weight), 64)
            limit = weight * grid.largest
            assert integers.max() <= limit
            assert integers.min() >= limit * (1 - 2.0**-22) - 1


IMPOSSIBLE = [
    {"value_bits": 1}, {"value_bits": 33}, {"value_bits": 17, "modulus_bits": 16}, {"modulus_bits": 20},
    {"coordinate_bound": 0.0}, {"coordinate_bound": math.inf},
]  # fmt: skip


@pytest.mark.parametrize("settings_", IMPOSSIBLE)
def test_impossible_grids_are_refused(settings_: dict[str, float]):
    with pytest.raises(ParameterError):
        quantizer(**settings_)


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=40),
    st.integers(2, 24),
    st.integers(1, 500),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_encoding_stays_within_one_level_and_the_limit(
    values: list[float], bits: int, weight: int, at_random: bool
):
    grid = quantizer(bits, 1.5, 64)
    exact = np.clip(np.array(values), -1.5, 1.5) * grid.scale * weight
    integers = signed(grid.encode(np.array(values), source=SEEDED if at_random else None, weight=weight), 64)
    assert np.abs(integers - exact).max() <= (1.0 if at_random else 0.5) + 1e-6
    assert np.abs(integers).max() <= weight * grid.largest


# Overflow


@given(st.integers(2, 32), st.integers(1, 100_000), st.integers(1, 1000), st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_the_chosen_modulus_is_the_smallest_that_holds_every_sum(
    bits: int, clients: int, weight: int, noise: int
):
    bound = clients * ((2 ** (bits - 1) - 1) * weight + noise)
    assert largest_sum(bits, clients=clients, max_weight=weight, noise_bound=noise) == bound
    chosen = modulus_for(bits, clients, max_weight=weight, noise_bound=noise)
    for modulus_bits in MODULUS_BITS:
        fits = -(2 ** (modulus_bits - 1)) <= -bound and bound < 2 ** (modulus_bits - 1)
        assert fits == (modulus_bits >= chosen)
        if fits:
            check_overflow(
                modulus_bits, value_bits=bits, clients=clients, max_weight=weight, noise_bound=noise
            )
        else:
            with pytest.raises(ParameterError, match=f"use {chosen} bits"):
                check_overflow(
                    modulus_bits, value_bits=bits, clients=clients, max_weight=weight, noise_bound=noise
                )


def test_published_examples_of_the_overflow_rule():
    assert modulus_for(16, 100) == 24
    assert modulus_for(20, 1000) == 32


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
def test_the_worst_sum_that_fits_decodes_exactly(modulus_bits: int):
    grid = quantizer(8, 1.0, modulus_bits)
    clients = min(((1 << (modulus_bits - 1)) - 1) // grid.largest, 3000)
    check_overflow(modulus_bits, value_bits=8, clients=clients)
    total = np.zeros(2, dtype=word_type(modulus_bits))
    for _ in range(clients):
        add_into(total, grid.encode(np.array([1.0, -1.0]), source=SEEDED))
    np.testing.assert_allclose(grid.decode_sum(reduce(total, modulus_bits)), [clients, -clients], rtol=1e-12)


def test_no_modulus_is_found_for_a_sum_beyond_64_bits():
    with pytest.raises(ParameterError, match="no modulus"):
        modulus_for(32, 1 << 20, max_weight=1 << 20)


# Packing


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 16_383, 16_384, 16_385, 50_001])
def test_packing_is_the_low_bytes_of_every_element(modulus_bits: int, length: int):
    ring = reduce(SEEDED.words(length).astype(word_type(modulus_bits)), modulus_bits)
    packed = pack(ring, modulus_bits)
    width = modulus_bits // 8
    assert len(packed) == length * width
    assert packed == b"".join(int(value).to_bytes(width, "little") for value in ring)
    np.testing.assert_array_equal(unpack(packed, modulus_bits), ring)
    accumulator = ring.copy()
    add_packed(accumulator, packed, modulus_bits)
    np.testing.assert_array_equal(accumulator, ring + ring)


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
@pytest.mark.parametrize("extra", [-1, 1, 8])
def test_packed_vectors_of_another_length_are_refused(modulus_bits: int, extra: int):
    accumulator = np.zeros(10, dtype=word_type(modulus_bits))
    with pytest.raises(ProtocolError):
        add_packed(accumulator, bytes(10 * modulus_bits // 8 + extra), modulus_bits)
    assert not accumulator.any()


@pytest.mark.parametrize("modulus_bits", MODULUS_BITS)
def test_signed_values_survive_the_ring(modulus_bits: int):
    top = (1 << (modulus_bits - 1)) - 1
    values = np.array([0, 1, -1, top, -top - 1, 12345 % top], dtype=np.int64)
    np.testing.assert_array_equal(signed(from_signed(values, modulus_bits), modulus_bits), values)


# Headers


def test_headers_are_opened_and_checked():
    payloads = [from_signed(np.array([j, -j], dtype=np.int64), 24) for j in (1, 2, 3)]
    total = reduce(
        np.sum(
            [frame(p, weight=w, modulus_bits=24) for p, w in zip(payloads, (5, 7, 11))],
            axis=0,
            dtype=np.uint32,
        ),
        24,
    )
    opened = unframe(total, survivors=3, modulus_bits=24, max_weight=11, value_bits=8)
    assert opened.total_weight == 23
    assert signed(opened.payload, 24).tolist() == [6, -6]
    assert len(total) == 2 + HEADER
    for changes in (
        {"survivors": 2},
        {"survivors": 4},
        {"max_weight": 7},
        {"max_weight": 1, "value_bits": 2},
    ):
        settings_ = {"survivors": 3, "max_weight": 11, "value_bits": 8, **changes}
        with pytest.raises(ProtocolError):
            unframe(total, modulus_bits=24, **settings_)


def test_a_coordinate_beyond_what_the_clients_can_reach_is_refused():
    total = frame(from_signed(np.array([3 * 127 + 1], dtype=np.int64), 24), weight=3, modulus_bits=24)
    total[0] = 3
    with pytest.raises(ProtocolError):
        unframe(total, survivors=3, modulus_bits=24, value_bits=8)
    unframe(total, survivors=3, modulus_bits=24, value_bits=8, noise_bound=1)


def test_a_sum_with_a_mask_left_in_it_fails_the_count():
    leftover = RandomSource.seeded(4).words(6).astype(np.uint32)
    for length in range(2):
        with pytest.raises(ProtocolError):
            unframe(leftover[:length], survivors=3, modulus_bits=32)
    with pytest.raises(ProtocolError):
        unframe(leftover, survivors=3, modulus_bits=32)


# Rotation


@pytest.mark.parametrize("length", [1, 2, 8, 64, 128, 1024])
def test_the_fast_transform_equals_the_recursive_definition(length: int):
    def recursive(vector: np.ndarray) -> np.ndarray:
        if len(vector) == 1:
            return vector
        first, second = np.split(vector, 2)
        return np.concatenate([recursive(first + second), recursive(first - second)])

    vector = SEEDED.uniform(length) - 0.5
    np.testing.assert_allclose(hadamard(vector), recursive(vector) / math.sqrt(length), atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 1000, 4096])
def test_rotation_keeps_norms_and_comes_back_on_sums(length: int):
    rotation = Rotation(seed=b"r" * 32, length=length)
    one, two = SEEDED.uniform(length), SEEDED.uniform(length)
    rotated = rotation.forward(one)
    assert math.isclose(float(np.linalg.norm(rotated)), float(np.linalg.norm(one)), rel_tol=1e-12)
    np.testing.assert_allclose(rotation.inverse(rotated + rotation.forward(two)), one + two, atol=1e-10)


def test_rotation_spreads_a_spike():
    spike = np.zeros(4096)
    spike[17] = 1.0
    assert np.abs(Rotation(seed=b"r" * 32, length=4096).forward(spike)).max() == pytest.approx(1 / 64)
    source = RandomSource.seeded(6)
    noise = Rotation(seed=b"r" * 32, length=4096).forward(source.uniform(4096))
    other = Rotation(seed=b"s" * 32, length=4096).forward(source.uniform(4096))
    assert np.abs(noise).max() < 6 * np.linalg.norm(noise) / 64
    assert np.abs(np.corrcoef(noise, other)[0, 1]) < 0.1
