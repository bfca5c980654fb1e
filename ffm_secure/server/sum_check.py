"""Is an opened sum one that honest clients can have sent? Under a mask this is all the server can ask of
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ffm_secure.privacy.mechanism import SumNoise
from ffm_secure.records import RoundSum
from ffm_secure.agreed.run_spec import Question, RunSpec

_TAIL = 8.0  # standard deviations; an honest sum exceeds it with probability below 1e-14
_LARGEST_SITE = 16.0  # how many times the public size of a client an honest site's data may be


@dataclass(frozen=True, slots=True, kw_only=True)
class HonestBound:
    """The most that honest survivors' sum can be, in L2; infinity where nothing follows from the run file."""

    norm: float
    because: str = ""


def why_too_large(opened: RoundSum, spec: RunSpec, start: Tensor, *, turns: int = 1) -> str:
    """Return why a sum is refused, or an empty string. `start` is the broadcast vector [d], `turns` in how
    many rounds an honest site may have learned so far, those that stayed closed among them.

    Guarantee: a sum of honest clients passes, except with probability below 1e-14. One dishonest client can
    still send as much as all honest ones together may: the bound is on the sum.
    """
    survivors = len(opened.survivors)
    if spec.sheet is not None and spec.mechanism.client_level is None:
        return why_no_answers(opened, spec)
    bound = honest_bound(spec, survivors, float(start.double().norm()), turns=turns)
    norm = float(np.linalg.norm(opened.values))
    if not math.isfinite(norm):
        return "the opened sum is not finite"
    if norm <= bound.norm:
        return ""
    return (
        f"the opened sum has norm {norm:.4g}; {survivors} honest clients send at most "
        f"{bound.norm:.4g} ({bound.because})"
    )


def why_no_answers(opened: RoundSum, spec: RunSpec) -> str:
    """Return why a sum is none of probabilities, or an empty string: every number is from 0 to the weight of
    the survivors, and those of one public row add up to it, up to rounding.
    """
    assert spec.sheet is not None, "asked where answers are sent"
    values = opened.values.reshape(spec.sheet.rows, spec.sheet.classes)
    weight, slack = opened.weight_sum, _rounding(spec, len(opened.survivors)) / math.sqrt(spec.codec.size)
    apart = float(np.abs(values.sum(axis=1) - weight).max())
    if not math.isfinite(apart):
        return "the opened sum is not finite"
    if values.min() < -slack or values.max() > weight + slack:
        return (
            f"the opened answers are from {values.min():.4g} to {values.max():.4g}, not from 0 to {weight:g}"
        )
    if apart > slack * spec.sheet.classes:
        return f"the answers to one public row add up to {apart:.4g} more or less than {weight:g}"
    return ""


def why_answer_too_large(opened: RoundSum, question: Question, spec: RunSpec) -> str:
    """Return why the opened answer to a query is refused, or an empty string; the same guarantee holds."""
    survivors, query = len(opened.survivors), question.query
    records = 1.0 if spec.config.privacy.unit == "client" else _LARGEST_SITE * spec.public_client_size
    signal = survivors * records * query.bound
    most = _with_noise(signal, question.mechanism.deviation(survivors), query.size)
    norm = float(np.linalg.norm(opened.values))
    if math.isfinite(norm) and norm <= most:
        return ""
    return (
        f"the answer to {query.name} has norm {norm:.4g}; {survivors} honest clients send at most {most:.4g}"
    )


