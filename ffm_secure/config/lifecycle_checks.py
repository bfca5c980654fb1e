"""What the kinds of lifecycle and the evaluation need of a run file, beyond what a single field can say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffm_secure.config.schema import Problems
from ffm_secure.registry import LIFECYCLES

if TYPE_CHECKING:
    from ffm_secure.config.run_file import Lifecycle, RunConfig


def check_lifecycle(config: RunConfig, problems: Problems) -> None:
    """Check what a kind of lifecycle needs, and what it does not read."""
    lifecycle = config.federation.lifecycle
    if LIFECYCLES.has(lifecycle.kind, "one_shot"):
        _check_one_shot(config, problems)
    else:
        _check_steps(lifecycle, problems)
    for part in ("start", "finish"):
        _check_part(config, part, problems)
    if LIFECYCLES.has(lifecycle.kind, "public_phases"):
        _check_pretraining(lifecycle, problems)


def _check_part(config: RunConfig, part: str, problems: Problems) -> None:
    """Check what a start or a finish may cost: it is a part of the run's epsilon."""
    lifecycle, privacy = config.federation.lifecycle, config.privacy
    name, epsilon = f"federation.lifecycle.{part}_epsilon", getattr(lifecycle, f"{part}_epsilon")
    if epsilon and getattr(lifecycle, part) == "none":
        problems.add(name, epsilon, f"is not read without a {part}")
    elif epsilon >= privacy.epsilon and privacy.unit != "none" and epsilon:
        problems.add(
            name, epsilon, f"must be below privacy.epsilon = {privacy.epsilon:g}, of which it is a part"
        )


def check_evaluation(config: RunConfig, problems: Problems) -> None:
    """Check what an evaluation of private rows needs, and that nothing is said that it does not read."""
    evaluation, privacy = config.evaluation, config.privacy
    if bool(evaluation.group_column) != bool(evaluation.groups):
        problems.add(
            "evaluation.groups", evaluation.groups, "belongs to evaluation.group_column: give both, or none"
        )
    if evaluation.rows == "public":
        for name in ("epsilon", "group_column"):
            if getattr(evaluation, name):
                problems.add(
                    f"evaluation.{name}", getattr(evaluation, name), "is read with rows = 'held_back' alone"
                )
        return
    if privacy.unit != "none" and not 0.0 < evaluation.epsilon <= privacy.epsilon:
        problems.add(
            "evaluation.epsilon",
            evaluation.epsilon,
            f"must be above 0 and at most privacy.epsilon = {privacy.epsilon:g}: a count of private rows "
            "is a release",
        )


def _check_steps(lifecycle: Lifecycle, problems: Problems) -> None:
    """Check what a run needs that learns by steps."""
    if (lifecycle.local_steps > 0) == (lifecycle.local_epochs > 0):
        problems.add(
            "federation.lifecycle.local_steps",
            lifecycle.local_steps,
            "give local_steps or local_epochs, exactly one above 0",
        )
    for name, least in (("batch_size", "at least 1"), ("learning_rate", "above 0")):
        if not getattr(lifecycle, name):
            problems.add(f"federation.lifecycle.{name}", getattr(lifecycle, name), f"must be {least}")


def _check_one_shot(config: RunConfig, problems: Problems) -> None:
    """Check a run that asks for sums and takes no step: what steps need is not read, and nobody is asked
    twice.
    """
    federation, lifecycle = config.federation, config.federation.lifecycle
    for name in ("local_steps", "local_epochs", "batch_size", "learning_rate", "momentum", "proximal"):
        if getattr(lifecycle, name):
            problems.add(
                f"federation.lifecycle.{name}",
                getattr(lifecycle, name),
                f"is not read with kind = '{lifecycle.kind}', which takes no steps",
            )
    cohorts = config.task.clients // max(1, federation.cohort)
    if not 1 <= federation.rounds <= max(1, cohorts):
        problems.add(
            "federation.rounds",
            federation.rounds,
            f"must be from 1 to {max(1, cohorts)} with kind = '{lifecycle.kind}': each round asks another "
            "cohort, so that no owner answers twice",
        )


def _check_pretraining(lifecycle: Lifecycle, problems: Problems) -> None:
    controller = lifecycle.controller
    if bool(lifecycle.public_data) == (lifecycle.public_examples > 0):
        problems.add(
            "federation.lifecycle.public_data",
            lifecycle.public_data,
            "give public_data or public_examples, exactly one of them",
        )
    if not lifecycle.public_steps and not lifecycle.local_steps:
        problems.add("federation.lifecycle.public_steps", 0, "must be above 0 where local_epochs is given")
    if controller.kind == "fixed" and not controller.public and not controller.private:
        problems.add("federation.lifecycle.controller.private", 0, "public and private cannot both be 0")
