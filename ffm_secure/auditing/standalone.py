"""Attack an update of any system: what was observed, the model, and, where the auditor has it, the truth."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

from torch import nn

from attacks.command import load_model, load_tokenizer
from attacks.examine import Examined, examine, study
from attacks.fitting import fit
from attacks.observation import Observation, ObservationError, load_observation
from attacks.registry import ATTACKS
from attacks.truth import load_truth
from ffm_secure.auditing.budget import NULL_SECONDS, AuditBudget, not_run
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
    unused: Path | None = None,
    budget: str = "quick",
    attacks: Collection[str] = ATTACKS,
) -> AuditSummary:
    """Attack a stored observation of any system, each attack beside its control, beside itself on noise and beside guessing.

    The control is a rehearsal: the same model takes the same kind of step on invented data, undefended. With `truth`, a
    safetensors file of what the client trained on, findings are scored; without it an attack leaks when it is as sure
    as on the rehearsal and surer than on noise. `unused` is such a file of records that nobody trained on: guessing goes by
    their words and labels, and rehearsals are made of them.

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
        others = None if unused is None else load_truth(unused)
    except (ObservationError, OSError, ValueError) as error:
        raise StoreError(f"{folder}: {error}") from None
    observation = _fitted(folder, observation, loaded)
    decode = decoder(None if model is None else load_tokenizer(model))
    purse = AuditBudget(name=budget)
    scene = study(observation, loaded, known, unused=others, null_seconds=NULL_SECONDS[budget])
    results = examine(scene, purse.budget, purse.refusal, [ATTACKS[name]() for name in attacks])
    findings = _findings(results, observation, decode)
    return AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None,
        sentence=sentence(findings),
        questions=max((one.judgement.questions for one in results if one.judgement is not None), default=0),
    )


def _fitted(folder: Path, observation: Observation, model: nn.Module | None) -> Observation:
    try:
        return fit(observation, model).observation
    except ObservationError as error:
        raise DataError(f"{folder}: {error}") from None


def _findings(
    results: Sequence[Examined], observation: Observation, decode: Decode
) -> tuple[AuditFinding, ...]:
    observer = cast(Observer, observation.observer)  # a name the other system gave
    stated = observation.metadata.get("point") or ("aggregated" if observation.kind == "sum" else "raw")
    point = cast(Point, stated)
    return tuple(
        not_run(observer, one.attack, point, one.refused)
        if one.seen is None or one.judgement is None
        else finding_of(observer, point, one.seen, one.judgement, decode)
        for one in results
    )
