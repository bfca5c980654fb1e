"""Rules that compare sums over groups of clients, so that a few wrong ones cannot move the model far.
 The inputs are means over groups that a protection opened one by one, or single updates where they travel in
the clear and `protection.groups` is the whole cohort. Each rule is post-processing of what was opened:
nothing is charged for it. None of them is a defence against backdoors: docs/results/robustness.md says by
attack what each withstood.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from defenses import robust
from ffm_secure.aggregation.base import Aggregate, View
from ffm_secure.config.run_file import Strategy as StrategyConfig
from ffm_secure.strategies.base import ServerState, Strategy


class GroupRule(Strategy):
    """Add what a rule makes of the groups' means, scaled by the server's learning rate."""

    needs: ClassVar[View] = "groups"
    linear: ClassVar[bool] = False

    def __init__(self, config: StrategyConfig) -> None:
        super().__init__(config)
        self.note = f"{self.words}, meant for at most {config.attackers} malicious clients a cohort"

    words: ClassVar[str] = ""

    def step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Return the state after a round."""
        change = self.combine(aggregate)
        vector = (state.vector.double() + self.config.learning_rate * change).to(torch.float32)
        return ServerState(round=state.round + 1, vector=vector)

    @abstractmethod
    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return one change of the groups' means, float64 [d]."""


class GeometricMedian(GroupRule):
    """The point closest to all groups' means together."""

    words = "the geometric median of the groups' means"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the geometric median."""
        return robust.geometric_median(aggregate.points)


class CoordinateMedian(GroupRule):
    """The median of the groups' means in every coordinate."""

    words = "the median of the groups' means in every coordinate"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the median of every coordinate."""
        return robust.coordinate_median(aggregate.points)


class TrimmedMean(GroupRule):
    """The mean in every coordinate without the largest and smallest values."""

    words = "the groups' mean in every coordinate without the largest and smallest"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the trimmed mean; as many are left out at each end as clients may be malicious."""
        return robust.trimmed_mean(aggregate.points, wrong=self.config.attackers)


class Krum(GroupRule):
    """The one mean that lies closest among its neighbours."""

    words = "the one group mean that lies closest among its neighbours (Krum)"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the mean with the smallest score."""
        return robust.krum(aggregate.points, wrong=self.config.attackers)


class MultiKrum(GroupRule):
    """The mean of all but the worst by Krum's score."""

    words = "the mean of the groups but for those Krum scores worst"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the mean of those with the smallest scores."""
        return robust.multi_krum(aggregate.points, wrong=self.config.attackers)


class Bulyan(GroupRule):
    """Groups chosen by Krum, then averaged around their median."""

    words = "groups chosen by Krum and averaged around their median (Bulyan)"

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the mean around the median of the chosen."""
        return robust.bulyan(aggregate.points, wrong=self.config.attackers)


class RootTrust(GroupRule):
    """Weigh groups by how far they agree with what the server learned itself from public rows.

    A group's mean counts by its cosine with the server's own update, not at all where that is negative, and
    at the length of that update: with noise of known size in it, at the length that such noise gives an
    honest mean.
    Source: Cao et al. 2021, arXiv:2012.13995, on sums over groups.
    """

    def __init__(self, config: StrategyConfig) -> None:
        super().__init__(config)
        self.note = (
            f"groups weighed by their agreement with an update from {config.root_examples} public rows"
        )

    def combine(self, aggregate: Aggregate) -> Tensor:
        """Return the weighted mean; nothing where no group agrees."""
        assert aggregate.reference is not None, "the server learns from its root rows first"
        reference, points = aggregate.reference.double(), aggregate.points
        lengths = []
        for group in aggregate.groups:
            noise = group.noise_variance * reference.numel()
            lengths.append(math.sqrt(float(reference.square().sum()) + noise))
        return robust.trusted_mean(points, reference, torch.tensor(lengths, dtype=torch.float64))
