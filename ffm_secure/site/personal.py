"""An owner's own model at home, and how it does beside one made alone and the shared one.

Guarantee: this runs after the last round, and no message reads anything of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ffm_secure.lifecycle.personal import AtHome, Personalisation, learned_at_home
from ffm_secure.records import PersonalOutcome
from ffm_secure.registry import PERSONALS
from ffm_secure.site.trainer import SiteData, SiteTrainer
from ffm_secure.storage.durable import write_atomic
from ffm_secure.tasks.encoded import Encoded

MARK = "STAYS AT HOME.txt"
_MARKED = (
    "This model was made from its owner's rows without noise. Passing it on, or any figure of it, releases "
    "those rows; no ledger has paid for that.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """Hold what an owner made at home, and the owner's own figures of it. Private."""

    vector: Tensor  # float32 [d]
    outcome: PersonalOutcome

    def __repr__(self) -> str:
        return "OwnModel(private)"


def make_own(trainer: SiteTrainer, data: SiteData, *, untrained: Tensor, shared: Tensor) -> OwnModel:
    """Return an owner's own model and compare three models on rows that neither it nor the one made alone has
    seen.

    `shared` is the last shared vector [d], with what the owner keeps at home; `untrained` the one a run
    starts from, from which the model made alone takes the same steps. Where the run holds no rows back, the
    shared model has learned from the rows tested, which speaks for it.
    """
    config = trainer.spec.config
    learned, tested = _parted(data, share=config.personal.tested, seed=config.seed)
    home = AtHome(
        trainable=trainer.trainable,
        task=trainer.task,
        rows=learned,
        start=shared,
        spec=config.personal,
        seed=(config.seed, data.index, 0x0E),
        device=trainer.spec.device,
        microbatch=config.speed.microbatch,
    )
    make: Personalisation = PERSONALS.load(config.personal.kind)
    own = make(home)
    alone = untrained
    if PERSONALS.has(config.personal.kind, "steps"):
        alone = learned_at_home(replace(home, start=untrained))
    outcome = PersonalOutcome(
        client=data.name,
        rows=len(tested),
        local=_metric(trainer, alone, tested),
        shared=_metric(trainer, shared, tested),
        own=_metric(trainer, own, tested),
    )
    return OwnModel(vector=own, outcome=outcome)


def keep_own(trainer: SiteTrainer, own: OwnModel, folder: Path) -> None:
    """Write an own model below the owner's folder, marked as what it is."""
    trainer.trainable.load_vector(own.vector)
    trainer.trainable.export(folder, trainer.spec.config.model.name)
    write_atomic(folder / MARK, _MARKED.encode())


def _parted(data: SiteData, *, share: float, seed: int) -> tuple[Encoded, Encoded]:
    """Return the rows own models are made from, and those they are compared on."""
    if data.held_back is not None:
        return data.examples, data.held_back.encoded
    count = len(data.examples)
    order = np.random.default_rng([seed, data.index, 0x7E57]).permutation(count)
    tested = round(share * count)
    return data.examples.take(np.sort(order[tested:])), data.examples.take(np.sort(order[:tested]))


def _metric(trainer: SiteTrainer, vector: Tensor, rows: Encoded) -> float:
    trainer.trainable.load_vector(vector)
    return trainer.task.evaluate(trainer.trainable.model, rows, device=trainer.spec.device).metric
