"""Attack an update of any system: what was observed, the model, and, where the auditor has it, the truth."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from attacks.command import load_model, load_tokenizer
from attacks.contract import Prior
from attacks.fitting import fit
from attacks.inversion.tokens import vocabulary_of
from attacks.observation import Observation, ObservationError, load_observation
from attacks.registry import ATTACKS
from attacks.rehearsal import guessed, noise_only, rehearse
from attacks.truth import Truth, load_truth
from attacks.verdict import judge, judge_unknown, tried, unless_guessed
from ffm_secure.auditing.budget import AuditBudget, not_tried
from ffm_secure.auditing.findings import finding_of
from ffm_secure.auditing.wording import Decode, decoder, sentence
from ffm_secure.errors import DataError, StoreError
from ffm_secure.records import (
    AuditFinding,
    AuditSummary,
    Observer,
    Point,
)


def audit_observation(
    folder: Path,
    *,
    model: Path | None = None,
    adapter: Path | None = None,
    truth: Path | None = None,
    budget: str = "quick",
    attacks: Collection[str] = ATTACKS,
) -> AuditSummary:
    """Attack a stored observation of any system, each attack beside its control.

    The control is a rehearsal: the same model takes the same kind of step on invented data, undefended. With `truth`, a
    safetensors file of what the client trained on, findings are scored; without it an attack leaks when it is as sure
    as on the rehearsal, and nothing is claimed where its confidence cannot tell an update from noise.

    `adapter` is a folder as PEFT writes it, put on top of the model. Names of other libraries are matched with the model's.

    Raises:
      StoreError: a folder or file cannot be read.
      DataError: names, shapes or values of the update are not the model's, each named.
    """
    began = time.process_time()
    try:
        observation = load_observation(folder)
        loaded = None if model is None else load_model(model, adapter=adapter)
        known = None if truth is None else load_truth(truth)
    except (ObservationError, OSError, ValueError) as error:
        raise StoreError(f"{folder}: {error}") from None
    observation = _fitted(folder, observation, loaded)
    decode = decoder(None if model is None else load_tokenizer(model))
    findings = tuple(_standalone(observation, loaded, known, AuditBudget(name=budget), decode, attacks))
    return AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None,
        sentence=sentence(findings),
    )


def _fitted(folder: Path, observation: Observation, model: nn.Module | None) -> Observation:
    try:
        return fit(observation, model).observation
    except ObservationError as error:
        raise DataError(f"{folder}: {error}") from None


def _standalone(
    observation: Observation,
    model: nn.Module | None,
    truth: Truth | None,
    purse: AuditBudget,
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
        yield finding_of(observer, point, seen, found, decode)
