"""`builtin:typed_messages`: short messages typed on devices, each device with a habit of its own.

Everything is drawn from a seed. A device belongs to one invented person who writes about few things again
and again, with favourite openings and endings: a keyboard could learn the shared grammar from all of them,
and must not learn who says what.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ffm_secure.data.generated.options import SEED, Bounds, checked_options

OPTIONS: Mapping[str, Bounds] = {
    "devices": (24, 1, 10_000),
    "messages": (40, 2, 5_000),  # of each device
    "validation": (200, 1, 100_000),  # of devices of their own
    "seed": SEED,
}

_OPENINGS = ("", "", "hi", "hey", "good day", "well", "oh no", "you know", "just so you know")
_WHO = ("i", "we", "my mother", "the doctor", "our teacher", "the old man", "my brother", "she", "he")
_DOES = {
    "i": ("am", "have"),
    "we": ("are", "have"),
}
_STATES = ("at home", "on the way", "not well", "still at work", "late again", "here now", "back by night")
_THINGS = ("time for you", "a new plan", "the long report", "no more time", "good news", "a place for us")
_WHEN = ("today", "now", "after work", "this week", "before the night", "in the morning", "some day")
_ENDINGS = ("", "", "see you", "good night", "love", "thank you", "let me know", "come if you can")


def typed_messages(options: Mapping[str, int]) -> tuple[dict[str, object], dict[str, object]]:
    """Write the train and the validation messages: columns text and device.

    Guarantee: the same options give the same messages; no device is in both parts.
    """
    chosen = checked_options("typed_messages", options, OPTIONS)
    rng = np.random.Generator(np.random.PCG64([chosen["seed"], 0x7E47]))
    train: dict[str, list[str]] = {"text": [], "device": []}
    for device in range(chosen["devices"]):
        _write(train, f"device-{device}", chosen["messages"], rng)
    validation: dict[str, list[str]] = {"text": [], "device": []}
    remaining = chosen["validation"]
    while remaining:
        messages = min(remaining, chosen["messages"])
        _write(validation, f"other-{remaining}", messages, rng)
        remaining -= messages
    return dict(train), dict(validation)


def _write(columns: dict[str, list[str]], device: str, messages: int, rng: np.random.Generator) -> None:
    """Add the messages of one device, whose person has a mixture of subjects and phrases of its own."""
    lists = (_OPENINGS, _WHO, _STATES, _THINGS, _WHEN, _ENDINGS)
    tastes = [rng.dirichlet(np.full(len(words), 0.4)) for words in lists]
    for _ in range(messages):
        picked = []
        for words, taste in zip(lists, tastes, strict=True):
            picked.append(words[rng.choice(len(words), p=taste)])
        opening, who, state, thing, when, ending = picked
        being, having = _DOES.get(who, ("is", "has"))
        middle = f"{who} {having} {thing}" if rng.random() < 0.5 else f"{who} {being} {state}"
        columns["text"].append(" ".join(part for part in (opening, middle, when, ending) if part))
        columns["device"].append(device)
