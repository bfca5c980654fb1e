"""What a site does in a round, and what the server does by itself.

Private rows are sampled and read in `finetune.py`, in `PrivateGradient.steps`, through the rule that a site's
trainer builds.
"""

from ffm_secure.lifecycle.base import Algorithm, ServerPhase, SiteRound
from ffm_secure.lifecycle.finetune import ModelUpdate, finetune

__all__ = ["Algorithm", "ModelUpdate", "ServerPhase", "SiteRound", "finetune"]
