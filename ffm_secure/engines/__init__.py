"""Where clients live."""

from ffm_secure.engines.local import Engine, LocalEngine, RoundResult

ENGINES = {"local": LocalEngine}

__all__ = ["ENGINES", "Engine", "LocalEngine", "RoundResult"]
