"""Play each observer against a run: the same update at every point of its way, each attack with its control."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from attacks import canary, curves
from attacks.command import load_model, load_tokenizer
from attacks.contract import Attack, Budget, Prior
from attacks.inversion.tokens import vocabulary_of
from attacks.observation import Knowledge, Observation, ObservationError, load_observation
from attacks.registry import ATTACKS
from attacks.rehearsal import guessed, noise_only, rehearse
from attacks.scoring import pooled
from attacks.truth import Truth, load_truth
from attacks.verdict import Judgement, Result, judge, judge_unknown, tried, unless_guessed
from defenses.dp import RecordMechanism
from defenses.random_source import RandomSource
from ffm_secure import client_replay, plan, report, setup
from ffm_secure.audit_words import Decode, decoder, sentence
from ffm_secure.canary_rounds import client_canaries, record_canaries
from ffm_secure.config import RunConfig
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.pictures import side_by_side
from ffm_secure.store import Store
from ffm_secure.types import (
    AuditFinding,
    AuditSummary,
    LeakCurve,
    Observer,
    Point,
    RecoveredPair,
    RunSummary,
)

CANDIDATES = 32  # members and as many outsiders in a membership test
CANARIES = 1000
SIGNIFICANCE = 0.05

# Attacks that search for minutes: they are given one record, the client's worst case, and no place in a quick audit.
HEAVY = frozenset({"matching", "text search", "fedavg", "learned", "aggregate"})
# Closed forms: where they fail on many records, they are tried on one, unless they are dear on this model.
CLOSED = frozenset({"presence", "labels", "linear", "least squares", "span"})
DEAR = 5.0  # CPU seconds
# Closed forms that cost tens of seconds on a real model: they come last, so that cheap attacks never lose their verdict.
LATE = frozenset({"adapter_readout", "span", "span_exact"})
SECONDS = {
    "quick": (20.0, 120.0),
    "standard": (45.0, 1_400.0),
    "exhaustive": (3_600.0, float("inf")),
}  # an attack, all
# Draws of records and noise, for attacks cheap enough that luck need not decide their verdict. Of a single record's label
# there are few outcomes, so it takes more of them.
DRAWS, DRAWS_OF_ONE = 4, 8
CHEAP = 0.5  # CPU seconds
DRAWING = 1 / 12  # of the seconds of all attacks may go into drawing, for several records and for one each

SHOWN_PICTURES = 2  # of one finding

Ran = dict[tuple[str, int, str], Result]  # by attack, records, and point or what crossed the wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One update on its way from a client to an observer, and apart from it the truth about it."""

    point: Point
    observation: Observation
    truth: Truth


@dataclass(slots=True, kw_only=True)
class Purse:
    """The CPU seconds of one audit, shared out among its attacks in order."""

    name: str
    began: float = field(default_factory=time.process_time)
    drawing: dict[int, float] = field(default_factory=dict)  # seconds spent on draws, by records

    def budget(self, attack: Attack) -> Budget | None:
        """Return what an attack may spend; None when the audit has nothing left for it."""
        each, total = SECONDS[self.name]
        left = total - (time.process_time() - self.began)
        if left <= 0 or (self.name == "quick" and attack.family in HEAVY):
            return None
        preset = Budget.named(self.name)
        restarts = 2 if self.name == "standard" and attack.family in HEAVY else preset.restarts
        return replace(preset, seconds=min(each, left), restarts=restarts)

    def draw(self, stage: Stage, number: int, point: Point) -> Stage | None:
        """Draw a stage anew; None once drawing has had its share, for on a large model attacks are worth more."""
        if stage.again is None or self.drawing.get(stage.records, 0.0) > DRAWING * SECONDS[self.name][1]:
            return None
        began = time.process_time()
        other = stage.again(number)
        other.at(point)
        self.drawing[stage.records] = self.drawing.get(stage.records, 0.0) + time.process_time() - began
        return other

    def refusal(self, attack: Attack) -> str:
        """Say why an attack is not run."""
        if self.name == "quick" and attack.family in HEAVY:
            return "not tried: it searches for minutes; run the audit with --budget standard"
        return f"not tried: the attacks before it used up the {SECONDS[self.name][1]:.0f} CPU seconds of this audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What all scenes share: the model as broadcast, what an attacker may bring along, and the scenes themselves."""

    records: int
    model: nn.Module
    prior: Prior
    points: frozenset[str]  # of one client's update
    at: Callable[[Point], Scene]
    wire: Callable[[int], Scene]  # what that many clients really send in a round, nothing granted
    again: Callable[[int], Stage] | None = None  # the same step with other records and other noise, by number

    @property
    def control(self) -> Scene:
        """Return the undefended update."""
        return self.at("raw")


