"""What the server learns itself from public root rows, for a strategy that compares groups with it."""

from __future__ import annotations

import math

from torch import Tensor

from ffm_secure.agreed.run_spec import RunSpec
from ffm_secure.lifecycle.finetune import PlainGradient, finetune
from ffm_secure.records import RoundPlan
from ffm_secure.server.context import ServerContext
from ffm_secure.strategies import ServerState

_ROOT = 0x600D  # a label of its own: the server draws other batches than any site


def root_update(server: ServerContext, plan: RoundPlan, state: ServerState) -> Tensor | None:
    """Return the server's own update of a round, float64 [d]; None where the strategy compares with none.

    It takes the steps a site takes, on public rows, and is no longer than a site's bound lets an update be:
    what it is compared with was clipped.
    """
    if server.root is None:
        return None
    spec = server.spec
    lifecycle = spec.config.federation.lifecycle
    rule = PlainGradient(
        trainable=server.trainable,
        task=server.task,
        encoded=server.root,
        spec=lifecycle,
        seed=(spec.config.seed, plan.round, _ROOT),
        device=spec.device,
        microbatch=spec.config.speed.microbatch,
    )
    with server.trainable.training_only(spec.strategy.trains(state.round)):
        learned = finetune(trainable=server.trainable, start=state.vector, spec=lifecycle, rule=rule)
    update = learned.vector.detach().cpu().double()
    longest, length = longest_signal(spec), float(update.norm())
    if length > longest:
        update = update * (longest / length)
    if spec.config.compression.kind == "none":
        return update
    public = spec.public_state(plan, state.vector)  # compared on what is left of sites' updates
    return spec.compression.restore(spec.compression.compress(update, public), public)


def longest_signal(spec: RunSpec) -> float:
    """Return how long clipping lets a site's update be before noise; infinity where nothing follows."""
    lifecycle, mechanism = spec.config.federation.lifecycle, spec.mechanism
    if mechanism.client_level is not None:
        return mechanism.clip_norm
    if lifecycle.optimizer != "sgd":
        return math.inf
    if mechanism.sum_level is not None:
        return lifecycle.learning_rate * mechanism.clip_norm
    if mechanism.record_level is not None:
        steps = mechanism.record_level.steps / (1.0 - lifecycle.momentum)
        return lifecycle.learning_rate * mechanism.clip_norm * steps
    return math.inf
