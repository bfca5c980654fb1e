"""FFM pre-training: the server learns from public data, clients from private data, and a controller says who
is next.

A controller is a pure function of the records of the past rounds: losses on public rows, which phases there
were, bytes, and seconds where no privacy unit is promised, because the wall time of a private phase depends
on private rows. A client's own loss is in no record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from ffm_secure.config import compatibility
from ffm_secure.config.run_file import Controller, Lifecycle, RunConfig
from ffm_secure.lifecycle.base import Algorithm, History, Phase, ServerPhase
from ffm_secure.lifecycle.finetune import PlainGradient, finetune
from ffm_secure.records import RoundRecord
from ffm_secure.strategies.base import ServerState, Strategy

SOURCES: tuple[Phase, ...] = ("public", "private")


def fixed(history: History, spec: Controller) -> Phase:
    """Repeat `public` public and then `private` private phases."""
    if len(history) % (spec.public + spec.private) < spec.public:
        return "public"
    return "private"


def plateau(history: History, spec: Controller) -> Phase:
    """Stay with a source while the public loss falls; leave it when it has stopped, and never sooner than
    `patience` phases.

    Hysteresis: a source is left only when the best loss of its last `patience` phases is not below the loss
    before them by more than `margin` of it, so that noise in one evaluation does not turn the switch.
    """
    if not history:
        return "public"
    current = history[-1].phase
    stay = next(
        (age for age, record in enumerate(reversed(history)) if record.phase != current), len(history)
    )
    if stay < spec.patience or len(history) == stay == spec.patience:
        return current  # too soon, or nothing is known from before
    before = history[-spec.patience - 1].loss
    best = min(record.loss for record in history[-spec.patience :])
    if before - best > spec.margin * abs(before):
        return current
    return other(current)


def gain_per_cost(history: History, spec: Controller) -> Phase:
    """Choose the source whose last `window` phases lowered the public loss most for what they cost.

    Each source is tried once first, and the one not chosen is tried again after `retry` phases, because its
    gain may have changed since. A source that costs nothing comes first, but only while it gains more than
    `least_gain` of the loss a phase.
    """
    for source in SOURCES:
        if not any(record.phase == source for record in history):
            return source
    best: Phase = max(SOURCES, key=lambda source: rate(history, source, spec))
    since = next((age for age, record in enumerate(reversed(history)) if record.phase != best), len(history))
    if since >= spec.retry:
        return other(best)
    return best


def rate(history: History, source: str, spec: Controller) -> float:
    """Return the fall of the public loss per unit of cost over a source's last `window` phases; infinite
    before it is known.

    What costs nothing is worth any price while it gains more than `least_gain` of the last loss a phase, and
    nothing below that: a gain that small must not keep a run from what it is willing to pay for.
    """
    pairs = [(before, after) for before, after in pairwise(history) if after.phase == source][-spec.window :]
    if not pairs:
        return math.inf
    gain = sum(before.loss - after.loss for before, after in pairs) / len(pairs)
    cost = sum(COSTS[spec.cost](after) for _, after in pairs) / len(pairs)
    if gain <= 0.0:
        return gain
    if cost > 0.0:
        return gain / cost
    if gain > spec.least_gain * abs(history[-1].loss):
        return math.inf
    return 0.0


COSTS: Mapping[str, Callable[[RoundRecord], float]] = {
    # Every private phase charges its cohort the same event, so the price of each is one charge. The largest
    # epsilon over the owners,
    # which the record holds, stands still while the cohort is of owners who have spent less than others.
    "epsilon": lambda record: float(record.phase == "private"),
    "bytes": lambda record: float(record.bytes_up + record.bytes_down),
    "seconds": lambda record: record.seconds - record.evaluation_seconds,
    "phases": lambda record: 1.0,
}
CONTROLLERS: Mapping[str, Callable[[History, Controller], Phase]] = {
    "fixed": fixed,
    "plateau": plateau,
    "gain_per_cost": gain_per_cost,
}


def other(phase: str) -> Phase:
    """Return the other source."""
    if phase == "public":
        return "private"
    return "public"


def next_phase(history: History, spec: Lifecycle, *, private_rounds: int) -> Phase:
    """Return what the controller says, but never more than `private_rounds` private rounds."""
    chosen = CONTROLLERS[spec.controller.kind](history, spec.controller)
    spent = sum(record.phase == "private" for record in history)
    if chosen == "private" and spent >= private_rounds:
        return "public"
    return chosen


class PreTrain(Algorithm):
    """Learn from public rows on the server and from private rows at the sites, as a controller says."""

    kind = "pretrain"
    reads_public_rows = True

    def next_phase(self, history: History, config: RunConfig) -> Phase:
        """Return which source the next round learns from.

        Guarantee: at most as many private rounds as the noise was calibrated for ever come out.
        """
        spec = config.federation.lifecycle
        return next_phase(history, spec, private_rounds=compatibility.private_rounds(config))

    def learn_in_public(self, phase: ServerPhase, state: ServerState) -> Tensor:
        """Return the global vector after one public phase: plain gradient steps on public rows, on the
        server.
        """
        config, spec = phase.config, phase.config.federation.lifecycle
        plain = replace(
            spec,
            local_steps=spec.public_steps or spec.local_steps,
            local_epochs=0,
            batch_size=spec.public_batch_size or spec.batch_size,
            learning_rate=spec.public_learning_rate or spec.learning_rate,
            proximal=0.0,
        )
        assert phase.public is not None, "a public phase has public rows"
        rule = PlainGradient(
            trainable=phase.trainable,
            task=phase.task,
            encoded=phase.public,
            spec=plain,
            seed=(config.seed, phase.round, config.task.clients),
            device=phase.device,
            microbatch=config.speed.microbatch,
        )
        update = finetune(trainable=phase.trainable, start=state.vector, spec=plain, rule=rule)
        return state.vector + update.vector.to(state.vector.device)

    def remember(
        self, strategy: Strategy, before: ServerState, after: ServerState, phase: Phase
    ) -> ServerState:
        """Keep the newest change of each source beside the server's state, so that a resumed run still has
        it.
        """
        changes = {}
        for name, value in before.optimizer_state.items():
            if name.startswith("moved."):
                changes[name] = value
        newest = strategy.moved(before.vector, after.vector)
        return replace(after, optimizer_state={**after.optimizer_state, **changes, f"moved.{phase}": newest})

    def alignment(self, strategy: Strategy, state: ServerState) -> float | None:
        """Return the cosine between the newest public and the newest private change; None where there are no
        two.

        The strategy says what a change is: of the trained numbers, or under a rule for LoRA of the products
          and the head.
        Both are released numbers: the public change, and the opened mean of the private ones with its noise,
        which pulls the cosine towards 0. Values that stay at or below 0 without noise say that the two
        distributions pull apart.
        """
        public = state.optimizer_state.get("moved.public")
        private = state.optimizer_state.get("moved.private")
        if public is None or private is None:
            return None
        return strategy.cosine(public, private)

    def describe(self, config: RunConfig, public_rows: int) -> str:
        """Say who learns from what, and how often."""
        spec = config.federation.lifecycle
        return (
            f"pre-training by {spec.controller.kind} controller: public phases of "
            f"{spec.public_steps or spec.local_steps} steps on {public_rows:,} public rows, "
            f"at most {compatibility.private_rounds(config)} private rounds"
        )