def audit_run(folder: Path, *, budget: str = "quick") -> RunSummary:
    """Attack a finished run and write the findings into its report.

    Raises:
      StoreError: the folder holds no finished run.
      ConfigError: the run file names an attack that does not exist.
    """
    summary = _read_summary(folder)
    config = Store.read(folder).config()
    if unknown := sorted(set(config.audit.attacks) - {"all", *ATTACKS}):
        raise ConfigError(
            "audit.attacks", [f"there is no attack {', '.join(unknown)}; `python -m attacks list` names them"]
        )
    began = time.process_time()
    prepared = setup.prepare(config, Path.cwd(), folder)
    resumed = Store.read(folder).resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round was finished, so there is nothing to audit")
    vector = client_replay.next_start(prepared, folder, *resumed)
    stages = [with_draws(prepared, vector, records) for records in (CANDIDATES, 1)]
    observers = cast("tuple[Observer, ...]", config.audit.observers or ("server", "public"))
    decode, ran = decoder(prepared.backbone.tokenizer), Ran()
    findings = tuple(_findings(stages, observers, config, Purse(name=budget), decode, ran))
    bounds = bounds_over_rounds(prepared)
    bound = bounds[max(bounds)] if bounds else None
    audit = AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None if bound is None else bound.epsilon,
        epsilon_lower_method="" if bound is None else _measured_how(bound, summary),
        sentence=sentence(findings),
        curves=(*_placed(_leak_curves(stages[0], ran, budget), stages[0], prepared), *_over_rounds(bounds)),
    )
    audited = replace(summary, audit=audit)
    report.write(audited, folder)
    return audited


def _measured_how(bound: canary.LowerBound, summary: RunSummary) -> str:
    """Say in the five fields of every epsilon what a measured lower bound is a bound on."""
    promise = next(statement for statement in summary.statements if statement.observer == "server")
    return (
        f"{bound.canaries} canaries in one run of the mechanism, {bound.method}, confidence {1 - bound.significance:.0%}; "
        f"unit {promise.unit}, adjacency {promise.adjacency}, observer server, delta {promise.delta:g}"
    )


def audit_observation(
    folder: Path,
    *,
    model: Path | None = None,
    truth: Path | None = None,
    budget: str = "quick",
    attacks: Collection[str] = ATTACKS,
) -> AuditSummary:
    """Attack a stored observation of any system, each attack beside its control.

    The control is a rehearsal: the same model takes the same kind of step on invented data, undefended. With `truth`, a
    safetensors file of what the client trained on, findings are scored; without it an attack leaks when it is as sure
    as on the rehearsal, and nothing is claimed where its confidence cannot tell an update from noise.

    Raises:
      StoreError: a folder or file cannot be read.
    """
    began = time.process_time()
    try:
        observation = load_observation(folder)
        loaded = None if model is None else load_model(model)
        known = None if truth is None else load_truth(truth)
    except (ObservationError, OSError, ValueError) as error:
        raise StoreError(f"{folder}: {error}") from None
    decode = decoder(None if model is None else load_tokenizer(model))
    findings = tuple(_standalone(observation, loaded, known, Purse(name=budget), decode, attacks))
    return AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None,
        sentence=sentence(findings),
    )


