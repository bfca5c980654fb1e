"""Which choices go together, and what a run would train, send, spend and reveal."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from ffm_secure.config.compressed import compression_reasons
from ffm_secure.config.distilled import distillation_reasons
from ffm_secure.config.groups import average_reasons, group_reasons, group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.errors import PlanRefused
from ffm_secure.registry import (
    AXES,
    COMPRESSIONS,
    FINISHES,
    LIFECYCLES,
    PERSONAL,
    STARTS,
    STRATEGIES,
    TASKS,
    TRAINABLES,
)

GROUP_RULES = STRATEGIES.with_trait("groups")
LORA_RULES = STRATEGIES.with_trait("lora")
PROMPTS = TRAINABLES.with_trait("prompt")
ONE_SHOT = LIFECYCLES.with_trait("one_shot")
LANGUAGE = TASKS.with_trait("language")
ANSWERS = TASKS.with_trait("answers")

_PRIVATE = ("record", "person", "client")
_WEIGHTS = (
    "weights from example counts are private data, and the divisor must be a public constant: use "
    "weighting = 'uniform'"
)
_FAIR = (
    "a weight that follows from a client's loss is private data, and no event charges for it: use weighting "
    "= 'uniform', and evaluate by owner and class with noise"
)
_FAIR_ONCE = "a run that takes no step has no loss to weigh by: use weighting = 'uniform'"
_CLIENT_NEEDS_RING = (
    "noise of the client unit is whole only in the secure sum; in the clear the server sees each "
    "client with a share of it"
)
_CKKS_DISCRETE = "approximate sums cannot carry exact discrete noise: use secagg or bfv with the client unit"
_NO_HEAD = "a language model has no classification head to train alone: choose lora, prompt or full"
_TELLS = (
    "its prompt is made of the whole text, so a causal model would be told the words it has to "
    "predict: use prompt or prefix"
)
_ONE_SIDED = ("prefix", "deep_prompt", "prompt_generator")
_TWO_SIDES = (
    "it stands in front of one text, and an encoder-decoder has two, the prompt and the answer: use prompt, "
    "p_tuning or lora"
)
_NOT_FACTORS = (
    "the rule is about the factors B and A of LoRA, which this kind does not train: use average, or "
    "trainable lora"
)
_NO_EPSILON = "without a guarantee nothing is spent, so gain per epsilon has no meaning: choose bytes"
_CLOCK = (
    "the wall time of a private phase depends on how many rows clients have and how long their "
    "texts are, so decisions by it would "
    "release that without noise or charge: choose epsilon or bytes"
)
_NO_CACHE = "picture models keep no keys and values to put a prefix in front of: use deep_prompt"
_HOME_CLIENT = (
    "what a client keeps at home bears no noise under the client unit, and the public evaluation "
    "of the clients' models would "
    "release it: use the record or person unit, or ffa"
)
_HOME_PUBLIC = (
    "the server learns in public phases, but every client keeps a B of its own and the server has "
    "none: use ffa"
)
_CLIP_UNIT = "clips single records; the client unit clips whole updates: use clipping = 'flat'"
_CLIP_NONE = "there is nothing to clip without a privacy unit: leave clipping at 'flat'"
_SEEDED_NONE = "a run without privacy unit draws no privacy noise: leave noise at 'system'"
_NO_CLASSES = "sums by class need classes: choose a classification task"
_NO_STEPS = "takes no step, so nothing is there for it to steer"
_ONE_MODEL = "makes one head for everybody from one sum: use strategy average"
_NO_CELLS = "counts by class need classes: choose a classification task, or evaluate on public rows"
_TABLE_OF_CLIENT = (
    "a client's counts would have to be one bounded table, which is not built: evaluate on public rows, or "
    "use the record unit"
)
_PERSON_ON_BOTH_SIDES = (
    "rows of a person may lie on both sides, and the person would pay twice: evaluate on public rows"
)
_OWN_MODELS = "every client has a model of its own, and the counts would be of none of them: use ffa"

_SUM_NEEDS_RING = (
    "a site that adds its share alone is protected by nobody: only a secure sum (secagg or bfv) "
    "hides its update; "
    "use noise_shares = 'site'"
)
_SUM_CLIENT = "the client unit adds its noise in shares already: leave noise_shares at 'site'"
_SUM_NONE = "without a privacy unit there is no noise to share: leave noise_shares at 'site'"
_SUM_OPTIMIZER = (
    "a local optimizer would reshape the sum of gradients, which has no noise before it is opened "
    "and is bounded per "
    "record as it is only: use sgd, and an optimizer on the server (federation.strategy)"
)
_SUM_PROXIMAL = "one step from the broadcast model has nothing to be pulled back from: set proximal to 0"
_SUM_RULE = (
    "its messages are no sums of bounded gradients, so a share of the noise protects no record: use "
    "average or a "
    "server optimizer"
)

_RULE_NEEDS_GROUPS = (
    "the rule compares sums over groups, and one sum is nothing to compare: set protection.groups"
)
_OWN_WEIGHT = (
    "a client says itself how much it counts, and an attacker would count for as much as it may: use "
    "weighting = 'uniform'"
)
_STREAM_UNIT = (
    "blocks of rows that arrived together pay on their own, and {who} stands in several of them: use the "
    "record unit"
)
_STREAM_START = (
    "the head would be made anew for every stage, over what was learned: use lifecycle class_sums or "
    "ridge_sums, or learn without it"
)
_PRIOR_TWICE = "the shares of the classes are taken off at the end already: use one of the two"
_STREAM_FINISH = "counts of all stages after the last one are not built: use finish = 'none'"
_STREAM_HELD_BACK = "counts of private rows by stage are not built: evaluate on public rows"
_STREAM_PUBLIC = "public phases have no stages: use lifecycle finetune"
_STREAM_CLASSES = "stages are compared by their classes: choose a classification task"
_STREAM_BANDED = (
    "noise with a memory would reach from one stage's rows into the next: use correlation = 'none'"
)
_REPLAY_SUMS = "sums forget nothing, so nothing is to be replayed: set task.stream.replay to 0"

_BANDED_RECORD = (
    "noise with a memory is sound where turns are a known number of rounds apart; a record joins by chance, "
    "so none of its turns are, and what it changes in two rounds would overlap: use the client unit"
)
_BANDED_NONE = "without a privacy unit there is no noise to correlate: leave correlation at 'none'"
_BANDED_ONCE = "a run of one release has no earlier noise to take back: leave correlation at 'none'"
_BANDED_PUBLIC = (
    "phases of the server's own between the rounds were not thought through: use lifecycle finetune, or "
    "correlation = 'none'"
)
_BANDED_FACTORS = (
    "the rule turns or folds factors between rounds, so noise that is taken back later belongs to other "
    "numbers: use average or a server optimizer"
)
_BANDED_LOSSES = (
    "the noise is whole only where everybody's share is in every sum, so a round with a lost client stays "
    "closed: simulate no losses, or use correlation = 'none'"
)
_BANDED_GROUPS = (
    "a sum over a group lacks the noise of all others, which earlier rounds rely on: use one group, or "
    "correlation = 'none'"
)

LARGEST_RECORD_DELTA = 1e-2
LARGEST_EPSILON = 1000.0

# (axis, axis): refused pairs with the reason. Pairs that are absent were considered and are sound.
REFUSED: Mapping[tuple[str, str], Mapping[tuple[str, str], str]] = {
    ("task", "trainable"): {
        **{(task, "head"): _NO_HEAD for task in LANGUAGE},
        **{(task, kind): _TWO_SIDES for task in ANSWERS for kind in _ONE_SIDED},
        ("causal_lm", "prompt_generator"): _TELLS,
        ("image_classification", "prefix"): _NO_CACHE,
    },
    ("trainable", "strategy"): {
        (kind, rule): _NOT_FACTORS for kind in ("full", "head", "lora_xs", *PROMPTS) for rule in LORA_RULES
    },
    ("task", "lifecycle"): {(task, kind): _NO_CLASSES for task in LANGUAGE for kind in ONE_SHOT},
    ("task", "start"): {(task, kind): _NO_CLASSES for task in LANGUAGE for kind in STARTS if kind != "none"},
    ("task", "finish"): {
        (task, kind): _NO_CLASSES for task in LANGUAGE for kind in FINISHES if kind != "none"
    },
    ("lifecycle", "finish"): {
        (kind, finish): _NO_STEPS for kind in ONE_SHOT for finish in FINISHES if finish != "none"
    },
    ("lifecycle", "strategy"): {
        ("pretrain", "fedsa"): _HOME_PUBLIC,
        **{(kind, rule): _ONE_MODEL for kind in ONE_SHOT for rule in STRATEGIES if rule != "average"},
    },
    ("lifecycle", "start"): {
        (kind, start): _NO_STEPS for kind in ONE_SHOT for start in STARTS if start != "none"
    },
    ("start", "finish"): {("class_prior", "class_offsets"): _PRIOR_TWICE},
    ("strategy", "unit"): {("fedsa", "client"): _HOME_CLIENT},
    ("cost", "unit"): {("epsilon", "none"): _NO_EPSILON, **{("seconds", unit): _CLOCK for unit in _PRIVATE}},
    ("cost", "noise"): {("epsilon", "seeded"): _NO_EPSILON},
    ("strategy", "groups"): {(rule, "one"): _RULE_NEEDS_GROUPS for rule in GROUP_RULES},
    ("strategy", "weighting"): {
        (rule, kind): _OWN_WEIGHT for rule in GROUP_RULES for kind in ("examples", "q_fair")
    },
    ("weighting", "unit"): {
        **{("examples", unit): _WEIGHTS for unit in _PRIVATE},
        **{("q_fair", unit): _FAIR for unit in _PRIVATE},
    },
    ("lifecycle", "weighting"): {(kind, "q_fair"): _FAIR_ONCE for kind in ONE_SHOT},
    ("task", "evaluation"): {(task, "held_back"): _NO_CELLS for task in LANGUAGE},
    ("unit", "evaluation"): {
        ("client", "held_back"): _TABLE_OF_CLIENT,
        ("person", "held_back"): _PERSON_ON_BOTH_SIDES,
    },
    ("strategy", "evaluation"): {("fedsa", "held_back"): _OWN_MODELS},
    ("unit", "protection"): {("client", "none"): _CLIENT_NEEDS_RING, ("client", "ckks"): _CKKS_DISCRETE},
    ("unit", "clipping"): {
        **{("client", kind): f"{kind} clipping {_CLIP_UNIT}" for kind in ("per_layer", "automatic")},
        **{("none", kind): _CLIP_NONE for kind in ("per_layer", "automatic")},
    },
    ("optimizer", "noise_shares"): {(kind, "sum"): _SUM_OPTIMIZER for kind in ("adam", "adamw")},
    ("proximal", "noise_shares"): {("on", "sum"): _SUM_PROXIMAL},
    ("strategy", "noise_shares"): {(rule, "sum"): _SUM_RULE for rule in LORA_RULES},
    ("unit", "noise_shares"): {("client", "sum"): _SUM_CLIENT, ("none", "sum"): _SUM_NONE},
    ("noise_shares", "protection"): {("sum", "none"): _SUM_NEEDS_RING, ("sum", "ckks"): _CKKS_DISCRETE},
    ("unit", "noise"): {("none", "seeded"): _SEEDED_NONE},
    ("task", "stream"): {(task, "on"): _STREAM_CLASSES for task in LANGUAGE},
    ("lifecycle", "stream"): {("pretrain", "on"): _STREAM_PUBLIC},
    ("start", "stream"): {(kind, "on"): _STREAM_START for kind in STARTS if kind != "none"},
    ("finish", "stream"): {(kind, "on"): _STREAM_FINISH for kind in FINISHES if kind != "none"},
    ("unit", "stream"): {
        ("person", "on"): _STREAM_UNIT.format(who="a person"),
        ("client", "on"): _STREAM_UNIT.format(who="a client"),
    },
    ("evaluation", "stream"): {("held_back", "on"): _STREAM_HELD_BACK},
    ("lifecycle", "replay"): {(kind, "on"): _REPLAY_SUMS for kind in ONE_SHOT},
    ("unit", "correlation"): {
        ("record", "banded"): _BANDED_RECORD,
        ("person", "banded"): _BANDED_RECORD,
        ("none", "banded"): _BANDED_NONE,
    },
    ("lifecycle", "correlation"): {
        ("pretrain", "banded"): _BANDED_PUBLIC,
        **{(kind, "banded"): _BANDED_ONCE for kind in ONE_SHOT},
    },
    ("strategy", "correlation"): {(rule, "banded"): _BANDED_FACTORS for rule in LORA_RULES},
    ("dropout", "correlation"): {("some", "banded"): _BANDED_LOSSES},
    ("correlation", "stream"): {("banded", "on"): _STREAM_BANDED},
    ("correlation", "groups"): {("banded", "several"): _BANDED_GROUPS},
}

# Every axis of choice with the values its pairs were reviewed with. A test compares this with the run
# file's schema, so that a
# new option must take a position; `position` refuses to answer for anything newer.
REVIEWED: Mapping[str, Collection[str]] = {
    "task": TASKS,
    "trainable": TRAINABLES,
    "lifecycle": LIFECYCLES,
    "start": STARTS,
    "finish": FINISHES,
    "controller": ("fixed", "plateau", "gain_per_cost"),
    "cost": ("epsilon", "bytes", "seconds", "phases"),
    "optimizer": ("sgd", "adam", "adamw"),
    "proximal": ("off", "on"),
    "strategy": STRATEGIES,
    "weighting": ("uniform", "examples", "q_fair"),
    "dropout": ("none", "some"),
    "unit": ("record", "person", "client", "none"),
    "clipping": ("flat", "per_layer", "automatic"),
    "noise": ("system", "seeded"),
    "noise_shares": ("site", "sum"),
    "correlation": ("none", "banded"),
    "protection": ("none", "secagg", "bfv", "ckks"),
    "groups": ("one", "several"),
    "evaluation": ("public", "held_back"),
    "personal": PERSONAL,
    "compression": COMPRESSIONS,
    "stream": ("off", "on"),
    "replay": ("off", "on"),
}


def position(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Return why two choices do not go together, or an empty string if they do.

    Raises:
      KeyError: one of them was never reviewed; unknown means refuse.
    """
    for axis, value in (first, second):
        if value not in REVIEWED[axis]:
            raise KeyError(f"{axis} = {value!r} has taken no position")
        reason = _own_position(first, second) or _own_position(second, first)
        if reason:
            return reason
    order = list(REVIEWED)
    (axis_a, value_a), (axis_b, value_b) = sorted((first, second), key=lambda choice: order.index(choice[0]))
    forward = REFUSED.get((axis_a, axis_b), {}).get((value_a, value_b), "")
    return forward or REFUSED.get((axis_b, axis_a), {}).get((value_b, value_a), "")


