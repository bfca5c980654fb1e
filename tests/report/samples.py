"""Summaries of made-up runs: as a real run would leave them, and at the edges."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from ffm_secure.records import (
    AuditFinding,
    AuditSummary,
    ClassMeasures,
    ClientOutcome,
    DataRelease,
    LeakCurve,
    PlanSummary,
    PrivacyStatement,
    RecoveredPair,
    RecoveredPicture,
    RoundRecord,
    RunSummary,
)
from ffm_secure.report.outcome import best_of

LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
INFINITY = math.inf
# Four by four pixels each.
CHEQUERED = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAGElEQVR42mOQi1pwwkYDQjLAWUCSAa"
    "cMANhzEiE2JETQAAAAAElFTkSuQmCC"
)
GREY = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAADklEQVR42mNoQAIMxHEAcFIYAZ6uvm"
    "8AAAAASUVORK5CYII="
)
HOSPITALS = (
    "St. Brigid",
    "Northfield General",
    "Harbour Clinic",
    "Lakeside",
    "Queen Maud",
    "Old Mill",
    "Riverside",
    "Elm Park",
)


def statement(observer: Any = "server", epsilon: float = 7.8012, **changes: Any) -> PrivacyStatement:
    """Build a record-level statement."""
    values: dict[str, Any] = {
        "observer": observer,
        "epsilon": epsilon,
        "delta": 1e-5,
        "unit": "record",
        "adjacency": "add or remove one record",
        "mechanism": ("1,240 x Gaussian(noise multiplier 0.71) on a Poisson sample of rate 0.0128",),
        "accountant": "PLD, pessimistic",
        "slack": 0.0031,
    }
    return PrivacyStatement(**(values | changes))


def statements(epsilon: float = 7.8012) -> tuple[PrivacyStatement, ...]:
    """Build the four statements of a record-level run."""
    return (
        statement("public", epsilon),
        statement("client", epsilon),
        statement("server", epsilon),
        statement("colluding_server", epsilon),
    )


def no_statement(observer: Any, note: str = "") -> PrivacyStatement:
    """Build the statement of an observer nothing is promised against."""
    return statement(
        observer,
        INFINITY,
        unit="none",
        adjacency="none",
        mechanism=("non-private release",),
        accountant="none",
        slack=0.0,
        note=note,
    )


def rounds(
    total: int,
    *,
    clients: int = 8,
    cohort: int = 8,
    final: float = 7.8012,
    aborted: tuple[int, ...] = (),
    seed: int = 1,
) -> tuple[RoundRecord, ...]:
    """Build a learning curve with noise, drops and aborts."""
    source, records, metric, loss = random.Random(seed), [], 0.131, 2.31
    for number in range(1, total + 1):
        who = tuple(sorted(source.sample(range(clients), cohort)))
        gone = {c: source.choice(("masking", "training")) for c in who[:1] if source.random() < 0.35}
        if number in aborted:
            gone = dict.fromkeys(who[: max(1, cohort // 2)], "masking")
        else:
            metric += (0.861 - metric) * (1 - math.exp(-3.2 / total)) * source.uniform(0.6, 1.3)
            loss += (0.48 - loss) * (1 - math.exp(-3.4 / total)) * source.uniform(0.6, 1.3)
        up = 0 if number in aborted else 442_880 * (cohort - len(gone))
        records.append(
            RoundRecord(
                round=number,
                phase="private",
                cohort=who,
                survivors=() if number in aborted else tuple(c for c in who if c not in gone),
                dropped=gone,
                aborted=f"{cohort - len(gone)} of {cohort} clients were left, {cohort - 1} are needed"
                if number in aborted
                else "",
                loss=loss,
                metric=metric,
                metric_name="accuracy",
                epsilon_spent=final if number == total else final * math.sqrt(number / total),
                bytes_up=up,
                bytes_down=442_880 * cohort,
                seconds=source.uniform(18, 23),
                client_seconds=source.uniform(14, 17),
                evaluation_seconds=1.42,
            )
        )
    return tuple(records)


def plan(promised: tuple[PrivacyStatement, ...], **changes: Any) -> PlanSummary:
    """Build a plan."""
    values: dict[str, Any] = {
        "headline": "8 hospitals adapt a 22.7-million-parameter text encoder over 20 rounds; "
        "each patient record is protected with epsilon 8.",
        "trains": (
            "LoRA of rank 8 on the query and value projections of all six layers, and the classification head"
        ),
        "trainable_parameters": 78_352,
        "total_parameters": 22_791_312,
        "sends": "one masked vector per client and round, 44-bit integers; nobody can open a single one",
        "bytes_up_per_client_round": 442_880,
        "bytes_down_per_client_round": 442_880,
        "spends": "epsilon at most 8 per record at delta 1e-5, reserved before each round",
        "noise_multiplier": 0.7134,
        "statements": promised,
        "reveals": {
            "public": "the final adapter",
            "client": "every broadcast adapter",
            "server": "the sum over at least 7 clients in each round",
            "colluding_server": "the sum without the updates of up to 2 colluding clients",
        },
        "breaks": "7 of 8 clients together with the server can compute the update of the eighth; "
        "its records stay protected by their own noise.",
        "warnings": (),
    }
    return PlanSummary(**(values | changes))


def clients(
    total: int = 8, *, epsilon: float = 7.8012, budget: float = 8.0, seed: int = 2
) -> tuple[ClientOutcome, ...]:
    """Build one outcome per data owner; the second one gets worse."""
    source = random.Random(seed)
    return tuple(
        ClientOutcome(
            client=HOSPITALS[i] if total <= 8 else f"client {i:03d}",
            examples=source.randint(640, 3900),
            participations=source.randint(17, 20),
            metric=0.41 if i == 1 else min(0.98, max(0.05, source.gauss(0.83, 0.07))),
            metric_before=0.46 if i == 1 else max(0.01, source.gauss(0.2, 0.08)),
            epsilon=epsilon if math.isinf(epsilon) or i == 0 else epsilon * source.uniform(0.9, 1),
            budget=budget,
        )
        for i in range(total)
    )


def findings(*, leak: bool = False) -> tuple[AuditFinding, ...]:
    """Build one finding per verdict and shape."""
    truth = "62-year-old man from Carrow with chest pain since Tuesday, insured as K-4471, sees Dr. Amsel"
    got = (
        "year old man with chest pain since Tuesday, insured as K-4471, sees nobody"
        if leak
        else "the of pain with and patient was the"
    )
    pairs = (
        RecoveredPair(truth=truth, recovered=got),
        RecoveredPair(
            truth="Neurology follow-up: migraine, left-handed violinist",
            recovered="follow-up stable"
            if not leak
            else "neurology follow-up migraine left-handed violinist",
        ),
        RecoveredPair(truth="cardiology", recovered="cardiology" if leak else "orthopaedics"),
        RecoveredPair(truth="rash on both arms", recovered=""),
    )
    score = 0.71 if leak else 0.118
    return (
        AuditFinding(
            observer="server",
            attack="Text inversion by gradient matching",
            point="noised" if not leak else "raw",
            verdict="leaked" if leak else "not leaked",
            measure="token F1",
            score=score,
            low=score - 0.04,
            high=score + 0.05,
            baseline=0.112,
            control=0.763,
            seconds=88.4,
            knowledge=("architecture", "tokenizer", "one update"),
            pairs=pairs,
        ),
        AuditFinding(
            observer="public",
            attack="Membership inference (likelihood ratio)",
            point="aggregated",
            verdict="inconclusive",
            measure="TPR at 1 % FPR",
            score=0.019,
            low=0.006,
            high=0.043,
            baseline=0.01,
            control=0.14,
            seconds=41.0,
            reason="the interval reaches both sides of the baseline",
        ),
        AuditFinding(
            observer="server",
            attack="Label recovery from the head's bias",
            point="aggregated",
            verdict="not leaked",
            measure="label accuracy",
            score=0.137,
            low=0.1,
            high=0.18,
            baseline=0.131,
            control=0.94,
            seconds=0.8,
        ),
        AuditFinding(
            observer="public",
            attack="Canary exposure",
            point="aggregated",
            verdict="not leaked",
            measure="epsilon lower bound",
            score=0.4217,
            seconds=63.0,
            knowledge=("final model", "200 planted canaries"),
        ),
        AuditFinding(
            observer="server",
            attack="Image inversion",
            point="raw",
            verdict="not applicable",
            measure="PSNR dB",
            score=None,
            reason="the task has no images",
        ),
        AuditFinding(
            observer="client",
            attack="Analytic inversion of the first linear layer",
            point="aggregated",
            verdict="not applicable",
            measure="exact match",
            score=None,
            reason="no linear layer sees the input directly",
        ),
    )


def audit(*, leak: bool = False) -> AuditSummary:
    """Build an audit that found nothing, or something."""
    said = (
        "One attack recovered most of a note word for word."
        if leak
        else "No attack recovered more than guessing would."
    )
    return AuditSummary(
        budget="quick: 5 minutes",
        cpu_seconds=193.2,
        findings=findings(leak=leak),
        epsilon_lower=0.4217,
        epsilon_lower_method="200 canaries in one run, 95 % confidence",
        sentence=said,
    )


def curves() -> tuple[LeakCurve, ...]:
    """Build curves of every axis, one cut short and one not drawn."""
    noise = {"axis": "noise multiplier", "x": (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0), "baseline": 0.0}
    return (
        LeakCurve(
            attack="span",
            axis="tokens per rank",
            measure="token F1",
            x=(2.5, 5.0, 10.0, 20.0),
            y=(1.0, 1.0, 0.42, 0.0),
            baseline=0.0,
            here=240.0,
            reason="stopped after 8 CPU seconds",
        ),
        LeakCurve(
            attack="span",
            measure="token F1",
            y=(1.0, 0.93, 0.41, 0.12, 0.0, 0.0, 0.0),
            here=0.7134,
            **noise,
        ),
        LeakCurve(
            attack="position_vision",
            axis="records",
            measure="PSNR dB",
            x=(1.0, 2.0, 4.0, 8.0),
            y=(200.0, 11.2, 9.8, 9.1),
            baseline=12.1,
            here=4.0,
        ),
        LeakCurve(
            attack="canaries",
            axis="rounds",
            measure="epsilon, at least",
            x=(1.0, 2.0, 4.0, 8.0, 16.0, 20.0),
            y=(0.0, 0.21, 0.64, 1.3, 2.2, 2.9),
            here=20.0,
        ),
        LeakCurve(
            attack="span_exact", axis="tokens per width", measure="", reason="one run takes 31 CPU seconds"
        ),
    )


def pictured() -> RunSummary:
    """Build a run whose audit read pictures and words,
    with curves and everything granted beside what was observed.
    """
    base = audit(leak=True)
    beside = RecoveredPicture(truth=CHEQUERED, recovered=CHEQUERED, psnr=200.0, ssim=1.0)
    apart = RecoveredPicture(truth=CHEQUERED, recovered=GREY, psnr=10.79, ssim=0.004)
    granted = ("batch_size", "task", "labels", "image_shape", "one step")
    found = base.findings[0]
    extra = (
        dataclasses.replace(
            found,
            attack="position_vision",
            measure="PSNR dB",
            score=200.0,
            low=None,
            high=None,
            baseline=12.1,
            control=200.0,
            observed=11.3,
            observed_reason="1 client in one whole round, nothing granted",
            granted=granted,
            knowledge=("image_shape",),
            pairs=(),
            pictures=(beside, apart),
        ),
        dataclasses.replace(
            found, granted=granted, knowledge=(), observed_reason="not tried: it searches for minutes"
        ),
    )
    return private(audit=dataclasses.replace(base, findings=(*extra, *base.findings), curves=curves()))


def private(**changes: Any) -> RunSummary:
    """Build a private run with an audit: what the demo leaves."""
    values: dict[str, Any] = {
        "name": "clinic-notes-demo",
        "status": "complete",
        "stamps": (),
        "config": {
            "format": 1,
            "name": "clinic-notes-demo",
            "seed": 7,
            "task": {
                "kind": "text_classification",
                "data": "builtin:clinic_notes",
                "clients": 8,
                "split": {"kind": "natural", "column": "hospital"},
            },
            "model": {
                "name": "builtin:minilm",
                "trainable": {"kind": "lora", "rank": 8, "target_modules": ["query", "value"]},
            },
            "federation": {
                "rounds": 20,
                "cohort": 8,
                "lifecycle": {"kind": "finetune", "local_epochs": 1, "batch_size": 16, "learning_rate": 5e-4},
                "strategy": {"kind": "average"},
            },
            "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5},
            "protection": {"kind": "secagg", "threshold": 7},
            "audit": {"observers": ["server", "public"], "attacks": "all"},
            "speed": {"device": "auto"},
            "document": {
                "controller": "Carrow Regional Hospitals",
                "purpose": "sort clinic notes by speciality",
                "contact": "privacy@carrow.example",
                "legal_basis": "",
            },
        },
        "plan": plan(statements(7.9971)),
        "rounds": rounds(20),
        "statements": statements(),
        "budget_epsilon": 8.0,
        "metric_name": "accuracy",
        "metric_final": 0.8312,
        "metric_zero_round": 0.1308,
        "metric_majority": 0.2251,
        "higher_is_better": True,
        "clients": clients(),
        "clients_source": "simulation's own view, never released",
        "audit": audit(),
        "ledger_entries": 164,
        "ledger_head": "9f2c41d7be0358aa6d1f0c7e4b9a2d83f6517ce09b44a1d2e8837f60c5d2b19e",
        "software": {
            "ffm-secure": "0.1.0",
            "python": "3.12.8",
            "torch": "2.13.0",
            "transformers": "5.2.0",
            "peft": "0.19.0",
            "platform": "Linux x86_64",
        },
        "seconds": 432.7,
        "owners": HOSPITALS,
        "ended": "2026-11-30T14:55:16+00:00",
        "digests": {
            "frozen model": "2428982d5144fbc8d61c405bc0e9f2e664addc2c72cd7284edb0e0543f4635eb",
            "trained numbers": "ec03cfcc1dc87fbc07d1723470430c3864010845944d5182780454d0749f5125",
        },
        "data": DataRelease(
            source="builtin:clinic_notes",
            public_rows=2400,
            held_out=0,
            classes=("cardiology", "neurology", "nephrology"),
            classes_from="stored",
            max_length=64,
            cut=0.0317,
        ),
        "classes": ClassMeasures(
            names=("cardiology", "neurology", "nephrology"),
            rows=100,
            macro_f1=0.8312,
            balanced_accuracy=0.8297,
            calibration_error=0.0519,
            confusion=((40, 3, 2), (4, 29, 2), (1, 3, 16)),
        ),
    }
    values |= changes
    best = best_of(values["rounds"], higher_is_better=values["higher_is_better"])
    if best is not None:
        values = {"round_best": best.round, "metric_best": best.metric} | values
    values.setdefault(
        "metric_final", values["rounds"][-1].metric if values["rounds"] else values["metric_zero_round"]
    )
    return RunSummary(**values)


def non_private() -> RunSummary:
    """Build a run without a guarantee, with a leak."""
    why = "privacy.unit is none: the owner waived protection for a test on public data"
    infinite = tuple(
        no_statement(observer, why if observer == "server" else "")
        for observer in ("public", "client", "server", "colluding_server")
    )
    return private(
        name="baseline-without-privacy",
        stamps=("NOT PRIVATE: privacy.unit is none, because the data are public",),
        statements=infinite,
        plan=plan(
            infinite,
            spends="nothing is bounded: epsilon is infinite",
            noise_multiplier=0.0,
            warnings=("Updates travel in the clear: the server sees each one.",),
        ),
        budget_epsilon=INFINITY,
        rounds=rounds(20, final=INFINITY),
        clients=clients(epsilon=INFINITY, budget=INFINITY),
        audit=audit(leak=True),
    )


def aborted() -> RunSummary:
    """Build an interrupted run with lost rounds, of which one observer has no guarantee."""
    mixed = (
        statement("public", 2.914),
        statement("client", 2.914),
        statement("server", 4.2031, unit="client", adjacency="zero out one client"),
        no_statement("colluding_server", "3 colluding clients are enough to remove the noise"),
    )
    records = rounds(14, clients=20, cohort=10, aborted=(3, 9, 10), final=4.2031)
    return private(
        name="unreliable-network",
        status="interrupted",
        rounds=records,
        statements=mixed,
        plan=plan(mixed),
        audit=None,
        metric_final=records[-1].metric,
    )


def many(total: int = 200, length: int = 50) -> RunSummary:
    """Build a run with many clients."""
    return private(
        name="two-hundred-clients", rounds=rounds(length, clients=total, cohort=20), clients=clients(total)
    )


def fresh() -> RunSummary:
    """Build a run that has not finished a round."""
    return private(
        name="zero rounds",
        status="interrupted",
        rounds=(),
        metric_final=0.1308,
        audit=None,
        clients=(),
        ledger_entries=0,
        ledger_head="",
        software={},
        config={},
        statements=(),
    )


def single() -> RunSummary:
    """Build a run of one round."""
    return private(name="one round", rounds=rounds(1))


def thousand() -> RunSummary:
    """Build a run of a thousand rounds over a thousand clients."""
    return private(
        name="a thousand of each",
        rounds=rounds(1000, clients=1000, cohort=40, aborted=(17, 333, 334)),
        clients=clients(1000),
        status="budget exhausted",
    )


def diverged() -> RunSummary:
    """Build a run whose metric stopped being a number."""
    broken = tuple(
        dataclasses.replace(r, metric=math.nan, loss=INFINITY) if r.round > 12 else r for r in rounds(20)
    )
    lost = tuple(dataclasses.replace(c, metric=math.nan) for c in clients())
    return private(name="diverged", rounds=broken, metric_final=math.nan, clients=lost)


def perplexity() -> RunSummary:
    """Build a run where lower is better and nothing is known of a majority."""
    records = tuple(
        dataclasses.replace(r, metric=400 * math.exp(-r.round / 6) + 31, metric_name="perplexity")
        for r in rounds(20)
    )
    moved = tuple(
        dataclasses.replace(c, metric=30 + 10 * c.metric, metric_before=380 + 90 * c.metric_before)
        for c in clients()
    )
    return private(
        name="shakespeare",
        classes=None,
        rounds=records,
        clients=moved,
        metric_name="perplexity",
        metric_final=records[-1].metric,
        metric_zero_round=402.9,
        metric_majority=None,
        higher_is_better=False,
    )


def contradicted() -> RunSummary:
    """Build a run whose audit proves more leakage than accounting allows, over budget as well."""
    return private(
        name="contradicted",
        statements=statements(8.25),
        audit=dataclasses.replace(audit(leak=True), epsilon_lower=9.114),
    )


def every_text(summary: RunSummary, change: Callable[[str], str]) -> RunSummary:
    """Replace every free text of a summary, keys of free mappings included."""
    fixed = {"observer", "verdict", "point", "phase", "status", "axis", "source", "view"}

    def walk(value: Any, name: str = "") -> Any:
        if isinstance(
            value, DataRelease
        ):  # where the rows come from is a free text, unlike a finding's source
            return dataclasses.replace(
                value,
                source=change(value.source),
                classes=walk(value.classes),
                classes_from=change(value.classes_from),
            )
        if isinstance(value, str):
            return value if name in fixed else change(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: walk(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
            )
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, name) for item in value)
        if isinstance(value, dict):
            return {
                (change(k) if isinstance(k, str) and name != "reveals" else k): walk(v)
                for k, v in value.items()
            }
        return value

    return walk(summary)


def long_words() -> RunSummary:
    """Build a run in which every text is one very long word."""
    return every_text(aborted_with_audit(), lambda text: f"{text[:12].replace(' ', '')}{LONG_WORD}")


def aborted_with_audit() -> RunSummary:
    """Build a run with every kind of section filled, stamps and warnings included."""
    base = aborted()
    return dataclasses.replace(
        base,
        audit=audit(leak=True),
        stamps=("NOT PRIVATE: privacy noise came from a seed",),
        plan=dataclasses.replace(base.plan, warnings=("Threshold 7 of 10 leaves little room for drops.",)),
    )


ALL: dict[str, Callable[[], RunSummary]] = {
    "private": private,
    "non_private": non_private,
    "aborted": aborted,
    "many": many,
    "fresh": fresh,
    "single": single,
    "thousand": thousand,
    "diverged": diverged,
    "perplexity": perplexity,
    "contradicted": contradicted,
    "long_words": long_words,
    "full": aborted_with_audit,
    "pictured": pictured,
}