def _standalone(
    observation: Observation,
    model: nn.Module | None,
    truth: Truth | None,
    purse: Purse,
    decode: Decode,
    attacks: Collection[str],
) -> Iterator[AuditFinding]:
    rehearsed = None if model is None else rehearse(observation, model, seed=0)
    easier = rehearsed is not None and guessed(observation, rehearsed[1])
    silence, prior = noise_only(observation, seed=0), Prior()
    observer = cast(Observer, observation.observer)  # a name the other system gave
    told = observation.metadata.get("point") or ("aggregated" if observation.kind == "sum" else "raw")
    point = cast(Point, told)
    if truth is not None and model is not None:
        truth = replace(truth, vocabulary=vocabulary_of(model))
    for name in attacks:
        attack = ATTACKS[name]()
        budget = purse.budget(attack)
        if budget is None:
            yield not_tried(observer, attack, point, purse)
            continue
        seen = tried(attack, observation, model, prior, budget, truth)
        control = None
        if rehearsed is not None and seen[0].applicable:
            control = tried(attack, rehearsed[0], model, prior, budget, rehearsed[1])
        if truth is None and control is not None and control[1] is not None and control[1].proven:
            noise = tried(attack, silence, model, prior, budget, None)
            found = judge_unknown(seen[0], control[0], noise[0], guessed=easier)
        else:
            found = unless_guessed(judge(seen, control), easier)
        yield _told(observer, point, seen, found, decode)


def _told(observer: Observer, point: Point, seen: Result, judged: Judgement, decode: Decode) -> AuditFinding:
    """Write a judgement as a finding of the report."""
    return AuditFinding(
        observer=observer,
        attack=seen[0].attack,
        point=point,
        verdict=judged.verdict,
        measure=judged.measure,
        score=judged.score,
        low=judged.low,
        high=judged.high,
        baseline=judged.baseline,
        control=judged.control,
        seconds=seen[0].seconds,
        knowledge=seen[0].knowledge_used,
        reason=judged.reason,
        pairs=tuple(
            RecoveredPair(truth=decode(true), recovered=decode(guess)) for true, guess in judged.pairs
        ),
    )


