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
