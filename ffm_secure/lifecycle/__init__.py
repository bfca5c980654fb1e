"""How a client learns at home."""

from ffm_secure.lifecycle.finetune import LocalChange, finetune
from ffm_secure.lifecycle.pretrain import CONTROLLERS, next_phase

__all__ = ["CONTROLLERS", "LocalChange", "finetune", "next_phase"]
