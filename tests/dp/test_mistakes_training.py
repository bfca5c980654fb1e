"""The table of mistakes, training half: each test first makes the mistake and measures it, then shows that we
cannot.

Row numbers are those of docs/mistakes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from defenses.dp.accountant import epsilon
from defenses.dp.clip import Clipping
from defenses.dp.events import GaussianEvent
from defenses.dp.mechanism import RecordMechanism
from defenses.dp.noise import add_gaussian, grid_of
from defenses.dp.per_sample import PerSampleEngine
from defenses.dp.probe import probe_sensitivity
from defenses.errors import NotPrivateError, ParameterError
from defenses.random_source import RandomSource

BOUND = Clipping(clip_norm=1.0)


def mechanism(**changes: object) -> RecordMechanism:
    values: dict[str, object] = {
        "sampling_rate": 0.02,
        "noise_multiplier": 1.0,
        "clip_norm": 1.0,
        "expected_batch_size": 10,
        "steps": 1000,
    }
    return RecordMechanism(**(values | changes))


def price(noise_multiplier: float) -> float:
    event = mechanism(noise_multiplier=noise_multiplier).event("row")
    return epsilon([event], delta=1e-5).epsilon


def linear(width: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 1, bias=False)


def dot_losses(model: nn.Module, x: Tensor) -> Callable[[Sequence[int]], Callable[[], Tensor]]:
    """A loss whose gradient for sample i is x[i] itself."""
    return lambda indices: lambda: model(x[list(indices)]).squeeze(-1)


def clipped(rows: Tensor, bound: float = 1.0) -> Tensor:
    return (rows * (bound / rows.norm(dim=1).clamp_min(bound))[:, None]).sum(0)


def test_row_3_an_empty_batch_releases_noise_and_cannot_be_skipped() -> None:
    # the mistake: no release when nobody was drawn; then a release alone proves that somebody is there
    run, source = mechanism().start(), RandomSource.seeded(1)
    skipped_with_nobody, skipped_with_one = 1.0, 1 - 0.02
    assert (
        skipped_with_nobody != skipped_with_one
    )  # an output of probability 0 against 0.02: no epsilon covers that
    with PerSampleEngine(linear()) as engine:
        while len(run.sample(1, source)):
            run.privatise(engine.empty(run.bound), source)
        with pytest.raises(ParameterError, match="never privatised"):
            run.sample(1, source)
        released = run.privatise(engine.empty(run.bound), source)
    assert float(released["weight"].abs().min()) > 0
    event = run.event("row")
    assert isinstance(event, GaussianEvent)
    assert event.steps == run.steps_taken


def test_row_4_an_empty_batch_holds_no_dummy_record() -> None:
    # the mistake: a stand-in record of norm C for an empty batch; a real record opposite to it moves the sum
    # by 2C
    dummy, real = torch.tensor([1.0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    assert float((dummy - real).norm()) == 2.0
    with PerSampleEngine(linear()) as engine:
        empty = engine.empty(BOUND)
        one = engine.clipped_sum(dot_losses(engine.model, 5 * real[None])([0]), clip=BOUND)
    assert float(empty.gradients["weight"].abs().max()) == 0.0
    assert float((one.gradients["weight"] - empty.gradients["weight"]).norm()) == pytest.approx(1.0, rel=1e-6)


def test_row_5_a_mean_loss_is_refused() -> None:
    # the mistake: clip gradients of the mean loss; the mean's divisor lets one sample move all others
    x = torch.zeros(4, 4)
    x[:, 0] = torch.tensor([3.9, 3.9, 3.9, -3.9])
    cost = float((clipped(x / 4) - clipped(x[:3] / 3, 3.9 / 3)).norm())
    assert cost > 1.9  # times C: see docs/mistakes.md for what that is in epsilon
    model = linear()
    losses_of = dot_losses(model, x)
    with PerSampleEngine(model) as engine:
        with pytest.raises(NotPrivateError, match="one loss per sample"):
            engine.clipped_sum(lambda: losses_of([0, 1, 2, 3])().mean(), clip=BOUND)
        with pytest.raises(NotPrivateError, match="the loss does"):
            probe_sensitivity(
                engine,
                lambda indices: lambda: losses_of(indices)() / len(indices),
                samples=4,
                clip_norm=1.0,
            )
        assert probe_sensitivity(engine, losses_of, samples=4, clip_norm=1.0).sensitivity <= 1 + 1e-5


def test_row_6_a_token_mean_loss_is_refused() -> None:
    # the mistake: divide every token's loss by the tokens of the whole batch
    lengths = torch.tensor([2.0, 10.0, 3.0])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * lengths[:, None]
    growth = float(lengths.sum() / (lengths.sum() - 10.0))
    assert growth == 3.0  # every other sample's gradient triples when the long one leaves
    model = linear()

    def losses_of(indices: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: dot_losses(model, x)(indices)() / lengths[list(indices)].sum()

    with PerSampleEngine(model) as engine, pytest.raises(NotPrivateError, match="the loss does"):
        probe_sensitivity(engine, losses_of, samples=3, clip_norm=1.0)


def test_row_7_a_frozen_batch_norm_in_train_mode_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 1, bias=False))
    x = torch.randn(4, 4) * torch.tensor([1.0, 1.0, 1.0, 20.0])[:, None]
    whole, rest = (model[0](part) for part in (x, x[:3]))
    assert (
        float((clipped(whole) - clipped(rest)).norm()) > 2.2
    )  # times C, with nothing trainable in the module
    with pytest.raises(NotPrivateError, match="BatchNorm1d"):
        PerSampleEngine(model)


def test_row_8_a_parameter_outside_the_covered_modules_is_refused() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sum(-1)

    model = nn.Sequential(nn.Linear(4, 4), Head())
    x = 100 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model(x).sum().backward()
    scale = model[1].get_parameter("scale")
    assert scale.grad is not None
    assert (
        float(scale.grad.norm()) > 100
    )  # what such a head would have been trained on, at any noise multiplier
    with pytest.raises(NotPrivateError, match=r"1\.scale.*Head"):
        PerSampleEngine(model)


def test_row_9_clipping_is_by_sample_and_not_by_batch() -> None:
    # the mistake: clip the batch's gradient once; one sample of weight 1e6 then decides all of it
    x = torch.zeros(8, 4)
    x[:, 0] = 1.0
    x[7, 0] = -1e6
    batch_clipped = [clipped(part.mean(0, keepdim=True)) for part in (x, x[:7])]
    assert float((batch_clipped[0] - batch_clipped[1]).norm()) == pytest.approx(2.0)
    # that is 2C on a mean whose noise was calibrated to C / 8: sixteen times the stated sensitivity
    model = linear()
    with PerSampleEngine(model) as engine:
        whole, rest = (engine.clipped_sum(dot_losses(model, x)(range(n)), clip=BOUND) for n in (8, 7))
    assert float(rest.gradients["weight"].norm()) == pytest.approx(7.0)
    assert float((whole.gradients["weight"] - rest.gradients["weight"]).norm()) == pytest.approx(1.0)


def test_row_15_an_adaptive_bound_is_accounted_with_its_count() -> None:
    stated = mechanism(clipping="adaptive", count_noise=0.6, noise_multiplier=1.0)
    adjusted = stated.gradient_noise_multiplier()
    assert price(adjusted) < 0.5 * price(1.0)  # the mistake: accounting the gradient's adjusted noise
    event = stated.event("row")
    assert isinstance(event, GaussianEvent)
    assert event.noise_multiplier == 1.0
    assert epsilon([event], delta=1e-5).epsilon == pytest.approx(price(1.0))
    with PerSampleEngine(linear()) as engine:
        released = stated.privatise(engine.empty(stated.bound), RandomSource.seeded(1))
        plain = mechanism(noise_multiplier=adjusted).privatise(engine.empty(BOUND), RandomSource.seeded(1))
    assert torch.equal(released["weight"], plain["weight"])


def test_row_16_low_precision_does_not_stretch_the_bound() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 300, generator=draw).bfloat16()
    naive = (rows * (1.0 / rows.norm(dim=1))[:, None]).double().norm(dim=1)
    assert float(naive.max()) > 1.002  # norms and factors in bfloat16
    model = nn.Linear(300, 1, bias=False).bfloat16()
    with PerSampleEngine(model) as engine:
        for i in range(16):
            own = engine.clipped_sum(lambda i=i: model(rows[i : i + 1]).squeeze(-1), clip=BOUND).gradients[
                "weight"
            ]
            assert own.dtype == torch.float64
            assert float(own.double().norm()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_17_a_non_finite_sample_vanishes(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    assert not torch.isfinite(
        clipped(x)
    ).all()  # the mistake: one sample announces itself by breaking the model
    model = linear()
    with PerSampleEngine(model) as engine:
        whole = engine.clipped_sum(dot_losses(model, x)([0, 1, 2]), clip=BOUND).gradients["weight"]
        rest = engine.clipped_sum(dot_losses(model, x)([0, 2]), clip=BOUND).gradients["weight"]
    assert torch.equal(whole, rest)


def test_row_18_noise_is_cryptographic_on_a_grid_and_replays_are_marked() -> None:
    # the mistake, part one: a general-purpose generator repeats itself from a guessable seed
    torch.manual_seed(0)
    first = torch.randn(4)
    torch.manual_seed(0)
    assert torch.equal(first, torch.randn(4))
    torch.manual_seed(0)
    ours = [add_gaussian(torch.zeros(4), std=1.0, source=RandomSource.system()) for _ in range(2)]
    torch.manual_seed(0)
    assert not torch.equal(ours[0], ours[1])
    # part two: low bits of x + noise depend on x; on the public grid they do not exist
    released = add_gaussian(torch.full((1000,), 1 / 3), std=1.0, source=RandomSource.system()).double()
    assert torch.equal(released / grid_of(1.0), (released / grid_of(1.0)).round())
    # part three: a run under a replayable source says so
    run = mechanism().start()
    run.sample(10, RandomSource.seeded(3))
    assert not run.private
    run = mechanism().start()
    run.sample(10, RandomSource.system())
    assert run.private
