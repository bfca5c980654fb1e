"""Settings of the table that are no plain update of one kind: targets singled out, released models, attackers
that train.

Each line of `LINES` makes a case for a seed: those the tests hold, on digits drawn anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks import Observation, Prior
from attacks.inversion import active_adapters
from attacks.truth import Truth
from tests.attacks import cases, models
from tests.attacks.cases import Case
from tests.attacks.test_active_peft import Pool

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    attack: str
    model: str
    update: str
    batch: int
    setting: Callable[[int], Case]
    seeds: int = 3
    iterations: int = 200


def _digits(places: Tensor) -> Batch:
    images, labels = models.digits()
    return {"images": images[places], "labels": labels[places]}


def _drawn(seed: int, *, first: int = 0, last: int = 600) -> Tensor:
    return first + torch.randperm(last - first, generator=torch.Generator().manual_seed(seed))


def fished(seed: int, *, batch: int, noise: float) -> Case:
    """Single one image of a class out of a batch by a crafted head."""
    return cases.fished(batch, order=_drawn(seed)).noised(noise, seed)


def silenced(seed: int, *, clients: int, noise: float) -> Case:
    """Open a sum of clients of which all but one were sent weights that keep them silent."""
    return cases.silenced(clients, order=_drawn(seed)).noised(noise, seed)


def simulated(seed: int, *, batch: int, noise: float) -> Case:
    """Let the attacker train on simulated updates of the exact client, its noise included."""
    return cases.simulated(batch, order=_drawn(seed, first=1300, last=1700)).noised(noise, seed)


def pooled(seed: int, *, noise: float) -> Case:
    """Plant the queries of sixteen targets in a prompt pool; eight of them take part beside eight others."""
    images, _ = models.digits()
    places, others = _drawn(seed, first=1000, last=1200)[:16], _drawn(seed, first=1200, last=1700)[:8]
    start = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    targets = images[places]
    keys, _ = active_adapters.craft_prompt_keys(start, targets.flatten(1), images[:600].flatten(1))
    rows = _digits(torch.cat([others, places[:8]]))
    observation = models.observe(Pool(keys), rows, models.image_loss)
    observation = models.noised(observation, noise, seed=seed) if noise else observation
    observation = Observation(kind="gradient", tensors=observation.tensors, broadcast={"keys": keys})
    truth = Truth(members=(True,) * 8 + (False,) * 8)
    return Case(
        seen=observation, model=None, truth=truth, prior=Prior(candidates={"queries": targets.flatten(1)})
    )


@functools.cache
def _trained(seed: int, first: int, last: int) -> nn.Module:
    model, rows = models.mlp(seed=seed), _memorised(first, last)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        models.image_loss(model, rows).backward()
        optimiser.step()
    return model.requires_grad_(False)


def _memorised(first: int, last: int) -> Batch:
    """Return digits with random labels: a model can only memorise them."""
    labels = torch.randint(10, (240,), generator=torch.Generator().manual_seed(0))
    return {"images": models.digits()[0][first:last], "labels": labels[first:last]}


def released(seed: int, *, trained: bool) -> Case:
    """Test forty members and forty others on a released model that memorised the members,
    or that saw none.
    """
    first = 80 * (seed % 2)
    model = _trained(10 + seed, first, first + 40) if trained else models.mlp(seed=10 + seed)
    references = tuple(_trained(own, 160, 240) for own in (1, 2, 3))
    prior = Prior(
        candidates=_memorised(first, first + 80), examples=_memorised(160, 240), reference_models=references
    )
    observation = Observation(kind="gradient", tensors={"3.bias": torch.zeros(10)})
    return Case(seen=observation, model=model, truth=Truth(members=(True,) * 40 + (False,) * 40), prior=prior)


def _lines() -> tuple[Line, ...]:
    lines: list[Line] = []
    for update, noise in (("gradient", 0.0), ("noised, z = 1", 1.0)):
        for batch in (2, 4, 8):
            one = functools.partial(fished, batch=batch, noise=noise)
            lines.append(
                Line(attack="fishing", model="crafted head", update=update, batch=batch, setting=one)
            )
        for batch in (1, 4):
            one = functools.partial(simulated, batch=batch, noise=noise)
            lines.append(
                Line(
                    attack="learned_inversion",
                    model="network of two layers",
                    update=update,
                    batch=batch,
                    setting=one,
                )
            )
        summed = update.replace("gradient", "sum of clients of one each")
        for clients in (4, 16):
            one = functools.partial(silenced, clients=clients, noise=noise)
            lines.append(
                Line(
                    attack="model_inconsistency",
                    model="others silenced",
                    update=summed,
                    batch=clients,
                    setting=one,
                )
            )
        one = functools.partial(pooled, noise=noise)
        lines.append(
            Line(
                attack="prompt_membership",
                model="planted prompt pool",
                update=update,
                batch=16,
                setting=one,
                seeds=5,
            )
        )
    for attack in ("lira", "rmia"):
        for trained, update in ((True, "released, labels memorised"), (False, "released, members not seen")):
            one = functools.partial(released, trained=trained)
            lines.append(
                Line(
                    attack=attack,
                    model="network of two layers",
                    update=update,
                    batch=40,
                    setting=one,
                    seeds=4,
                )
            )
    return tuple(lines)


LINES = _lines()
