"""How the best attack of each kind fares as one thing about the update changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from attacks import curves
from attacks.contract import Attack
from attacks.registry import ATTACKS
from ffm_secure.auditing import replayed as client_replay
from ffm_secure.auditing.budget import CLOSED
from ffm_secure.auditing.findings import Ran
from ffm_secure.auditing.step import ReplayedStep
from ffm_secure.engines import simulation
from ffm_secure.records import (
    LeakCurve,
)


def leak_curves(stage: ReplayedStep, ran: Ran, budget: str) -> Iterator[curves.Curve]:
    """Draw curves for the best closed form of each family whose control passed: one attack shows the law of
    its kind.
    """
    best: dict[str, tuple[tuple[int, float, float], Attack]] = {}
    for (name, records, point), (result, scored) in ran.items():
        attack = ATTACKS[name]()
        if point == "raw" and scored is not None and scored.succeeded and attack.family in CLOSED:
            rated = (records, scored.value, -result.steps)
            if attack.family not in best or rated > best[attack.family][0]:
                best[attack.family] = rated, attack
    chosen = sorted(((attack, -rated[2]) for rated, attack in best.values()), key=lambda pair: pair[1])
    yield from curves.draw(
        chosen, stage.control.observation, stage.model, length=mean_length(stage), name=budget
    )


def mean_length(stage: ReplayedStep) -> int:
    """Return how many tokens an invented text gets: as many as the client's have on average."""
    texts = stage.control.truth.sequences or ((0,),)
    return max(2, round(sum(map(len, texts)) / len(texts)))


def place_on_curves(
    leaks: Iterator[curves.Curve], stage: ReplayedStep, prepared: simulation.Prepared
) -> Iterator[LeakCurve]:
    """Mark on each curve where the run lies: what the server sees of one step."""
    config, width = prepared.config, curves.width_of(stage.control.observation, stage.model)
    clients = stage.at(client_replay.seen_by("server", config, stage.points)).observation.contributors
    records = float(config.federation.lifecycle.batch_size * clients)
    noise = float(prepared.mechanism.noise_multiplier)
    tokens = None
    if width:
        tokens = records * mean_length(stage) / width.size
    here = {
        "records": records,
        "noise multiplier": noise,
        "tokens per width": tokens,
        "tokens per rank": tokens,
    }
    for one in leaks:
        yield LeakCurve(**{item.name: getattr(one, item.name) for item in fields(one)}, here=here[one.axis])
