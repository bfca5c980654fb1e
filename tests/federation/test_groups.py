"""Secure sums over random groups: one sum a group, bit for bit the same under every protection, and what they
refuse.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from defenses.errors import ProtocolError
from defenses.secagg import ring
from defenses.secagg.masks import RingVector
from ffm_secure.aggregation import aggregate_of
from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size, groups_of
from ffm_secure.config.run_file import RunConfig
from ffm_secure.engines import simulation
from ffm_secure.engines.summary import describe
from ffm_secure.errors import ConfigError, PlanRefused
from ffm_secure.federation import TrainingResult
from ffm_secure.records import RoundPlan, RoundSum
from ffm_secure.server.rounds import added
from tests.federation.helpers import CLIENT, RECORD, finish, first_plan, make, prepared, train
from ffm_secure.protection.encrypted import value_bound
from ffm_secure.transport.courier import Courier, Lost, Reply
from ffm_secure.transport.stages import PLAN
from tests.federation.test_dishonest_site import LIAR, LyingTrainer, everything

LIFECYCLE = {"kind": "finetune", "local_steps": 1, "batch_size": 4, "learning_rate": 0.1}
SIX = {"rounds": 2, "cohort": 6}
MASKS = {"kind": "secagg", "threshold": 3, "groups": 2}


def six(**sections: Any) -> RunConfig:
    """Return a run of six sites in two groups of three."""
    federation = {**SIX, "lifecycle": LIFECYCLE, **sections.pop("federation", {})}
    return make(task={"clients": 6}, federation=federation, **{"protection": MASKS, **sections})


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[simulation.Simulation, TrainingResult]:
    """Run once with masks over two groups, for all tests that only look at it."""
    made = six(
        federation={"strategy": {"kind": "root_trust", "root_examples": 30}}, audit={"observers": ["server"]}
    )
    return train(made, tmp_path_factory.mktemp("groups"))


def test_every_protection_opens_the_same_group_sums(
    masked: tuple[simulation.Simulation, TrainingResult], tmp_path: Path
) -> None:
    """The state after two rounds is equal bit for bit, so every group's sum was."""
    _, expected = masked
    kinds = ["none"]
    if importlib.util.find_spec("tenseal") is not None:
        kinds.append("bfv")
    for kind in kinds:
        made = six(
            federation={"strategy": {"kind": "root_trust", "root_examples": 30}},
            protection={"kind": kind, "threshold": 3, "groups": 2},
        )
        _, trained = train(made, tmp_path / kind)
        assert torch.equal(trained.state.vector, expected.state.vector), kind
        assert [record.groups for record in trained.records] == [item.groups for item in expected.records]


def test_a_round_names_its_groups_and_the_next_has_others(
    masked: tuple[simulation.Simulation, TrainingResult],
) -> None:
    _, trained = masked
    first, second = (record.groups for record in trained.records)
    assert sorted(site for group in first for site in group) == list(range(6))
    assert first != second
    assert {len(group) for group in first} == {3}
    assert trained.records[0].survivors == tuple(range(6)), "over everybody"


def test_what_the_server_saw_is_kept_group_by_group(
    masked: tuple[simulation.Simulation, TrainingResult],
) -> None:
    ready, _ = masked
    folder = ready.server.transcript.store.folder  # type: ignore[union-attr]
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"round-00000{round}-server-group-0000{group}" for round in (1, 2) for group in (0, 1)]


def test_groups_are_a_function_of_the_public_seed() -> None:
    made = six()
    cohort = tuple(range(6))
    assert groups_of(made, cohort, query="learn", turn=0) == groups_of(made, cohort, query="learn", turn=0)
    drawn = {groups_of(made, cohort, query="learn", turn=turn) for turn in range(40)}
    assert len(drawn) > 5
    other = dataclasses.replace(made, seed=made.seed + 1)
    assert any(
        groups_of(made, cohort, query="learn", turn=turn)
        != groups_of(other, cohort, query="learn", turn=turn)
        for turn in range(5)
    )


def test_every_pair_meets_equally_often() -> None:
    """Two sites share a group of three of six with chance 2/5; 600 turns leave 0.4 within 0.08."""
    made, together = six(), np.zeros((6, 6))
    for turn in range(600):
        for group in groups_of(made, tuple(range(6)), query="learn", turn=turn):
            for site in group:
                together[site, list(group)] += 1
    off_diagonal = together[~np.eye(6, dtype=bool)] / 600
    assert off_diagonal.min() > 0.32
    assert off_diagonal.max() < 0.48


