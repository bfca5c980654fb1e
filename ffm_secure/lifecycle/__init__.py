"""How a client learns at home."""

from ffm_secure.lifecycle.finetune import LocalChange, finetune

LIFECYCLES = {"finetune": finetune}

__all__ = ["LIFECYCLES", "LocalChange", "finetune"]
