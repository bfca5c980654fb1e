"""Every kind of strategy, trainable, algorithm, query, compression and engine by name, in one line each;
nothing heavy is imported for it.

A line names the kind and where its class or function is; that module is imported when a run names the kind,
so that a mistake in a run file costs no import of a model library. `refuses` is the kind's position towards
choices on other axes: none given means that every other choice was considered and is sound.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ffm_secure.foreign import LibraryObject

Refusals = Mapping[tuple[str, str], str]
_NOTHING: Refusals = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One value of an axis: its name in a run file, and where its code is."""

    name: str
    target: str  # "module:attribute"
    refuses: Refusals = field(
        default_factory=lambda: _NOTHING
    )  # (axis, value) -> why the two do not go together
    traits: frozenset[str] = frozenset()

    def load(self) -> LibraryObject:
        """Import the code of this kind."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(slots=True)
class Axis:
    """One axis of choice with its kinds, in the order they were declared."""

    name: str
    kinds: dict[str, Kind] = field(default_factory=dict)

    def register(
        self, name: str, target: str, *, refuses: Refusals = _NOTHING, traits: tuple[str, ...] = ()
    ) -> None:
        """Add a kind.

        Raises:
          ValueError: the name is taken: a later line must not change what an earlier run file means.
        """
        if name in self.kinds:
            raise ValueError(f"{self.name} = {name!r} is registered already, as {self.kinds[name].target}")
        self.kinds[name] = Kind(name=name, target=target, refuses=refuses, traits=frozenset(traits))

    def load(self, name: str) -> LibraryObject:
        """Import the code of a kind."""
        return self.kinds[name].load()

    def has(self, name: str, trait: str) -> bool:
        """Tell whether a kind has a trait."""
        return name in self.kinds and trait in self.kinds[name].traits

    def with_trait(self, trait: str) -> tuple[str, ...]:
        """Return the kinds that have a trait."""
        return tuple(name for name, kind in self.kinds.items() if trait in kind.traits)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds

    def __len__(self) -> int:
        return len(self.kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrNone:
    """The word "none" and the kinds of an axis that have a trait, also those registered later."""

    axis: Axis
    trait: str

    def __iter__(self) -> Iterator[str]:
        return iter(("none", *self.axis.with_trait(self.trait)))

    def __contains__(self, name: object) -> bool:
        return name == "none" or (isinstance(name, str) and self.axis.has(name, self.trait))

    def __len__(self) -> int:
        return 1 + len(self.axis.with_trait(self.trait))


TASKS = Axis("task")
STRATEGIES = Axis("strategy")
TRAINABLES = Axis("trainable")
LIFECYCLES = Axis("lifecycle")
ENGINES = Axis("engine")
QUERIES = Axis("query")
STARTS = OrNone(axis=QUERIES, trait="start")
FINISHES = OrNone(axis=QUERIES, trait="finish")
PERSONALS = Axis("personal")
COMPRESSIONS = Axis("compression")
PERSONAL = OrNone(axis=PERSONALS, trait="at_home")
TRACKERS = Axis("tracker")  # shows what is public already: it goes together with every choice
AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (TASKS, STRATEGIES, TRAINABLES, LIFECYCLES, ENGINES, QUERIES, PERSONALS, COMPRESSIONS)
    }
)

TASKS.register("text_classification", "ffm_secure.tasks.text:TextClassification", traits=("classifies",))
TASKS.register("causal_lm", "ffm_secure.tasks.text:CausalLM", traits=("language",))
TASKS.register("masked_lm", "ffm_secure.tasks.text:MaskedLM", traits=("language",))
TASKS.register("image_classification", "ffm_secure.tasks.image:ImageClassification", traits=("classifies",))
TASKS.register(
    "sequence_to_sequence", "ffm_secure.tasks.sequence:SequenceToSequence", traits=("language", "answers")
)
STRATEGIES.register("average", "ffm_secure.strategies.average:Average")
STRATEGIES.register("avgm", "ffm_secure.strategies.adaptive:ServerOptimizer")
STRATEGIES.register("adam", "ffm_secure.strategies.adaptive:ServerOptimizer")
STRATEGIES.register("yogi", "ffm_secure.strategies.adaptive:ServerOptimizer")
STRATEGIES.register("adam_debiased", "ffm_secure.strategies.debiased:DebiasedAdam")
STRATEGIES.register("adagrad", "ffm_secure.strategies.adaptive:ServerOptimizer")
STRATEGIES.register(
    "geometric_median", "ffm_secure.strategies.group_rules:GeometricMedian", traits=("groups",)
)
STRATEGIES.register(
    "coordinate_median", "ffm_secure.strategies.group_rules:CoordinateMedian", traits=("groups",)
)
STRATEGIES.register("trimmed_mean", "ffm_secure.strategies.group_rules:TrimmedMean", traits=("groups",))
STRATEGIES.register("krum", "ffm_secure.strategies.group_rules:Krum", traits=("groups",))
STRATEGIES.register("multi_krum", "ffm_secure.strategies.group_rules:MultiKrum", traits=("groups",))
STRATEGIES.register("bulyan", "ffm_secure.strategies.group_rules:Bulyan", traits=("groups",))
STRATEGIES.register("root_trust", "ffm_secure.strategies.group_rules:RootTrust", traits=("groups", "root"))
STRATEGIES.register("ffa", "ffm_secure.strategies.lora_rules:FrozenA", traits=("lora",))
STRATEGIES.register("rolora", "ffm_secure.strategies.lora_rules:Alternating", traits=("lora",))
STRATEGIES.register("fedsvd", "ffm_secure.strategies.lora_rules:FedSVD", traits=("lora",))
STRATEGIES.register("fedex", "ffm_secure.strategies.lora_rules:FedEx", traits=("lora",))
STRATEGIES.register("flora", "ffm_secure.strategies.lora_rules:FLoRA", traits=("lora",))
STRATEGIES.register("fedsa", "ffm_secure.strategies.lora_rules:FedSA", traits=("lora",))

TRAINABLES.register("full", "ffm_secure.trainable.full:attach_full")
TRAINABLES.register("head", "ffm_secure.trainable.lora:attach_head")
TRAINABLES.register("lora", "ffm_secure.trainable.lora:attach_lora")
TRAINABLES.register("lora_xs", "ffm_secure.trainable.lora:attach_lora_xs")
TRAINABLES.register("prompt", "ffm_secure.trainable.prompt:attach_prompt", traits=("prompt",))
TRAINABLES.register("prefix", "ffm_secure.trainable.prefix:attach_prefix", traits=("prompt",))
TRAINABLES.register("p_tuning", "ffm_secure.trainable.prompt_kinds:attach_p_tuning", traits=("prompt",))
TRAINABLES.register("deep_prompt", "ffm_secure.trainable.prompt_kinds:attach_deep_prompt", traits=("prompt",))
TRAINABLES.register(
    "prompt_generator", "ffm_secure.trainable.prompt_kinds:attach_prompt_generator", traits=("prompt",)
)

LIFECYCLES.register("finetune", "ffm_secure.lifecycle.base:Algorithm")
LIFECYCLES.register(
    "pretrain", "ffm_secure.lifecycle.pretrain:PreTrain", traits=("public_phases", "public_rows")
)
LIFECYCLES.register("class_sums", "ffm_secure.lifecycle.one_shot:OneShot", traits=("one_shot",))
LIFECYCLES.register("ridge_sums", "ffm_secure.lifecycle.one_shot:OneShot", traits=("one_shot",))
_TEXTS_ALONE = "candidates are texts: choose text_classification"
_FROZEN_FEATURES = (
    "records vote in the features of the model as it was published, and votes make nothing but a head of it: "
    "use trainable head"
)
_VOTES_BY_STAGE = "votes of rows that arrive in stages are not built: leave the stream out"
_VOTES_AMONG_GROUPS = "votes are one sum over everybody, and no rule compares groups of it: use one group"
LIFECYCLES.register(
    "candidate_votes",
    "ffm_secure.lifecycle.one_shot:Votes",
    traits=("one_shot", "asks_again"),
    refuses={
        ("task", "image_classification"): _TEXTS_ALONE,
        **{("trainable", kind): _FROZEN_FEATURES for kind in TRAINABLES if kind != "head"},
        ("stream", "on"): _VOTES_BY_STAGE,
        ("groups", "several"): _VOTES_AMONG_GROUPS,
    },
)

QUERIES.register("candidate_votes", "ffm_secure.queries.candidate_votes:build")
QUERIES.register("class_sums", "ffm_secure.queries.class_sums:build", traits=("start",))
QUERIES.register("ridge_sums", "ffm_secure.queries.ridge_sums:build", traits=("start",))
QUERIES.register("class_prior", "ffm_secure.queries.class_prior:build", traits=("start", "settles"))
QUERIES.register("class_offsets", "ffm_secure.queries.class_offsets:build", traits=("finish",))
QUERIES.register("evaluation", "ffm_secure.queries.evaluation:build")

_NO_HEAD_AT_HOME = "a language model has no head over classes: choose mean_regularised or few_steps"
_NO_CLASSES_AT_HOME = "an offset a class needs classes: choose mean_regularised or few_steps"
PERSONALS.register(
    "mean_regularised", "ffm_secure.lifecycle.personal_steps:mean_regularised", traits=("at_home", "steps")
)
PERSONALS.register("few_steps", "ffm_secure.lifecycle.personal_steps:few_steps", traits=("at_home", "steps"))
PERSONALS.register(
    "head",
    "ffm_secure.lifecycle.personal_steps:head_at_home",
    traits=("at_home", "steps"),
    refuses={("task", task): _NO_HEAD_AT_HOME for task in TASKS.with_trait("language")},
)
PERSONALS.register(
    "prior",
    "ffm_secure.lifecycle.personal_prior:prior_at_home",
    traits=("at_home",),
    refuses={("task", task): _NO_CLASSES_AT_HOME for task in TASKS.with_trait("language")},
)

_WHOLE_BATCH = (
    "what one picture contributes depends on the others of its batch, so nothing bounds a record: use task "
    "image_text_classification, or the client unit"
)
_CONTEXT_INSTEAD = "class texts have a prompt of their own: use context or class_context"
_TEXTS_ARE_HEAD = (
    "the texts of the classes are the head, which is no linear map of features: learn with finetune, without "
    "a start or a finish"
)
_TEXTS_AT_HOME = "the texts of the classes are the head: choose mean_regularised or few_steps"
_STREAM_TEXTS = "which class texts a model knows at a stage was not thought through: use image_classification"
_CLASS_TEXTS: dict[tuple[str, str], str] = {
    ("stream", "on"): _STREAM_TEXTS,
    **{("trainable", kind): _CONTEXT_INSTEAD for kind in TRAINABLES.with_trait("prompt")},
    **{("lifecycle", kind): _TEXTS_ARE_HEAD for kind in LIFECYCLES.with_trait("one_shot")},
    **{("start", kind): _TEXTS_ARE_HEAD for kind in STARTS if kind != "none"},
    **{("finish", kind): _TEXTS_ARE_HEAD for kind in FINISHES if kind != "none"},
    **{("personal", kind): _TEXTS_AT_HOME for kind in ("head", "prior")},
}
_NO_CLASS_TEXTS = "only models that score pictures against texts read class texts: use prompt"
_NOT_SCORED: dict[tuple[str, str], str] = {("task", task): _NO_CLASS_TEXTS for task in TASKS}
_NO_FACTORS = "the rule works on LoRA factors, and a context has none: use average"
TASKS.register(
    "image_text_classification",
    "ffm_secure.tasks.image_text:ImageTextClassification",
    refuses=_CLASS_TEXTS,
    traits=("classifies", "class_texts"),
)
TASKS.register(
    "image_text_contrastive_classification",
    "ffm_secure.tasks.image_text:ImageTextContrastive",
    refuses={**_CLASS_TEXTS, **{("unit", unit): _WHOLE_BATCH for unit in ("record", "person")}},
    traits=("classifies", "class_texts"),
)
for _kind in ("context", "class_context"):
    TRAINABLES.register(
        _kind,
        f"ffm_secure.trainable.context:attach_{_kind}",
        refuses={
            **_NOT_SCORED,
            **{("strategy", rule): _NO_FACTORS for rule in STRATEGIES.with_trait("lora")},
        },
        traits=("context",),
    )

_NO_UPDATE = "a run that takes no step sends no update to compress: its answers are sent whole"
_OTHER_NUMBERS = (
    "its messages are factors or products, not the changes of the broadcast numbers that a support is chosen "
    "by: use projection, rotation or bits, or another strategy"
)
_UNEVEN_NOISE = (
    "it takes one size of noise out of every number, and numbers off the support bear none: use adam, or "
    "projection"
)
_OTHER_PLACES = (
    "noise that is taken back in a later round must stand in the same numbers there: use bits, rotation or "
    "projection, or correlation = 'none'"
)
_ONCE: dict[tuple[str, str], str] = {
    ("lifecycle", kind): _NO_UPDATE for kind in LIFECYCLES.with_trait("one_shot")
}
COMPRESSIONS.register("none", "ffm_secure.compression.whole:build")
COMPRESSIONS.register("bits", "ffm_secure.compression.whole:build", refuses=_ONCE)
COMPRESSIONS.register("rotation", "ffm_secure.compression.rotation:build", refuses=_ONCE)
COMPRESSIONS.register("projection", "ffm_secure.compression.projection:build", refuses=_ONCE)
COMPRESSIONS.register(
    "support",
    "ffm_secure.compression.support:build",
    refuses={
        **_ONCE,
        **{("strategy", rule): _OTHER_NUMBERS for rule in STRATEGIES.with_trait("lora")},
        ("strategy", "adam_debiased"): _UNEVEN_NOISE,
        ("correlation", "banded"): _OTHER_PLACES,
    },
)

_ASKS_THE_STUDENT = (
    "it asks the student about private rows, and no owner holds the student: leave it out, or fine-tune one "
    "model"
)
_MEAN_OF_ANSWERS = (
    "the server trains the student on the mean of the owners' answers; what another rule makes of them was "
    "not tried: use average"
)
_NO_CHANGE = (
    "probabilities on public rows are sent, no change of a model: leave it at 'none', or take fewer public "
    "rows"
)
_TEXTS_OF_CLASSES = (
    "owners whose models read the classes' texts differently were not tried: use text_classification or "
    "image_classification"
)
_OWN_ALREADY = "every owner has a model of its own already: let it learn from the student by back_steps"
LIFECYCLES.register(
    "distillation",
    "ffm_secure.lifecycle.distillation:Distil",
    traits=("public_rows", "distils"),
    refuses={
        **{
            ("task", task): "answers are probabilities of classes: choose a classification task"
            for task in TASKS.with_trait("language")
        },
        **{("task", task): _TEXTS_OF_CLASSES for task in TASKS if task.startswith("image_text")},
        **{("start", kind): _ASKS_THE_STUDENT for kind in QUERIES.with_trait("start")},
        **{("finish", kind): _ASKS_THE_STUDENT for kind in QUERIES.with_trait("finish")},
        ("evaluation", "held_back"): _ASKS_THE_STUDENT,
        **{("strategy", rule): _MEAN_OF_ANSWERS for rule in STRATEGIES if rule != "average"},
        **{("compression", kind): _NO_CHANGE for kind in COMPRESSIONS if kind != "none"},
        **{("personal", kind): _OWN_ALREADY for kind in PERSONALS},
        ("weighting", "q_fair"): "no loss of the student at an owner is known: use weighting = 'uniform'",
        ("proximal", "on"): "an own model has no broadcast model to be pulled to: set proximal to 0",
        ("noise_shares", "sum"): (
            "an own model learns at home, where a share of the noise protects no record: use noise_shares = "
            "'site'"
        ),
        ("correlation", "banded"): (
            "votes of one owner in two rounds are nearly the same, and noise that is taken back was not "
            "thought through for them: use correlation = 'none'"
        ),
        ("groups", "several"): "no rule compares means of answers, so groups only add noise: use one group",
        ("stream", "on"): "what an own model keeps of rows that are gone was not thought through",
    },
)

ENGINES.register("local", "ffm_secure.engines.local:LocalEngine")

TRACKERS.register("csv", "ffm_secure.tracking.csv_file:CsvFile")
TRACKERS.register("tensorboard", "ffm_secure.tracking.tensorboard:TensorBoard")
TRACKERS.register("mlflow", "ffm_secure.tracking.mlflow_run:MlflowRun")
TRACKERS.register("wandb", "ffm_secure.tracking.wandb_run:WandbRun")
