"""What leaks falls as a defence grows: noise, the batch, the cohort behind a sum, the rank; clipping alone
hides nothing.

Noise on every attack is in test_under_noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from attacks import Budget, Observation, Prior, curves
from attacks.inversion import active_adapters
from attacks.registry import build
from attacks.truth import Truth
from tests.attacks import cases, models
from tests.attacks.cases import Case
from tests.attacks.test_active_peft import Pool

BUDGET = Budget(steps=60_000, iterations=50, restarts=1)
SLACK = 0.15  # of the way from guessing to perfect: what luck may move a score between two points
NOISE = (0.0, 1e-4, 1e-2, 1.0)
TOKENS, WIDTH = 5, 32


def text() -> nn.Module:
    return models.gpt2(vocabulary=100, width=WIDTH, length=8, layers=1, classes=8, tied=False)


def vision() -> nn.Module:
    return models.vit(size=16, patch=8, width=WIDTH, layers=1)


def nothing(model: nn.Module, *, frozen: tuple[str, ...] = ()) -> Observation:
    """Return an observation that says no more than what is trained."""
    trained = {
        n: p for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in frozen)
    }
    return Observation(kind="gradient", tensors={name: torch.zeros_like(p) for name, p in trained.items()})


def shares(found: curves.Curve) -> list[float]:
    """Return scores as the way from guessing (0) to the first, undefended point (1)."""
    assert found.baseline is not None
    assert found.y[0] > found.baseline
    return [(value - found.baseline) / (found.y[0] - found.baseline) for value in found.y]


def falls(values: list[float], *, to: float) -> None:
    assert all(later <= earlier + SLACK for earlier, later in pairwise(values)), values
    assert values[-1] <= to, values


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("token_presence", text),
        ("position_text", text),
        ("label_identity", vision),
        ("position_vision", vision),
    ],
)
def test_noise_takes_the_leak_of_every_closed_form_step_by_step(name, make) -> None:
    model = make()
    rehearsals = curves.by_noise(nothing(model), model, NOISE, length=TOKENS)
    found = curves.curve(build(name), model, "noise multiplier", rehearsals, BUDGET)
    assert found.x == NOISE
    falls(shares(found), to=0.4)


@pytest.mark.parametrize(
    ("name", "make", "frozen", "sizes"),
    [("span", text, ("wte", "wpe"), (1, 8)), ("position_vision", vision, (), (1, 2, 4))],
)
def test_a_larger_batch_hides_more(name, make, frozen, sizes) -> None:
    model = make()
    seen = nothing(model, frozen=frozen)
    width = curves.width_of(seen, model)
    assert width == curves.Width(axis="tokens per width", size=WIDTH)
    rehearsals = curves.by_batch(seen, model, sizes, length=TOKENS)
    found = curves.curve(build(name), model, width.axis, rehearsals, BUDGET, scale=TOKENS / width.size)
    assert found.x == tuple(size * TOKENS / WIDTH for size in sizes)
    falls(shares(found), to=0.4)  # eight texts have 40 tokens, more than the width


def test_more_tokens_than_the_rank_of_lora_hide_what_fewer_give() -> None:
    model = models.add_lora(text(), 8, ("attn.c_attn", "mlp.c_fc"), zero_b=False)
    width = curves.width_of(nothing(model), model)
    assert width == curves.Width(axis="tokens per rank", size=8)
    rehearsals = curves.by_batch(nothing(model), model, (1, 2, 8), length=TOKENS)
    found = curves.curve(build("span"), model, width.axis, rehearsals, BUDGET, scale=TOKENS / width.size)
    assert found.x == (5 / 8, 10 / 8, 40 / 8)
    falls(shares(found), to=0.2)


# -------------------------------------------------------------------------------- batches, sums and low ranks


def read(name: str, case: Case) -> float:
    """Return how much of what the client holds is read back, from 0 to 1.

    Of pictures the share of each one's variance that the best recovered picture explains, on the mean; else
    the score.
    """
    found = cases.run(name, case)
    truth = case.truth.images
    if truth is None:
        result = cases.score(found, case.truth)
        return 0.0 if result is None else result.value
    if not found.of("image"):
        return 0.0
    true, guesses = truth.flatten(1).double(), torch.stack(found.of("image")).flatten(1).double()
    missed = torch.cdist(true, guesses).square().amin(dim=1) / (
        true - true.mean(dim=1, keepdim=True)
    ).square().sum(1)
    return float((1.0 - missed).clamp_min(0.0).mean())


def pictures(make: Callable[[], nn.Module], **settings: int) -> Callable[..., Case]:
    return lambda count, clients=1: cases.digits(make, count, clients=clients, **settings)


GROWING: dict[str, tuple[Callable[..., Case], tuple[int, ...], float]] = {
    "linear_readout": (pictures(lambda: models.mlp(width=32)), (1, 8, 32), 0.5),
    "cocktail_party": (pictures(models.mlp), (1, 16), 0.7),
    "imprint": (pictures(lambda: cases.imprinted(bins=16)), (1, 8, 64), 0.7),
    "adapter_leak": (cases.adapter, (1, 8, 64), 0.5),
    "decepticon": (cases.deceived, (2, 32), 0.8),
    "span": (lambda count, clients=1: cases.text(count, clients=clients, width=16), (1, 8), 0.5),
    "inverting_gradients": (lambda count: pictures(models.cnn, start=3)(count).iterations(60), (1, 12), 0.6),
    "text_matching": (cases.matched, (1, 6), 0.85),
    "fedavg_surrogate": (lambda count: cases.stepped(count).iterations(60), (1, 8), 0.6),
    "learned_inversion": (cases.simulated, (1, 8), 0.85),
}
SUMMED = ("linear_readout", "imprint", "adapter_leak", "decepticon", "span")
LENGTHY = ("text_matching", "fedavg_surrogate", "learned_inversion")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LENGTHY else name for name in GROWING]
)
def test_a_larger_batch_hides_more_from_every_family(name: str) -> None:
    make, sizes, most = GROWING[name]
    values = [read(name, make(size)) for size in sizes]
    assert values[0] > 0.6
    falls(values, to=most * values[0])


@pytest.mark.parametrize("name", SUMMED)
def test_more_clients_behind_a_sum_hide_more(name: str) -> None:
    make, sizes, most = GROWING[name]
    values = [read(name, make(size, clients=size)) for size in sizes]
    assert values[0] > 0.6
    falls(values, to=most * values[0])


def beside_lora(rank: int) -> Case:
    model = models.add_lora(models.gpt2(vocabulary=400), rank, ("attn.c_attn", "mlp.c_fc"), zero_b=False)
    ids = models.sentences(1, 8, 400)
    seen = models.observe(model, {"input_ids": ids, "labels": torch.tensor([1])}, models.text_loss)
    return Case(seen=seen, model=model, truth=cases.words(ids))


@pytest.mark.parametrize(
    ("name", "make", "ranks"),
    [
        ("span", beside_lora, (16, 8, 2)),
        ("lora_leak", cases.low_rank, (8, 4, 2)),
        pytest.param(
            "text_matching", lambda rank: cases.matched(2, rank=rank), (16, 1), marks=pytest.mark.slow
        ),
    ],
)
def test_a_lower_rank_of_lora_hides_more(
    name: str, make: Callable[[int], Case], ranks: tuple[int, ...]
) -> None:
    values = [read(name, make(rank)) for rank in ranks]
    assert values[0] > 0.9
    falls(values, to=0.7)


# ------------------------------------------------------------------------------------------------- membership


def members(count: int, *, clients: int = 1) -> Case:
    """Return digits of which four are tested beside four strangers."""
    case = cases.digits(lambda: models.mlp(width=32), count, clients=clients)
    images, labels = models.digits()
    chosen = [0, 1, 2, 3, 1000, 1001, 1002, 1003]
    prior = Prior(
        candidates={"images": images[chosen], "labels": labels[chosen]},
        examples={"images": images[1200:1240], "labels": labels[1200:1240]},
    )
    return replace(case, prior=prior, truth=Truth(members=(True,) * 4 + (False,) * 4))


def spoken(count: int, *, clients: int = 1) -> Case:
    """Return texts of which four are tested beside four strangers."""
    case = cases.text(count, clients=clients, width=32, length=4)
    ids = torch.cat([models.sentences(count, 4, 120)[:4], models.sentences(4, 4, 120, seed=7)])
    labels = torch.cat([torch.arange(4), torch.arange(4)]) % 2
    prior = Prior(candidates={"token_ids": ids, "labels": labels})
    return replace(case, prior=prior, truth=Truth(members=(True,) * 4 + (False,) * 4))


def planted(count: int) -> Case:
    """Return eight targets planted in a prompt pool, four of them among as many examples as told."""
    images, labels = models.digits()
    targets = images[1000:1008]
    drawn = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    keys, _ = active_adapters.craft_prompt_keys(drawn, targets.flatten(1), images[:600].flatten(1))
    batch = torch.cat([targets[:4], images[1200 : 1196 + count]])
    tagged = torch.cat([labels[1000:1004], labels[1200 : 1196 + count]])
    seen = models.observe(Pool(keys), {"images": batch, "labels": tagged}, models.image_loss)
    seen = Observation(kind="gradient", tensors=seen.tensors, broadcast={"keys": keys})
    prior = Prior(candidates={"queries": targets.flatten(1)})
    return Case(seen=seen, model=None, truth=Truth(members=(True,) * 4 + (False,) * 4), prior=prior)


def area(name: str, case: Case) -> float:
    """Return the area under the curve of members against strangers;
    half, where the attack has nothing to say.
    """
    result = cases.scored(name, case)
    return 0.5 if result is None else result.value


@pytest.mark.parametrize(
    ("name", "make", "count"),
    [("matched_filter", members, 4), ("projection_residual", spoken, 4), ("prompt_membership", planted, 8)],
)
def test_noise_hides_who_took_part(name: str, make: Callable[[int], Case], count: int) -> None:
    case = make(count)
    values = [
        sum(area(name, case.noised(noise, seed)) for seed in range(draws)) / draws
        for noise, draws in ((0.0, 1), (1e-2, 1), (10.0, 16))
    ]
    assert values[0] > 0.8
    falls(values, to=0.7)


@pytest.mark.parametrize(
    ("name", "make", "sizes"),
    [("matched_filter", members, (4, 256)), ("projection_residual", spoken, (4, 20))],
)
@pytest.mark.parametrize("summed", [False, True])
def test_a_crowd_hides_who_took_part(
    name: str, make: Callable[..., Case], sizes: tuple[int, ...], summed: bool
) -> None:
    values = [area(name, make(size, clients=size if summed else 1)) for size in sizes]
    assert values[0] > 0.8
    falls(values, to=0.75)


# --------------------------------------------------------------------------------------------------- clipping

# A bound rescales one update. These read its direction; fedavg_unrolled and learned_inversion fit the length
# as well, and so do counts of many labels, whose identity needs the scale.
DIRECTIONS = (
    "token_presence",
    "position_text",
    "span",
    "tiger",
    "position_vision",
    "linear_readout",
    "spear",
    "adapter_readout",
    "cocktail_party",
    "imprint",
    "trap_weights",
    "fishing",
    "model_inconsistency",
    "adapter_leak",
    "lora_leak",
    "decepticon",
    "encoder_bins",
    "idlg_label",
    "llg",
    "inverting_gradients",
    "fedavg_surrogate",
)


@pytest.mark.parametrize(
    "name",
    [*DIRECTIONS, pytest.param("text_matching", marks=pytest.mark.slow), "matched_filter", "label_identity"],
)
def test_clipping_alone_hides_nothing(name: str) -> None:
    """A bound rescales one update: what attacks read is its direction,
    so only noise on top of the bound protects.
    """
    own = {"matched_filter": lambda: members(4), "label_identity": lambda: cases.labelled(2)}
    case = own.get(name, cases.CASES.get(name))()
    small = models.noised(case.seen, 0.0, clip_norm=1e-3)
    assert sum(float(value.square().sum()) for value in small.tensors.values()) < 1.1e-6
    bare, clipped = cases.scored(name, case), cases.scored(name, replace(case, seen=small))
    assert bare is not None
    assert bare.succeeded or name == "matched_filter"  # eight candidates are too few for an interval
    assert clipped is not None
    way = bare.value - bare.baseline
    assert clipped.value - clipped.baseline > (1.0 - SLACK) * way if way < 1.5 else clipped.succeeded


def test_a_curve_out_of_time_leaves_points_out_and_a_dear_attack_is_not_drawn() -> None:
    model = vision()
    rehearsals = curves.by_batch(nothing(model), model, (1, 2), length=TOKENS)
    late = curves.curve(
        build("label_identity"), model, "records", rehearsals, Budget(steps=1e-06, iterations=1, restarts=1)
    )
    assert late.x == late.y == ()
    assert "stopped" in late.reason
    dear = tuple(
        curves.draw([(build("label_identity"), 1e6)], nothing(model), model, length=TOKENS, name="quick")
    )
    assert {one.axis for one in dear} == {"records", "noise multiplier"}
    assert all("steps, more than its share" in one.reason and not one.x for one in dear)
