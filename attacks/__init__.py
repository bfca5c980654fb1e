"""The adversary: attacks that see only an observation, never the truth."""

from attacks.contract import (
    Attack,
    Budget,
    Finding,
    Item,
    NotApplicable,
    PlainAttack,
    Prior,
    Reconstruction,
    not_applicable,
)
from attacks.observation import Knowledge, Observation, ObservationError, load_observation, save_observation

__all__ = [
    "Attack",
    "Budget",
    "Finding",
    "Item",
    "Knowledge",
    "NotApplicable",
    "Observation",
    "ObservationError",
    "PlainAttack",
    "Prior",
    "Reconstruction",
    "load_observation",
    "not_applicable",
    "save_observation",
]
