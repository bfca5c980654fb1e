"""Play each observer against a run: the same update at every point of its way, each attack with its control."""

from __future__ import annotations

import copy
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks import canary
from attacks.command import load_model, load_tokenizer
from attacks.contract import Attack, Budget, Prior, Reconstruction
from attacks.observation import Knowledge, Observation, ObservationError, load_observation
from attacks.registry import ATTACKS
from attacks.rehearsal import noise_only, rehearse
from attacks.scoring import Score, score
from attacks.truth import Truth, load_truth
from defenses.dp import Clipping, PerSampleEngine, RecordMechanism
from defenses.random_source import RandomSource
from ffm_secure import plan, report, setup
from ffm_secure.errors import StoreError
from ffm_secure.mechanism import ClientNoise
from ffm_secure.store import Store
from ffm_secure.types import AuditFinding, AuditSummary, RecoveredPair, RunSummary

CANDIDATES = 32  # members and as many outsiders in a membership test
CANARIES = 1000
SIGNIFICANCE = 0.05

# Attacks that search for minutes: they are given one record, the client's worst case, and no place in a quick audit.
HEAVY = frozenset({"matching", "text search", "fedavg", "learned", "aggregate"})
# Closed forms that cost tens of seconds on a real model: they come last, so that cheap attacks never lose their verdict.
LATE = frozenset({"adapter_readout", "span", "span_exact"})
SECONDS = {"quick": (20.0, 120.0), "standard": (45.0, 1_400.0), "exhaustive": (3_600.0, float("inf"))}  # an attack, all
TELLING = 0.1  # how much surer an attack must be on an undefended update than on noise for its confidence to tell

Result = tuple[Reconstruction, Score | None]
Decode = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One update on its way from a client to an observer, and apart from it the truth about it."""

    point: str  # raw, clipped, noised, aggregated
    observation: Observation
    truth: Truth


@dataclass(slots=True, kw_only=True)
class Purse:
    """The CPU seconds of one audit, shared out among its attacks in order."""

    name: str
    began: float = field(default_factory=time.process_time)

    def budget(self, attack: Attack) -> Budget | None:
        """Return what an attack may spend; None when the audit has nothing left for it."""
        each, total = SECONDS[self.name]
        left = total - (time.process_time() - self.began)
        if left <= 0 or (self.name == "quick" and attack.family in HEAVY):
            return None
        preset = Budget.named(self.name)
        restarts = 2 if self.name == "standard" and attack.family in HEAVY else preset.restarts
        return replace(preset, seconds=min(each, left), restarts=restarts)

    def refusal(self, attack: Attack) -> str:
        """Say why an attack is not run."""
        if self.name == "quick" and attack.family in HEAVY:
            return "not tried: it searches for minutes; run the audit with --budget standard"
        return f"not tried: the attacks before it used up the {SECONDS[self.name][1]:.0f} CPU seconds of this audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What all scenes share: the model as broadcast, what an attacker may bring along, the control, the rest."""

    model: nn.Module
    prior: Prior
    control: Scene
    scenes: Mapping[str, Scene]


def audit_run(folder: Path, *, budget: str = "quick") -> RunSummary:
    """Attack a finished run and write the findings into its report.

    Raises:
      StoreError: the folder holds no finished run.
    """
    summary = _read_summary(folder)
    config = Store.read(folder).config()
    began = time.process_time()
    prepared = setup.prepare(config, Path.cwd(), folder)
    resumed = Store.read(folder).resume()
    if resumed is None:
        raise StoreError(f"{folder}: no round was finished, so there is nothing to audit")
    stages = [build_stage(prepared, resumed[0].vector)]
    if budget != "quick":
        stages.append(build_stage(prepared, resumed[0].vector, records=1))
    observers = config.audit.observers or ("server", "public")
    decode = decoder(prepared.backbone.tokenizer)
    findings = tuple(_findings(stages, observers, config, Purse(name=budget), decode))
    bound = mechanism_lower_bound(prepared)
    audit = AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None if bound is None else bound.epsilon,
        epsilon_lower_method="" if bound is None else _measured_how(bound, summary),
        sentence=sentence(findings),
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
    silence, prior = noise_only(observation, seed=0), Prior()
    observer: Any = observation.observer
    point = str(observation.metadata.get("point") or ("aggregated" if observation.kind == "sum" else "raw"))

    def attempt(attack: Attack, seen: Observation, budget: Budget, known: Truth | None) -> Result:
        found = attack.run(seen, model, prior, budget, 0)
        return found, score(found, known) if found.applicable and known is not None else None

    for name in attacks:
        attack = ATTACKS[name]()
        budget = purse.budget(attack)
        if budget is None:
            yield not_tried(observer, attack, point, purse)
            continue
        seen = attempt(attack, observation, budget, truth)
        if not seen[0].applicable or rehearsed is None:
            yield judge(observer, name, point, seen, seen if not seen[0].applicable else (seen[0], None), decode)
            continue
        control = attempt(attack, rehearsed[0], budget, rehearsed[1])
        if truth is not None or control[1] is None or not control[1].succeeded:
            yield judge(observer, name, point, seen, control, decode)
        else:
            yield judge_unknown(observer, name, point, seen[0], control[0], attempt(attack, silence, budget, None)[0])


