"""Integers into plaintext slots and back: digits, lanes, and the arithmetic that undoes both on a sum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from defenses.he.parameters import Parameters

Integers = npt.NDArray[np.int64]


def pack(values: Integers, parameters: Parameters) -> Integers:
    """Pack at most `values_per_chunk` int64 values into one int64 vector of `slots`.

    Value = sum of digit_k * 2^(k * digit_bits), all digits but the top in [0, 2^digit_bits).
    Slot = sum of lane_l * 2^(l * lane_bits), signed. Both are linear, so sums unpack to sums.
    """
    if parameters.digits > 1:
        # Where a digit lies depends on the count, so a short last chunk is filled up with zeros.
        values = np.concatenate([values, np.zeros(parameters.values_per_chunk - len(values), dtype=np.int64)])
    digits = _split(values, parameters)
    lanes = np.zeros((parameters.lanes, parameters.slots), dtype=np.int64)
    lanes.reshape(-1)[: digits.size] = digits
    packed: Integers = lanes[-1]
    for lane in lanes[-2::-1]:
        packed = (packed << parameters.lane_bits) + lane
    return packed


def unpack(slots: Integers, parameters: Parameters) -> Integers:
    """Undo `pack` on a sum of packed slots; returns `values_per_chunk` values, unused ones zero.

    Guarantee: exact while every lane sum stays within its signed lane, which `lint` proves for honest
    parties.
    """
    half, mask = 1 << (parameters.lane_bits - 1), (1 << parameters.lane_bits) - 1
    lanes = np.empty((parameters.lanes, parameters.slots), dtype=np.int64)
    rest = slots
    for lane in lanes[:-1]:
        lane[:] = ((rest + half) & mask) - half
        rest = (rest - lane) >> parameters.lane_bits
    lanes[-1] = rest
    return _join(lanes.reshape(-1)[: parameters.values_per_chunk * parameters.digits], parameters)


def _split(values: Integers, parameters: Parameters) -> Integers:
    if parameters.digits == 1:
        return values
    mask, parts, rest = (1 << parameters.digit_bits) - 1, [], values
    for _ in range(parameters.digits - 1):
        parts.append(rest & mask)
        rest = rest >> parameters.digit_bits
    return np.concatenate([*parts, rest])


def _join(digits: Integers, parameters: Parameters) -> Integers:
    parts = digits.reshape(parameters.digits, -1)
    value: Integers = parts[-1]
    for part in parts[-2::-1]:
        value = (value << parameters.digit_bits) + part
    return value