def _own_position(choice: tuple[str, str], other: tuple[str, str]) -> str:
    """Return what a registered kind itself says against a choice on another axis."""
    axis, value = choice
    if axis not in AXES or value not in AXES[axis]:
        return ""
    return AXES[axis].kinds[value].refuses.get(other, "")


def choices(config: RunConfig) -> dict[str, str]:
    """Return the value a run file takes on every axis."""
    federation, lifecycle = config.federation, config.federation.lifecycle
    return {
        "task": config.task.kind,
        "trainable": config.model.trainable.kind,
        "lifecycle": lifecycle.kind,
        "start": lifecycle.start,
        "finish": lifecycle.finish,
        "controller": lifecycle.controller.kind,
        "cost": lifecycle.controller.cost,
        "optimizer": lifecycle.optimizer,
        "proximal": "on" if lifecycle.proximal else "off",
        "strategy": federation.strategy.kind,
        "weighting": federation.weighting,
        "dropout": "some" if federation.dropout.rate else "none",
        "unit": config.privacy.unit,
        "clipping": config.privacy.clipping,
        "noise": config.privacy.noise,
        "noise_shares": config.privacy.noise_shares,
        "correlation": config.privacy.correlation,
        "protection": config.protection.kind,
        "groups": "one" if config.protection.groups == 1 else "several",
        "evaluation": config.evaluation.rows,
        "personal": config.personal.kind,
        "compression": config.compression.kind,
        "stream": "on" if config.task.stream.order else "off",
        "replay": "on" if config.task.stream.replay else "off",
    }