def honest_bound(spec: RunSpec, survivors: int, start_norm: float, *, turns: int = 1) -> HonestBound:
    """Return the bound for the sum over so many survivors of the run's mechanism, rule and learning rate.

    A compression makes no update longer; with a residual an update may hold what all turns so far left out.
    """
    config = spec.config
    held = turns if config.compression.residual else 1
    declared = config.protection.norm_bound
    weight = spec.codec.max_weight
    if declared:
        rounding = _rounding(spec, survivors)
        signal = survivors * weight * declared * held
        norm = _with_noise(signal, _client_noise(spec, survivors), spec.codec.size)
        return HonestBound(norm=norm + rounding, because="protection.norm_bound")
    if spec.mechanism.client_level is not None:
        signal = survivors * config.privacy.clip_norm
        norm = _with_noise(signal, _client_noise(spec, survivors), spec.codec.size)
        return HonestBound(
            norm=norm + _rounding(spec, survivors), because="clip and noise of the client unit"
        )
    if spec.mechanism.sum_level is not None:
        return _shared_bound(spec, spec.mechanism.sum_level, survivors)
    if spec.mechanism.record_level is not None and not spec.strategy.merges_into_base:
        norm = survivors * held * _record_update_norm(spec, start_norm) + _rounding(spec, survivors)
        return HonestBound(norm=norm, because="clip, noise and learning rate of the record unit")
    return HonestBound(norm=math.inf)


def _rounding(spec: RunSpec, survivors: int) -> float:
    """Return the most that rounding to the grid adds: one level a coordinate and client."""
    codec = spec.codec
    quantizer = codec.quantizer
    if codec.grid_scale:
        level = 1.0 / codec.grid_scale
    else:
        level = quantizer.coordinate_bound / quantizer.largest
    return survivors * level * math.sqrt(codec.size) * codec.max_weight


def _client_noise(spec: RunSpec, survivors: int) -> float:
    """Return the deviation of one coordinate's noise in a sum of the client unit; 0 for the other units."""
    noise = spec.mechanism.client_level
    return noise.share_deviation * math.sqrt(survivors) if noise is not None else 0.0


def _shared_bound(spec: RunSpec, noise: SumNoise, survivors: int) -> HonestBound:
    """Return the bound for sums of bounded gradients with noise in shares."""
    records = noise.expected_batch_size * _batches(noise.expected_batch_size)
    signal = survivors * noise.inner.bound * records
    norm = _with_noise(signal, noise.share_deviation * math.sqrt(survivors), spec.codec.size)
    return HonestBound(
        norm=norm + _rounding(spec, survivors), because="clip, noise in shares and learning rate"
    )


def _batches(expected: float) -> float:
    """Return the most a realised batch may be, in expected batches."""
    return _LARGEST_SITE + _TAIL * math.sqrt(_LARGEST_SITE / expected)


def _with_noise(signal: float, deviation: float, size: int) -> float:
    """Return a tail bound on the norm of a signal plus independent noise: their squares add, not their norms.

    Source: Laurent and Massart 2000, Lemma 1 (chi-square tail), with a normal tail for the inner product.
    """
    tail = _TAIL**2 / 2
    squared = deviation**2 * (size + 2 * math.sqrt(size * tail) + 2 * tail)
    return math.sqrt(squared + signal**2 + 2 * signal * deviation * _TAIL)


def _record_update_norm(spec: RunSpec, start_norm: float) -> float:
    """Return a bound on one honest client's update under the record unit.

    SGD moves by the learning rate times the sum of its gradients, momentum m by 1 / (1 - m) times that; Adam
    moves each coordinate by at most the learning rate times (1 - beta1) / sqrt(1 - beta2), below 3.2 a step.
    """
    lifecycle, mechanism = spec.config.federation.lifecycle, spec.mechanism.record_level
    assert mechanism is not None
    size = spec.codec.size
    if lifecycle.optimizer != "sgd" or spec.config.compression.residual:
        size = spec.compression.size  # the bound is on what is not compressed yet
    rate, steps = lifecycle.learning_rate, mechanism.steps
    decay = rate * lifecycle.weight_decay * steps * start_norm
    if lifecycle.optimizer != "sgd":
        return 3.2 * rate * steps * math.sqrt(size) + 2 * decay
    expected = mechanism.expected_batch_size
    signal = mechanism.clip_norm * _batches(expected)
    deviation = mechanism.noise_multiplier * mechanism.clip_norm / expected
    momentum = 1.0 / (1.0 - lifecycle.momentum)
    return momentum * rate * steps * _with_noise(signal, deviation, size) + 2 * decay
