"""The model of a run and what everybody agrees on about it:
no data is needed, so an audit can do it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from defenses.dp import Event, balanced_schedule
from defenses.random_source import RandomSource
from ffm_secure import compression, record_codec, trainable
from ffm_secure.config import compatibility
from ffm_secure.config.groups import group_size
from ffm_secure.config.run_file import RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.config.owners import numbered_names
from ffm_secure.errors import PlanRefused, StoreError
from ffm_secure.lifecycle.base import Algorithm
from ffm_secure.models import backbone as models
from ffm_secure.models.backbone import Backbone, fingerprint
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.privacy.mechanism import Mechanism
from ffm_secure.privacy.query_noise import answers_paid, calibrate_query
from ffm_secure.protection.codec import FAIR_LEVELS, VectorCodec, codec_for, grid_codec
from ffm_secure.protection.masked import SessionBinding
from ffm_secure.queries import agenda
from ffm_secure.queries.base import Setting
from ffm_secure.registry import LIFECYCLES, QUERIES
from ffm_secure.agreed.run_spec import Question, RunSpec
from ffm_secure.storage.durable import write_atomic
from ffm_secure.strategies import Strategy, merges_into_base
from ffm_secure.strategies import build as build_strategy
from ffm_secure.trainable import TrainableModel
from ffm_secure.record_codec import read_regular

_PUBLIC_FACTS = "public_facts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicFacts:
    """What a run takes to be public about its data:
    the size of one client, the classes, and who takes part.
    """

    format: int = 1
    public_client_size: int
    classes: int | None
    owners: tuple[str, ...] = ()  # empty: by number
    candidates: tuple[str, ...] = ()  # public texts that private records vote on
    texts: int = 0  # public rows that a lifecycle reads
    texts_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Hold the model of a run, what of it is trained, and the spec."""

    config: RunConfig
    backbone: Backbone
    trainable: TrainableModel
    spec: RunSpec
    facts: PublicFacts

    @property
    def owners(self) -> tuple[str, ...]:
        """Return the name of every data owner."""
        return self.spec.owners

    @property
    def strategy(self) -> Strategy:
        """Return the strategy."""
        return self.spec.strategy

    @property
    def mechanism(self) -> Mechanism:
        """Return what owns sampler, bound, noise and event."""
        return self.spec.mechanism

    @property
    def codec(self) -> VectorCodec:
        """Return how updates travel."""
        return self.spec.codec

    @property
    def device(self) -> str:
        """Return where tensors live."""
        return self.spec.device

    def binding(self, question: Question | None = None) -> SessionBinding | None:
        """Bind what sites of secure aggregation hold a session to, about an update or an answer; None without
        it, as hashing a backbone takes a while.
        """
        if self.config.protection.kind != "secagg":
            return None
        return SessionBinding(
            backbone=self.backbone_digest(),
            layout=self.spec.layout_digest if question is None else question.layout_digest,
            mechanism=self.spec.mechanism_digest if question is None else question.mechanism.digest(),
        )

    def backbone_digest(self) -> str:
        """Return the fingerprint of the tensors that are not trained."""
        trained = {id(parameter) for parameter in self.trainable.parameters.values()}
        frozen = {}
        for name, value in self.trainable.model.named_parameters():
            if id(value) not in trained:
                frozen[name] = value
        return fingerprint(frozen)


