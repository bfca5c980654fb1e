"""The evidence folder: nothing in it that is not certified, and no row that points at nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffm_secure.certificate.documents import TABLE, Support, values_at
from ffm_secure.certificate.evidence import write_evidence
from ffm_secure.certificate.verify import Materials, verify
from ffm_secure.errors import StoreError
from tests.federation.helpers import call


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "evidence"
    write_evidence(finished, (finished / "certificate.json").read_bytes(), out)
    return out


@pytest.mark.parametrize("row", TABLE, ids=[row.text for row in TABLE])
def test_every_row_is_followed_to_its_field(row: Support, folder: Path) -> None:
    values = values_at(folder / row.file, row.field)
    needs_an_audit = "audit" in row.field
    assert values or needs_an_audit
    assert all(value not in ("", None) for value in values)


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
