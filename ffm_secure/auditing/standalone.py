"""Attack an update of any system: what was observed, the model, and, where the auditor has it, the truth."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch
from torch import nn

from attacks import steps
from attacks.command import load_model, load_tokenizer, normalisation
from attacks.examine import Examined, examine, study
from attacks.fitting import Fitted, fit
from attacks.observation import Observation, ObservationError, load_observation
from attacks.registry import ATTACKS
from attacks.scoring import Pictured
from attacks.truth import load_truth
from ffm_secure.auditing.budget import NULL_STEPS, SHOWN_PICTURES, AuditBudget, Watch, not_run, unwatched
from ffm_secure.auditing.findings import finding_of
from ffm_secure.auditing.png import side_by_side
from ffm_secure.auditing.wording import Decode, decoder, sentence
from ffm_secure.errors import DataError, StoreError
from ffm_secure.records import (
    AuditFinding,
    AuditSummary,
    Observer,
    Point,
    RecoveredPicture,
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
    watch: Watch = unwatched,
) -> AuditSummary:
    """Attack a stored observation of any system, each attack beside its control, beside itself on noise and
    beside guessing.

    The control is a rehearsal: the same model takes the same kind of step on invented data, undefended. With
    `truth`, a safetensors file of what the client trained on, findings are scored; without it an attack leaks
    when it is as sure as on the rehearsal and surer than on noise. `unused` is such a file of records that
    nobody trained on: guessing goes by their words and labels, and rehearsals are made of them.

    `adapter` is a folder as PEFT writes it, put on top of the model. Names of other libraries are matched
    with the model's.

    Raises:
      StoreError: a folder or file cannot be read.
      DataError: names, shapes or values of the update are not the model's, each named.
    """
    began = time.process_time()
    try:
        observation = load_observation(folder)
        loaded = None
        if model is not None:
            loaded = load_model(model, adapter=adapter)
        known = None
        if truth is not None:
            known = load_truth(truth)
        others = None
        if unused is not None:
            others = load_truth(unused)
    except (ObservationError, OSError, ValueError) as error:
        raise StoreError(f"{folder}: {error}") from None
    fitted = _fitted(folder, observation, loaded)
    observation = fitted.observation
    decode = decoder(None if model is None else load_tokenizer(model))
    with steps.counted():
        purse = AuditBudget(name=budget, watch=watch)
        scene = study(observation, loaded, known, unused=others, null_steps=NULL_STEPS[budget])
        chosen = [ATTACKS[name]() for name in attacks]
        results = examine(scene, purse.budget, purse.refusal, chosen, purse.watch)
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    if model is not None:
        shift, scale = normalisation(model)
    findings = _findings(results, observation, decode, _Colours(shift=shift, scale=scale))
    return AuditSummary(
        budget=budget,
        cpu_seconds=time.process_time() - began,
        findings=findings,
        epsilon_lower=None,
        sentence=sentence(findings),
        notes=(*fitted.notes, *_renamed(observation)),
        questions=max((one.judgement.questions for one in results if one.judgement is not None), default=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Colours:
    """The mean and deviation per channel by which a model's pictures were normalised, or nothing."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def beside(self, shown: Sequence[Pictured]) -> tuple[RecoveredPicture, ...]:
        """Return true and recovered pictures as a person sees them."""
        channels = 0
        if shown:
            channels = shown[0].truth.shape[0]
        if channels not in (1, 3):
            return ()
        stated = len(self.shift) == len(self.scale) == channels
        if stated:
            mean, deviation = (torch.tensor(self.shift), torch.tensor(self.scale))
        else:
            mean, deviation = (None, None)
        return side_by_side(shown[:SHOWN_PICTURES], mean, deviation)


def _fitted(folder: Path, observation: Observation, model: nn.Module | None) -> Fitted:
    try:
        return fit(observation, model)
    except ObservationError as error:
        raise DataError(f"{folder}: {error}") from None


def _observer(observation: Observation) -> Observer:
    """Return the observer of the threat model; one that another system named otherwise saw what a server
    sees.
    """
    named = observation.observer
    if named in get_args(Observer):
        return cast(Observer, named)
    return "server"


def _renamed(observation: Observation) -> tuple[str, ...]:
    if observation.observer in get_args(Observer):
        return ()
    return (f"the observer {observation.observer!r} is shown as the server",)


def _findings(
    results: Sequence[Examined], observation: Observation, decode: Decode, colours: _Colours
) -> tuple[AuditFinding, ...]:
    observer = _observer(observation)
    stated = observation.metadata.get("point") or ("aggregated" if observation.kind == "sum" else "raw")
    point = cast(Point, stated)
    return tuple(
        not_run(observer, one.attack, point, one.refused)
        if one.seen is None or one.judgement is None
        else replace(
            finding_of(observer, point, one.seen, one.judgement, decode),
            pictures=colours.beside(one.seen[1].pictures) if one.seen[1] is not None else (),
        )
        for one in results
    )
