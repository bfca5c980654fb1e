"""What leaks falls as a defence grows: noise, the batch, the cohort behind a sum; clipping alone hides nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from attacks import Budget, Knowledge, Observation, Prior, curves
from attacks.registry import build
from attacks.scoring import score
from attacks.truth import Truth
from tests.attacks import models

BUDGET = Budget(seconds=60.0, iterations=50, restarts=1)
SLACK = 0.15  # of the way from guessing to perfect: what luck may move a score between two points
NOISE = (0.0, 1e-4, 1e-2, 1.0)
TOKENS, WIDTH = 5, 32


def text() -> nn.Module:
    return models.gpt2(vocabulary=100, width=WIDTH, length=8, layers=1, classes=8, tied=False)


def vision() -> nn.Module:
    return models.vit(size=16, patch=8, width=WIDTH, layers=1)


def nothing(model: nn.Module, *, frozen: tuple[str, ...] = ()) -> Observation:
    """Return an observation that says no more than what is trained."""
    trained = {name: p for name, p in model.named_parameters() if not any(part in name for part in frozen)}
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


def inputs_read(clients: int) -> float:
    """Return the share of pictures the first layer gives away from a sum over clients with four pictures each."""
    model, (images, labels) = models.mlp(width=256), models.digits()
    batches = [{"images": images[4 * i : 4 * i + 4], "labels": labels[4 * i : 4 * i + 4]} for i in range(clients)]
    seen = models.observe_sum(model, batches, models.image_loss) if clients > 1 else models.observe(
        model, batches[0], models.image_loss
    )  # fmt: skip
    found = build("linear_readout").run(seen, model, Prior(), BUDGET, 0)
    guesses = torch.stack(found.of("inputs") or found.of("image") or (torch.zeros(64),)).flatten(1).double()
    distance = torch.cdist(images[: 4 * clients].flatten(1).double(), guesses).amin(dim=1)
    return float((distance < 1e-2).double().mean())


def test_more_clients_behind_a_sum_hide_more() -> None:
    found = [inputs_read(clients) for clients in (1, 8)]
    assert found[0] == 1.0
    falls(found, to=0.6)


@pytest.mark.parametrize("name", ["token_presence", "matched_filter"])
def test_clipping_alone_hides_nothing(name: str) -> None:
    """A bound rescales one update: what attacks read is its direction, so only noise on top of the bound protects."""
    model, ids = text(), models.sentences(4, TOKENS, 100)
    batch = {"input_ids": ids[:2], "labels": torch.tensor([0, 1])}
    seen = models.observe(model, batch, models.text_loss, knowledge=Knowledge(batch_size=2, sequence_length=TOKENS))
    small = seen.replace_tensors({key: value * 1e-3 for key, value in seen.tensors.items()}, point="clipped")
    labels = torch.tensor([0, 1, 0, 1])
    prior = Prior(candidates={"token_ids": ids, "labels": labels})
    truth = Truth(sequences=tuple(tuple(row) for row in ids[:2].tolist()), members=(True, True, False, False))
    values = []
    for observation in (seen, small):
        scored = score(build(name).run(observation, model, prior, BUDGET, 0), truth)
        assert scored is not None
        values.append(scored.value)
    assert values[0] > 0.9
    assert values[1] == pytest.approx(values[0], abs=0.1)


def test_a_curve_out_of_time_leaves_points_out_and_a_dear_attack_is_not_drawn() -> None:
    model = vision()
    rehearsals = curves.by_batch(nothing(model), model, (1, 2), length=TOKENS)
    late = curves.curve(
        build("label_identity"), model, "records", rehearsals, Budget(seconds=1e-9, iterations=1, restarts=1)
    )
    assert late.x == late.y == ()
    assert "stopped" in late.reason
    dear = tuple(curves.draw([(build("label_identity"), 1e6)], nothing(model), model, length=TOKENS, name="quick"))
    assert {one.axis for one in dear} == {"records", "noise multiplier"}
    assert all("CPU seconds" in one.reason and not one.x for one in dear)
