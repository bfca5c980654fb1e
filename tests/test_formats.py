"""Stored files of format 1 are read for ever, and what is written says what it is and who wrote it."""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defenses.dp import Ledger
from ffm_secure import record_codec
from ffm_secure.certificate import collect, statement as statements
from ffm_secure.certificate.check import Materials
from ffm_secure.certificate.envelope import Envelope
from ffm_secure.certificate.verify import verify
from ffm_secure.config import run_file
from ffm_secure.records import ModelExport, RoundRecord
from ffm_secure.report.document import from_json

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "fixtures" / "format1"
VERSION = importlib.metadata.version("ffm-secure")


def test_a_stored_certificate_still_holds_in_every_part(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "stored"))
    materials = Materials(folder=folder, ledger=folder / "ledger.sqlite")
    result = verify((folder / "certificate.json").read_bytes(), materials)
    assert [check for check in result.checks if not check.holds] == []
    assert len([check for check in result.checks if check.claim.startswith("ledger of")]) == 4


def test_stored_files_of_a_run_are_still_read() -> None:
    config = run_file.load(STORED / "run.toml")
    assert config.format == 1
    summary = from_json((STORED / "report.json").read_text())
    lines = (STORED / "rounds.jsonl").read_text().splitlines()
    assert tuple(record_codec.from_json(RoundRecord, line, "a round") for line in lines) == summary.rounds
    export = record_codec.from_json(ModelExport, (STORED / "adapter" / "export.json").read_text(), "export")
    assert export.format == 1


def test_a_stored_ledger_still_composes_to_what_it_said(tmp_path: Path) -> None:
    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy(STORED / name, tmp_path / name)
    stated = from_json((STORED / "report.json").read_text()).statements[0].epsilon
    with Ledger.open(tmp_path / "ledger.sqlite", create=False) as ledger:
        ledger.verify()
        assert ledger.epsilon_of(ledger.blocks(), "record", 1e-5) == pytest.approx(stated, rel=1e-3)


def test_a_field_that_comes_later_leaves_older_certificates_valid() -> None:
    """The canonical form is that of what was written: a missing field is filled in and signed by nobody."""
    content = (STORED / "certificate.json").read_bytes()
    envelope = Envelope.from_bytes(content)
    whole = json.loads(envelope.payload)
    for owner in whole["predicate"]["owners"]:
        del owner["withdrawn"]  # as if this field had come after the certificate
    older = statements.canonical(whole)
    read = statements.Statement.from_bytes(older)
    assert [owner.withdrawn for owner in read.predicate.owners] == ["", "", "", ""]
    assert read == statements.Statement.from_bytes(envelope.payload)
    assert not verify(replace(envelope, payload=older).to_bytes(), Materials()).holds  # nobody signed that


@pytest.mark.parametrize("name", ["run.toml", "report.json", "adapter/export.json", "rounds.jsonl"])
def test_a_file_says_its_format_and_another_is_refused(name: str, tmp_path: Path) -> None:
    text = (STORED / name).read_text()
    first = text.splitlines()[0] if name.endswith("jsonl") else text
    told = tomllib.loads(text) if name.endswith("toml") else json.loads(first)
    assert told["format"] == 1
    later = text.replace("format = 1", "format = 2").replace('"format":1', '"format":2')
    later = later.replace('"format": 1', '"format": 2')
    assert later != text
    (tmp_path / "later").write_text(later)
    read: dict[str, Any] = {
        "run.toml": lambda: run_file.load(tmp_path / "later"),
        "report.json": lambda: from_json(later),
        "adapter/export.json": lambda: record_codec.from_json(ModelExport, later, "export"),
        "rounds.jsonl": lambda: record_codec.from_json(RoundRecord, later.splitlines()[0], "a round"),
    }
    with pytest.raises(Exception, match="format"):
        read[name]()


def test_what_leaves_names_the_release_that_wrote_it() -> None:
    assert json.loads((STORED / "report.json").read_text())["software"]["ffm-secure"] == VERSION
    assert f"ffm-secure {VERSION}" in (STORED / "adapter" / "README.md").read_text()
    assert f"ffm-secure {VERSION}" in (STORED / "report.html").read_text()
    payload = Envelope.from_bytes((STORED / "certificate.json").read_bytes()).payload
    predicate = statements.Statement.from_bytes(payload).predicate
    assert predicate.software["ffm-secure"] == VERSION
    assert len(predicate.lock) == len(collect.lock_digest()) == 64


def test_the_bill_of_materials_is_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "build" / "sbom.json"
    command = [sys.executable, str(ROOT / "requirements" / "make_sbom.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    first = out.read_bytes()
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_bytes() == first
    written = json.loads(first)
    assert (written["bomFormat"], written["specVersion"]) == ("CycloneDX", "1.6")
    assert written["metadata"]["component"]["version"] == VERSION
    purls = [one["purl"] for one in written["components"]]
    assert len(set(purls)) == len(purls)
    assert f"pkg:pypi/torch@{importlib.metadata.version('torch').split('+')[0]}" in purls
    script = runpy.run_path(str(ROOT / "requirements" / "make_sbom.py"))
    assert len(purls) == len(script["pins"]())
    with pytest.raises(ValueError, match="pins no version"):
        script["component"]("torch>=2")