def check(config: RunConfig) -> None:
    """Refuse unsound combinations, with every reason at once.

    Raises:
      PlanRefused: at least one pair of choices, or one number, is unsound.
    """
    reasons = [
        *_pair_reasons(choices(config)),
        *_number_reasons(config),
        *_sum_reasons(config),
        *_banded_reasons(config),
        *average_reasons(config),
        *group_reasons(config),
        *compression_reasons(config),
        *distillation_reasons(config, position),
    ]
    if reasons:
        raise PlanRefused(reasons)


def _pair_reasons(chosen: Mapping[str, str]) -> Iterator[str]:
    axes = list(chosen.items())
    for index, first in enumerate(axes):
        for second in axes[index + 1 :]:
            reason = position(first, second)
            if reason:
                yield f"{first[0]} = '{first[1]}' with {second[0]} = '{second[1]}': {reason}"


def _number_reasons(config: RunConfig) -> Iterator[str]:
    federation, protection, privacy = config.federation, config.protection, config.privacy
    threshold = minimum_survivors(config)
    if protection.kind in ("secagg", "bfv", "ckks") and federation.cohort < 3:
        yield (
            f"federation.cohort = {federation.cohort} with protection '{protection.kind}': must be "
            "at least 3, or one client "
            "could subtract itself and read the other"
        )
    elif protection.kind != "none":
        if threshold < 3 or threshold - protection.colluding < 2:
            yield (
                f"protection.threshold = {threshold} with colluding = {protection.colluding}: at "
                "least 3 clients, 2 of them honest, must be in "
                "every sum, or colluders read the last one; raise threshold"
            )
        needed = shamir_threshold(config)
        if protection.kind == "secagg" and needed > threshold:
            yield (
                f"protection.threshold = {threshold}: unmasking needs {needed} of "
                f"{group_size(config)} clients in mode "
                f"'{protection.mode}' with {protection.colluding} colluding; raise threshold to "
                f"{needed} or lower colluding"
            )
    shared = privacy.unit == "client" or privacy.noise_shares == "sum"
    if shared and protection.kind != "none" and honest_survivors(config) < 1:
        yield (
            f"protection.colluding = {protection.colluding}: leaves no honest noise among {threshold} "
            "survivors"
        )
    if privacy.unit == "client" and privacy.delta > 0 and privacy.delta > 1.0 / config.task.clients:
        yield (
            f"privacy.delta = {privacy.delta}: must be at most 1 / clients = "
            f"{1 / config.task.clients:g}, or the guarantee may "
            "give away one whole client"
        )
    if config.task.kind in ANSWERS and config.task.loss_on != "answer":
        yield (
            f"task.loss_on = {config.task.loss_on!r} with task.kind = {config.task.kind!r}: must be "
            "'answer'; what the encoder reads is never predicted"
        )
    if privacy.unit in ("record", "person") and privacy.delta > LARGEST_RECORD_DELTA:
        yield (
            f"privacy.delta = {privacy.delta}: must be at most {LARGEST_RECORD_DELTA:g}, or the guarantee "
            "may give away one record in a hundred; take less than 1 / the number of rows"
        )
    if privacy.unit != "none" and privacy.epsilon > LARGEST_EPSILON:
        yield (
            f"privacy.epsilon = {privacy.epsilon:g}: above {LARGEST_EPSILON:g} nothing is promised that "
            "anybody could notice; choose less, or say unit = 'none' with a reason"
        )
    adaptive = (
        LIFECYCLES.has(federation.lifecycle.kind, "public_phases")
        and federation.lifecycle.controller.kind != "fixed"
    )
    if adaptive and federation.evaluate_every != 1:
        yield (
            f"federation.evaluate_every = {federation.evaluate_every}: the controller decides by "
            "the loss of every round; "
            "set it to 1"
        )
    absent = []
    for stage in federation.dropout.stages:
        if stage in ("confirm", "unmask"):
            absent.append(stage)
    if protection.kind in ("bfv", "ckks") and federation.dropout.rate > 0:
        for stage in absent:
            yield (
                f"federation.dropout.stages: '{stage}' does not exist with protection "
                f"'{protection.kind}'; remove it"
            )


