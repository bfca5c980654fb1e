"""From opened sums to the aggregate a strategy steps by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ffm_secure.config.run_file import RunConfig
from ffm_secure.records import RoundSum

View = Literal["sum", "groups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMean:
    """The mean update of one group, and who is in it."""

    survivors: tuple[int, ...]
    mean: Tensor  # float64 [d]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """What the server may know of a round's updates: the mean of every group whose sum was opened; one group
    is the usual.
    """

    groups: tuple[GroupMean, ...]
    noise_variance: float = 0.0  # of the noise in one coordinate of the mean, where it is known; else 0

    @property
    def mean(self) -> Tensor:
        """Return the mean over everybody, float64 [d]: groups count by their members."""
        if len(self.groups) == 1:
            return self.groups[0].mean
        counts = []
        for group in self.groups:
            counts.append(len(group.survivors))
        weighted = []
        for count, group in zip(counts, self.groups, strict=True):
            weighted.append(count * group.mean)
        return torch.stack(weighted).sum(dim=0) / sum(counts)

    @classmethod
    def of_mean(cls, mean: Tensor, survivors: tuple[int, ...] = ()) -> Aggregate:
        """Return the aggregate of a single sum."""
        return cls(groups=(GroupMean(survivors=survivors, mean=mean),))


def aggregate_of(
    config: RunConfig, sums: Sequence[RoundSum], *, site_noise_variance: float = 0.0
) -> Aggregate:
    """Divide each opened sum by what may be divided by.

    `site_noise_variance` is the variance of the noise that every site's update holds in each coordinate.

    Guarantee: with a client unit the divisor is the public cohort size, never the number that answered;
    otherwise it is the public number of survivors, or the summed public weights of a run without privacy
    unit.
    """
    groups, sites, divided_by = [], 0, 0.0
    for opened in sums:
        cohort = float(config.federation.cohort)
        if config.privacy.unit == "client":
            divisor = cohort
        else:
            divisor = opened.weight_sum
        mean = torch.from_numpy(opened.values) / divisor
        groups.append(GroupMean(survivors=opened.survivors, mean=mean))
        sites, divided_by = sites + len(opened.survivors), divided_by + divisor
    variance = site_noise_variance * sites / divided_by**2 if divided_by else 0.0
    return Aggregate(groups=tuple(groups), noise_variance=variance)
