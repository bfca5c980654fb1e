"""The adversary: attacks that see only an observation, never the truth."""
