"""How a change travels: count, weight, change and (without privacy unit) loss as one vector of integers
modulo 2^m.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from defenses.errors import ProtocolError
from defenses.random_source import RandomSource
from defenses.secagg import ring
from defenses.secagg.masks import RingVector
from ffm_secure.config.compressed import FEWEST_BITS, value_bits
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.tables import Compression
from ffm_secure.errors import PlanRefused
from ffm_secure.privacy.field import FEWEST_LEVELS, fits
from ffm_secure.privacy.calibration import largest_records
from ffm_secure.privacy.mechanism import ClientNoise, Mechanism, MechanismOutput, SumNoise
from ffm_secure.records import RoundSum

_LARGEST_LOSS = 64.0  # nats; a larger mean loss is reported as this
FAIR_LEVELS, _LARGEST_FAIR_LOSS = 4095, 4.0  # of a weight by loss, and the nats at which it is largest


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorCodec:
    """Encode changes of `size` numbers for sums of at most `clients`.

    Every protection carries the same integers, so their sums agree bit for bit.
    Guarantee: `real_codec` and `grid_codec` prove that no sum can wrap around; in a field of few bits
    (`compression.field_bits`) a coordinate of noise wraps with probability below 1e-18. `open` refuses a sum
    whose count or weight coordinate is impossible.
    """

    size: int
    clients: int
    quantizer: ring.Quantizer
    max_weight: int = 1
    carries_loss: bool = False
    grid_scale: float = (
        0.0  # integer levels a unit where noise is discrete; 0: values are real and rounded here
    )
    noise_bound: int = 0

    @property
    def length(self) -> int:
        """Return the number of ring coordinates, count and weight included."""
        return ring.HEADER + self.size + int(self.carries_loss)

    @property
    def modulus_bits(self) -> int:
        """Return m."""
        return self.quantizer.modulus_bits

    def digest(self) -> bytes:
        """Bind everything that shapes the integers; both ends of a secure session must agree on it."""
        return hashlib.sha256(f"ffm-secure vector 1 {self!r}".encode()).digest()

    def holds(self, vector: object) -> bool:
        """Tell whether something is a vector of this code: [length] words, in the machine's byte order.

        What is not is sealed by no protection: the site that made it is lost to the round, and nobody else.
        """
        word = ring.word_type(self.modulus_bits)
        return isinstance(vector, np.ndarray) and vector.dtype == word and vector.shape == (self.length,)

    def quantise(self, update: MechanismOutput, *, source: RandomSource) -> RingVector:
        """Return the ring vector of one client; real values are rounded at random, without bias.

        Raises:
          TypeError: anything but what a mechanism let out; on a grid, where the noise is discrete, real
            numbers too: they bear none.
        """
        if not isinstance(update, MechanismOutput):
            raise TypeError("only an update that a mechanism protected can be sealed")
        values = update.values
        if self.grid_scale:
            if values.dtype != np.int64:
                raise TypeError("only whole numbers bear the noise of a grid")
            payload = ring.from_signed(values.astype(np.int64, copy=False), self.modulus_bits)
            return ring.frame(payload, weight=1, modulus_bits=self.modulus_bits)
        weight = min(update.weight, self.max_weight)
        if self.carries_loss:
            share = (
                min(max(update.loss, 0.0), _LARGEST_LOSS) / _LARGEST_LOSS * self.quantizer.coordinate_bound
            )
            values = np.append(values, share)
        payload = self.quantizer.encode(values, source=source, weight=weight)
        return ring.frame(payload, weight=weight, modulus_bits=self.modulus_bits)

    def open(self, ring_sum: RingVector, *, round: int, survivors: Sequence[int]) -> RoundSum:
        """Check and decode an opened sum.

        Raises:
          ProtocolError: count, weight or magnitude is impossible for these survivors.
        """
        opened = ring.unframe(
            ring_sum,
            survivors=len(survivors),
            modulus_bits=self.modulus_bits,
            max_weight=self.max_weight,
            value_bits=None if self.grid_scale else self.quantizer.value_bits,
            noise_bound=self.noise_bound,
        )
        if len(opened.payload) != self.length - ring.HEADER:
            raise ProtocolError
        if self.grid_scale:
            values = ring.signed(opened.payload, self.modulus_bits) / self.grid_scale
            return RoundSum(
                round=round,
                survivors=tuple(survivors),
                values=values,
                loss_sum=None,
                weight_sum=float(len(survivors)),
            )
        decoded = self.quantizer.decode_sum(opened.payload)
        loss = None
        if self.carries_loss:
            loss = float(decoded[self.size]) * _LARGEST_LOSS / self.quantizer.coordinate_bound
        return RoundSum(
            round=round,
            survivors=tuple(survivors),
            values=decoded[: self.size],
            loss_sum=loss,
            weight_sum=float(opened.total_weight),
        )


def fair_weight(loss: float, *, power: float) -> int:
    """Return the whole weight of a client from its mean loss: the loss to a power, at least 1.

    With the sums of weighted changes and of weights the server divides one by the other, and learns no
    client's loss.
    Source: Li, Sanjabi, Beirami, Smith 2020, arXiv:1905.10497 (q-FFL), with one global step size.
    """
    share = min(max(loss, 0.0), _LARGEST_FAIR_LOSS) / _LARGEST_FAIR_LOSS
    return max(1, round(FAIR_LEVELS * math.pow(share, power)))


def codec_for(config: RunConfig, mechanism: Mechanism, *, size: int, largest_weight: int = 1) -> VectorCodec:
    """Return the codec of a run for updates of `size` numbers, in the smallest ring that cannot overflow."""
    clients, protection = group_size(config), config.protection
    noise = mechanism.client_level or mechanism.sum_level
    if noise is not None and config.compression.field_bits:
        return _narrow_codec(config, noise, size=size)
    if noise is not None:
        one_site = (
            1 if mechanism.sum_level is None else largest_records(config.federation.lifecycle.batch_size)
        )
        return grid_codec(
            size=size,
            clients=clients,
            value_bits=protection.value_bits,
            bound=config.privacy.clip_norm,
            grid_scale=noise.scale,
            noise_bound=noise.noise_bound,
            one_site=one_site,
        )
    bits = value_bits(config, largest_weight=largest_weight)
    if bits < FEWEST_BITS:
        raise PlanRefused(
            [
                f"compression.field_bits = {config.compression.field_bits}: {clients} clients that count for "
                f"up to {largest_weight} each leave fewer than {FEWEST_BITS} bits for one number; take more "
                "bits, or weighting = 'uniform'"
            ]
        )
    return real_codec(
        size=size,
        clients=clients,
        value_bits=bits,
        bound=protection.coordinate_bound,
        max_weight=largest_weight,
        carries_loss=config.privacy.unit == "none",
    )


def _narrow_codec(config: RunConfig, noise: ClientNoise | SumNoise, *, size: int) -> VectorCodec:
    """Return the codec for changes on a grid that was chosen to fit the field.

    Raises:
      PlanRefused: not even the coarsest grid that is worth anything fits.
    """
    field_bits, demand = config.compression.field_bits, noise.demand
    fitting = fits(demand, clients=group_size(config), field_bits=field_bits)
    if noise.levels < FEWEST_LEVELS or not fitting:
        raise PlanRefused(
            [
                f"compression.field_bits = {field_bits}: noise of {noise.noise_multiplier:.3g} x clip in a "
                f"sum of {group_size(config)} sites leaves a grid of {noise.levels:.0f} levels, and at least "
                f"{FEWEST_LEVELS} are needed; take more bits"
            ]
        )
    quantizer = ring.Quantizer(
        value_bits=max(2, demand.largest.bit_length() + 1),
        coordinate_bound=config.privacy.clip_norm,
        modulus_bits=field_bits,
    )
    return VectorCodec(
        size=size,
        clients=group_size(config),
        quantizer=quantizer,
        grid_scale=noise.scale,
        noise_bound=noise.noise_bound,
    )


def uncompressed_bytes(config: RunConfig, mechanism: Mechanism, *, size: int, largest_weight: int = 1) -> int:
    """Return what one upload of `size` numbers takes without compression, noise being as strong as it is."""
    plain = replace(config, compression=Compression())
    noise = mechanism.client_level or mechanism.sum_level
    if noise is None:
        codec = codec_for(plain, mechanism, size=size, largest_weight=largest_weight)
        return codec.length * codec.modulus_bits // 8
    levels = (1 << (config.protection.value_bits - 1)) - 1
    one_site = 1
    if mechanism.sum_level is not None:
        one_site = largest_records(config.federation.lifecycle.batch_size)
    bits = ring.modulus_for(
        config.protection.value_bits,
        group_size(config),
        max_weight=one_site,
        noise_bound=math.ceil(noise.noise_bound * levels / noise.levels),
    )
    return (ring.HEADER + size) * bits // 8


def real_codec(
    *, size: int, clients: int, value_bits: int, bound: float, max_weight: int, carries_loss: bool
) -> VectorCodec:
    """Return the codec for real changes, in the smallest ring that cannot overflow."""
    bits = ring.modulus_for(value_bits, clients, max_weight=max_weight)
    quantizer = ring.Quantizer(value_bits=value_bits, coordinate_bound=bound, modulus_bits=bits)
    return VectorCodec(
        size=size, clients=clients, quantizer=quantizer, max_weight=max_weight, carries_loss=carries_loss
    )


def grid_codec(
    *,
    size: int,
    clients: int,
    value_bits: int,
    bound: float,
    grid_scale: float,
    noise_bound: int,
    one_site: int = 1,
) -> VectorCodec:
    """Return the codec for changes already on an integer grid with discrete noise of at most `noise_bound` (a
    tail bound); one site's coordinate is at most `one_site` times the largest value.
    """
    bits = ring.modulus_for(value_bits, clients, max_weight=one_site, noise_bound=noise_bound)
    quantizer = ring.Quantizer(value_bits=value_bits, coordinate_bound=bound, modulus_bits=bits)
    return VectorCodec(
        size=size, clients=clients, quantizer=quantizer, grid_scale=grid_scale, noise_bound=noise_bound
    )
