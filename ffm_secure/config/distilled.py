"""What distillation needs of a run file, and whose model is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ffm_secure.config.models import Distillation, OwnModel
from ffm_secure.config.schema import Problems
from ffm_secure.registry import LIFECYCLES

if TYPE_CHECKING:
    from ffm_secure.config.run_file import RunConfig

FEWEST_VOTERS = 50  # of a round under the client unit; with fewer the noise is most of what is opened
Position = Callable[[tuple[str, str], tuple[str, str]], str]


def distils(config: RunConfig) -> bool:
    """Tell whether owners send answers on public rows instead of changes of a model."""
    return LIFECYCLES.has(config.federation.lifecycle.kind, "distils")


def check_distillation(config: RunConfig, problems: Problems) -> None:
    """Check what distillation needs, and that nothing is said that no other lifecycle reads."""
    table, protection = config.distillation, config.protection
    if not distils(config):
        if table != Distillation():
            problems.add(
                "federation.lifecycle.kind",
                config.federation.lifecycle.kind,
                "does not read the table distillation; say 'distillation', or leave the table out",
            )
        return
    for name, least in (("steps", "at least 1"), ("learning_rate", "above 0")):
        if not getattr(table, name):
            problems.add(f"distillation.{name}", getattr(table, name), f"must be {least}: the student learns")
    if table.back_steps and config.federation.rounds < 2:
        problems.add(
            "distillation.back_steps",
            table.back_steps,
            "needs federation.rounds of at least 2: the student answers after the first",
        )
    if protection.coordinate_bound != 1.0:
        problems.add(
            "protection.coordinate_bound",
            protection.coordinate_bound,
            "must be 1 with kind = 'distillation': what is sent are probabilities",
        )
    if protection.norm_bound:
        problems.add(
            "protection.norm_bound",
            protection.norm_bound,
            "is not read with kind = 'distillation': the length of answers follows from their number",
        )


def distillation_reasons(config: RunConfig, position: Position) -> Iterator[str]:
    """Yield why the numbers of a distillation, or the models in it, do not hold with the rest of the file."""
    if not distils(config):
        return
    cohort = config.federation.cohort
    if config.privacy.unit == "client" and cohort < FEWEST_VOTERS:
        yield (
            f"federation.cohort = {cohort} with privacy.unit = 'client' and lifecycle 'distillation': must "
            f"be at least {FEWEST_VOTERS}; the noise for one client's votes drowns those of fewer; take the "
            "record unit"
        )
    for number, own in enumerate(config.distillation.models):
        reason = position(("task", config.task.kind), ("trainable", own.trainable.kind))
        if reason:
            yield f"distillation.models[{number}].trainable.kind = '{own.trainable.kind}': {reason}"


def unknown_owners(config: RunConfig, owners: Sequence[str]) -> tuple[str, ...]:
    """Return the owners that the table of models names and nobody is."""
    named = [name for own in config.distillation.models for name in own.owners]
    return tuple(name for name in named if name not in owners)


def models_of(config: RunConfig, owners: Sequence[str]) -> tuple[OwnModel, ...]:
    """Return the model of every owner: the one that names it, or those that name nobody, in turn."""
    table = config.distillation.models
    default = OwnModel(name=config.model.name, trainable=config.model.trainable)
    in_turn = [own for own in table if not own.owners] or [default]
    models, dealt = [], 0
    for owner in owners:
        named = [own for own in table if owner in own.owners]
        models.append(named[0] if named else in_turn[dealt % len(in_turn)])
        dealt += not named
    return tuple(models)
