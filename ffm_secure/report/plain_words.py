"""Epsilon in plain words, with a comparison that people know."""

from __future__ import annotations

import math

from ffm_secure.quantities import bound, count
from ffm_secure.records import DataRelease, PrivacyStatement

COIN_SURVEY = math.log(3)  # epsilon of the survey in which a coin decides who answers at random
_STRONG, _MODERATE = 1.0, 10.0


def best_guess(statement: PrivacyStatement) -> float:
    """Return how often anyone at all is right about one unit when half of all guesses are right beforehand.

    Source: Kairouz, Oh, Viswanath 2015, "The composition theorem for differential privacy", the region of
    false alarms and misses that (epsilon, delta) allows.

    >>> round(best_guess(PrivacyStatement(observer="public", epsilon=math.log(3), delta=0.0, unit="record",
    ...     adjacency="", mechanism=(), accountant="", slack=0.0)), 6)
    0.75
    """
    if statement.epsilon > 700:
        return 1.0
    odds = math.exp(statement.epsilon)
    return min(1.0, (odds + statement.delta) / (1 + odds))


def protected_unit(statement: PrivacyStatement) -> str:
    """Name what is protected as a person would."""
    if statement.unit == "client":
        return "one data owner with all rows"
    if statement.unit.startswith("person"):
        return f"one {statement.unit}"
    return f"one {statement.unit}"


def meaning(statement: PrivacyStatement) -> str:
    """Say what a finite epsilon means to someone who was in the data; rounding never flatters."""
    often = _often(best_guess(statement))
    odds = (
        f"Anyone who must say whether {protected_unit(statement)} was used, and who is right half the time "
        f"by tossing a coin, is right at most {often} after seeing all that this observer sees, however "
        "clever, and whatever they know of everyone else."
    )
    return f"{odds} {comparison(statement)}"


def comparison(statement: PrivacyStatement) -> str:
    """Compare a finite epsilon with a survey: a yes-or-no answer that is sometimes turned round."""
    survey = "the well-known coin survey, in which a coin decides whether one answers truly or at random"
    if math.isclose(statement.epsilon, COIN_SURVEY, rel_tol=0.01):
        return f"This is the secrecy of {survey}."
    known = f"({survey}: epsilon {bound(COIN_SURVEY, digits=2)})"
    return f"A survey is as secret if {_lies(statement.epsilon)} {known}."


def _lies(epsilon: float) -> str:
    """Say how often a survey of that epsilon turns an answer round: once in 1 + exp(epsilon)."""
    if epsilon > 30:
        return "hardly ever an answer is turned round"
    answers = 1 + math.exp(epsilon)
    if answers < 20:
        return f"{math.floor(100 / answers)} of 100 yes-or-no answers are turned round"
    return f"one yes-or-no answer in {count(math.ceil(answers))} is turned round"


def strength(statement: PrivacyStatement) -> str:
    """Say how far the number alone carries.

    Source: Ponomareva et al. 2023, "How to DP-fy ML": up to 1 strong, up to 10 reasonable.
    """
    if statement.epsilon <= _STRONG:
        return "strong: up to 1"
    if statement.epsilon <= _MODERATE:
        return "moderate: between 1 and 10, to be read beside the attacks"
    return "weak: above 10, the number alone protects little"


def _often(share: float) -> str:
    """Write how often, rounded up, without ever saying that something uncertain is sure."""
    rounded = math.ceil(share * 10_000) / 100
    if rounded < 100:
        return f"{rounded:g}\N{NO-BREAK SPACE}% of the time"
    missed = math.floor(1 / (1 - share)) if share < 1 else 0
    return f"every time but one in {count(missed)}" if 0 < missed < 10**9 else "every time"


def held_out_words(data: DataRelease) -> str:
    """Say how many of the public rows were private ones before, as the end of a sentence about them."""
    return f", {count(data.held_out)} of them taken from the owners' rows" if data.held_out else ""
