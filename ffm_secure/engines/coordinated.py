"""What a coordinator leaves behind: the model, a report, and every site's signed receipt."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from defenses.dp import Event
from ffm_secure import record_codec
from ffm_secure.engines.headquarters import ReadyRun
from ffm_secure.engines.simulated_data import SimulatedData
from ffm_secure.engines.simulation import Prepared
from ffm_secure.engines.summary import public_summary
from ffm_secure.federation import TrainingResult
from ffm_secure.records import LEARN, NOT_BEGUN, Receipt, RoundRecord, RunSummary
from ffm_secure.report import document as report
from ffm_secure.report import model_card
from ffm_secure.site.allowance import composed
from ffm_secure.storage.durable import write_atomic
from ffm_secure.trainable import exports
from ffm_secure.transport.receipts import RECEIPTS, Receipts


def finish(ready: ReadyRun, trained: TrainingResult) -> RunSummary:
    """Write model, report and receipts of a run; return what the report shows."""
    summary = summarise(ready, trained)
    loaded, task = ready.loaded, ready.task
    name = loaded.config.model.name
    store = ready.coordinator.store

    def export(folder: Path) -> None:
        written = exports.export(
            loaded.trainable,
            folder,
            name,
            max_length=task.max_length,
            text_columns=task.data.text_columns,
            layout=task.layout,
        )
        model_card.write_card(folder, written, summary)

    loaded.trainable.load_vector(trained.state.vector)
    store.replace_folder("adapter", export)
    report.write(summary, ready.folder)
    receipts = Receipts(sites=ready.coordinator.receipts)
    write_atomic(ready.folder / RECEIPTS, record_codec.canonical_bytes(receipts) + b"\n")
    return summary


def summarise(ready: ReadyRun, trained: TrainingResult) -> RunSummary:
    """Collect a run as its coordinator saw it: no ledger, and of single sites nothing but receipts."""
    private = ready.loaded.config.privacy.unit != "none"
    known = public_summary(
        _as_planned(ready),
        trained,
        zero_metric=ready.coordinator.server.evaluate(ready.initial).metric,
        public=ready.dataset.validation,
        spent=_charged(ready, trained) if private else (),
        seconds=time.time() - ready.began,
        ended=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    return replace(known, owners=ready.loaded.owners)


def _charged(ready: ReadyRun, trained: TrainingResult) -> tuple[Event, ...]:
    """Return the events of the site that can have paid most, by the public schedule."""
    loaded = ready.loaded
    events = {
        LEARN: loaded.mechanism.event(release="update of one round"),
        **loaded.spec.answer_events(),
    }
    return most_charged(trained.records, events, loaded.config.privacy.delta)


def most_charged(
    records: Sequence[RoundRecord], events: Mapping[str, Event], delta: float
) -> tuple[Event, ...]:
    """Return what the site that paid most was charged for; `events` by what a round asks.

    A site pays from the moment it begins a round, whatever becomes of it.
    """
    paid: dict[int, Counter[Event]] = {}
    for record in records:
        for site in record.cohort:
            if record.dropped.get(site) not in NOT_BEGUN:
                paid.setdefault(site, Counter())[events[record.query]] += 1
    if not paid:
        return ()
    most = max(paid.values(), key=lambda counts: composed(tuple(counts.items()), delta))
    return tuple(most.elements())


def _as_planned(ready: ReadyRun) -> Prepared:
    """Return the run as a plan describes one; the rows in it are public."""
    loaded = ready.loaded
    data = SimulatedData(
        dataset=ready.dataset,
        config=loaded.config,
        parts=(),
        public=None,
        account="",
        contents="",
        bare_contents="",
        owners=loaded.owners,
    )
    return Prepared(
        config=loaded.config,
        data=data,
        backbone=loaded.backbone,
        trainable=loaded.trainable,
        task=ready.task,
        spec=loaded.spec,
        facts=loaded.facts,
    )


def receipt_lines(ready: ReadyRun) -> list[str]:
    """Say what every site's newest receipt states."""
    lines = []
    for name, signed in sorted(ready.coordinator.receipts.items()):
        receipt = record_codec.from_bytes(Receipt, signed.content, "a receipt")
        spent = "no guarantee" if math.isinf(receipt.epsilon) else f"epsilon {receipt.epsilon:.4g}"
        lines.append(
            f"  receipt  {name}: {spent}, {receipt.entries} ledger entries, head {receipt.head[:16]}"
        )
    return lines