def test_a_server_that_groups_otherwise_opens_nothing(tmp_path: Path) -> None:
    """A site computes its own group; sessions about another are refused."""
    ready = simulation.build(prepared(six(federation={"rounds": 1})), tmp_path)
    true = ready.spec.groups_of(first_plan(ready))
    swapped = ((*true[0][:2], true[1][2]), (*true[1][:2], true[0][2]))
    side = ready.server.protection
    honest = side.open_groups
    side.open_groups = lambda plan, groups: honest(plan, swapped)  # type: ignore[method-assign]
    trained = finish(ready, tmp_path)
    assert all("0 of at least" in record.aborted for record in trained.records)


OVERSIZED = [
    pytest.param("secagg", RECORD, id="secagg-record"),
    pytest.param("none", RECORD, id="none-record", marks=pytest.mark.slow),
    pytest.param("bfv", RECORD, id="bfv-record", marks=pytest.mark.slow),
    pytest.param("secagg", CLIENT, id="secagg-client", marks=pytest.mark.slow),
    pytest.param("bfv", CLIENT, id="bfv-client", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "privacy"), OVERSIZED)
def test_an_oversized_sum_closes_its_group_alone(kind: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    """One site sends all there is room for: its group is refused, two others make the round."""
    if kind == "bfv":
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    made = make(
        task={"clients": 9},
        privacy=privacy,
        protection={"kind": kind, "threshold": 3, "groups": 3},
        federation={"rounds": 2, "cohort": 9},
    )
    ready = simulation.build(prepared(made), tmp_path)
    trainer = LyingTrainer(spec=ready.spec, trainable=ready.trainable, task=ready.task, states=ready.states)
    most = value_bound(ready.spec.codec)

    def lie(vector: RingVector, bits: int) -> RingVector:
        values = ring.signed(vector, bits)
        values[2:] = most
        return ring.from_signed(values, bits)

    trainer.lie = everything if kind != "bfv" else lie
    ready.courier.trainers.replace([trainer])
    trained = finish(ready, tmp_path)
    first, second = trained.records
    assert (first.aborted, second.aborted) == ("", "")
    assert len(first.groups) == 3
    assert len(second.groups) == 2
    assert LIAR not in second.survivors
    (reason,) = second.closed
    if kind == "none":  # the update is visible, so its sender is left out by name, and too few are left
        assert dict(second.dropped) == {LIAR: "refused"}
        assert "2 of at least 3" in reason
    else:
        assert "3 honest clients send at most" in reason
    assert bool(torch.isfinite(trained.state.vector).all())
    assert set(second.evidence) == (set() if kind == "none" else set(range(9)))


@pytest.mark.slow
def test_with_too_few_groups_left_the_round_is_given_up(tmp_path: Path) -> None:
    """Of two groups one is refused, and adding up needs two thirds of them: the model stays as it was."""
    ready = simulation.build(prepared(six(privacy=RECORD)), tmp_path)
    trainer = LyingTrainer(spec=ready.spec, trainable=ready.trainable, task=ready.task, states=ready.states)
    trainer.lie = everything
    ready.courier.trainers.replace([trainer])
    trained = finish(ready, tmp_path)
    assert trained.records[1].aborted.startswith(
        "1 of at least 2 groups were opened: the opened sum has norm"
    )
    assert trained.records[1].loss == trained.records[0].loss


class Declining:
    """A courier on which one site says no to every plan."""

    def __init__(self, inner: Courier, site: int) -> None:
        self.inner, self.site = inner, site
        self.asked: dict[str, set[int]] = {}

    def send(self, stage: str, messages: Mapping[int, bytes]) -> Iterator[Reply]:
        """Pass everything on but the plan of one site."""
        self.asked.setdefault(stage, set()).update(messages)
        left = {site: message for site, message in messages.items() if (stage, site) != (PLAN, self.site)}
        if len(left) < len(messages):
            yield Reply(site=self.site, content=Lost(stage=stage))
        yield from self.inner.send(stage, left)

    def seconds_at_sites(self) -> float:
        """Return what the inner courier says."""
        return self.inner.seconds_at_sites()

    def close(self) -> None:
        """Hold nothing open."""


def test_who_shares_a_group_with_a_site_that_declines_pays_nothing(tmp_path: Path) -> None:
    made = make(
        task={"clients": 9},
        privacy=RECORD,
        protection={**MASKS, "groups": 3},
        federation={"rounds": 1, "cohort": 9},
    )
    ready = simulation.build(prepared(made), tmp_path)
    (group,) = (part for part in ready.spec.groups_of(first_plan(ready)) if 0 in part)
    courier = Declining(ready.courier, 0)
    trained = finish(ready, tmp_path, courier=courier)
    (record,) = trained.records
    assert not record.aborted
    assert len(record.groups) == 2
    assert dict(record.dropped) == {site: "absent" if site == 0 else "not asked" for site in group}
    assert courier.asked["begin"] == set(range(9)) - set(group)
    assert [site.ledger.epsilon() > 0 for site in ready.sites] == [site not in group for site in range(9)]
    assert all(site.ledger.missing(trained.records, ready.server.run_id) == () for site in ready.sites)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protection": {"kind": "secagg", "groups": 3}}, "hides nobody"),
        ({"protection": {**MASKS, "colluding": 2}}, "2 of them honest"),
        ({"federation": {"strategy": {"kind": "geometric_median"}}}, "needs at least 3 groups"),
        (
            {"federation": {"strategy": {"kind": "krum"}}, "protection": {"kind": "none", "groups": 3}},
            "at least 5",
        ),
        (
            {
                "federation": {"strategy": {"kind": "bulyan", "attackers": 1}},
                "protection": {"kind": "none", "groups": 6},
            },
            "at least 7 groups",
        ),
        (
            {"federation": {"strategy": {"kind": "krum"}}, "protection": {"kind": "secagg", "threshold": 4}},
            "one sum is nothing to compare",
        ),
        (
            {"federation": {"strategy": {"kind": "root_trust"}, "weighting": "examples"}},
            "a client says itself how much it counts",
        ),
    ],
)
def test_what_cannot_hold_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanRefused) as caught:
        compatibility.check(six(**changes))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("protection", "words"),
    [({**MASKS, "groups": 4}, "must divide"), ({**MASKS, "threshold": 4}, "the size of a group, 3")],
)
def test_numbers_that_do_not_fit_are_named(protection: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        six(protection=protection)
    assert words in str(caught.value)


@pytest.mark.parametrize("privacy", [CLIENT, {**RECORD, "noise_shares": "sum"}], ids=["client", "shared"])
def test_every_groups_sum_carries_the_whole_noise(privacy: dict[str, Any]) -> None:
    """A share counts on the honest members of one group, not on those of the cohort."""
    lifecycle = {"kind": "finetune", "local_steps": 1, "batch_size": 8, "learning_rate": 0.1}
    federation = {"lifecycle": lifecycle}
    grouped = prepared(six(privacy=privacy, federation=federation)).spec.mechanism
    whole = prepared(
        six(privacy=privacy, federation=federation, protection={"kind": "secagg", "threshold": 6})
    ).spec.mechanism
    noise = grouped.client_level or grouped.sum_level
    other = whole.client_level or whole.sum_level
    assert noise is not None
    assert other is not None
    assert (noise.inner.honest_survivors, other.inner.honest_survivors) == (2, 5)
    assert noise.event("x") == other.event("x"), "one owner is in one group, so a round costs what it did"
    ratio = noise.share_deviation / other.share_deviation
    assert ratio == pytest.approx(math.sqrt(5 / 2), rel=1e-3)


def test_site_noise_is_as_large_with_groups_as_without() -> None:
    grouped, whole = (
        prepared(six(privacy=RECORD, protection=protection)).spec.mechanism
        for protection in (MASKS, {"kind": "secagg", "threshold": 4})
    )
    assert grouped.digest() == whole.digest()


def test_the_mean_over_groups_is_the_mean_over_everybody() -> None:
    """For every way to divide: the sum of sums over the sum of divisors."""
    generator = np.random.default_rng(1)
    sums = [
        RoundSum(
            round=1,
            survivors=tuple(sites),
            values=generator.normal(size=5),
            loss_sum=None,
            weight_sum=float(len(sites)),
        )
        for sites in ((0, 1, 2), (3, 4))
    ]
    for made, divisor in ((six(), 5.0), (six(privacy=CLIENT), 6.0)):
        mean = aggregate_of(made, sums).mean.numpy()
        assert mean == pytest.approx((sums[0].values + sums[1].values) / divisor)
    whole = added(sums)
    assert whole.survivors == (0, 1, 2, 3, 4)
    assert whole.weight_sum == 5.0


def test_the_plan_says_what_groups_reveal_and_cost() -> None:
    shown = describe(prepared(six(privacy=CLIENT, federation={"strategy": {"kind": "root_trust"}})))
    assert "in 2 random groups of 3" in shown.headline
    assert shown.reveals["server"].startswith("2 sums a round, each of at least 3 clients")
    assert any("1.4 x" in warning for warning in shown.warnings)
    assert "of 3 clients" in shown.breaks
    assert group_size(six()) == 3


def test_a_site_outside_every_group_has_no_part() -> None:
    spec = prepared(six()).spec
    plan = RoundPlan(run_id=bytes(16), round=1, cohort=spec.schedule[0], fingerprint="aa" * 32, mechanism="")
    assert 4 in spec.own_part(plan, 4).cohort
    assert len(spec.own_part(plan, 4).cohort) == 3
    with pytest.raises(ProtocolError):
        spec.own_part(plan, 9)
