"""Put a plan or a finished run into the records that people and reports read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from defenses.dp import Event
from defenses.he.collusion import Kind, collusion
from ffm_secure.config import compatibility, run_file
from ffm_secure.config.distilled import distils
from ffm_secure.config.groups import compares_groups, fewest_groups, group_size
from ffm_secure.config.run_file import OBSERVERS, RunConfig
from ffm_secure.config.schema import to_table
from ffm_secure.data.dataset import UNSTATED, Examples
from ffm_secure.engines.simulation import Prepared, Simulation, evaluation_examples
from ffm_secure.federation import TrainingResult
from ffm_secure.lifecycle.stream_measures import summary_of
from ffm_secure.models.backbone import fingerprint, vector_fingerprint
from ffm_secure.privacy.expectations import (
    bound_warnings,
    client_warnings,
    noise_warnings,
    sum_warnings,
)
from ffm_secure.privacy.mechanism import replay_events
from ffm_secure.privacy.query_noise import answers_paid
from ffm_secure.privacy.statements import SEEDED, statements
from ffm_secure.protection.codec import uncompressed_bytes
from ffm_secure.site.allowance import composed
from ffm_secure.protection.masked import fewest_to_open, sharing_graph
from ffm_secure.quantities import size, small
from ffm_secure.queries import agenda, candidate_votes, evaluation
from ffm_secure.queries.base import Setting, recall
from ffm_secure.records import (
    AuditSummary,
    ClassMeasures,
    ClientOutcome,
    DataRelease,
    Observer,
    PersonalOutcome,
    PlannedQuery,
    PlanSummary,
    ReleasedEvaluation,
    RunSummary,
    StreamSummary,
)
from ffm_secure.report.outcome import best_of
from ffm_secure.server.rounds import stage_scores
from ffm_secure.strategies import ServerState
from ffm_secure.tasks.base import Classification
from ffm_secure.tasks.measures import class_measures

_BACKENDS: Mapping[str, Kind] = {"none": "plain", "secagg": "masking", "bfv": "bfv", "ckks": "ckks"}
_PACKAGES = (
    "ffm-secure",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "cryptography",
    "opacus",
    "tenseal",
    "numpy",
)


def describe(prepared: Prepared) -> PlanSummary:
    """Say what the run would train, send, spend and reveal."""
    config = prepared.config
    federation, trained = config.federation, prepared.trainable
    share = trained.size / max(1, prepared.backbone.total_parameters)
    up = prepared.codec.length * prepared.codec.modulus_bits // 8
    before = _uncompressed(prepared)
    down = 4 * (trained.size if prepared.spec.sheet is None else prepared.spec.sheet.size)
    sealed = {
        "none": "in the clear",
        "secagg": "masked",
        "bfv": "encrypted (BFV)",
        "ckks": "encrypted (CKKS)",
    }[config.protection.kind]
    return PlanSummary(
        headline=f"{config.name}: {federation.rounds} rounds, {config.task.clients} clients, "
        f"{federation.cohort} a round{_in_groups(config)}, each at most "
        f"{compatibility.participation_cap(config)} times",
        trains=f"{'; '.join(trained.description)}: {trained.size:,} of "
        f"{prepared.backbone.total_parameters:,} numbers ({share:.2%})",
        trainable_parameters=trained.size,
        total_parameters=prepared.backbone.total_parameters,
        sends=f"{size(up)} per client and round, {sealed}, {prepared.codec.modulus_bits}-bit ring; "
        f"{size(down)} down{_compressed_words(prepared, before)}",
        bytes_up_per_client_round=up,
        bytes_down_per_client_round=down,
        spends=_spends(prepared),
        noise_multiplier=prepared.mechanism.noise_multiplier,
        statements=statements(config, prepared.mechanism, _planned(prepared)),
        reveals={observer: _reveals(config, observer) for observer in OBSERVERS},
        breaks=_breaks(config),
        warnings=tuple(_warnings(prepared)),
        queries=_planned_queries(prepared),
        bytes_up_uncompressed=before,
    )


def _uncompressed(prepared: Prepared) -> int:
    """Return what an upload would take without compression; 0 where nothing is compressed."""
    config, spec = prepared.config, prepared.spec
    if config.compression.kind == "none":
        return 0
    return uncompressed_bytes(
        config, spec.mechanism, size=spec.compression.size, largest_weight=spec.codec.max_weight
    )


def _compressed_words(prepared: Prepared, before: int) -> str:
    if not before:
        return ""
    return f"; {prepared.spec.compression.words()}; uncompressed {size(before)} up"


def _in_groups(config: RunConfig) -> str:
    groups = config.protection.groups
    return f" in {groups} random groups of {group_size(config)}" if groups > 1 else ""


def _planned_queries(prepared: Prepared) -> tuple[PlannedQuery, ...]:
    """Say what each question beside learning sends and costs."""
    spec = prepared.spec
    planned = []
    for name, question in spec.questions.items():
        codec, noise = question.codec, question.mechanism
        events = tuple(
            noise.event(release=name) for _ in range(answers_paid(spec.config, question.item.answers))
        )
        epsilon = composed(tuple(Counter(events).items()), spec.config.privacy.delta or 1e-5)
        planned.append(
            PlannedQuery(
                query=name,
                asks=question.item.asks,
                words=question.query.words,
                rows="held back" if question.item.held_back else "learned from",
                numbers=question.query.size,
                bytes_up=codec.length * codec.modulus_bits // 8,
                epsilon=epsilon if spec.has_dp_guarantee else math.inf,
                noise_multiplier=noise.noise_multiplier,
                answers=question.item.answers,
            )
        )
    return tuple(planned)


def summarise(
    ready: Simulation,
    trained: TrainingResult,
    *,
    zero_metric: float,
    outcomes: tuple[ClientOutcome, ...],
    seconds: float,
    ended: str,
    start: Tensor | None = None,
    personal: tuple[PersonalOutcome, ...] = (),
    audit: AuditSummary | None = None,
) -> RunSummary:
    """Collect a run into what its report shows; `ended` is a time of day, ISO 8601, UTC.

    `start` is the vector [d] it began with, which a stream is compared with.
    """
    prepared, config = ready.prepared, ready.config
    head = ready.ledger.head()
    named = config.task.split.kind == "natural"
    seen_by_all = public_summary(
        prepared,
        trained,
        zero_metric=zero_metric,
        public=evaluation_examples(prepared),
        spent=ready.largest_history() if config.privacy.unit != "none" else (),
        seconds=seconds,
        ended=ended,
    )
    return replace(
        seen_by_all,
        clients=outcomes,
        clients_source="simulation's own view, never released",
        audit=audit,
        ledger_entries=head.sequence,
        ledger_head=head.hash,
        owners=tuple(site.data.name for site in ready.sites) if named else (),
        digests=_digests(ready, trained),
        data=_data_release(prepared),
        evaluation=_released(ready, trained),
        stream=_stream(ready, trained, start),
        personal=personal,
    )


def public_summary(
    prepared: Prepared,
    trained: TrainingResult,
    *,
    zero_metric: float,
    public: Examples,
    spent: Sequence[Event],
    seconds: float,
    ended: str,
) -> RunSummary:
    """Collect what whoever runs the server knows of a run: nothing of single owners, no ledger.

    `public` are the rows that accuracy was read on: the commonest private label would be a release.
    """
    config, task = prepared.config, prepared.task
    private = config.privacy.unit != "none"
    best = best_of(trained.records, higher_is_better=task.higher_is_better)
    return RunSummary(
        name=config.name,
        status=trained.status,
        stamps=(SEEDED,) if config.privacy.noise == "seeded" else (),
        config=to_table(config),
        plan=describe(prepared),
        rounds=trained.records,
        statements=statements(config, prepared.mechanism, spent),
        budget_epsilon=config.privacy.epsilon if private else math.inf,
        metric_name=task.metric_name,
        metric_final=trained.records[-1].metric if trained.records else zero_metric,
        metric_zero_round=zero_metric,
        metric_majority=task.majority(public, public),
        higher_is_better=task.higher_is_better,
        clients=(),
        clients_source="every site's own; the coordinator has receipts alone",
        audit=None,
        ledger_entries=0,
        ledger_head="",
        software=software(),
        seconds=seconds,
        round_best=None if best is None else best.round,
        metric_best=None if best is None else best.metric,
        ended=ended,
        classes=_class_measures(prepared, trained, public),
    )


def _class_measures(prepared: Prepared, trained: TrainingResult, public: Examples) -> ClassMeasures | None:
    """Measure the last round's model class by class on public rows; None where it does not classify, or where
    owners keep a part of it.
    """
    task, trainable = prepared.task, prepared.trainable
    if not isinstance(task, Classification) or prepared.spec.strategy.home or not trained.records:
        return None
    before = trainable.flatten()
    trainable.load_vector(trained.state.vector)
    try:
        chances = task.chances(trainable.model, task.encode(public), device=prepared.spec.device)
    finally:
        trainable.load_vector(before)
    return class_measures(chances, task.labels(public), task.data.label_names)


def _digests(ready: Simulation, trained: TrainingResult) -> dict[str, str]:
    """Return SHA-256 of what was run and what came of it."""
    trained_here = {id(parameter) for parameter in ready.trainable.parameters.values()}
    named = ready.trainable.model.named_parameters()
    frozen = {name: value for name, value in named if id(value) not in trained_here}
    return {
        "frozen model": fingerprint(frozen),
        "run file": hashlib.sha256(run_file.dump(ready.config).encode()).hexdigest(),
        "trained numbers": vector_fingerprint(trained.state.vector),
    }


def _data_release(prepared: Prepared) -> DataRelease:
    """Say of the data what may be said to anyone; lengths are those of the public rows evaluated on."""
    config, data = prepared.config, prepared.dataset
    lengths = prepared.task.full_lengths(evaluation_examples(prepared))
    cut = None if lengths is None or not len(lengths) else float(np.mean(lengths > config.task.max_length))
    return DataRelease(
        source=config.task.data,
        public_rows=len(data.validation),
        held_out=data.held_out,
        classes=data.label_names or (),
        classes_from=data.names_from if data.label_names else "",
        max_length=0 if lengths is None else config.task.max_length,
        cut=cut,
    )


def _released(ready: Simulation, trained: TrainingResult) -> ReleasedEvaluation | None:
    """Read what a charged evaluation released; None where none was asked for, or none was opened."""
    spec = ready.spec
    opened = recall(trained.state, evaluation.NAME) if evaluation.NAME in spec.questions else None
    if opened is None:
        return None
    names = ready.prepared.dataset.label_names or ()
    setting = Setting(config=spec.config, trainable=ready.trainable, classes=ready.prepared.facts.classes)
    return evaluation.released(
        opened, evaluation.cells_of(setting), class_names=names, owner_names=spec.owners
    )


def _stream(ready: Simulation, trained: TrainingResult, start: Tensor | None) -> StreamSummary | None:
    """Read how the stages of a stream went on public rows; None without a stream."""
    if ready.server.stages is None or start is None:
        return None
    before = ServerState(round=0, vector=start)
    return summary_of(stage_scores(ready.server, before), trained.records)


def software() -> Mapping[str, str]:
    """Return the versions a figure depends on."""
    versions = {"python": platform.python_version(), "system": platform.system()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _spends(prepared: Prepared) -> str:
    privacy = prepared.config.privacy
    if prepared.mechanism.noise_multiplier == 0.0:
        return f"nothing is guaranteed, epsilon infinite; reason given: {privacy.reason}"
    if privacy.noise == "seeded":
        return f"nothing is guaranteed, epsilon infinite: {SEEDED}"
    if privacy.unit == "person":
        unit = f"person ({privacy.records_per_person} records)"
    else:
        unit = privacy.unit
    spends = (
        f"epsilon {privacy.epsilon:g} at delta {small(privacy.delta)} per {unit} and data owner; clip "
        f"{privacy.clip_norm:g}, noise {prepared.mechanism.noise_multiplier:.3f} x clip"
        f"{_where_noise_is(prepared)}"
    )
    if prepared.extension is not None:
        noise = prepared.mechanism.noise_multiplier
        spends = f"{spends}; {prepared.extension.words(privacy.epsilon, noise)}"
    if prepared.outlook is not None:
        return f"{spends}; {prepared.outlook.words()}"
    return (
        f"{spends}; the ledger lies in the run, as the run file asks: what rows "
        "spend elsewhere is not counted"
    )


def _where_noise_is(prepared: Prepared) -> str:
    shared = prepared.mechanism.sum_level
    if shared is None:
        return ""
    honest = shared.inner.honest_survivors
    return f" in the opened sum, of which every site adds 1 part in {honest} of the variance"


def _planned(prepared: Prepared) -> tuple[Event, ...] | None:
    """Return what one owner will have gone through at the end of an extended run; None where a run has one
    noise.
    """
    extension, spec = prepared.extension, prepared.spec
    answers = spec.answers_planned(held_back=False)
    replays = replay_events(prepared.mechanism, prepared.config)
    if not spec.has_dp_guarantee or (extension is None and not answers and not replays):
        return None
    event = prepared.mechanism.event(release="update of one round")
    if extension is None:
        rounds = compatibility.paid_rounds(prepared.config) if spec.learns else 0
        return (*answers, *(event for _ in range(rounds)), *replays)
    return (
        *extension.history,
        *(event for _ in range(compatibility.paid_rounds(prepared.config, extension.turns))),
    )


def _reveals(config: RunConfig, observer: Observer) -> str:
    shared = config.privacy.noise_shares == "sum"
    whole = config.privacy.unit == "client" or shared
    noised = "not noised"
    if shared:
        noised = "with a share of the noise"
    elif config.privacy.unit in ("record", "person"):
        noised = "already noised"
    least, sums = compatibility.minimum_survivors(config), "sums"
    if config.protection.groups > 1:
        sums = f"{config.protection.groups} sums a round, each"
    if observer == "public":
        votes = config.federation.lifecycle.kind == candidate_votes.NAME
        return "the final model" + (", and the candidates kept with their noisy votes" if votes else "")
    if observer == "client":
        extra = ""
        if config.protection.kind in ("bfv", "ckks"):
            extra = " and, as a key holder, every sum"
        if distils(config):
            return f"the student's answers to the public rows after every round{extra}"
        return f"the global model of every round{extra}"
    if observer == "server":
        return {
            "none": f"every client's update, {noised}, and the global model of every round",
            "secagg": f"{sums} of at least {least} clients"
            + (", noised as a whole" if whole else f", {noised}"),
            "bfv": "ciphertexts, and the sum the key holders return",
            "ckks": "ciphertexts, and the rounded sum the key holders return",
        }[config.protection.kind]
    return {
        "none": f"every client's update, {noised}",
        "secagg": f"sums less the updates of {config.protection.colluding} colluding clients",
        "bfv": f"with one client's key: every client's update, {noised}",
        "ckks": f"with one client's key: every client's update, {noised}",
    }[config.protection.kind]


def _breaks(config: RunConfig) -> str:
    """State who can decrypt, and which collusion breaks it."""
    kind, cohort, fewest = (
        config.protection.kind,
        group_size(config) if config.protection.kind == "secagg" else config.federation.cohort,
        compatibility.minimum_survivors(config),
    )
    tolerated, lies = 0, ""
    if kind == "secagg":
        graph, active = sharing_graph(config), config.protection.mode == "active"
        tolerated = (2 * graph.threshold - graph.neighbours if active else graph.threshold) - 1
        if graph.kind == "harary":  # beyond what was provided for it depends on where on the ring they sit
            tolerated = config.protection.colluding
        tolerated = max(0, min(tolerated, fewest - 2))  # so many leave two honest clients in every sum
        answer = "Not protected if"
        if active:
            answer = "This holds even if"
        lies = f" {answer} the server lies about who dropped out."
    stated = collusion(_BACKENDS[kind], parties=cohort, fewest=min(fewest, cohort), tolerated=tolerated)
    return f"{stated.who_can_decrypt} {stated.broken_by}{lies}"


def _group_warnings(config: RunConfig) -> list[str]:
    """Say what sums over groups cost, and what they do not do."""
    groups, warnings = config.protection.groups, []
    if groups == 1:
        return []
    size, needed = group_size(config), fewest_groups(config)
    if fewest_to_open(config) == size > 1:
        warnings.append(
            f"a group's sum needs all its {size} clients: any one that is lost closes its group, and with "
            f"fewer than {needed} of {groups} groups a round is given up; lower protection.threshold"
        )
    if config.privacy.unit == "client" or config.privacy.noise_shares == "sum":
        warnings.append(
            f"every group's sum carries its own whole noise, so the mean over all has {groups**0.5:.2g} x "
            "the noise of one sum over the cohort"
        )
    if not compares_groups(config):
        warnings.append(
            f"federation.strategy.kind = '{config.federation.strategy.kind}' adds the groups up: only the "
            "check of every group's sum keeps a malicious client out"
        )
    elif agenda.queries(config):
        warnings.append("answers to queries are added over the groups: no rule compares them")
    return warnings


def _warnings(prepared: Prepared) -> list[str]:
    config, warnings = prepared.config, []
    if config.privacy.noise == "seeded":
        warnings.append(SEEDED)
    if config.privacy.unit != "none":
        declared = "taken from the data; declare it with task.nominal_examples"
        if config.task.nominal_examples:
            declared = "declared"
        warnings.append(
            f"taken to be public: validation rows, class names, and {prepared.spec.public_client_size} "
            f"examples a client ({declared})"
        )
        if prepared.dataset.held_out:
            warnings.append(
                f"{config.task.data} has no validation part: {prepared.dataset.held_out:,} of its rows "
                "leave the clients, are taken to be public and are not protected by any epsilon; give "
                "validation rows that may be public"
            )
    warnings += _group_warnings(config)
    warnings += _vote_warnings(prepared)
    if fewest_to_open(config) == config.federation.cohort > 1:
        warnings.append(
            f"a sum needs all {config.federation.cohort} clients of a cohort: any one that is lost gives up "
            "the round, and one that says its budget does not pay ends the run; take more clients, or lower "
            "protection.threshold or protection.colluding"
        )
    if (
        config.privacy.unit in ("record", "person")
        and config.privacy.delta > 1 / prepared.spec.public_client_size
    ):
        warnings.append(
            f"privacy.delta = {config.privacy.delta:g} is above 1 / {prepared.spec.public_client_size} "
            "examples of a client; choose a smaller one"
        )
    record_level, in_shares = prepared.mechanism.record_level, prepared.mechanism.sum_level
    sampled = record_level or (in_shares.inner if in_shares is not None else None)
    if sampled is not None and sampled.sampling_rate == 1.0:
        warnings.append("batch_size reaches a client's whole data: sampling does not amplify privacy")
    warnings += bound_warnings(config, record_level)
    warnings += noise_warnings(config, record_level, size=prepared.codec.size)
    warnings += sum_warnings(config, in_shares)
    warnings += client_warnings(config, prepared.mechanism.client_level)
    if config.protection.kind != "none" and config.privacy.unit == "none":
        warnings.append("hiding single updates is not differential privacy: no epsilon is claimed")
    if licence := getattr(prepared.dataset, "license_note", ""):
        warnings.append(f"{config.task.data}: {_licence_words(licence)}")
    return warnings


def _vote_warnings(prepared: Prepared) -> list[str]:
    """Say where there are more candidates than votes can tell apart."""
    question = prepared.spec.questions.get(candidate_votes.NAME)
    records = prepared.spec.public_client_size * prepared.config.task.clients
    if question is None or 3 * question.query.room <= records:
        return []
    return [
        f"{question.query.room:,} candidates for about {records:,} records: with more than a third as many, "
        "the votes of each drown in noise; name fewer, or set federation.lifecycle.votes.asked"
    ]


def _licence_words(licence: str) -> str:
    if licence == UNSTATED:
        return "its licence is not stated; a README.md beside the data says it in a line '**Licence:** ...'"
    return licence


def outcomes(
    ready: Simulation, trained: TrainingResult, start: Tensor, *, rows: int = 2000
) -> tuple[ClientOutcome, ...]:
    """Evaluate the first and last model on every client's own data: a simulation's view, marked as such.

    At most `rows` examples are looked at over all clients (at least 8 of each), so that a long list of
    clients stays cheap.
    """
    participations = Counter(client for record in trained.records for client in record.cohort)
    share = max(8, rows // len(ready.sites))
    shares = []
    for site in ready.sites:
        shares.append(site.data.examples.take(range(min(len(site.data.examples), share))))
    before = []
    for examples in shares:
        before.append(ready.evaluate(start, examples).metric)
    last = len(trained.records) + 1
    after = []
    for site, examples in zip(ready.sites, shares, strict=True):
        own = ready.own_vector(site.data.index, trained.state.vector, before=last)
        after.append(ready.evaluate(own, examples).metric)
    guaranteed = ready.spec.has_dp_guarantee
    return tuple(
        ClientOutcome(
            client=site.data.name,
            examples=len(site.data.examples),
            participations=participations[index],
            metric=after[index],
            metric_before=before[index],
            epsilon=site.ledger.epsilon() if guaranteed else math.inf,
            budget=ready.config.privacy.epsilon if guaranteed else math.inf,
        )
        for index, site in enumerate(ready.sites)
    )
