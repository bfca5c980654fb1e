"""The own models of a simulation's owners: each architecture is loaded once, each owner has numbers of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ffm_secure.agreed.loaded_model import PublicFacts
from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.config.distilled import distils, models_of, unknown_owners
from ffm_secure.config.models import OwnModel
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.dataset import Examples
from ffm_secure.engines.simulated_data import SimulatedData
from ffm_secure.errors import PlanRefused
from ffm_secure.privacy.accounts import rows_digest
from ffm_secure.site.bound_probe import probe_bound
from ffm_secure.site.teaching import Architecture, Teacher, load_architecture, teacher_of


class _Texts(TypedDict, total=False):
    texts: int
    texts_digest: str


def public_facts(config: RunConfig, data: SimulatedData) -> _Texts:
    """Return what is public about the rows that owners answer; nothing where they answer none."""
    if not distils(config) or data.public is None:
        return {}
    return {"texts": len(data.public), "texts_digest": rows_digest(data.public)}


def load(config: RunConfig, base: Path, data: SimulatedData, facts: PublicFacts) -> tuple[Architecture, ...]:
    """Load the architecture of every owner's own model; nothing where owners have none.

    Raises:
      PlanRefused, ModelError: an owner is named that nobody is, or a model cannot be used.
    """
    if not distils(config):
        return ()
    unknown = unknown_owners(config, facts.owners)
    if unknown:
        raise PlanRefused(
            [
                f"distillation.models: owners {', '.join(unknown)} are nobody here; owners are "
                f"{', '.join(facts.owners[:20])}"
            ]
        )
    loaded: dict[OwnModel, Architecture] = {}
    for own in models_of(config, facts.owners):
        if own not in loaded:
            loaded[own] = load_architecture(config, own, base, classes=facts.classes, dataset=data.dataset)
    return tuple(loaded[own] for own in models_of(config, facts.owners))


def teacher(
    owned: tuple[Architecture, ...], config: RunConfig, data: SimulatedData, index: int, device: str
) -> Teacher | None:
    """Return one owner's own model; None where owners have none."""
    if not owned or data.public is None:
        return None
    own = owned[index]
    return teacher_of(
        own,
        config,
        examples=own.task.encode(data.rows(index)),
        public=own.task.encode(data.public),
        device=device,
    )


def probe(spec: RunSpec, owned: tuple[Architecture, ...], public: Examples) -> None:
    """Measure on public rows, for every architecture, that no record moves a clipped sum by more than the
    bound.

    Raises:
      NotPrivateError: one does.
    """
    for own in {id(own): own for own in owned}.values():
        probe_bound(spec, own.trainable, own.task, own.task.encode(public))