def build_stage(prepared: setup.Prepared, vector: Tensor, *, seed: int = 0, records: int = CANDIDATES) -> Stage:
    """Replay one local step of a client from the broadcast model with known records, at every point of its way.

    One step is the worst case for the client; what a run sends after many steps tells an attacker less. A step on one
    record is the worst case of all: its length, label and the shape of a picture are granted as well.
    """
    config, trained = prepared.config, prepared.trainable
    trained.load_vector(vector)
    rows = np.random.default_rng(seed)
    client = max(range(len(prepared.parts)), key=lambda index: len(prepared.parts[index]))
    encoded = prepared.task.encode(prepared.dataset.train.take(prepared.parts[client]))
    size = min(records, len(encoded) // 2)
    order = rows.permutation(len(encoded))
    members, others = order[:size], order[size : 2 * size]
    model = _attackable(prepared)
    batch = prepared.task.batch(encoded, members, device=prepared.device)
    gradients = _gradients(prepared, batch)
    names = _names(prepared)
    facts = {"batch_size": size, "local_steps": 1, "learning_rate": config.federation.lifecycle.learning_rate}
    truth = _truth(batch, members=size, outsiders=size)
    prior = Prior(candidates=_candidates(prepared, encoded, [*members, *others]), **_pixels(prepared))
    knowledge = Knowledge(task=config.task.kind, batch_size=size, **(_granted(batch, truth) if size == 1 else {}))

    def scene(point: str, tensors: Mapping[str, Tensor], contributors: int = 1) -> Scene:
        kind: Any = "sum" if contributors > 1 else "gradient"
        metadata: dict[str, Any] = {"point": point, **facts} | ({"summand": "gradient"} if kind == "sum" else {})
        observed = {names[name]: tensor.detach().cpu() for name, tensor in tensors.items()}
        observation = Observation(
            kind=kind,
            tensors=observed,
            contributors=contributors,
            metadata=metadata,
            knowledge=knowledge,
        )
        return Scene(point=point, observation=observation, truth=truth)

    control = scene("raw", gradients["raw"])
    scenes = {
        "raw": control,
        **{point: scene(point, tensors) for point, tensors in gradients.items() if point != "raw"},
    }
    scenes["aggregated"] = scene("aggregated", _aggregate(prepared, gradients, client, size), smallest_sum(config))
    return Stage(model=model, prior=prior, control=control, scenes=scenes)


def _gradients(prepared: setup.Prepared, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return one step's update at each point: raw, and under record-level privacy clipped and noised by the run's mechanism."""
    trained, task, mechanism = prepared.trainable, prepared.task, prepared.mechanism
    losses = task.losses(trained.model, batch)
    raw = torch.autograd.grad(losses.mean(), list(trained.parameters.values()), allow_unused=True)
    found = {
        "raw": {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(trained.parameters.items(), raw, strict=True)
        }
    }
    if isinstance(mechanism, RecordMechanism):
        with PerSampleEngine(trained.model, parameters=trained.parameters) as engine:
            clipping = Clipping(kind=prepared.config.privacy.clipping, clip_norm=mechanism.clip_norm)
            clipped = engine.clipped_sum(lambda: task.losses(trained.model, batch), clip=clipping).gradients
        found["clipped"] = {name: value / mechanism.expected_batch_size for name, value in clipped.items()}
        found["noised"] = mechanism.privatise(clipped, RandomSource.system())
    if isinstance(mechanism, ClientNoise):
        vector = torch.cat([value.reshape(-1) for value in found["raw"].values()])
        found["clipped"] = _unflatten(mechanism.inner.clip(vector.cpu()), found["raw"])
        share = mechanism.noisy_integers(vector, RandomSource.system()) / mechanism.scale
        found["noised"] = _unflatten(torch.from_numpy(share).float(), found["raw"])
    return found


def _aggregate(
    prepared: setup.Prepared, gradients: Mapping[str, Mapping[str, Tensor]], client: int, records: int
) -> dict[str, Tensor]:
    """Add what the other clients of a cohort send in the same step, each with its own records and its own noise."""
    own = gradients.get("noised", gradients["raw"])
    total = {name: value.clone() for name, value in own.items()}
    others = [index for index in range(len(prepared.parts)) if index != client and len(prepared.parts[index])]
    for index in others[: smallest_sum(prepared.config) - 1]:
        part = prepared.parts[index][:records]
        batch = prepared.task.batch(
            prepared.task.encode(prepared.dataset.train.take(part)), np.arange(len(part)), device=prepared.device
        )
        sent = _gradients(prepared, batch)
        for name, value in sent.get("noised", sent["raw"]).items():
            total[name] += value
    return total


def smallest_sum(config: Any) -> int:
    """Return how many clients stand behind the smallest sum an observer may be left with: the threshold, less colluders."""
    return max(1, plan.minimum_survivors(config) - config.protection.colluding)


def _unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def _names(prepared: setup.Prepared) -> dict[str, str]:
    """Map the canonical names of what is trained to the names the model itself uses."""
    own = {id(parameter): name for name, parameter in prepared.trainable.model.named_parameters()}
    return {name: own[id(parameter)] for name, parameter in prepared.trainable.parameters.items()}


def _attackable(prepared: setup.Prepared) -> nn.Module:
    """Copy the model for the attacker: eager attention, and padding read from the ids, as a client's own batches have it."""
    model = copy.deepcopy(prepared.trainable.model).cpu()
    pad = getattr(prepared.backbone.tokenizer, "pad_token_id", None)
    if pad is None or prepared.config.task.kind == "image_classification":
        return model
    kind = type(model)

    def forward(self: nn.Module, input_ids: Tensor, **rest: Any) -> Any:
        mask = rest.pop("attention_mask", (input_ids != pad).long())
        return kind.forward(self, input_ids=input_ids, attention_mask=mask, **rest)

    model.__class__ = type("Padded" + kind.__name__, (kind,), {"forward": forward})
    return model


def _candidates(prepared: setup.Prepared, encoded: Any, rows: list[int]) -> dict[str, Tensor]:
    batch = prepared.task.batch(encoded, np.asarray(rows), device="cpu")
    renamed = {"input_ids": "token_ids", "pixel_values": "images", "labels": "labels"}
    found = {renamed[name]: value for name, value in batch.items() if name in renamed}
    if prepared.config.task.kind in ("causal_lm", "masked_lm"):
        found.pop("labels", None)
    return found


def _granted(batch: Mapping[str, Tensor], truth: Truth) -> dict[str, Any]:
    """Return what the strongest observer of one record is assumed to know besides the update."""
    granted: dict[str, Any] = {"labels": truth.labels}
    if truth.sequences is not None:
        granted["lengths"] = tuple(map(len, truth.sequences))
    if truth.images is not None:
        granted["image_shape"] = tuple(truth.images.shape[1:])
    return granted


def _pixels(prepared: setup.Prepared) -> dict[str, Any]:
    """Return the public normalisation of pictures."""
    mean, std = getattr(prepared.task, "mean", None), getattr(prepared.task, "std", None)
    return {} if mean is None or std is None else {"image_mean": mean.flatten(), "image_std": std.flatten()}


def _truth(batch: Mapping[str, Tensor], *, members: int, outsiders: int) -> Truth:
    sequences = None
    if "input_ids" in batch:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        sequences = tuple(tuple(ids[keep.bool()].tolist()) for ids, keep in zip(batch["input_ids"], mask, strict=True))
    labels = batch.get("labels")
    flat = tuple(labels.tolist()) if labels is not None and labels.dim() == 1 else None
    return Truth(
        sequences=sequences,
        images=batch.get("pixel_values"),
        labels=flat,
        members=(True,) * members + (False,) * outsiders,
    )


def _findings(
    stages: list[Stage], observers: tuple[str, ...], config: Any, purse: Purse, decode: Decode
) -> Iterator[AuditFinding]:
    results: dict[tuple[str, str], Result] = {}
    ordered = sorted(ATTACKS.items(), key=lambda item: item[0] in LATE)
    for name, make in ordered:  # all observers of one attack together, so that its control is run once
        attack = make()
        stage = stages[-1] if attack.family in HEAVY else stages[0]
        for observer in observers:
            point = seen_by(observer, config, stage)
            for scene in (stage.control, stage.scenes[point]):
                budget = purse.budget(attack)
                if (name, scene.point) not in results and budget is not None:
                    results[name, scene.point] = _attempt(attack, stage, scene, budget)
            if (name, point) in results and (name, "raw") in results:
                yield judge(observer, name, point, results[name, point], results[name, "raw"], decode)
            else:
                yield not_tried(observer, attack, point, purse)


def _attempt(attack: Attack, stage: Stage, scene: Scene, budget: Budget) -> Result:
    found = attack.run(scene.observation, stage.model, stage.prior, budget, 0)
    return found, score(found, scene.truth) if found.applicable else None


def not_tried(observer: str, attack: Attack, point: str, purse: Purse) -> AuditFinding:
    """Say that nothing is known of an attack that the budget had no room for."""
    return AuditFinding(
        observer=observer,  # type: ignore[arg-type]
        attack=attack.name,
        point=point,  # type: ignore[arg-type]
        verdict="inconclusive",
        measure="not run",
        score=None,
        reason=purse.refusal(attack),
    )


def decoder(tokenizer: Any) -> Decode:
    """Return a function from token ids, separated by blanks, to readable tokens, separated by blanks."""

    def decode(ids: str) -> str:
        try:
            return " ".join(str(tokenizer.decode([int(one)])).strip() or one for one in ids.split())
        except (ValueError, TypeError, IndexError, OverflowError):
            return ids

    return (lambda ids: ids) if tokenizer is None else decode


def seen_by(observer: str, config: Any, stage: Stage) -> str:
    """Return at which point of its way an observer sees an update; seeded noise hides nothing, so it is taken off."""
    alone = "clipped" if config.privacy.noise == "seeded" else "noised"
    single = alone if alone in stage.scenes else "raw"
    if observer == "server" and config.protection.kind == "none":
        return single
    if observer == "colluding_server" and config.protection.kind != "secagg":
        return single
    return single if config.privacy.noise == "seeded" else "aggregated"


def judge(
    observer: str,
    name: str,
    point: str,
    seen: Result,
    control: Result,
    decode: Decode = str,
) -> AuditFinding:
    """Give the verdict: a leak, no leak although the control succeeded, nothing proven, or not applicable with the reason."""
    found, result = seen
    reference = control[1]
    base = AuditFinding(
        observer=observer,
        attack=name,
        point=point,
        verdict="not applicable",
        measure="",
        score=None,  # type: ignore[arg-type]
        seconds=found.seconds,
        knowledge=found.knowledge_used,
        reason=found.reason,
    )
    if not control[0].applicable:
        return replace(base, reason=control[0].reason)
    if reference is None or not reference.succeeded:
        value = None if reference is None else reference.value
        return replace(
            base,
            verdict="inconclusive",
            measure="" if reference is None else reference.measure,
            control=value,
            reason="the same attack fails even on the undefended update, so its silence proves nothing",
        )
    if result is None:
        return replace(
            base,
            measure=reference.measure,
            control=reference.value,
            baseline=reference.baseline,
            reason=f"works on the undefended update, but does not fit this one: {found.reason or 'nothing to score'}",
        )
    return replace(
        base,
        verdict="leaked" if result.succeeded else "not leaked",
        measure=result.measure,
        score=result.value,
        low=result.low,
        high=result.high,
        baseline=result.baseline,
        control=reference.value,
        reason="" if result.succeeded else "control passed",
        pairs=tuple(RecoveredPair(truth=decode(true), recovered=decode(guess)) for true, guess in result.pairs),
    )


def judge_unknown(
    observer: str, name: str, point: str, seen: Reconstruction, control: Reconstruction, silence: Reconstruction
) -> AuditFinding:
    """Give the verdict where the truth is not known: is the attack as sure as on a rehearsal, or no surer than on noise?"""
    low = silence.confidence if silence.items else 0.0
    base = AuditFinding(
        observer=observer,  # type: ignore[arg-type]
        attack=name,
        point=point,  # type: ignore[arg-type]
        verdict="inconclusive",
        measure="own confidence",
        score=seen.confidence if seen.items else 0.0,
        baseline=low,
        control=control.confidence,
        seconds=seen.seconds,
        knowledge=seen.knowledge_used,
        reason="its confidence does not tell an update from noise; name what the client trained on with --truth",
    )
    if control.confidence - low < TELLING:
        return base
    leaked = bool(seen.items) and seen.confidence > 0.5 * (low + control.confidence)
    reason = "as sure as on a rehearsal with invented data" if leaked else "control passed on a rehearsal"
    return replace(base, verdict="leaked" if leaked else "not leaked", reason=reason)


def sentence(findings: tuple[AuditFinding, ...]) -> str:
    """Say the outcome in one line a manager understands."""
    leaks = sorted({f"{item.attack} by the {item.observer}" for item in findings if item.verdict == "leaked"})
    passed = sum(item.verdict == "not leaked" for item in findings)
    untried = sum(item.measure == "not run" for item in findings)
    open_ = sum(item.verdict == "inconclusive" for item in findings) - untried
    if leaks:
        return f"Private data leaked: {', '.join(leaks[:4])}{' and more' if len(leaks) > 4 else ''}."
    if not passed:
        return "Nothing was proven: no attack worked even on the undefended update."
    rest = f", {untried} were not tried under this budget" if untried else ""
    return (
        f"No leak found: {passed} attacks that read the undefended update failed on what observers see; "
        f"{open_} were inconclusive{rest}."
    )


def mechanism_lower_bound(prepared: setup.Prepared, *, seed: int = 1) -> canary.LowerBound | None:
    """Audit the run's own mechanism over all rounds a client may take part in, with canaries of the largest allowed norm.

    The canaries go through the very sampler, bound, noise and divisor that the run used; the result is a lower bound on
    epsilon, wrong with probability at most 5 %, to be held against the ledger's upper bound.
    """
    mechanism, config = prepared.mechanism, prepared.config
    if mechanism is None:
        return None
    rounds = max(1, plan.participation_cap(config))
    dimension = max(2 * CANARIES, min(prepared.trainable.size, 20_000))
    coins = canary.Canaries(count=CANARIES, dimension=dimension, norm=mechanism.clip_norm, seed=seed, kind="dirac")
    source = RandomSource.system()
    if isinstance(mechanism, RecordMechanism):
        update = _record_canaries(mechanism, coins, rounds, source)
    else:
        update = _client_canaries(mechanism, coins, rounds, source)
    return coins.audit(update, config.privacy.delta, SIGNIFICANCE)


def _record_canaries(mechanism: RecordMechanism, coins: canary.Canaries, rounds: int, source: RandomSource) -> Tensor:
    included = coins.included.nonzero().flatten()
    vectors = [coins.direction(int(index)) for index in included]
    total = torch.zeros(coins.dimension)
    for _ in range(rounds * mechanism.steps):
        clipped = torch.zeros(coins.dimension)
        for row in mechanism.sample(len(vectors), source):
            clipped += vectors[int(row)]
        total += mechanism.privatise({"canary": clipped}, source)["canary"]
    return total


def _client_canaries(mechanism: ClientNoise, coins: canary.Canaries, rounds: int, source: RandomSource) -> Tensor:
    grid = replace(mechanism, dimension=coins.dimension)
    total = torch.zeros(coins.dimension, dtype=torch.float64)
    signal = coins.contribution(grid.inner.clip)
    for _ in range(rounds):
        noise = sum(
            grid.noisy_integers(torch.zeros(coins.dimension), source) for _ in range(grid.inner.honest_survivors)
        )
        total += signal.double() + torch.from_numpy(np.asarray(noise)) / grid.scale
    return total


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
