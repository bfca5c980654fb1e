"""What a site does in a round, and what the server does by itself."""

from ffm_secure.lifecycle.base import Algorithm, ServerPhase, SiteRound
from ffm_secure.lifecycle.finetune import ModelUpdate, finetune

__all__ = ["Algorithm", "ModelUpdate", "ServerPhase", "SiteRound", "finetune"]
