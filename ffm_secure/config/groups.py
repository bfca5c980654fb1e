"""Sums over random groups: how large groups are, who is in which, and what a rule over groups needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from defenses.random_source import RandomSource
from ffm_secure.registry import STRATEGIES

if TYPE_CHECKING:
    from ffm_secure.config.run_file import RunConfig

# rule -> (times, plus): against f attackers it needs at least times * f + plus groups, for f of them spoil at
# most f groups
FEWEST: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "geometric_median": (2, 1),
        "coordinate_median": (2, 1),
        "trimmed_mean": (2, 1),
        "krum": (2, 3),
        "multi_krum": (2, 3),
        "bulyan": (4, 3),
        "root_trust": (0, 2),
    }
)


def compares_groups(config: RunConfig) -> bool:
    """Tell whether the strategy compares sums over groups instead of adding them up."""
    return STRATEGIES.has(config.federation.strategy.kind, "groups")


def root_examples(config: RunConfig) -> int:
    """Return how many public rows the server learns from to compare groups with; 0 for most strategies."""
    strategy = config.federation.strategy
    return strategy.root_examples if STRATEGIES.has(strategy.kind, "root") else 0


def group_size(config: RunConfig) -> int:
    """Return how many clients one sum is over: a whole cohort, or an equal part of it."""
    return config.federation.cohort // max(1, config.protection.groups)


def fewest_groups(config: RunConfig) -> int:
    """Return how many groups must be opened in a round for its strategy.

    Of a rule over groups, what it needs against the attackers the run file names; of any other strategy two
    thirds of the groups, as of the clients of a single sum.
    """
    groups = config.protection.groups
    if not compares_groups(config):
        return max(1, -(-2 * groups // 3))
    times, plus = FEWEST.get(config.federation.strategy.kind, (0, 2))
    return times * config.federation.strategy.attackers + plus


def groups_of(
    config: RunConfig, cohort: tuple[int, ...], *, query: str, turn: int
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of a round, drawn from the run file's public seed: every party draws the same.

    Guarantee: a function of the run file, the question and its turn alone. Nobody chooses at run time who is
    summed with whom, and a round that is tried again has the groups it had.
    """
    if config.protection.groups <= 1:
        return (cohort,)
    order = RandomSource.seeded(config.seed).derive("groups", query, turn).permutation(len(cohort))
    size = len(cohort) // config.protection.groups
    groups = []
    for start in range(0, size * config.protection.groups, size):
        places = order[start : start + size]
        groups.append(tuple(sorted(cohort[place] for place in places)))
    return tuple(groups)


def group_reasons(config: RunConfig) -> Iterator[str]:
    """Yield why groups and the rule over them cannot hold what they are for."""
    groups, strategy = config.protection.groups, config.federation.strategy
    if groups > 1 and config.protection.kind != "none" and group_size(config) < 3:
        yield (
            f"protection.groups = {groups} with federation.cohort = {config.federation.cohort}: groups of "
            f"{group_size(config)} clients, and a sum over fewer than 3 hides nobody; take fewer groups"
        )
    needed = fewest_groups(config)
    if compares_groups(config) and groups < needed:
        against = "two sums to compare"
        if strategy.kind != "root_trust":
            against = f"federation.strategy.attackers = {strategy.attackers}, who may spoil a group each"
        yield (
            f"protection.groups = {groups} with federation.strategy.kind = '{strategy.kind}': the rule needs "
            f"at least {needed} groups for {against}; take more groups (protection.kind = 'none': as many as "
            "clients), or expect fewer attackers"
        )


def average_reasons(config: RunConfig) -> Iterator[str]:
    """Yield why models are not averaged whose numbers mean something else in every round."""
    strategy = config.federation.strategy
    if strategy.average_last > 1 and STRATEGIES.has(strategy.kind, "lora"):
        yield (
            f"federation.strategy.average_last = {strategy.average_last} with kind = "
            f"'{strategy.kind}': the rule turns or "
            "folds factors between rounds, so their mean is no model; set it to 0"
        )
