"""Let every site of a finished simulation make a model of its own; each one's stays in its own folder."""

from __future__ import annotations

from torch import Tensor

from ffm_secure.engines.simulation import Simulation
from ffm_secure.federation import TrainingResult
from ffm_secure.records import PersonalOutcome
from ffm_secure.site.personal import keep_own, make_own

FOLDER = "own-model"


def make_own_models(
    ready: Simulation, trained: TrainingResult, untrained: Tensor
) -> tuple[PersonalOutcome, ...]:
    """Make and keep every site's own model; return how each does beside two others. Nothing where the run
    file asks for none.

    Guarantee: all rounds are over and nothing is sent; a simulation alone sees these figures together.
    """
    if ready.config.personal.kind == "none":
        return ()
    outcomes = []
    for site in ready.sites:
        if not len(site.data.examples):
            continue
        shared = ready.own_vector(site.data.index, trained.state.vector, before=len(trained.records) + 1)
        with ready.courier.trainers.borrow() as trainer:
            own = make_own(trainer, site.data, untrained=untrained, shared=shared)
            keep_own(trainer, own, ready.states.place(site.data.index) / FOLDER)
        outcomes.append(own.outcome)
    return tuple(outcomes)
