"""What is printed about privacy:
the right account, the right observer, infinity where nothing is guaranteed.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from defenses.dp import SampledSkellamEvent, epsilon
from ffm_secure.engines import simulation, summary
from ffm_secure.errors import DataError, PlanRefused, StoreError
from ffm_secure.privacy.calibration import calibrate
from ffm_secure.privacy.statements import statements
from tests.federation.helpers import CLIENT, RECORD, SECAGG, charge_everybody, finish, make, prepared, train

ONE = {"rounds": 1}


def shared(tmp_path: Path, **changes: object) -> dict[str, object]:
    return {**RECORD, "noise": "system", "ledger": str(tmp_path / "owner.sqlite"), **changes}


def test_a_lost_ledger_is_refused_on_resume(tmp_path: Path) -> None:
    """Found by attacking it: with the ledger deleted, a resumed run printed less than it had spent."""
    made = make(privacy={**RECORD, "noise": "system"})
    train(made, tmp_path)
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(StoreError, match="lacks 12 charges"):
        train(made, tmp_path)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"task": {"clients": 5}, "federation": {"rounds": 1, "cohort": 4}}]
)
def test_another_dealing_of_known_rows_is_charged_to_them(change: dict[str, object], tmp_path: Path) -> None:
    train(make(privacy=shared(tmp_path), federation=ONE), tmp_path / "a")
    with pytest.raises(PlanRefused, match=r"have spent 7\.991 before, together 8\.[89]"):
        simulation.build(
            prepared(make(**{"privacy": shared(tmp_path), "federation": ONE, **change})), tmp_path / "b"
        )


def test_a_copy_of_the_rows_is_the_same_account(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    text = "text,label\n" + "".join(f"note {i},{'ab'[i % 2]}\n" for i in range(60))
    (folder / "train.csv").write_text(text)
    (folder / "validation.csv").write_text("text,label\nx,a\ny,b\n")
    shutil.copytree(folder, tmp_path / "copy")
    model = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
    accounts = [
        prepared(
            make(
                task={"kind": "text_classification", "data": str(place), "clients": 4},
                model=model,
                privacy=RECORD,
            )
        ).account
        for place in (folder, tmp_path / "copy")
    ]
    assert accounts[0].split()[-2:] == accounts[1].split()[-2:]


@pytest.mark.parametrize("public", [True, False])
def test_rows_that_become_public_are_counted_in_a_warning(public: bool, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"note {i},{'ab'[i % 2]}\n" for i in range(60))
    )
    if public:
        (tmp_path / "validation.csv").write_text("text,label\nx,a\ny,b\n")
    task = {"kind": "text_classification", "data": str(tmp_path), "clients": 4}
    model = {"name": "builtin:tiny-bert", "trainable": {"kind": "head"}}
    if not public:
        with pytest.raises(DataError, match=r"say task\.validation = 'hold_out'"):
            prepared(make(task=task, model=model, privacy=RECORD))
        task["validation"] = "hold_out"
    ready = prepared(make(task=task, model=model, privacy=RECORD))
    warnings = summary.describe(ready).warnings
    count = ready.dataset.held_out
    assert any(f"{count} of its rows leave the clients" in line for line in warnings) is not public
    assert (count > 0) is not public


def test_another_unit_beside_a_used_account_is_refused(tmp_path: Path) -> None:
    train(make(privacy=shared(tmp_path), federation=ONE), tmp_path / "a")
    client = shared(tmp_path, unit="client")
    with pytest.raises(PlanRefused, match="would forget them"):
        prepared(make(privacy=client, federation=ONE, protection=SECAGG))


def test_a_second_run_of_one_file_is_refused_and_never_given_more_noise(tmp_path: Path) -> None:
    """It trained on with noise 13 instead of 0.8, as nearly nothing was left."""
    made = make(privacy=shared(tmp_path, epsilon=4.0), federation=ONE)
    first, _ = train(made, tmp_path / "a")
    with pytest.raises(
        PlanRefused, match=r"have spent 3\.99. before, together 4\.39., above the lifetime budget of 4"
    ):
        prepared(made)
    first.ledger.grant("record", 6.0, 1e-5, raise_because="the owners agreed to a second run")
    second, result = train(made, tmp_path / "b")
    assert result.status == "complete"
    assert second.mechanism == first.mechanism
    assert 4.0 < second.epsilon() < 4.5
    assert second.prepared.outlook is not None
    assert second.prepared.outlook.left == pytest.approx(6.0 - second.epsilon(), rel=1e-2)


def test_statements_come_from_the_events_that_were_charged(tmp_path: Path) -> None:
    made = make(privacy={**RECORD, "noise": "system"})
    built, trained = train(made, tmp_path)
    result = summary.summarise(built, trained, zero_metric=0.0, outcomes=(), seconds=0.0, ended="")
    events = built.largest_history()
    again = epsilon(events, 1e-5)
    assert result.statements[0].epsilon == pytest.approx(again.epsilon)
    assert result.statements[0].slack > 0
    assert [statement.observer for statement in result.statements] == [
        "public",
        "client",
        "server",
        "colluding_server",
    ]


def test_seeded_noise_is_never_a_number(tmp_path: Path) -> None:
    made = make(privacy=RECORD, federation=ONE)
    built, trained = train(made, tmp_path)
    outcomes = summary.outcomes(built, trained, built.trainable.flatten().cpu())
    result = summary.summarise(built, trained, zero_metric=0.0, outcomes=outcomes, seconds=0.0, ended="")
    assert result.stamps[0].startswith("NOT PRIVATE")
    assert all(math.isinf(statement.epsilon) for statement in result.statements)
    assert all(math.isinf(record.epsilon_spent) for record in result.rounds)
    assert all(math.isinf(outcome.epsilon) for outcome in result.clients)
    assert "nothing is guaranteed" in result.plan.spends


def test_client_noise_never_counts_the_curious_client(tmp_path: Path) -> None:
    built = prepared(make(privacy=CLIENT, protection={**SECAGG, "colluding": 0}))
    assert built.mechanism.client_level is not None
    assert built.mechanism.client_level.inner.honest_survivors == 2  # of a threshold of three


def test_the_majority_is_the_public_one(tmp_path: Path) -> None:
    made = make(privacy={**RECORD, "noise": "system"}, federation=ONE)
    built, trained = train(made, tmp_path)
    result = summary.summarise(built, trained, zero_metric=0.0, outcomes=(), seconds=0.0, ended="")
    validation = built.prepared.dataset.validation
    chosen = np.sort(np.random.default_rng(made.seed).permutation(len(validation))[:60])
    labels = built.task.labels(validation.take(chosen))  # the rows the accuracy is counted on
    assert result.metric_majority == pytest.approx(max((labels == label).mean() for label in set(labels)))


def test_a_begun_run_keeps_its_noise(tmp_path: Path) -> None:
    """With a ledger that outlives runs, a resume must not calibrate against the run's own charges."""
    made = make(privacy=shared(tmp_path), federation={"rounds": 2})
    first = simulation.build(simulation.prepare(made, Path.cwd()), _new(tmp_path / "run"))
    charge_everybody(first)
    again = simulation.prepare(made, Path.cwd(), tmp_path / "run")
    assert again.mechanism == first.mechanism
    assert finish(simulation.build(again, tmp_path / "run"), tmp_path / "run").status == "budget exhausted"


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_several_kinds_of_events_are_said_in_words() -> None:
    """A head from noisy sums and rounds of learning: a reader gets sentences, each with its noise."""
    config = make(privacy={**RECORD, "noise": "system"})
    mechanism = calibrate(config, size=10, public_client_size=50)
    learned = mechanism.event("update of one round")
    sums = SampledSkellamEvent(
        unit="record",
        adjacency="add_remove",
        sampling_rate=1.0,
        l1_sensitivity=900.0,
        l2_sensitivity=300.0,
        variance=360_000.0,
        dimension=77_760,
        scale=100.0,
        steps=1,
        release="ridge_sums",
    )
    first = statements(config, mechanism, [sums, learned, learned])[0]
    assert first.mechanism == (
        "ridge_sums: 1 x 1 unsampled sum of 77,760 numbers with Skellam noise in shares, "
        "noise multiplier 2.0000",
        "update of one round: 2 x 2 Poisson(0.16) sampled Gaussian steps, noise multiplier "
        f"{mechanism.noise_multiplier:.4f}, clip 1",
    )
