"""The records that cross room boundaries: what a round plans, what leaves a client, what a run reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Observer = Literal["public", "client", "server", "colluding_server"]
Verdict = Literal["leaked", "not leaked", "inconclusive", "not applicable"]
Point = Literal["raw", "clipped", "noised", "aggregated"]  # where on its way an update is seen
RunStatus = Literal["complete", "interrupted", "budget exhausted"]
View = Literal["internal", "public"]  # of a report: everything there is, or releases alone
# in `RoundRecord.dropped`: the site refused the plan, or its ledger does not pay; it was not charged
DECLINED = "declined"
# the site gave no answer before the round began: down, or cut off; no update of it is in any sum
ABSENT = "absent"
# too few of the site's group took part for the group's sum, so it was not asked to pay
NOT_ASKED = "not asked"
NOT_BEGUN = frozenset({DECLINED, ABSENT, NOT_ASKED})
# in `RoundRecord.dropped`: updates are visible, and the site's was one that no honest site sends
REFUSED = "refused"
# in `RoundPlan.query` and `RoundRecord.query`: the round learns; anything else is a query of the registry
LEARN = "learn"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyStatement:
    """State one epsilon with the five fields without which it means nothing.

    `epsilon` is infinity where nothing is guaranteed; it is never 0 for "unknown" and never left out.
    `mechanism` is the ordered list of events in words, `slack` the accountant's numeric excess, already
    inside `epsilon`.
    """

    observer: Observer
    epsilon: float
    delta: float
    unit: str  # "record", "person with 4 records", "client", "none"
    adjacency: str
    mechanism: tuple[str, ...]
    accountant: str
    slack: float
    note: str = ""

    @property
    def finite(self) -> bool:
        """Tell whether anything is guaranteed at all."""
        return math.isfinite(self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Tell a site everything about the round it is asked to take part in.

    Its canonical bytes travel; a site parses them, recomputes what it can and refuses what differs
    (`site.plan_check`).
    """

    run_id: bytes
    round: int
    cohort: tuple[int, ...]
    fingerprint: str  # SHA-256 over the exact global tensors
    mechanism: str  # digest of what decides epsilon
    phase: Literal["private", "public"] = "private"
    step: int = 0  # steps the global model has taken; says which half of the factors a rule trains
    turn: int = 0  # place of the cohort in the public schedule: private rounds before this one
    attempt: int = 0  # how often the round was begun before; grows when one that a kill ended is tried again
    layout: str = ""  # digest of names, shapes and codec of what is sent
    query: str = LEARN  # what is asked
    asked: tuple[int, ...] = ()  # which of a question's public choices it is about, where not all


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Tell the server what a site's ledger says after a round; the ledger itself never leaves the site."""

    epsilon: float  # spent so far; infinity without a guarantee
    entries: int
    head: str  # hash of the ledger's last row

    def __post_init__(self) -> None:
        if math.isnan(self.epsilon) or self.epsilon < 0.0:
            raise ValueError(f"epsilon = {self.epsilon!r}: must be 0 or more")
        if not 0 <= self.entries < 2**53 or re.fullmatch("[0-9a-f]{0,64}", self.head) is None:
            raise ValueError(
                "entries and head must be those of a ledger: a number, and a hash in hexadecimal"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Answer a plan: the site takes part, or does not; why not stays in the site's own log."""

    accepted: bool
    affordable: bool = True  # False: the budget of the site's own ledger does not pay for the round
    receipt: Receipt | None = None  # once the site has paid


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSum:
    """Hold what the server learned in a round: the sum over the survivors, nothing about any one of them."""

    round: int
    survivors: tuple[int, ...]
    values: NDArray[np.float64]  # [d], the decoded sum
    loss_sum: float | None  # present only where the run releases it (no privacy unit)
    weight_sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageScore:
    """State how a model does on the public rows of one stage of a stream."""

    stage: str
    rows: int
    unknown: float  # share right among all classes
    known: float  # among the classes of this stage alone


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """Record one finished or aborted round; everything in it may be published."""

    round: int
    phase: Literal["private", "public"]
    cohort: tuple[int, ...]
    survivors: tuple[int, ...]
    dropped: Mapping[int, str] = field(default_factory=dict)  # client -> stage at which it was lost
    aborted: str = ""  # reason; empty when the round was opened
    loss: float  # of the global model on the public evaluation set, nats
    metric: float
    metric_name: str
    epsilon_spent: float  # the largest over data owners so far; infinity without a guarantee
    bytes_up: int  # all clients together
    bytes_down: int
    seconds: float  # wall time of the whole round
    client_seconds: float  # wall time inside clients' training
    evaluation_seconds: float = 0.0
    norm: float | None = None  # L2 of the opened mean, as it was divided
    alignment: float | None = (
        None  # cosine between the newest public and the newest private change, where two can be compared
    )
    # SHA-256 of the signed uploads behind a sum that was refused, by client; they lie in evidence/
    evidence: Mapping[int, str] = field(default_factory=dict)
    query: str = LEARN  # what was asked
    groups: tuple[tuple[int, ...], ...] = ()  # survivors of every sum, where a round opens several
    closed: tuple[str, ...] = ()  # why sums of further groups stayed closed, or were refused
    stage: str = ""  # of a stream, whose rows were asked
    stages: tuple[StageScore, ...] = ()  # of every stage's public rows, after the last round of one


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedObservation:
    """Describe what one observer saw of one round as it crossed the wire; the tensors lie beside it."""

    format: int = 1
    round: int
    observer: Observer
    point: Point
    sites: tuple[int, ...]  # whose updates are in it
    scale: float = 1.0  # the stored vector times this is the plain sum over `sites`
    step: int = 0  # steps the broadcast model had taken; says which tensors were sent
    named: bool = True  # False: what was sent is no change of named tensors (products, for instance)
    own: int = -1  # the site whose own update this is; -1 for a sum
    group: int = -1  # which group's sum it is, where a round opens several; -1 for the only one


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOutcome:
    """Show how one data owner fared: a simulation's own view, which a report marks as such."""

    client: str
    examples: int
    participations: int
    metric: float
    metric_before: float
    epsilon: float
    budget: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalOutcome:
    """Show how one owner's own model does on its own rows, beside two others: the owner's own figures, never
    released.
    """

    client: str
    rows: int  # that were tested
    local: float  # metric of a model that the owner made alone
    shared: float  # of the last shared model
    own: float  # of the own model


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredPair:
    """Show one true item beside what the attack recovered (text, or a label)."""

    truth: str
    recovered: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredPicture:
    """Show one true picture beside the recovered one, both as `data:image/png;base64,` addresses."""

    truth: str
    recovered: str
    psnr: float  # dB, over the range of the true pictures
    ssim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFinding:
    """Report one attack by one observer on one form of the update, with its control and its baseline."""

    observer: Observer
    attack: str
    point: Point
    verdict: Verdict
    measure: str  # for instance "token F1", "PSNR dB", "TPR at 1 % FPR", "epsilon lower bound"
    score: float | None
    low: float | None = None  # 99 % interval
    high: float | None = None
    baseline: float | None = None  # the same measure for guessing from the prior
    control: float | None = None  # the same attack with the defence off
    luck: float | None = (
        None  # how likely guessing or noise does as well, corrected for all questions of the audit
    )
    seconds: float = 0.0
    knowledge: tuple[str, ...] = ()
    reason: str = ""
    pairs: tuple[RecoveredPair, ...] = ()
    granted: tuple[str, ...] = ()  # what the attacker was allowed to know beyond the wire: the worst case
    observed: float | None = None  # the same attack on what the protocol really sends, with nothing granted
    observed_reason: str = ""  # what that was, or why there is no such number
    source: Literal["replayed", "recorded"] = (
        "replayed"  # one step played again at its worst, or what really crossed the wire
    )
    round: int = 0  # of a recorded observation
    pictures: tuple[RecoveredPicture, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakCurve:
    """Show how an attack fares on invented data as one thing about the update changes; rehearsed on the run's
    own model.
    """

    attack: str
    axis: Literal["records", "tokens per width", "tokens per rank", "rounds", "noise multiplier"]
    measure: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    baseline: float | None = None  # the same measure for guessing
    here: float | None = None  # where on the axis this run lies
    reason: str = ""  # why points are missing, or all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """Collect what an audit found, with its budget and the lower bound it puts under the ledger's upper
    bound.
    """

    budget: str
    cpu_seconds: float
    findings: tuple[AuditFinding, ...]
    epsilon_lower: float | None  # statistical lower bound, None when no canary audit ran
    epsilon_lower_method: str = ""
    sentence: str = ""  # one line a manager understands
    questions: int = 0  # which luck was corrected for
    notes: tuple[str, ...] = ()  # how the names of another system's update were read
    curves: tuple[LeakCurve, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedQuery:
    """Say what one question of a run sends and costs, beside learning."""

    query: str
    asks: int
    words: str
    rows: str  # "learned from" or "held back"
    numbers: int
    bytes_up: int  # one client, one round
    epsilon: float  # of this question alone, for one owner; infinity without a guarantee
    noise_multiplier: float
    answers: int = 1  # most of one owner, without spare ones


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """Say what a run would train, send, spend and reveal; trains nothing."""

    headline: str
    trains: str
    trainable_parameters: int
    total_parameters: int
    sends: str
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    spends: str
    noise_multiplier: float
    statements: tuple[PrivacyStatement, ...]
    reveals: Mapping[Observer, str]
    breaks: str  # the collusion statement
    warnings: tuple[str, ...] = ()
    queries: tuple[PlannedQuery, ...] = ()
    bytes_up_uncompressed: int = 0  # what an upload would take without compression; 0: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRelease:
    """Say of the data what may be said to anyone: public rows, declared names; no private row is counted."""

    source: str
    public_rows: int
    held_out: int  # public rows that were taken from the owners' rows and are protected by nothing
    classes: tuple[str, ...] = ()
    classes_from: str = ""  # who named them
    max_length: int = 0  # tokens kept of a text; 0 where there is no text
    cut: float | None = None  # share of the public texts that are longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """State a share that was read from noisy counts, with its interval."""

    name: str
    value: float
    low: float
    high: float
    rows: float  # noisy, so it may be below 0
    deviation: float  # of the value, noise and chance together


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedEvaluation:
    """Hold what a charged evaluation of private rows released."""

    accuracy: Estimate
    classes: tuple[Estimate, ...]
    groups: tuple[Estimate, ...]
    confidences: tuple[Estimate, ...]  # share right, by the largest probability in tenths
    gap: Estimate | None  # between the best and the worst group
    deviation: float  # of the noise of one count
    level: float  # of every interval
    owners: tuple[Estimate, ...] = ()  # where the run file asks for counts by owner
    worst: tuple[Estimate, ...] = ()  # worst class, group and owner, each with an interval for the true worst


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMeasures:
    """State what a stream of stages did to a model; `lifecycle.stream_measures` says how each is read."""

    average: float
    forgetting: float
    backward: float
    forward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSummary:
    """Hold accuracies on public rows of every stage, before the first stage and after each."""

    stages: tuple[str, ...]
    unknown: tuple[tuple[float, ...], ...]  # [stages + 1, stages], among all classes
    known: tuple[tuple[float, ...], ...]  # among the classes of the row's own stage
    measures_unknown: StreamMeasures
    measures_known: StreamMeasures


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMeasures:
    """Hold how a classifier answers the public rows it is evaluated on.

    `confusion[i][j]` counts rows of class i that were answered with class j; empty for very many classes.
    """

    names: tuple[str, ...]
    rows: int
    macro_f1: float
    balanced_accuracy: float
    calibration_error: float  # mean distance between confidence and share right, from 0 to 1
    confusion: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Hold everything a report shows; a pure function turns it into a page.

    What `view` calls internal stays with whoever ran the audit or the simulation; `report.release` makes the
    public one of it.
    """

    format: int = 1
    name: str
    status: RunStatus
    stamps: tuple[str, ...]  # for instance "NOT PRIVATE: privacy noise came from a seed"
    config: Mapping[str, Any]
    plan: PlanSummary
    rounds: tuple[RoundRecord, ...]
    statements: tuple[PrivacyStatement, ...]
    budget_epsilon: float
    metric_name: str
    metric_final: float
    metric_zero_round: float
    metric_majority: float | None
    higher_is_better: bool
    clients: tuple[ClientOutcome, ...]
    clients_source: str  # "simulation's own view, never released" or "charged release"
    audit: AuditSummary | None
    ledger_entries: int
    ledger_head: str
    software: Mapping[str, str]
    seconds: float
    view: View = "internal"
    owners: tuple[str, ...] = ()  # names of the data owners, where the data name them
    round_best: int | None = None  # first round with the best public metric, which `best/` keeps
    metric_best: float | None = None
    ended: str = ""  # ISO 8601, UTC
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of what was run and what came of it
    data: DataRelease | None = None
    evaluation: ReleasedEvaluation | None = None  # of held-back private rows, where the run file asks for it
    stream: StreamSummary | None = None  # where rows arrived in stages, once all of them are over
    personal: tuple[PersonalOutcome, ...] = ()  # internal: own models at home, where the run file asks
    classes: ClassMeasures | None = None  # of the last round's model on public rows, where it classifies


# A text; a prompt with a line break behind it; turns as lines 'role: words'; turns by the chat template.
Layout = Literal["text", "answered", "lines", "template"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelExport:
    """Say what lies in an adapter folder and how it is loaded.

    `form` is `adapter` (PEFT, on the base), `model` (complete, in the folder `model/`), `whole` (complete,
    the folder itself) or `own` (`ffm-secure predict` alone). `virtual` counts the outputs of virtual tokens
    in front of a language model's own. `layout` says how a causal model was given what it continues.
    """

    format: int = 1
    form: Literal["adapter", "model", "whole", "own"]
    auto_class: str
    task: str
    trainable: str
    base_model: str
    base_fingerprint: str  # SHA-256 over the base's tensors
    base_inside: bool  # the base has no name anyone can load, so its weights lie in `base/`
    dtype: str
    max_length: int
    virtual: int = 0
    labels: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    layout: Layout = "text"
    class_text: str = ""  # the text of a class, where pictures are scored against texts
    key_mapping: Mapping[str, str] = field(
        default_factory=dict
    )  # renames the base's tensors, where a part is used
