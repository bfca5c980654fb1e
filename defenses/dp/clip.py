"""What bounds one sample's share of a sum: flat, per-layer, automatic and adaptive clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from defenses.errors import ParameterError

ClippingKind = Literal["flat", "per_layer", "automatic", "adaptive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    """Say how one sample's gradient is bounded in L2 before it is added to the sum.

    - `flat`: scaled by min(1, C / norm).
    - `per_layer`: every module's part is clipped to C / sqrt(number of modules).
    - `automatic`: scaled by C / (norm + stabiliser), so every sample counts about equally.
    - `adaptive`: flat at the present C; C follows a quantile of the norms, whose noisy count is part of the
      release.

    Guarantee: one finite sample contributes at most `clip_norm` in L2 over all parameters together; a sample
    with a NaN, an infinity or a norm beyond float32 contributes exactly zero.
    Source: flat Abadi et al. 2016, Algorithm 1; automatic Bu et al. 2022 (arXiv 2206.07136), AUTO-S; adaptive
    Andrew et al. 2019 (arXiv 1905.03871), Algorithm 1.
    """

    kind: ClippingKind = "flat"
    clip_norm: float
    stabiliser: float = 0.01
    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in get_args(ClippingKind):
            raise ParameterError(f"kind = {self.kind!r}: clipping knows {', '.join(get_args(ClippingKind))}")
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ParameterError(f"clip_norm = {self.clip_norm}: must be positive and finite")
        if not self.stabiliser > 0:
            raise ParameterError(f"stabiliser = {self.stabiliser}: must be positive")
        if not 0 < self.quantile < 1:
            raise ParameterError(f"quantile = {self.quantile}: must lie strictly between 0 and 1")

    def factors(self, squared_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn squared norms (parameter name -> `[batch]`) into scaling factors of the same shape, in
        float32.
        """
        total = _total(squared_norms.values())
        finite = torch.isfinite(total)
        if self.kind == "per_layer":
            return self._per_layer(squared_norms, finite)
        norm = total.sqrt()
        if self.kind == "automatic":
            factor = self.clip_norm / (norm + self.stabiliser)
        else:
            factor = flat_factors(norm, clip_norm=self.clip_norm)
        factor = torch.where(finite, factor, 0.0)
        return dict.fromkeys(squared_norms, factor)

    def _per_layer(self, squared_norms: Mapping[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
        groups: dict[str, list[str]] = {}
        for name in squared_norms:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        bound = self.clip_norm / math.sqrt(len(groups))
        factors: dict[str, Tensor] = {}
        for names in groups.values():
            norm = _total(squared_norms[name] for name in names).sqrt()
            factor = torch.where(finite, flat_factors(norm, clip_norm=bound), 0.0)
            factors.update(dict.fromkeys(names, factor))
        return {name: factors[name] for name in squared_norms}

    def within(self, squared_norms: Mapping[str, Tensor]) -> int:
        """Count the samples whose norm is at most C.

        Private: it leaves only with noise, see `AdaptiveCount`.
        """
        return int((_total(squared_norms.values()).sqrt() <= self.clip_norm).sum())

    def follow(self, noisy_fraction: float) -> Clipping:
        """Return the next step's clipping after seeing the noisy fraction of samples within C."""
        step = self.learning_rate * (min(max(noisy_fraction, 0.0), 1.0) - self.quantile)
        return replace(self, clip_norm=self.clip_norm * math.exp(-step))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveCount:
    """Say what share of the noise the count behind an adaptive bound takes.

    Each sample adds +1/2 or -1/2 to the count, so its sensitivity is 1/2 and noise of standard deviation
    `count_noise` has noise multiplier 2 * count_noise. Gradient and count are one joint Gaussian release:

        total^-2 = gradient^-2 + (2 count_noise)^-2

    Guarantee: the event states `total`; the gradient gets the larger multiplier that makes the equation true.
    Source: Andrew et al. 2019 (arXiv 1905.03871), Theorem 1.
    """

    total: float
    count_noise: float

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise ParameterError(f"noise_multiplier = {self.total}: adaptive clipping needs noise")
        if not 2 * self.count_noise > self.total:
            raise ParameterError(
                f"count_noise = {self.count_noise}: must exceed noise_multiplier / 2 = {self.total / 2}, "
                "or the count alone spends more than the whole step; try expected_batch_size / 20"
            )

    @property
    def gradient(self) -> float:
        """Return the noise multiplier the gradient itself must get."""
        return float((self.total**-2 - (2 * self.count_noise) ** -2) ** -0.5)


def flat_factors(norm: Tensor, *, clip_norm: float) -> Tensor:
    """Return min(1, clip_norm / norm) elementwise, 1 for norm 0."""
    return torch.where(norm <= clip_norm, 1.0, clip_norm / norm)


def clip_vector(vector: Tensor, *, clip_norm: float) -> Tensor:
    """Scale a whole vector down to L2 norm at most `clip_norm`; a vector with NaN or Inf becomes zero.

    Guarantee: the float64 norm of the result is at most clip_norm * (1 + 1e-6).
    """
    norm = torch.linalg.vector_norm(vector.to(torch.float64))
    if not torch.isfinite(norm):
        return torch.zeros_like(vector)
    if norm <= clip_norm:
        return vector.clone()
    scaled: Tensor = vector.to(torch.float64) * (clip_norm / norm)
    return scaled.to(vector.dtype)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
