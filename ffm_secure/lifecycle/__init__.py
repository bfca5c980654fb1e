"""How a client learns at home."""

from ffm_secure.lifecycle.finetune import ModelUpdate, finetune
from ffm_secure.lifecycle.pretrain import CONTROLLERS, next_phase

__all__ = ["CONTROLLERS", "ModelUpdate", "finetune", "next_phase"]