def _sum_reasons(config: RunConfig) -> Iterator[str]:
    """Refuse numbers with which one record's change of the sum has no bound of its own."""
    lifecycle = config.federation.lifecycle
    if config.privacy.noise_shares != "sum" or LIFECYCLES.has(lifecycle.kind, "one_shot"):
        return
    if lifecycle.local_steps != 1:
        yield (
            f"federation.lifecycle.local_steps = {lifecycle.local_steps} with privacy.noise_shares = "
            "'sum': must be 1; after a "
            "second step a record has moved the model at which all others are read, and no bound on "
            "its own gradient holds "
            "for that; take more rounds of one step, or noise_shares = 'site'"
        )
    for name in ("momentum", "weight_decay"):
        value = getattr(lifecycle, name)
        if value:
            yield (
                f"federation.lifecycle.{name} = {value:g} with privacy.noise_shares = 'sum': must be "
                "0, for nothing but the sum "
                "of gradients is sent; use an optimizer on the server (federation.strategy)"
            )


def _banded_reasons(config: RunConfig) -> Iterator[str]:
    """Refuse numbers with which noise with a memory is not whole, or turns are not apart."""
    separation, clients = config.privacy.separation, config.task.clients
    if config.privacy.correlation != "banded":
        if separation:
            yield (
                f"privacy.separation = {separation}: belongs to correlation = 'banded'; leave it out, or "
                "choose that"
            )
        return
    if not 2 <= separation <= clients:
        yield (
            f"privacy.separation = {separation} with correlation = 'banded': must be from 2 to task.clients "
            f"= {clients}; every client learns in one round of so many"
        )
    if config.federation.cohort != clients:
        yield (
            f"federation.cohort = {config.federation.cohort} with privacy.correlation = 'banded': must be "
            f"task.clients = {clients}; noise is taken back by the site that added it, so all are in every "
            "round"
        )
    if minimum_survivors(config) != clients:
        yield (
            f"protection.threshold = {minimum_survivors(config)} with privacy.correlation = 'banded': must "
            f"be task.clients = {clients}; a sum without one site's share lacks noise that others rely on"
        )


