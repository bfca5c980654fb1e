"""The evidence folder: nothing in it that is not certified, and no row that points at nothing."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from defenses.dp import Ledger
from ffm_secure.certificate.documents import TABLE, Support, values_at
from ffm_secure.certificate.evidence import write_evidence
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.engines.summary import software
from ffm_secure.errors import StoreError
from ffm_secure.records import RunSummary
from ffm_secure.report.document import from_json
from tests.federation.helpers import call


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "evidence"
    write_evidence(finished, (finished / "certificate.json").read_bytes(), out)
    return out


def summary(folder: Path) -> RunSummary:
    return from_json((folder / "report.json").read_text())


def ledger_heads(folder: Path, finished: Path) -> tuple[object, ...]:
    with Ledger.open(finished / "ledger.sqlite", create=False) as ledger:
        return (ledger.head().hash,) * len(ledger_owners(folder))


def ledger_owners(folder: Path) -> set[str]:
    with (folder / "ledger.csv").open(newline="") as file:
        return {row["owner"] for row in csv.DictReader(file)} - {"*"}


def events(folder: Path, finished: Path) -> tuple[object, ...]:
    """Return the charges of one owner as the mechanism of a statement words them."""
    with Ledger.open(finished / "ledger.sqlite", create=False) as ledger:
        charged = ledger.charged("client-1", ledger.entries(owner="client-1")[0].run)
    words = [f"{count} x {event.to_json()}" for event, count in charged]
    return (words,) * 4


def run_file_of(folder: Path, finished: Path) -> tuple[object, ...]:
    return ((finished / "run.toml").read_text(),)


# what a row of the table claims, computed from the run itself and from no certificate
CLAIMS: dict[tuple[str, str], Callable[[Path, Path], tuple[object, ...]]] = {
    ("GDPR Art. 5(2)", "predicate.owners.*.ledger_head"): ledger_heads,
    ("GDPR Art. 25", "predicate.run_file"): run_file_of,
    ("GDPR Art. 30", "predicate.rounds.*.cohort"): lambda folder, _: tuple(
        len(one.cohort) for one in summary(folder).rounds
    ),
    ("GDPR Art. 32", "predicate.not_protected.*"): lambda folder, _: (
        *(
            f"{who.replace('_', ' ')} sees {what}"
            for who, what in sorted(summary(folder).plan.reveals.items())
        ),
        summary(folder).plan.breaks,
    ),
    ("GDPR Art. 35", "predicate.statements.*.epsilon"): lambda folder, _: tuple(
        one.epsilon for one in summary(folder).statements
    ),
    ("EDPB Opinion 28/2024", "predicate.audit.*.verdict"): lambda folder, _: (),  # it was not audited
    ("AI Act Annex IV", "plan.trains"): lambda folder, _: (summary(folder).plan.trains,),
    ("AI Act Annex IV", "predicate.run_file"): run_file_of,
    ("AI Act Annex IV", "predicate.software"): lambda folder, _: (dict(software()),),
    ("AI Act Art. 10", "predicate.declared_public.*"): lambda folder, _: tuple(
        line for line in summary(folder).plan.warnings if line.startswith("taken to be public")
    ),
    ("AI Act Art. 12", "predicate.transcript"): lambda _, finished: (
        hashlib.sha256((finished / "rounds.jsonl").read_bytes()).hexdigest(),
    ),
    ("AI Act Art. 15", "metric_final"): lambda _, finished: (
        json.loads((finished / "rounds.jsonl").read_text().splitlines()[-1])["metric"],
    ),
    ("AI Act Art. 15", "metric_zero_round"): lambda folder, _: (summary(folder).metric_zero_round,),
    ("NIST SP 800-226", "predicate.statements.*.unit"): lambda *_: ("record",) * 4,
    ("NIST SP 800-226", "predicate.statements.*.adjacency"): lambda *_: ("add or remove one record",) * 4,
    ("NIST SP 800-226", "predicate.statements.*.mechanism"): events,
    ("NIST SP 800-226", "predicate.statements.*.accountant"): lambda *_: ("PLD, tilted FFT, rounded up",) * 4,
}


def test_every_claim_of_the_table_is_followed_here() -> None:
    assert {(row.text, row.field) for row in TABLE} == set(CLAIMS)


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.text} {row.field}" for row in TABLE])
def test_every_row_is_followed_to_its_field(row: Support, folder: Path, finished: Path) -> None:
    """The field holds what the row says it does, and the table counts as many entries as there are."""
    values, expected = values_at(folder / row.file, row.field), CLAIMS[row.text, row.field](folder, finished)
    assert len(values) == len(expected)
    for value, claimed in zip(values, expected, strict=True):
        assert value == (pytest.approx(claimed, abs=1e-6) if isinstance(claimed, float) else claimed)
    line = f"| {row.text} | {row.duty} | {row.file} | {row.field} | {row.what} |"
    assert f"{line} {len(values) or 'none in this run'} |" in (folder / "mapping.md").read_text()


def test_the_ledger_of_the_folder_counts_and_names_no_rows(folder: Path, finished: Path) -> None:
    """The ledger itself knows how many records a block holds; what leaves does not say it."""
    with Ledger.open(finished / "ledger.sqlite", create=False) as ledger:
        inside = list(csv.DictReader(io.StringIO(ledger.export("csv"))))
    assert any(int(row["records"]) > 0 for row in inside)
    outside = list(csv.DictReader(io.StringIO((folder / "ledger.csv").read_text())))
    assert len(outside) == len(inside)
    assert not {"records", "dataset", "reason", "commitment", "blocks"} & set(outside[0])
    assert [row["event"] for row in outside] == [row["event"] for row in inside]


def test_the_card_has_its_result_where_the_hub_reads_it(folder: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard((folder / "adapter" / "README.md").read_text())
    (result,) = card.data.eval_results
    assert card.data.model_name == "test"
    assert (result.metric_type, result.task_type) == ("accuracy", "image-classification")
    assert result.metric_value == pytest.approx(summary(folder).metric_final)
    assert result.dataset_name == "builtin:digits"


def test_a_row_that_points_at_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(StoreError, match="is not there"):
        values_at(folder / "statement.json", "predicate.no_such_field")


def test_the_table_supports_and_never_complies(folder: Path) -> None:
    text = (folder / "mapping.md").read_text() + (folder / "dpia_annex.md").read_text()
    assert "compl" not in text.replace("Status: complete", "").lower()
    assert "It supports a duty" in text
    assert "none in this run" in text  # the run was not audited, and the row says so
    assert "simulated key" in text


def test_the_folder_verifies_by_itself_and_names_what_was_changed(folder: Path, tmp_path: Path) -> None:
    content = (folder / "certificate.json").read_bytes()
    assert verify(content, Materials(folder=folder)).holds
    ledger = folder / "ledger.csv"
    before = ledger.read_bytes()
    ledger.write_bytes(before.replace(b"client-1", b"client-2", 1))
    wrong = [check.claim for check in verify(content, Materials(folder=folder)).checks if not check.holds]
    ledger.write_bytes(before)
    assert wrong == ["ledger.csv"]


def test_nothing_in_it_names_a_folder_of_this_machine(folder: Path, finished: Path) -> None:
    for name in ("statement.json", "mapping.md", "dpia_annex.md", "ledger.csv"):
        assert str(finished.parent) not in (folder / name).read_text()


def test_the_command_needs_a_certificate_and_a_new_folder(run: Path) -> None:
    assert call("evidence", str(run)).returncode == 0
    again = call("evidence", str(run))
    assert again.returncode == 5
    assert "exists" in again.stderr
    (run / "certificate.json").unlink()
    without = call("evidence", str(run), "--out", str(run.parent / "other"))
    assert without.returncode == 5
    assert "ffm-secure certify" in without.stderr
