"""Which choices go together: every pair of options has a position, and every refusal gives a reason."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest

from ffm_secure.config import compatibility, tables
from ffm_secure.config import run_file as config
from ffm_secure.errors import PlanRefused
from tests.config.test_config import table

OPTIONS = [(axis, value) for axis, values in compatibility.REVIEWED.items() for value in values]
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if pair[0][0] != pair[1][0]]


def _choices(kind: type, field: str) -> tuple[str, ...]:
    found = {item.name: item for item in dataclasses.fields(kind)}[field].metadata["choices"]
    return typing.cast(tuple[str, ...], found)


@pytest.mark.parametrize(
    ("axis", "kind", "field"),
    [
        ("task", config.Task, "kind"),
        ("trainable", config.TrainableSpec, "kind"),
        ("lifecycle", config.Lifecycle, "kind"),
        ("start", config.Lifecycle, "start"),
        ("finish", config.Lifecycle, "finish"),
        ("controller", config.Controller, "kind"),
        ("cost", config.Controller, "cost"),
        ("optimizer", config.Lifecycle, "optimizer"),
        ("strategy", config.Strategy, "kind"),
        ("weighting", config.Federation, "weighting"),
        ("unit", config.Privacy, "unit"),
        ("clipping", config.Privacy, "clipping"),
        ("noise", config.Privacy, "noise"),
        ("noise_shares", config.Privacy, "noise_shares"),
        ("correlation", config.Privacy, "correlation"),
        ("protection", config.Protection, "kind"),
        ("evaluation", tables.Evaluation, "rows"),
        ("personal", config.Personal, "kind"),
        ("compression", tables.Compression, "kind"),
    ],
)
def test_every_option_of_the_run_file_was_reviewed(axis: str, kind: type, field: str) -> None:
    assert set(compatibility.REVIEWED[axis]) == set(_choices(kind, field))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda pair: "-".join(pair))
def test_every_pair_has_a_position(first: tuple[str, str], second: tuple[str, str]) -> None:
    reason = compatibility.position(first, second)
    assert reason == compatibility.position(second, first)
    assert reason == "" or len(reason) > 20


def test_refusals_name_reviewed_options() -> None:
    for (axis_a, axis_b), pairs in compatibility.REFUSED.items():
        for value_a, value_b in pairs:
            assert value_a in compatibility.REVIEWED[axis_a]
            assert value_b in compatibility.REVIEWED[axis_b]


def test_a_new_option_must_take_a_position() -> None:
    with pytest.raises(KeyError, match="has taken no position"):
        compatibility.position(("unit", "household"), ("protection", "secagg"))


def refused(**sections: dict[str, object]) -> str:
    changed = table()
    for section, values in sections.items():
        changed[section] |= values
    with pytest.raises(PlanRefused) as caught:
        compatibility.check(config.from_table(changed))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"federation": {"weighting": "examples"}}, "public constant"),
        ({"privacy": {"unit": "client"}}, "whole only in the secure sum"),
        ({"privacy": {"unit": "client"}, "protection": {"kind": "ckks"}}, "exact discrete noise"),
        ({"federation": {"cohort": 2}, "protection": {"kind": "secagg"}}, "must be at least 3"),
        ({"protection": {"kind": "secagg", "threshold": 2}}, "raise threshold"),
        (
            {"privacy": {"unit": "client", "delta": 0.5}, "protection": {"kind": "secagg"}},
            "give away one whole client",
        ),
        (
            {"privacy": {"unit": "client", "clipping": "per_layer"}, "protection": {"kind": "secagg"}},
            "clips single records",
        ),
    ],
)
def test_unsound_combinations_are_refused(sections: dict[str, dict[str, object]], words: str) -> None:
    assert words in refused(**sections)


def test_all_reasons_come_at_once() -> None:
    text = refused(
        federation={"weighting": "examples"},
        privacy={"unit": "client", "clipping": "automatic"},
        protection={"kind": "ckks"},
    )
    assert text.count("\n") >= 3


@pytest.mark.parametrize(
    ("cohort", "colluding", "mode", "needed"),
    [
        (10, 1, "active", 6),
        (10, 3, "active", 7),
        (5, 1, "active", 3),
        (3, 1, "active", 2),
        (4, 1, "active", 3),
        (10, 3, "semi_honest", 4),
    ],
)
def test_shares_needed_match_the_table(cohort: int, colluding: int, mode: str, needed: int) -> None:
    changed = table()
    changed["task"]["clients"], changed["federation"]["cohort"] = cohort, cohort
    changed["protection"] = {"kind": "secagg", "colluding": colluding, "mode": mode}
    assert compatibility.shamir_threshold(config.from_table(changed)) == needed


SHARED = {"privacy": {"noise_shares": "sum"}, "protection": {"kind": "secagg"}}


def test_noise_in_shares_goes_with_masks_and_encryption_and_one_plain_step() -> None:
    for kind in ("secagg", "bfv"):
        changed = table()
        changed["privacy"] |= {"noise_shares": "sum"}
        changed["protection"] = {"kind": kind}
        allowed = config.from_table(changed)
        compatibility.check(allowed)
        assert allowed.privacy.noise_shares == "sum"


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("protection", {"kind": "none"}, "only a secure sum"),
        ("protection", {"kind": "ckks"}, "exact discrete noise"),
        ("privacy", {"unit": "client"}, "in shares already"),
        ("lifecycle", {"local_steps": 2}, "a second step"),
        ("lifecycle", {"local_steps": 0, "local_epochs": 1}, "must be 1"),
        ("lifecycle", {"optimizer": "adam"}, "no noise before it is opened"),
        ("lifecycle", {"momentum": 0.5}, "momentum = 0.5"),
        ("lifecycle", {"weight_decay": 0.1}, "weight_decay = 0.1"),
        ("lifecycle", {"proximal": 0.1}, "set proximal to 0"),
        ("federation", {"strategy": {"kind": "ffa"}}, "no sums of bounded gradients"),
        ("protection", {"kind": "secagg", "threshold": 3, "colluding": 3}, "leaves no honest noise"),
    ],
)
def test_what_would_leave_a_record_without_a_bound_or_without_noise_is_refused(
    section: str, values: dict[str, object], words: str
) -> None:
    changed = {name: dict(given) for name, given in SHARED.items()}
    if section == "lifecycle":
        lifecycle = {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1}
        changed["federation"] = {"lifecycle": {**lifecycle, **values}}
    else:
        changed[section] = {**changed.get(section, {}), **values}
    assert words in refused(**changed)


def test_without_a_unit_there_is_no_noise_to_share() -> None:
    changed = table()
    changed["privacy"] = {"unit": "none", "reason": "public", "noise_shares": "sum"}
    changed["protection"] = {"kind": "secagg"}
    with pytest.raises(PlanRefused, match="no noise to share"):
        compatibility.check(config.from_table(changed))


BANDED = {
    "task": {"clients": 4},
    "federation": {"cohort": 4},
    "privacy": {"unit": "client", "delta": 1e-3, "correlation": "banded", "separation": 2},
    "protection": {"kind": "secagg", "threshold": 4},
}


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("privacy", {"unit": "record"}, "a record joins by chance"),
        ("privacy", {"separation": 0}, "from 2 to task.clients"),
        ("privacy", {"separation": 5}, "from 2 to task.clients"),
        ("privacy", {"correlation": "none"}, "belongs to correlation = 'banded'"),
        ("task", {"clients": 5}, "all are in every round"),
        ("protection", {"threshold": 3}, "lacks noise that others rely on"),
        ("federation", {"dropout": {"rate": 0.1, "stages": ["upload"]}}, "stays closed"),
        ("federation", {"strategy": {"kind": "ffa"}}, "belongs to other"),
    ],
)
def test_noise_with_a_memory_that_would_not_be_whole_is_refused(
    section: str, values: dict[str, object], words: str
) -> None:
    changed = {name: dict(given) for name, given in BANDED.items()}
    changed[section] = {**changed[section], **values}
    assert words in refused(**changed)