def turns_apart(config: RunConfig) -> int:
    """Return how many rounds lie between two turns of a client, at least; 1 where all learn at once."""
    return config.privacy.separation if config.privacy.correlation == "banded" else 1


def honest_survivors(config: RunConfig) -> int:
    """Return how many shares of the noise count in every opened sum: a curious client knows its own, at
    least.
    """
    return minimum_survivors(config) - max(1, config.protection.colluding)


def minimum_survivors(config: RunConfig) -> int:
    """Return the fewest clients whose sum may be opened: the threshold, or two thirds of those it is over.

    Guarantee: with groups it is of each group; whatever is calibrated to it, shares of noise too, holds in
    every group's own sum.
    """
    if config.protection.threshold:
        return config.protection.threshold
    if config.protection.kind == "none":
        return 1
    size = group_size(config)
    return max(min(3, size), -(-2 * size // 3))


def shamir_threshold(config: RunConfig) -> int:
    """Return how many shares unmasking needs on the complete graph.

    Source: ffm-secagg/1, section 1.5: semi-honest t > c; active 2t > k + c, with no share dealt to oneself.
    """
    neighbours, corrupt = group_size(config) - 1, config.protection.colluding
    if config.protection.mode == "semi_honest":
        return corrupt + 1
    return (neighbours + corrupt) // 2 + 1


def stages(config: RunConfig) -> int:
    """Return how many stages a run has: one, where all rows are there from the beginning."""
    return max(1, len(config.task.stream.order))


def stage_cap(config: RunConfig) -> int:
    """Return the largest number of rounds of one stage that any one client learns in; by turns where the
    noise has a memory.
    """
    if config.privacy.correlation == "banded":
        return math.ceil(private_rounds(config) / config.privacy.separation)
    rounds = private_rounds(config) // stages(config)
    return math.ceil(rounds * config.federation.cohort / config.task.clients)


def participation_cap(config: RunConfig) -> int:
    """Return the largest number of rounds any one client learns in under the balanced schedule."""
    return stages(config) * stage_cap(config)


def paid_rounds(config: RunConfig, turns: int = 0) -> int:
    """Return the most rounds one owner pays for with a row while it is new: those it takes part in, and the
    spare attempts the run file asks for.

    `turns` is how often it may still take part, where that is not the whole run.
    """
    return (turns or stage_cap(config)) + config.privacy.spare_rounds


def replay_rounds(config: RunConfig) -> int:
    """Return the most rounds one owner pays for with a row of its reservoir: those of all later stages."""
    if not config.task.stream.replay:
        return 0
    return (stages(config) - 1) * stage_cap(config) + config.privacy.spare_rounds


def private_rounds(config: RunConfig) -> int:
    """Return the most rounds in which clients take part; public phases of pre-training are none of them."""
    rounds, lifecycle = config.federation.rounds, config.federation.lifecycle
    if not LIFECYCLES.has(lifecycle.kind, "public_phases"):
        return rounds
    most, controller = lifecycle.private_rounds or rounds, lifecycle.controller
    if controller.kind == "fixed":
        whole, rest = divmod(rounds, controller.public + controller.private)
        return min(most, whole * controller.private + max(0, rest - controller.public))
    return min(most, rounds)


def local_steps(config: RunConfig, nominal: int) -> int:
    """Return the steps of one round as a public constant."""
    lifecycle = config.federation.lifecycle
    return lifecycle.local_steps or lifecycle.local_epochs * -(
        -stage_size(config, nominal) // lifecycle.batch_size
    )


def sampling_rate(config: RunConfig, nominal: int) -> float:
    """Return the Poisson rate of one local step from public constants only."""
    return min(1.0, config.federation.lifecycle.batch_size / stage_size(config, nominal))


def replay_rate(config: RunConfig, nominal: int) -> float:
    """Return the Poisson rate at which a step draws rows of the reservoir; 0 without one."""
    stream = config.task.stream
    if not stream.replay:
        return 0.0
    return min(1.0, stream.replay_rate * sampling_rate(config, nominal))


def stage_size(config: RunConfig, nominal: int) -> int:
    """Return the public size of what one stage brings to one client, whose data are `nominal` rows."""
    return max(1, nominal // stages(config))
