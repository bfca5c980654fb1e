"""What the kinds of lifecycle and the evaluation need of a run file, beyond what a single field can say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffm_secure.config.compressed import check_compression
from ffm_secure.config.distilled import check_distillation
from ffm_secure.config.schema import Problems
from ffm_secure.registry import LIFECYCLES, PERSONALS

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
    if LIFECYCLES.has(lifecycle.kind, "public_rows"):
        _check_public_rows(lifecycle, problems)
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


def check_tables(config: RunConfig, problems: Problems) -> None:
    """Check the tables that stand for themselves."""
    check_evaluation(config, problems)
    check_personal(config, problems)
    check_stream(config, problems)
    check_compression(config, problems)
    check_distillation(config, problems)


def check_evaluation(config: RunConfig, problems: Problems) -> None:
    """Check what an evaluation of private rows needs, and that nothing is said that it does not read."""
    evaluation, privacy = config.evaluation, config.privacy
    if bool(evaluation.group_column) != bool(evaluation.groups):
        problems.add(
            "evaluation.groups", evaluation.groups, "belongs to evaluation.group_column: give both, or none"
        )
    if evaluation.rows == "public":
        for name in ("epsilon", "group_column", "by_owner"):
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


def check_personal(config: RunConfig, problems: Problems) -> None:
    """Check what a model of each owner's own needs, and that nothing is said that it does not read."""
    personal = config.personal
    steps = PERSONALS.has(personal.kind, "steps")
    for name, least in (("steps", "at least 1"), ("batch_size", "at least 1"), ("learning_rate", "above 0")):
        value = getattr(personal, name)
        if steps and not value:
            problems.add(f"personal.{name}", value, f"must be {least} with kind = '{personal.kind}'")
        elif value and not steps:
            problems.add(f"personal.{name}", value, f"is not read with kind = '{personal.kind}'")
    if personal.kind == "mean_regularised" and not personal.pull:
        problems.add("personal.pull", personal.pull, "must be above 0; without a pull say 'few_steps'")


def check_stream(config: RunConfig, problems: Problems) -> None:
    """Check that a stream has its stages, and that the rounds can be dealt to them."""
    stream, rounds = config.task.stream, config.federation.rounds
    if bool(stream.column) != bool(stream.order):
        problems.add("task.stream.order", stream.order, "belongs to task.stream.column: give both, or none")
    if not stream.order:
        if stream.replay:
            problems.add("task.stream.replay", stream.replay, "is not read without a stream")
        return
    values: list[str] = []
    for stage in stream.order:
        values += stage.split("|")
    if len(set(values)) < len(values) or not all(values):
        problems.add("task.stream.order", stream.order, "every value must be there once, and none be empty")
    if len(stream.order) < 2:
        problems.add("task.stream.order", stream.order, "a stream has at least two stages")
    if rounds < 1 or rounds % len(stream.order):
        problems.add(
            "federation.rounds",
            rounds,
            f"must be a multiple of the {len(stream.order)} stages of task.stream: each has as many",
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
    if LIFECYCLES.has(lifecycle.kind, "asks_again"):
        _check_votes(config, problems)
        return
    cohorts = config.task.clients // max(1, federation.cohort)
    most = max(1, cohorts) * max(1, len(config.task.stream.order))
    if not 1 <= federation.rounds <= most:
        problems.add(
            "federation.rounds",
            federation.rounds,
            f"must be from 1 to {most} with kind = '{lifecycle.kind}': each round asks another "
            "cohort, so that no owner answers twice",
        )


def _check_votes(config: RunConfig, problems: Problems) -> None:
    """Check a run of votes: every question is put to all owners, cohort by cohort."""
    federation, votes = config.federation, config.federation.lifecycle.votes
    if not votes.candidates:
        problems.add(
            "federation.lifecycle.votes.candidates",
            "",
            "missing; name a public file of texts to vote on, or builtin:<name>",
        )
    if config.task.clients % max(1, federation.cohort):
        problems.add(
            "federation.cohort",
            federation.cohort,
            f"must divide task.clients = {config.task.clients}: every owner votes once in every question",
        )
        return
    cohorts = config.task.clients // max(1, federation.cohort)
    if federation.rounds < 1 or federation.rounds % cohorts:
        problems.add(
            "federation.rounds",
            federation.rounds,
            f"must be a multiple of {cohorts}, the rounds in which all owners have voted on one question",
        )


def _check_public_rows(lifecycle: Lifecycle, problems: Problems) -> None:
    if bool(lifecycle.public_data) == (lifecycle.public_examples > 0):
        problems.add(
            "federation.lifecycle.public_data",
            lifecycle.public_data,
            "give public_data or public_examples, exactly one of them",
        )


def _check_pretraining(lifecycle: Lifecycle, problems: Problems) -> None:
    controller = lifecycle.controller
    if not lifecycle.public_steps and not lifecycle.local_steps:
        problems.add("federation.lifecycle.public_steps", 0, "must be above 0 where local_epochs is given")
    if controller.kind == "fixed" and not controller.public and not controller.private:
        problems.add("federation.lifecycle.controller.private", 0, "public and private cannot both be 0")