def load_model(
    config: RunConfig,
    base: Path,
    facts: PublicFacts,
    *,
    multiplier: float = 0.0,
    history: Sequence[Event] = (),
    turns: int = 0,
) -> LoadedModel:
    """Load the backbone, attach what is trained, work out the spec.

    `multiplier` is the noise a run has begun with. For a run that goes on beyond its last round, `history` is
    what an owner has paid for in it, and `turns` how often one may still take part.

    Raises:
      ModelError, BudgetExceeded: with what to do.
    """
    backbone = models.load_backbone(
        config.model.name,
        kind=config.task.kind,
        labels=facts.classes,
        base=base,
        seed=config.seed,
        dtype=config.model.dtype,
        random_weights=config.model.weights == "random",
        class_text=config.task.class_text,
    )
    trained = _attach(config, backbone)
    strategy = build_strategy(config.federation.strategy, trained, seed=config.seed)
    algorithm: Algorithm = LIFECYCLES.load(config.federation.lifecycle.kind)()
    sheet = algorithm.sheet(facts.texts, facts.classes, facts.texts_digest)
    shortened = compression.build(config, strategy, trained.size if sheet is None else sheet.size)
    questions = {item.query: _question(config, item, trained, facts) for item in agenda.queries(config)}
    if LIFECYCLES.has(config.federation.lifecycle.kind, "one_shot"):
        mechanism: Mechanism = questions[config.federation.lifecycle.kind].mechanism
    else:
        asked = () if history else _asked(config, questions)
        mechanism = calibrate(
            config,
            size=shortened.length,
            public_client_size=facts.public_client_size,
            multiplier=multiplier,
            history=(*history, *asked),
            turns=turns,
        )
    spec = _agree(config, trained, strategy, shortened, mechanism, facts, questions, algorithm)
    spec = replace(spec, sheet=sheet)
    trained.model.to(spec.device)
    return LoadedModel(config=config, backbone=backbone, trainable=trained, spec=spec, facts=facts)


def _attach(config: RunConfig, backbone: Backbone) -> TrainableModel:
    options = {
        **to_table(config.model.trainable),
        "folded": merges_into_base(config.federation.strategy),
    }
    attached = trainable.attach(backbone, options, task_kind=config.task.kind, seed=config.seed)
    if config.model.adapter:
        trainable.start_from(attached, Path(config.model.adapter).expanduser())
        attached.description += ("it starts from an adapter; what that was trained on is not counted here",)
    return attached


def _question(config: RunConfig, item: agenda.Item, trained: TrainableModel, facts: PublicFacts) -> Question:
    """Build one query of a run, with the noise and the code of its answer."""
    setting = Setting(config=config, trainable=trained, classes=facts.classes, candidates=facts.candidates)
    query = QUERIES.load(item.query)(setting)
    noise = calibrate_query(
        config,
        query,
        epsilon=item.epsilon,
        public_client_size=facts.public_client_size,
        answers=item.answers,
    )
    codec = grid_codec(
        size=query.size,
        clients=group_size(config),
        value_bits=noise.value_bits,
        bound=((1 << (noise.value_bits - 1)) - 1) / noise.scale,
        grid_scale=noise.scale,
        noise_bound=noise.noise_bound,
    )
    schedule = question_schedule(config, item)
    return Question(item=item, query=query, mechanism=noise, codec=codec, schedule=schedule)


def _asked(config: RunConfig, questions: Mapping[str, Question]) -> tuple[Event, ...]:
    """Return what the questions put to the rows that are learned from cost one owner, one event an answer."""
    if config.privacy.unit == "none":
        return ()
    return tuple(
        question.mechanism.event(release=name)
        for name, question in questions.items()
        if not question.item.held_back
        for _ in range(answers_paid(config, question.item.answers))
    )


def question_schedule(config: RunConfig, item: agenda.Item) -> tuple[tuple[int, ...], ...]:
    """Return the cohort of every time a question is put; no owner is in two of them, of one stage."""
    return _by_stage(config, item.asks, item.query)


def _by_stage(config: RunConfig, rounds: int, *names: str) -> tuple[tuple[int, ...], ...]:
    """Return a balanced schedule, which begins anew with every stage of a stream."""
    stages = compatibility.stages(config)
    cohorts: list[tuple[int, ...]] = []
    for stage in range(stages):
        later = (f"stage {stage}",) if stage else ()
        schedule = balanced_schedule(
            config.task.clients,
            rounds=rounds // stages,
            cohort=config.federation.cohort,
            source=RandomSource.seeded(config.seed).derive("schedule", *names, *later),
        )
        for cohort in schedule:
            cohorts.append(tuple(int(client) for client in cohort))
    return tuple(cohorts)