def build_stage(
    prepared: setup.Prepared,
    vector: Tensor,
    *,
    seed: int = 0,
    records: int = CANDIDATES,
    model: nn.Module | None = None,
) -> Stage:
    """Replay one local step of a client from the broadcast model with known records, at every point of its way.

    One step is the worst case for the client; what a run sends after many steps tells an attacker less. A step on one
    record is the worst case of all: its length, label and the shape of a picture are granted as well. `model` is the attacker's
    copy where there is one already.
    """
    config, trained = prepared.config, prepared.trainable
    trained.load_vector(vector)
    rows = np.random.default_rng(seed)
    client = client_replay.largest(prepared)
    own = prepared.parts[client]
    few = own[
        np.sort(rows.permutation(len(own))[: 4 * CANDIDATES])
    ]  # not all of a large client's records need encoding
    encoded = prepared.task.encode(prepared.dataset.train.take(few))
    size = min(records, len(encoded) // 2)
    order = rows.permutation(len(encoded))
    members, others = order[:size], order[size : 2 * size]
    model = client_replay.attackable(prepared) if model is None else model
    batch = prepared.task.batch(encoded, members, device=prepared.device)
    points = client_replay.gradients(prepared, batch)
    names = client_replay.own_names(prepared)
    facts = {"learning_rate": config.federation.lifecycle.learning_rate}
    strangers = prepared.task.batch(
        encoded, order[size : size + CANDIDATES], device="cpu"
    )  # what guessing goes by
    truth = _truth(batch, members=size, strangers=strangers, vocabulary=vocabulary_of(model))
    prior = Prior(candidates=_candidates(prepared, encoded, [*members, *others]), **_pixels(prepared))
    shape = (
        None if truth.images is None else tuple(truth.images.shape[1:])
    )  # the model itself says what it takes
    public = Knowledge(task=config.task.kind, image_shape=shape)
    knowledge = replace(public, batch_size=size, local_steps=1, **(_granted(truth) if size == 1 else {}))

    def scene(
        point: Point,
        tensors: Mapping[str, Tensor],
        clients: int = 1,
        *,
        content: str = "gradient",
        **told: Any,
    ) -> Scene:
        summed = {"summand": content} if clients > 1 else {}
        hidden = client_replay.noise_facts(prepared, point, clients, steps=told.get("local_steps", 0))
        observation = Observation(
            kind="sum" if clients > 1 else cast(Literal["gradient", "delta"], content),
            tensors={names[name]: tensor.detach().cpu() for name, tensor in tensors.items()},
            contributors=clients,
            metadata={"point": point, **(told or facts), **summed, **hidden},
            knowledge=public if told else knowledge,
        )
        return Scene(point=point, observation=observation, truth=truth)

    @cache
    def wire(clients: int) -> Scene:
        sent = client_replay.wire_change(prepared, vector, encoded.take(members), client, clients)
        point: Point = "aggregated" if clients > 1 else "raw" if prepared.mechanism is None else "noised"
        return scene(point, sent, clients, content="delta", **client_replay.wire_facts(prepared, size))

    @cache
    def at(point: Point) -> Scene:
        if point != "aggregated":
            return scene(point, points[point])
        total = client_replay.aggregate(
            prepared, points, client, size
        )  # of a whole cohort: made when it is asked for
        return scene("aggregated", total, client_replay.smallest_sum(config))

    return Stage(records=size, model=model, prior=prior, points=frozenset(points), at=at, wire=wire)


def with_draws(prepared: setup.Prepared, vector: Tensor, records: int) -> Stage:
    """Build a stage that can be drawn anew."""
    first = build_stage(prepared, vector, records=records)
    again = cache(
        lambda number: build_stage(prepared, vector, seed=number, records=records, model=first.model)
    )
    return replace(first, again=again)


def _candidates(prepared: setup.Prepared, encoded: Any, rows: list[int]) -> dict[str, Tensor]:
    batch = prepared.task.batch(encoded, np.asarray(rows), device="cpu")
    renamed = {"input_ids": "token_ids", "pixel_values": "images", "labels": "labels"}
    found = {renamed[name]: value for name, value in batch.items() if name in renamed}
    if prepared.config.task.kind in ("causal_lm", "masked_lm"):
        found.pop("labels", None)
    return found


def _granted(truth: Truth) -> dict[str, Any]:
    """Return what the strongest observer of one record is assumed to know besides the update."""
    granted: dict[str, Any] = {"labels": truth.labels}
    if truth.sequences is not None:
        granted["lengths"] = tuple(map(len, truth.sequences))
    return granted


def _pixels(prepared: setup.Prepared) -> dict[str, Any]:
    """Return the public normalisation of pictures."""
    mean, std = getattr(prepared.task, "mean", None), getattr(prepared.task, "std", None)
    return {} if mean is None or std is None else {"image_mean": mean.flatten(), "image_std": std.flatten()}


def _truth(
    batch: Mapping[str, Tensor], *, members: int, strangers: Mapping[str, Tensor], vocabulary: int | None
) -> Truth:
    """Return what the client trained on, and the texts of the same kind that guessing may go by."""
    labels = batch.get("labels")
    flat = tuple(labels.tolist()) if labels is not None and labels.dim() == 1 else None
    return Truth(
        sequences=_texts(batch) or None,
        images=batch.get("pixel_values"),
        labels=flat,
        members=(True,) * members + (False,) * members,
        vocabulary=vocabulary,
        others=_texts(strangers),
    )


def _texts(batch: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    if "input_ids" not in batch:
        return ()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return tuple(tuple(ids[keep.bool()].tolist()) for ids, keep in zip(batch["input_ids"], mask, strict=True))


def _findings(
    stages: list[Stage],
    observers: tuple[Observer, ...],
    config: RunConfig,
    purse: Purse,
    decode: Decode,
    ran: Ran,
) -> Iterator[AuditFinding]:
    wanted = [name for name in ATTACKS if {"all", name} & set(config.audit.attacks)]
    for name in sorted(wanted, key=lambda name: name in LATE):
        attack = ATTACKS[name]()  # all its observers together, so that its control is run once
        stage = _stage_for(attack, stages, purse, ran)
        control = repeated(attack, stage, "raw", purse, ran)
        for observer in observers:
            point = client_replay.seen_by(observer, config, stage.points)
            proven = control is not None and control[1] is not None and control[1].proven
            # Where the control failed nothing would be proven, so the attack is not run a second time.
            seen = repeated(attack, stage, point, purse, ran, like=control) if proven else control
            if seen is None or control is None:
                yield not_tried(observer, attack, point, purse)
                continue
            judged = judge(seen, control)
            shown = (
                seen[1].pictures if seen[1] is not None and judged.verdict in ("leaked", "not leaked") else ()
            )
            pictures = side_by_side(shown[:SHOWN_PICTURES], stage.prior.image_mean, stage.prior.image_std)
            found = _told(observer, point, seen, judged, decode)
            found = replace(found, granted=_granted_words(stage), pictures=pictures)
            yield _beside_the_wire(found, attack, stage, purse, ran)


def _stage_for(attack: Attack, stages: Sequence[Stage], purse: Purse, ran: Ran) -> Stage:
    """Return the first stage on which the control passes; a step on one record is the second chance of a cheap attack."""
    several = stages[1:] if attack.family in HEAVY else stages if attack.family in CLOSED else stages[:1]
    for stage in several:
        control = _once(attack, stage, stage.control, purse, ran)
        if control is None or control[0].seconds > DEAR or (control[1] is not None and control[1].succeeded):
            return stage if control is not None and control[1] is not None else several[0]
    return several[0]


def _once(attack: Attack, stage: Stage, scene: Scene, purse: Purse, ran: Ran, key: str = "") -> Result | None:
    """Run an attack on a scene, if that has not been done and the purse allows it."""
    place, budget = (attack.name, stage.records, key or scene.point), purse.budget(attack)
    if place not in ran and budget is not None:
        ran[place] = tried(attack, scene.observation, stage.model, stage.prior, budget, scene.truth)
    return ran.get(place)


def repeated(
    attack: Attack, stage: Stage, point: Point, purse: Purse, ran: Ran, *, like: Result | None = None
) -> Result | None:
    """Run an attack on every draw of a stage where that is cheap; its score is then their mean.

    A draw on which nothing is found counts as guessing, as far as the score `like` this one says what that is.
    """
    first = _once(attack, stage, stage.at(point), purse, ran)
    known = first[1] if first is not None and first[1] is not None else None if like is None else like[1]
    if first is None or known is None or first[0].seconds > CHEAP:
        return first
    guess = replace(known, value=known.baseline, succeeded=False, pairs=(), pictures=())
    scores = [first[1] or guess]
    for number in range(1, DRAWS_OF_ONE if stage.records == 1 else DRAWS):
        other = purse.draw(stage, number, point)
        place = f"{point}, draw {number}"
        done = None if other is None else _once(attack, other, other.at(point), purse, ran, key=place)
        if done is None:
            break
        scores.append(done[1] or guess)
    found = any(one is not guess for one in scores)
    return (first[0], pooled(scores)) if found else first


def _granted_words(stage: Stage) -> tuple[str, ...]:
    """Name everything an attacker of this stage may know beyond the wire."""
    priors = (
        f"prior.{name}" for name in ("candidates", "image_mean") if getattr(stage.prior, name) is not None
    )
    return (*stage.control.observation.knowledge.granted(), "one step", *priors)


def _beside_the_wire(
    found: AuditFinding, attack: Attack, stage: Stage, purse: Purse, ran: Ran
) -> AuditFinding:
    """Put beside a leak how the attack fares on what the protocol really sends; where nothing leaked at worst, that is less."""
    if found.verdict != "leaked":
        return found
    clients = stage.at(found.point).observation.contributors
    if purse.budget(attack) is None:
        return replace(found, observed_reason=purse.refusal(attack))
    try:
        done = _once(attack, stage, stage.wire(clients), purse, ran, key=f"wire of {clients}")
    except ValueError as error:
        return replace(found, observed_reason=str(error))
    result, scored = cast(Result, done)
    told = f"{clients} client{'s' if clients > 1 else ''} in one whole round, nothing granted"
    value = None if scored is None else scored.value
    return replace(
        found, observed=value, observed_reason=told if value is not None else f"{told}: {result.reason}"
    )


def not_tried(observer: Observer, attack: Attack, point: Point, purse: Purse) -> AuditFinding:
    """Say that nothing is known of an attack that the budget had no room for."""
    return AuditFinding(
        observer=observer,
        attack=attack.name,
        point=point,
        verdict="inconclusive",
        measure="not run",
        score=None,
        reason=purse.refusal(attack),
    )


def _leak_curves(stage: Stage, ran: Ran, budget: str) -> Iterator[curves.Curve]:
    """Draw curves for the best closed form of each family whose control passed: one attack shows the law of its kind."""
    best: dict[str, tuple[tuple[int, float, float], Attack]] = {}
    for (name, records, point), (found, scored) in ran.items():
        attack = ATTACKS[name]()
        if point == "raw" and scored is not None and scored.succeeded and attack.family in CLOSED:
            rated = (records, scored.value, -found.seconds)
            if attack.family not in best or rated > best[attack.family][0]:
                best[attack.family] = rated, attack
    chosen = sorted(((attack, -rated[2]) for rated, attack in best.values()), key=lambda pair: pair[1])
    yield from curves.draw(chosen, stage.control.observation, stage.model, length=_length(stage), name=budget)


def _length(stage: Stage) -> int:
    """Return how many tokens an invented text gets: as many as the client's have on average."""
    texts = stage.control.truth.sequences or ((0,),)
    return max(2, round(sum(map(len, texts)) / len(texts)))


def _placed(drawn: Iterator[curves.Curve], stage: Stage, prepared: setup.Prepared) -> Iterator[LeakCurve]:
    """Mark on each curve where the run lies: what the server sees of one step."""
    config, width = prepared.config, curves.width_of(stage.control.observation, stage.model)
    clients = stage.at(client_replay.seen_by("server", config, stage.points)).observation.contributors
    records = float(config.federation.lifecycle.batch_size * clients)
    noise = 0.0 if prepared.mechanism is None else float(prepared.mechanism.noise_multiplier)
    tokens = records * _length(stage) / width.size if width else None
    here = {
        "records": records,
        "noise multiplier": noise,
        "tokens per width": tokens,
        "tokens per rank": tokens,
    }
    for one in drawn:
        yield LeakCurve(**{item.name: getattr(one, item.name) for item in fields(one)}, here=here[one.axis])


def _over_rounds(bounds: Mapping[int, canary.LowerBound]) -> Iterator[LeakCurve]:
    """Show how the proven lower bound on epsilon grows over the rounds one client takes part in."""
    epsilons = tuple(bound.epsilon for bound in bounds.values())
    reason = "" if bounds else "no noise hides what one round tells, so more rounds add nothing to it"
    here = float(max(bounds)) if bounds else None
    x = tuple(map(float, bounds))
    yield LeakCurve(
        attack="canaries",
        axis="rounds",
        measure="epsilon, at least",
        x=x,
        y=epsilons,
        here=here,
        reason=reason,
    )


def mechanism_lower_bound(prepared: setup.Prepared, *, seed: int = 1) -> canary.LowerBound | None:
    """Audit the run's own mechanism over all rounds a client may take part in, with canaries of the largest allowed norm.

    The canaries go through the very sampler, bound, noise and divisor that the run used; the result is a lower bound on
    epsilon, wrong with probability at most 5 %, to be held against the ledger's upper bound.
    """
    return bounds[max(bounds)] if (bounds := bounds_over_rounds(prepared, seed=seed)) else None


def bounds_over_rounds(prepared: setup.Prepared, *, seed: int = 1) -> dict[int, canary.LowerBound]:
    """Return the lower bound that 1, 2, 4, ... rounds of one canary run prove, and all rounds; nothing without a mechanism."""
    mechanism, config = prepared.mechanism, prepared.config
    if mechanism is None:
        return {}
    rounds = max(1, plan.participation_cap(config))
    dimension = max(2 * CANARIES, min(prepared.trainable.size, 20_000))
    coins = canary.Canaries(
        count=CANARIES, dimension=dimension, norm=mechanism.clip_norm, seed=seed, kind="dirac"
    )
    begin = record_canaries if isinstance(mechanism, RecordMechanism) else client_canaries
    totals, seen = begin(mechanism, coins, RandomSource.system()), {}
    for number in range(1, rounds + 1):
        total = next(totals)
        if number == rounds or number & (number - 1) == 0:
            seen[number] = coins.audit(total, config.privacy.delta, SIGNIFICANCE)
    return seen


def _read_summary(folder: Path) -> RunSummary:
    try:
        return report.from_json((folder / "report.json").read_text())
    except OSError:
        raise StoreError(f"{folder}: has no report.json yet; finish the run first (ffm-secure run)") from None
    except ValueError as error:
        raise StoreError(f"{folder / 'report.json'}: is damaged: {error}") from None


class _Callable(types.ModuleType):
    """Let `ffm_secure.audit(result)` mean the function, whether or not this module was imported before."""

    def __call__(self, result: Any, *, budget: str = "quick") -> AuditSummary:
        found = audit_run(Path(getattr(result, "folder", result)), budget=budget).audit
        assert found is not None
        return found


sys.modules[__name__].__class__ = _Callable
