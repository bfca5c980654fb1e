"""What a fact about an update may be: one rule for each, whether the protocol reveals it or it is granted."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attacks.foreign import StatedFact


@dataclass(frozen=True, slots=True)
class Rule:
    """Say what a fact may be: a kind of value, for numbers from `least` and below `below`, one or `many`."""

    kind: Literal["whole", "real", "text", "truth"]
    least: int = 0
    below: float = math.inf
    many: bool = False
    shortest: int = 0

    def wanted(self) -> str:
        """Word the rule."""
        if self.kind in ("text", "truth"):
            if self.kind == "text":
                return "text"
            return "true or false"
        below = ""
        if math.isfinite(self.below):
            below = f" and below {self.below:g}"
        numbers = "finite numbers"
        if self.kind == "whole":
            numbers = "whole numbers"
        if not self.many:
            one = f"a {numbers.removesuffix('s')}"
        else:
            one = f"a list of {numbers}"
        return f"{one} from {self.least}{below}" + (f", {self.shortest} at least" if self.shortest else "")

    def fits(self, value: object) -> bool:
        """Say whether a single value keeps the rule."""
        if self.kind == "truth":
            return isinstance(value, bool)
        if self.kind == "text":
            return is_text(value)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "whole" else int | float):
            return False
        # 64 bits bound every whole number: more fits no tensor. NaN fails every comparison.
        return self.least <= value < min(self.below, 2**63) and math.isfinite(value)

    def problems(self, name: str, value: object) -> list[str]:
        """Name what breaks the rule; of many wrong entries the first and their number."""
        if not self.many:
            if self.fits(value):
                return []
            return [f"{name} is {show(value)}, must be {self.wanted()}"]
        if not isinstance(value, tuple) or len(value) < self.shortest:
            return [f"{name} is {show(value)}, must be {self.wanted()}"]
        wrong = []
        for place, entry in enumerate(value):
            if not self.fits(entry):
                wrong.append(place)
        if not wrong:
            return []
        rest = ""
        if len(wrong) > 1:
            rest = f" (and {len(wrong) - 1} more)"
        return [f"{name}[{wrong[0]}] is {show(value[wrong[0]])}{rest}, must be {self.wanted()}"]


RULES: Mapping[str, Rule] = {
    "labels": Rule("whole", many=True),
    "label_counts": Rule("whole", many=True),
    "lengths": Rule("whole", many=True),
    "sequence_length": Rule("whole", least=1),
    "batch_size": Rule("whole", least=1),
    "local_steps": Rule("whole", least=1),
    "local_epochs": Rule("whole", least=1),
    "optimiser": Rule("text"),
    "learning_rate": Rule("real"),
    "weight_decay": Rule("real"),
    "momentum": Rule("real", below=1.0),
    "nesterov": Rule("truth"),
    "schedule": Rule("text"),
    "dropout": Rule("real", below=1.0),
    "clip_norm": Rule("real"),
    "noise_multiplier": Rule("real"),
    "noise_deviation": Rule("real"),
    "vocabulary_size": Rule("whole", least=1),
    "special_tokens": Rule("whole", many=True),
    "token_set": Rule("whole", many=True),
    "image_shape": Rule("whole", least=1, many=True, shortest=1),
    "task": Rule("text"),
    "auxiliary_data": Rule("text"),
    "batch_statistics": Rule("truth"),
}
COUNTS = {"round": Rule("whole"), "contributors": Rule("whole", least=1)}


def is_text(value: object) -> bool:
    """Say whether a value is text that can be written."""
    return (
        isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None
    )  # halves of letters cannot be written


def show(value: object) -> str:
    """Return a value as a message shows it, never longer than a line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a huge {type(value).__name__}"


def printable(text: str) -> str:
    """Return a text with every character that a terminal would obey written out; line ends stay."""
    shown = ""
    for character in text:
        if character.isprintable() or character == "\n":
            shown += character
        else:
            shown += character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return shown


def plain(value: StatedFact) -> StatedFact:
    """Turn NumPy's numbers into plain ones and a list into a tuple; anything else stays what it is."""
    if isinstance(value, list | tuple):
        return tuple(entry.item() if isinstance(entry, np.number | np.bool_) else entry for entry in value)
    if isinstance(value, np.number | np.bool_):
        return value.item()
    return value