def _agree(
    config: RunConfig,
    trained: TrainableModel,
    strategy: Strategy,
    shortened: compression.Compression,
    mechanism: Mechanism,
    facts: PublicFacts,
    questions: Mapping[str, Question],
    algorithm: Algorithm,
) -> RunSpec:
    """Work out what the server and every site agree on."""
    size, public_client_size = shortened.length, facts.public_client_size
    if mechanism.sum_level is not None:
        _require_plain_sums(config, strategy, algorithm)
    largest_weight = _largest_weight(config, public_client_size)
    only = questions.get(config.federation.lifecycle.kind)
    return RunSpec(
        config=config,
        owners=facts.owners or numbered_names(config.task.clients),
        public_client_size=public_client_size,
        layout=trained.layout,
        algorithm=algorithm,
        strategy=strategy,
        mechanism=mechanism,
        codec=only.codec
        if only is not None
        else codec_for(config, mechanism, size=size, largest_weight=largest_weight),
        schedule=only.schedule if only is not None else schedule_of(config),
        device=choose_device(config.speed.device),
        compression=shortened,
        first=compression.first_vector(shortened, trained.flatten()),
        questions=questions,
    )


def _require_plain_sums(config: RunConfig, strategy: Strategy, algorithm: Algorithm) -> None:
    """Refuse kinds, registered by whomever, that would send something else than the sum of bounded gradients.

    Raises:
      PlanRefused: noise in shares would not protect a record in what they send.
    """
    own = type(strategy)
    sends_sums = own.message is Strategy.message and own.mask is Strategy.mask and not strategy.home
    reasons = []
    if not sends_sums or own.sends is not Strategy.sends:
        reasons.append(
            f"federation.strategy.kind = '{config.federation.strategy.kind}' with "
            "privacy.noise_shares = 'sum': it reworks what a "
            "site sends, and a share of the noise protects a record only in a plain sum; use "
            "noise_shares = 'site'"
        )
    if type(algorithm).learn is not Algorithm.learn:
        reasons.append(
            f"federation.lifecycle.kind = '{config.federation.lifecycle.kind}' with "
            "privacy.noise_shares = 'sum': it makes sites do "
            "something else than add up bounded gradients; use noise_shares = 'site'"
        )
    if reasons:
        raise PlanRefused(reasons)


def schedule_of(config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Return the cohort of every private round.

    Guarantee: a run of more rounds begins with the cohorts of one of fewer.
    """
    return _by_stage(config, compatibility.private_rounds(config))


def _largest_weight(config: RunConfig, public_client_size: int) -> int:
    """Return the most one client may count for: a public bound, never the largest client there is."""
    if config.federation.weighting == "q_fair":
        return FAIR_LEVELS
    if config.federation.weighting != "examples":
        return 1
    return config.federation.largest_weight or 16 * public_client_size


def write_facts(folder: Path, facts: PublicFacts) -> None:
    """Note in a run directory what the run takes to be public."""
    write_atomic(folder / _PUBLIC_FACTS, record_codec.canonical_bytes(facts))


def read_facts(folder: Path) -> PublicFacts:
    """Read what a run noted.

    Raises:
      StoreError: it noted nothing, as runs of earlier versions did.
    """
    path = folder / _PUBLIC_FACTS
    try:
        content = read_regular(path)
    except OSError:
        raise StoreError(f"{path}: is missing; only a run that recorded observations has it") from None
    return record_codec.from_bytes(PublicFacts, content, str(path))


def stored_noise(folder: Path | None) -> float:
    """Return the noise multiplier a run began with, 0 if it has not begun."""
    path = None
    if folder is not None:
        path = folder / "noise.json"
    if path is None or not path.is_file():
        return 0.0
    try:
        value = float(json.loads(read_regular(path))["noise_multiplier"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(f"{path}: is damaged; start the run under another name") from None
    if not 0.0 < value < 1e9:
        raise StoreError(f"{path}: is damaged; start the run under another name")
    return value


def choose_device(wanted: str) -> str:
    """Return a torch device name; auto takes an accelerator if there is one."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"
