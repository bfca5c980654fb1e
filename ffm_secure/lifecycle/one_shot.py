"""One round instead of training: the head is made from sums that every owner adds to once."""

from __future__ import annotations

from ffm_secure.config.run_file import RunConfig
from ffm_secure.lifecycle.base import Algorithm, SiteRound
from ffm_secure.lifecycle.finetune import ModelUpdate


class OneShot(Algorithm):
    """Learn nothing by gradients: the query of the same name is asked, and its answer is the head."""

    kind = "one_shot"

    def learn(self, site_round: SiteRound) -> ModelUpdate:
        """Refuse: a run of this kind has no round of learning."""
        raise NotImplementedError("a head made from sums is not learned by steps")

    def describe(self, config: RunConfig, public_rows: int) -> str:
        """Say where the head comes from."""
        return f"the head is made from {config.federation.lifecycle.kind}; no gradient is taken"


class Votes(OneShot):
    """Learn nothing by gradients: private records vote on public candidates, and the best are kept."""

    def describe(self, config: RunConfig, public_rows: int) -> str:
        """Say what comes of the votes."""
        keep = config.federation.lifecycle.votes.keep
        return (
            f"votes of private records choose up to {keep} public candidates with their labels; the head is "
            "made from those, and no gradient is taken"
        )
