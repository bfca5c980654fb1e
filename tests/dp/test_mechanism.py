"""The mechanism's sampler, bound, noise and event are one thing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from defenses.dp.clip import Clipping
from defenses.dp.events import GaussianEvent, NonPrivateEvent, SkellamEvent
from defenses.dp.mechanism import ClientMechanism, RecordMechanism
from defenses.dp.mechanism_digest import digest_of
from defenses.dp.per_sample import ClippedSum, PerSampleEngine
from defenses.errors import BudgetExceeded, NotPrivateError, ParameterError
from defenses.random_source import RandomSource


def record(**changes: object) -> RecordMechanism:
    values: dict[str, object] = {
        "sampling_rate": 0.1,
        "noise_multiplier": 1.2,
        "clip_norm": 0.5,
        "expected_batch_size": 20,
        "steps": 3,
    }
    return RecordMechanism(**(values | changes))


def zeros(clip: Clipping, *, size: int = 200_000, batch_size: int = 0, within: int = 0) -> ClippedSum:
    return ClippedSum(gradients={"w": torch.zeros(size)}, batch_size=batch_size, clip=clip, within=within)


def test_the_event_is_made_of_the_fields_that_run() -> None:
    event = record(records_per_person=3, adjacency="zero_out").event("update")
    assert event == GaussianEvent(
        unit="person", records_per_person=3, adjacency="zero_out", sampling="poisson", sampling_rate=0.1,
        noise_multiplier=1.2, steps=3, clip_norm=0.5, release="update",
    )  # fmt: skip
    assert record(noise_multiplier=0.0).event("update") == NonPrivateEvent(
        reason="update: noise_multiplier is 0"
    )


def test_noise_has_the_scale_of_the_event_over_the_public_divisor() -> None:
    mechanism = record()
    released = mechanism.privatise(zeros(mechanism.bound), RandomSource.seeded(1))["w"].double()
    assert float(released.std()) == pytest.approx(1.2 * 0.5 / 20, rel=5 / math.sqrt(2 * 200_000))
    assert abs(float(released.mean())) < 5 * 0.03 / math.sqrt(200_000)


def test_the_divisor_does_not_follow_the_batch() -> None:
    mechanism = record(noise_multiplier=0.0)
    total = {"w": torch.full((3,), 10.0)}
    for realised in (1, 7, 400):
        found = mechanism.privatise(
            ClippedSum(gradients=total, batch_size=realised, clip=mechanism.bound), RandomSource.seeded(1)
        )
        assert torch.equal(found["w"], torch.full((3,), 0.5))


def test_a_run_alternates_sampling_and_release_and_stops_at_its_steps() -> None:
    mechanism, source = record(), RandomSource.seeded(2)
    run = mechanism.start()
    assert run.event("update") is None
    with pytest.raises(NotPrivateError, match="before sample"):
        run.privatise(zeros(run.bound, size=1), source)
    for step in range(3):
        run.sample(100, source)
        with pytest.raises(ParameterError, match="never privatised"):
            run.sample(100, source)
        event = run.event("update")
        assert isinstance(event, GaussianEvent)
        assert event.steps == run.steps_taken == step + 1
        run.privatise(zeros(run.bound, size=1), source)
    assert run.event("update") == mechanism.event("update")
    with pytest.raises(BudgetExceeded):
        run.sample(100, source)


def test_a_sum_with_another_bound_is_refused() -> None:
    run, source = record().start(), RandomSource.seeded(3)
    run.sample(100, source)
    with pytest.raises(NotPrivateError, match=r"clipped as flat at 0\.6"):
        run.privatise(zeros(Clipping(clip_norm=0.6), size=1), source)
    with pytest.raises(NotPrivateError, match="automatic"):
        run.privatise(zeros(Clipping(kind="automatic", clip_norm=0.5), size=1), source)


def test_every_field_that_decides_epsilon_changes_the_digest() -> None:
    base = record()
    changes: dict[str, object] = {
        "sampling_rate": 0.2,
        "noise_multiplier": 1.3,
        "clip_norm": 0.6,
        "expected_batch_size": 21,
        "steps": 4,
        "records_per_person": 2,
        "adjacency": "zero_out",
        "clipping": "per_layer",
        "quantile": 0.4,
        "clip_learning_rate": 0.1,
        "count_noise": 1.0,
    }
    digests = {record(**{name: value}).digest() for name, value in changes.items()} | {base.digest()}
    digests.add(record(sampling="full", sampling_rate=1.0).digest())
    assert len(digests) == len(changes) + 2
    assert set(changes) | {"sampling"} == {field.name for field in dataclasses.fields(RecordMechanism)}
    assert base.digest() == record().digest()


def test_sampling_kinds() -> None:
    source = RandomSource.seeded(4)
    assert np.array_equal(record(sampling="full", sampling_rate=1.0).sample(9, source), np.arange(9))
    fixed = record(sampling="fixed_size", adjacency="replace_one")
    assert [len(fixed.sample(100, source)) for _ in range(5)] == [10] * 5
    sizes = [len(record().sample(1000, source)) for _ in range(200)]
    assert np.mean(sizes) == pytest.approx(100, abs=5 * math.sqrt(90 / 200))
    assert len(set(sizes)) > 10
    with pytest.raises(ParameterError, match="fixed-size"):
        record(sampling="fixed_size")


def test_an_adaptive_run_follows_the_quantile_at_the_stated_cost() -> None:
    mechanism = record(
        clipping="adaptive", count_noise=2.0, clip_norm=0.1, steps=300, expected_batch_size=100
    )
    run, source = mechanism.start(), RandomSource.seeded(5)
    norms = torch.linspace(0.0, 4.0, 100)
    spread = []
    for _ in range(300):
        run.sample(1000, source)
        within = int((norms <= run.bound.clip_norm).sum())
        before = run.bound.clip_norm
        released = run.privatise(zeros(run.bound, size=2000, batch_size=100, within=within), source)["w"]
        spread.append(float(released.double().std()) * 100 / before)
    assert run.bound.clip_norm == pytest.approx(2.0, rel=0.1)
    # the gradient's own multiplier is larger than the stated one; together with the count they make it
    own = float(np.mean(spread))
    assert own == pytest.approx(mechanism.gradient_noise_multiplier(), rel=0.01)
    assert own**-2 + (2 * 2.0) ** -2 == pytest.approx(1.2**-2, rel=0.02)
    event = run.event("update")
    assert isinstance(event, GaussianEvent)
    assert event.noise_multiplier == 1.2


def test_one_dp_sgd_run_end_to_end_learns_and_handles_empty_batches() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    y = (x @ torch.randn(5) > 0).long()
    model = nn.Linear(5, 2)
    mechanism = record(
        sampling_rate=0.2, expected_batch_size=60, clip_norm=1.0, steps=40, noise_multiplier=0.8
    )
    run, source = mechanism.start(), RandomSource.seeded(6)
    with PerSampleEngine(model) as engine:
        for _ in range(40):
            batch = torch.from_numpy(run.sample(300, source))
            total = engine.empty(run.bound)
            for part in batch.split(16):
                total = total + engine.clipped_sum(
                    lambda part=part: nn.functional.cross_entropy(model(x[part]), y[part], reduction="none"),
                    clip=run.bound,
                )
            with torch.no_grad():
                for name, step in run.privatise(total, source).items():
                    model.get_parameter(name).sub_(step)
    assert float((model(x).argmax(1) == y).double().mean()) > 0.9


def client(**changes: object) -> ClientMechanism:
    values: dict[str, object] = {
        "noise_multiplier": 0.8,
        "clip_norm": 2.0,
        "honest_survivors": 4,
        "participations": 5,
    }
    return ClientMechanism(**(values | changes))


def test_float_shares_of_the_honest_survivors_make_the_stated_noise() -> None:
    mechanism = client()
    source = RandomSource.seeded(7)
    total = sum(mechanism.add_share(torch.zeros(100_000), source).double() for _ in range(4))
    assert isinstance(total, torch.Tensor)
    assert float(total.std()) == pytest.approx(0.8 * 2.0, rel=5 / math.sqrt(2e5))
    event = mechanism.event("sum")
    assert isinstance(event, GaussianEvent)
    assert (event.unit, event.sampling, event.steps, event.noise_multiplier) == ("client", "full", 5, 0.8)


def test_integer_shares_of_the_honest_survivors_make_the_variance_of_the_event() -> None:
    mechanism, source, dimension, scale = client(), RandomSource.seeded(8), 50_000, 1000.0
    event = mechanism.integer_event("sum", scale=scale, dimension=dimension)
    assert isinstance(event, SkellamEvent)
    total = sum(mechanism.integer_share(torch.zeros(dimension), scale=scale, source=source) for _ in range(4))
    assert isinstance(total, np.ndarray)
    assert total.dtype == np.int64
    assert total.var() == pytest.approx(event.variance, rel=5 * math.sqrt(2 / dimension))
    assert math.sqrt(event.variance) == pytest.approx(0.8 * event.l2_sensitivity)


@pytest.mark.parametrize("scale", [0.5, 3.0, 1e4])
@pytest.mark.parametrize("size", [0.1, 1.0, 1e6])
def test_a_rounded_update_stays_within_the_sensitivity_of_the_event(scale: float, size: float) -> None:
    mechanism = client(noise_multiplier=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        update = size * torch.randn(64, generator=draw)
        rounded = mechanism.integer_share(update, scale=scale, source=RandomSource.system())
        assert np.linalg.norm(rounded.astype(np.float64)) <= mechanism.integer_sensitivity(
            scale=scale, dimension=64
        )
    many = [
        mechanism.integer_share(torch.full((64,), 0.013), scale=scale, source=RandomSource.system())
        for _ in range(400)
    ]
    assert np.mean(many) == pytest.approx(0.013 * scale, abs=5 * 0.5 / math.sqrt(64 * 400))


def test_replacing_a_client_doubles_the_integer_sensitivity() -> None:
    one = client().integer_event("sum", scale=100.0, dimension=10)
    two = client(adjacency="replace_one").integer_event("sum", scale=100.0, dimension=10)
    assert isinstance(one, SkellamEvent)
    assert isinstance(two, SkellamEvent)
    assert two.l2_sensitivity == 2 * one.l2_sensitivity
    assert two.variance == one.variance


@pytest.mark.parametrize("changes", [
    {"noise_multiplier": -1.0}, {"clip_norm": 0.0}, {"honest_survivors": 0}, {"participations": 0},
])  # fmt: skip
def test_impossible_client_mechanisms_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        client(**changes)


@pytest.mark.parametrize("changes", [
    {"noise_multiplier": -1.0}, {"clip_norm": 0.0}, {"expected_batch_size": 0}, {"sampling_rate": 0.0},
    {"sampling_rate": 1.5}, {"steps": 0}, {"clipping": "adaptive"}, {"sampling": "full"},
    {"sampling": "shuffle"},
])  # fmt: skip
def test_impossible_record_mechanisms_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        record(**changes)


@pytest.mark.parametrize(("scale", "dimension"), [(5.0, 400), (20.0, 4000), (1e4, 64)])
@pytest.mark.parametrize("redraws", [math.exp(-2.0), 0.95])
def test_a_rounding_is_drawn_again_until_it_is_within_a_smaller_bound(
    scale: float, dimension: int, redraws: float
) -> None:
    """Conditional rounding: never beyond its bound, which one draw exceeds no more often than is said."""
    mechanism = client(noise_multiplier=0.0, redraws=redraws)
    bound = mechanism.integer_sensitivity(scale=scale, dimension=dimension)
    levels, root = 2.0 * scale, math.sqrt(dimension)
    room = math.sqrt(-2 * math.log(redraws)) * (levels + root / 2)
    assert bound == pytest.approx(min(levels + root, math.sqrt(levels**2 + dimension / 4 + room)))
    assert bound < client(noise_multiplier=0.0).integer_sensitivity(scale=scale, dimension=dimension)
    update = torch.full((dimension,), 2.0 / root, dtype=torch.float64)  # as long as an update may be
    source, beyond = RandomSource.seeded(3), 0
    single = client(noise_multiplier=0.0)
    for _ in range(100):
        rounded = mechanism.integer_share(update, scale=scale, source=source)
        assert np.linalg.norm(rounded.astype(np.float64)) <= bound
        once = single.integer_share(update, scale=scale, source=source)
        beyond += int(np.linalg.norm(once.astype(np.float64)) > bound)
    assert beyond <= 100 * redraws
    event = client(redraws=redraws).integer_event("sum", scale=scale, dimension=dimension)
    assert isinstance(event, SkellamEvent)
    assert event.l2_sensitivity == pytest.approx(bound)


def test_some_roundings_are_indeed_drawn_again() -> None:
    source, bound = RandomSource.seeded(4), client(redraws=0.95).integer_sensitivity(scale=5.0, dimension=400)
    update = torch.full((400,), 0.1)
    norms = []
    for _ in range(200):
        rounded = client(noise_multiplier=0.0).integer_share(update, scale=5.0, source=source)
        norms.append(float(np.linalg.norm(rounded.astype(np.float64))))
    assert 10 < sum(norm > bound for norm in norms) < 190


def test_mechanisms_without_redraws_keep_their_name() -> None:
    values = dataclasses.asdict(client())
    del values["redraws"]
    assert client().digest() == digest_of("client", values)
    assert client(redraws=0.1).digest() != client().digest()
    with pytest.raises(ParameterError, match="redraws = 1"):
        client(redraws=1.0)
