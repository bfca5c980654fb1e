"""What is said of an epsilon in plain words is true, and never says more than the epsilon does."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffm_secure.quantities import bound, figure, metric, size
from ffm_secure.report.plain_words import COIN_SURVEY, best_guess, comparison, meaning, strength

from .samples import statement


def survey_epsilon(turned: float) -> float:
    """Return the epsilon of a yes-or-no survey in which that share of answers is turned round."""
    return math.log((1 - turned) / turned)


@settings(deadline=None)
@given(epsilon=st.floats(0.01, 30), delta=st.floats(0, 0.1))
def test_no_test_between_two_neighbours_is_right_more_often_than_said(epsilon: float, delta: float) -> None:
    # The mechanism that (epsilon, delta) allows at worst: with probability delta all is told, else a survey.
    lies = (1 - delta) / (1 + math.exp(epsilon))
    right = delta + (1 - delta) * (1 - 1 / (1 + math.exp(epsilon)))
    assert lies + right == pytest.approx(1)
    said = best_guess(statement(epsilon=epsilon, delta=delta))
    assert said >= right - 1e-12
    assert said <= right + 1e-9


@settings(deadline=None)
@given(epsilon=st.floats(0.01, 25))
def test_the_survey_said_to_be_as_secret_is_no_more_secret_than_the_run(epsilon: float) -> None:
    words = comparison(statement(epsilon=epsilon))
    if match := re.search(r"one yes-or-no answer in ([\d,]+) is", words):
        turned = 1 / int(match[1].replace(",", ""))
    elif match := re.search(r"(\d+) of 100 yes-or-no", words):
        turned = int(match[1]) / 100
    else:
        assert math.isclose(epsilon, COIN_SURVEY, rel_tol=0.01)
        return
    assert survey_epsilon(turned) >= epsilon - 1e-9
    assert survey_epsilon(turned) <= epsilon * 1.3 + 0.05


def test_the_coin_survey_has_the_epsilon_that_is_said() -> None:
    # Half answer truly; the others by a second coin: three of four answers are true.
    assert survey_epsilon(0.25) == pytest.approx(COIN_SURVEY)
    assert "epsilon 1.1)" in comparison(statement(epsilon=8.0))


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (0.5, "at most 62.25 % of the time"),
        (8.0, "at most 99.97 % of the time"),
        (12.0, "every time but one in"),
    ],
)
def test_meaning_says_how_often(epsilon: float, words: str) -> None:
    assert words in meaning(statement(epsilon=epsilon, delta=1e-5)).replace("\N{NO-BREAK SPACE}", " ")


def test_nothing_uncertain_is_said_to_be_sure_and_what_is_sure_is() -> None:
    assert "every time after" in meaning(statement(epsilon=800.0))
    assert "100" not in meaning(statement(epsilon=15.0)).split("A survey")[0]


def test_the_unit_is_named() -> None:
    assert "one data owner with all rows" in meaning(statement(unit="client"))
    assert "one person with 4 records" in meaning(statement(unit="person with 4 records"))


def test_strength_follows_the_tiers() -> None:
    tiers = [strength(statement(epsilon=value)).split(":")[0] for value in (0.9, 1.0, 1.01, 10.0, 10.01)]
    assert tiers == ["strong", "strong", "moderate", "moderate", "weak"]


def test_one_number_is_written_one_way() -> None:
    assert metric(0.42) == "0.4200"
    assert metric(0.0875) == "0.0875"
    assert metric(402.9) == figure(402.9) == "402.9"
    assert (bound(7.9904), bound(7.9904, upper=False)) == ("7.991", "7.99")
    assert size(122_142) == "122 kB"
