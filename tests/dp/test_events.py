"""Events: frozen, exact in JSON, and nothing unknown gets through."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.dp.events import (
    Event,
    GaussianEvent,
    MatrixFactorizationEvent,
    NonPrivateEvent,
    SkellamEvent,
    TuningEvent,
    from_dict,
    from_json,
    price_of,
    statement_of,
)
from defenses.errors import ParameterError

GAUSSIAN: dict[str, Any] = {
    "unit": "record",
    "adjacency": "add_remove",
    "sampling": "poisson",
    "sampling_rate": 0.01,
    "noise_multiplier": 1.0,
    "steps": 10,
    "clip_norm": 0.5,
    "release": "round 3",
}


def examples() -> list[Event]:
    gaussian = GaussianEvent(**GAUSSIAN)
    return [
        gaussian,
        NonPrivateEvent(reason="baseline"),
        SkellamEvent(
            unit="client",
            adjacency="zero_out",
            l1_sensitivity=900.0,
            l2_sensitivity=30.0,
            variance=1e4,
            scale=32.0,
            steps=5,
            release="sum",
        ),
        MatrixFactorizationEvent(
            unit="client",
            adjacency="zero_out",
            noise_multiplier=3.0,
            sensitivity=2.0,
            bands=4,
            min_separation=5,
            participations=3,
            steps=15,
            clip_norm=1.0,
            release="run",
        ),
        TuningEvent(base=(gaussian, gaussian), distribution="poisson", stopping=10.0, release="best of many"),
    ]


@pytest.mark.parametrize("event", examples(), ids=lambda event: event.kind)
def test_json_round_trip_is_exact(event: Event) -> None:
    assert from_json(event.to_json()) == event
    assert from_json(event.to_json()).digest() == event.digest()
    assert json.loads(event.to_json())["version"] == 1


@given(
    rate=st.floats(1e-12, 1.0, exclude_min=True),
    noise=st.floats(1e-3, 1e6),
    steps=st.integers(1, 10**9),
    label=st.text(min_size=1).filter(lambda text: text.strip() != ""),
)
@settings(max_examples=60, deadline=None)
def test_every_gaussian_survives_json(rate: float, noise: float, steps: int, label: str) -> None:
    values = {**GAUSSIAN, "sampling_rate": rate, "noise_multiplier": noise, "steps": steps, "release": label}
    event = GaussianEvent(**values)
    assert from_json(event.to_json()) == event


def test_equal_events_have_one_text() -> None:
    assert (
        GaussianEvent(**{**GAUSSIAN, "noise_multiplier": 1}).to_json() == GaussianEvent(**GAUSSIAN).to_json()
    )


def test_events_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GaussianEvent(**GAUSSIAN).steps = 1


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "household"},
        {"adjacency": "substitute_two"},
        {"sampling": "shuffle"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"sampling_rate": float("nan")},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"steps": 0},
        {"steps": 2.0},
        {"steps": True},
        {"release": " "},
        {"records_per_person": 2},
        {"sampling": "full"},
        {"sampling": "fixed_size"},
    ],
)
def test_what_cannot_be_priced_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        GaussianEvent(**{**GAUSSIAN, **change})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ParameterError, match=r"(?s)unit.*sampling.*steps"):
        GaussianEvent(**{**GAUSSIAN, "unit": "x", "sampling": "y", "steps": -1})


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"version": None}, {"kind": "laplace"}, {"kind": None}, {"extra": 1}, {"steps": None}],
)
def test_unknown_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        from_dict({**GaussianEvent(**GAUSSIAN).to_dict(), **change})


def test_missing_fields_and_broken_text_are_refused() -> None:
    values = GaussianEvent(**GAUSSIAN).to_dict()
    del values["clip_norm"]
    with pytest.raises(ParameterError, match="clip_norm"):
        from_dict(values)
    for text in ("", "[]", "3", "{"):
        with pytest.raises(ParameterError):
            from_json(text)


def test_matrix_bands_may_not_exceed_the_separation() -> None:
    values = {field.name: getattr(examples()[3], field.name) for field in dataclasses.fields(examples()[3])}
    with pytest.raises(ParameterError, match="overlap"):
        MatrixFactorizationEvent(**{**values, "bands": 6})


def test_labels_do_not_change_the_price() -> None:
    one, other = GaussianEvent(**GAUSSIAN), GaussianEvent(**{**GAUSSIAN, "release": "x", "clip_norm": 9.0})
    assert price_of(one) == price_of(other)
    assert price_of(one) != price_of(GaussianEvent(**{**GAUSSIAN, "steps": 11}))


def test_statement_of_mixed_candidates_is_refused() -> None:
    gaussian = GaussianEvent(**GAUSSIAN)
    client = GaussianEvent(**{**GAUSSIAN, "unit": "client"})
    with pytest.raises(ParameterError):
        statement_of(TuningEvent(base=(gaussian, client), distribution="poisson", stopping=2.0, release="x"))
    assert statement_of(NonPrivateEvent(reason="x")) is None
