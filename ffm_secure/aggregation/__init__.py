"""Which view of the updates a strategy gets: one sum, or sums over groups."""

from ffm_secure.aggregation.base import Aggregate, GroupMean, aggregate_of

__all__ = ["Aggregate", "GroupMean", "aggregate_of"]
