"""From opened sums to the aggregate a strategy steps by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import RoundSum

View = Literal["sum", "groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMean:
    """The mean update of one group, and who is in it."""

    survivors: tuple[int, ...]
    mean: Tensor  # float64 [d]
    weight: float = 1.0  # what its sum was divided by: how much it counts in the mean over everybody
    noise_variance: float = 0.0  # of the noise in one coordinate of this mean, where it is known; else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """What the server may know of a round's updates: the mean of every group whose sum was opened; one group
    is the usual.
    """

    groups: tuple[GroupMean, ...]
    noise_variance: float = 0.0  # of the noise in one coordinate of the mean, where it is known; else 0
    reference: Tensor | None = None  # float64 [d], what the server learned from root rows; for `root_trust`

    @property
    def points(self) -> Tensor:
        """Return the groups' means, float64 [groups, d]."""
        return torch.stack([group.mean for group in self.groups])

    @property
    def mean(self) -> Tensor:
        """Return the mean over everybody, float64 [d]: the sum of all sums over all divisors."""
        if len(self.groups) == 1:
            return self.groups[0].mean
        weighted = []
        for group in self.groups:
            weighted.append(group.weight * group.mean)
        return torch.stack(weighted).sum(dim=0) / sum(group.weight for group in self.groups)

    @classmethod
    def of_mean(cls, mean: Tensor, survivors: tuple[int, ...] = ()) -> Aggregate:
        """Return the aggregate of a single sum."""
        return cls(groups=(GroupMean(survivors=survivors, mean=mean),))


def aggregate_of(
    config: RunConfig,
    sums: Sequence[RoundSum],
    *,
    site_noise_variance: float = 0.0,
    reference: Tensor | None = None,
) -> Aggregate:
    """Divide each opened sum by what may be divided by.

    `site_noise_variance` is the variance of the noise that every site's update holds in each coordinate;
    `reference` what the server learned itself, for a strategy that compares groups with it.

    Guarantee: with a client unit the divisor is the public size of what was summed over, a cohort, a group,
    or the part of a cohort whose turn it is, never the number that answered; otherwise it is the public
    number of survivors, or the summed public weights of a run without privacy unit.
    """
    groups, sites, divided_by = [], 0, 0.0
    for opened in sums:
        divisor = opened.weight_sum
        if config.privacy.unit == "client":
            divisor = group_size(config) / compatibility.turns_apart(config)
        members = len(opened.survivors)
        groups.append(
            GroupMean(
                survivors=opened.survivors,
                mean=torch.from_numpy(opened.values) / divisor,
                weight=divisor,
                noise_variance=site_noise_variance * members / divisor**2 if divisor else 0.0,
            )
        )
        sites, divided_by = sites + len(opened.survivors), divided_by + divisor
    variance = site_noise_variance * sites / divided_by**2 if divided_by else 0.0
    return Aggregate(groups=tuple(groups), noise_variance=variance, reference=reference)
