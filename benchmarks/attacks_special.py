"""Settings of the table that are no plain update of one kind: targets singled out, released models, attackers that train.

Each line of `LINES` makes, for a seed, what the server sees, the model, what the attacker is given, and the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks import Knowledge, Observation, Prior
from attacks.inversion import active, active_adapters
from attacks.truth import Truth
from tests.attacks import models
from tests.attacks.test_active_peft import Pool

SHAPE = (1, 8, 8)
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What one run of an attack gets, and the truth about it."""

    seen: Observation
    model: nn.Module | None
    truth: Truth
    prior: Prior = Prior()


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    attack: str
    model: str
    update: str
    batch: int
    setting: Callable[[int], Setting]
    seeds: int = 3
    iterations: int = 200


def _digits(places: Tensor) -> Batch:
    images, labels = models.digits()
    return {"images": images[places], "labels": labels[places]}


def _drawn(count: int, seed: int, *, first: int = 0, last: int = 600) -> Tensor:
    return first + torch.randperm(last - first, generator=torch.Generator().manual_seed(seed))[:count]


def _noised(made: Setting, noise: float, seed: int) -> Setting:
    return replace(made, seen=models.noised(made.seen, noise, seed=seed)) if noise else made


def fished(seed: int, *, batch: int, noise: float) -> Setting:
    """Single one image of a class out of a batch by a crafted head."""
    _, labels = models.digits()
    places = _drawn(600, seed)
    chosen = torch.cat([places[labels[places] == 3][:1], places[labels[places] != 3][: batch - 1]])
    model, rows = active.craft_fishing(models.mlp(), 3), _digits(chosen)
    seen = models.observe(model, rows, models.image_loss, knowledge=Knowledge(image_shape=SHAPE))
    return _noised(Setting(seen=seen, model=model, truth=Truth(images=rows["images"][:1])), noise, seed)


def silenced(seed: int, *, clients: int, noise: float) -> Setting:
    """Open a sum of clients of which all but one were sent weights that keep them silent."""
    model, rows = models.mlp(), _digits(_drawn(clients, seed))
    quiet = active.craft_suppression(model)
    parts = [
        models.gradient(sent, {key: value[i : i + 1] for key, value in rows.items()}, models.image_loss)
        for i, sent in enumerate([model, *[quiet] * (clients - 1)])
    ]
    seen = Observation(
        kind="sum", tensors={name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]},
        contributors=clients, metadata={"summand": "gradient"}, knowledge=Knowledge(image_shape=SHAPE),
    )  # fmt: skip
    return _noised(Setting(seen=seen, model=model, truth=Truth(images=rows["images"][:1])), noise, seed)


def _sent(examples: Mapping[str, Tensor], seed: int, *, noise: float) -> dict[str, Tensor]:
    seen = models.observe(models.mlp(width=32), examples, models.image_loss)
    return dict((models.noised(seen, noise, seed=seed) if noise else seen).tensors)


def simulated(seed: int, *, batch: int, noise: float) -> Setting:
    """Let the attacker train on simulated updates of the exact client, its noise included."""
    rows = _digits(_drawn(batch, seed, first=1300, last=1700))
    seen = Observation(
        kind="gradient", tensors=_sent(rows, 10**9 + seed, noise=noise), metadata={"batch_size": batch}
    )
    prior = Prior(client=functools.partial(_sent, noise=noise), examples=_digits(torch.arange(1200)))
    return Setting(seen=seen, model=None, truth=Truth(images=rows["images"]), prior=prior)


def pooled(seed: int, *, noise: float) -> Setting:
    """Plant the queries of sixteen targets in a prompt pool; eight of them take part beside eight others."""
    images, _ = models.digits()
    places, others = _drawn(16, seed, first=1000, last=1200), _drawn(8, seed, first=1200, last=1700)
    start = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    targets = images[places]
    keys, _ = active_adapters.craft_prompt_keys(start, targets.flatten(1), images[:600].flatten(1))
    rows = _digits(torch.cat([others, places[:8]]))
    seen = models.observe(Pool(keys), rows, models.image_loss)
    seen = models.noised(seen, noise, seed=seed) if noise else seen
    seen = Observation(kind="gradient", tensors=seen.tensors, broadcast={"keys": keys})
    truth = Truth(members=(True,) * 8 + (False,) * 8)
    return Setting(seen=seen, model=None, truth=truth, prior=Prior(candidates={"queries": targets.flatten(1)}))


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


def released(seed: int, *, trained: bool) -> Setting:
    """Test forty members and forty others on a released model that memorised the members, or that saw none."""
    first = 80 * (seed % 2)
    model = _trained(10 + seed, first, first + 40) if trained else models.mlp(seed=10 + seed)
    references = tuple(_trained(own, 160, 240) for own in (1, 2, 3))
    prior = Prior(
        candidates=_memorised(first, first + 80), examples=_memorised(160, 240), reference_models=references
    )
    seen = Observation(kind="gradient", tensors={"3.bias": torch.zeros(10)})
    return Setting(seen=seen, model=model, truth=Truth(members=(True,) * 40 + (False,) * 40), prior=prior)


def _lines() -> tuple[Line, ...]:
    made: list[Line] = []
    for update, noise in (("gradient", 0.0), ("noised, z = 1", 1.0)):
        for batch in (2, 4, 8):
            one = functools.partial(fished, batch=batch, noise=noise)
            made.append(Line(attack="fishing", model="crafted head", update=update, batch=batch, setting=one))
        for batch in (1, 4):
            one = functools.partial(simulated, batch=batch, noise=noise)
            made.append(
                Line(attack="learned_inversion", model="network of two layers", update=update, batch=batch, setting=one)
            )
        summed = update.replace("gradient", "sum of clients of one each")
        for clients in (4, 16):
            one = functools.partial(silenced, clients=clients, noise=noise)
            made.append(
                Line(attack="model_inconsistency", model="others silenced", update=summed, batch=clients, setting=one)
            )
        one = functools.partial(pooled, noise=noise)
        made.append(Line(attack="prompt_membership", model="planted prompt pool", update=update, batch=16, setting=one, seeds=5))
    for attack in ("lira", "rmia"):
        for trained, update in ((True, "released, labels memorised"), (False, "released, members not seen")):
            one = functools.partial(released, trained=trained)
            made.append(Line(attack=attack, model="network of two layers", update=update, batch=40, setting=one, seeds=4))
    return tuple(made)


LINES = _lines()
