"""What a site's policy asks of a run file; every objection in words."""

from __future__ import annotations

from collections.abc import Iterator

from ffm_secure.config import compatibility
from ffm_secure.config.federated import shared_objections
from ffm_secure.config.run_file import RunConfig
from ffm_secure.site.site_file import SiteFile


def objections(config: RunConfig, site: SiteFile, *, sites: int) -> tuple[str, ...]:
    """Return why this site takes no part in a run among `sites` sites; empty when it may."""
    return (*shared_objections(config, sites=sites), *_own_objections(config, site))


def _own_objections(config: RunConfig, site: SiteFile) -> Iterator[str]:
    policy, privacy, protection = site.policy, config.privacy, config.protection
    if protection.kind not in policy.protections:
        yield (
            f"protection.kind = {protection.kind!r}: policy.protections accepts "
            f"{', '.join(policy.protections) or 'none of them'}"
        )
    fewest = compatibility.minimum_survivors(config)
    if fewest < policy.smallest_cohort:
        yield (
            f"a sum of {fewest} sites could be opened: policy.smallest_cohort = {policy.smallest_cohort}; "
            "ask the coordinator for a larger protection.threshold"
        )
    if protection.kind == "secagg" and protection.colluding < policy.colluders:
        yield (
            f"protection.colluding = {protection.colluding}: policy.colluders = {policy.colluders}; ask the "
            "coordinator for more, or count on fewer in site.toml"
        )
    if privacy.unit == "none" or privacy.noise == "seeded":
        if not policy.without_guarantee:
            yield "the run promises nothing about rows, and policy.without_guarantee is not true"
        return
    for name, value, largest in (
        ("epsilon", privacy.epsilon, policy.largest_epsilon),
        ("delta", privacy.delta, policy.largest_delta),
        ("clip_norm", privacy.clip_norm, policy.largest_clip),
    ):
        if value > largest:
            limit = "largest_clip" if name == "clip_norm" else f"largest_{name}"
            yield f"privacy.{name} = {value:g}: policy.{limit} = {largest:g}"
    if privacy.unit != site.budget.unit:
        yield f"privacy.unit = {privacy.unit!r}: this site's budget is per {site.budget.unit}"
