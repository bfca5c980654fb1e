"""Turn a run's summary into report.json and report.html: pure, byte-stable, read back without loss."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ffm_secure import record_codec
from ffm_secure.errors import RecordError, StoreError
from ffm_secure.records import AuditSummary, RunSummary
from ffm_secure.report.page import render_audit_html, render_html
from ffm_secure.storage.durable import create_folder, write_atomic

__all__ = ["from_json", "render_html", "render_json", "write", "write_audit"]


def render_json(summary: RunSummary) -> str:
    """Write a summary as JSON text that `report.schema.json` describes.

    Guarantee: the same summary gives the same bytes; `from_json` gives the summary back. Infinity and
    not-a-number
    are the strings "infinity", "-infinity" and "nan". Keys of mappings are sorted; fields keep their order.
    Raises: StoreError where a value does not have its declared type.
    """
    try:
        plain = record_codec.encode(summary, "report")
    except RecordError as error:
        raise StoreError(f"{error}; the run is at fault, not its report") from None
    return json.dumps(plain, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def from_json(text: str) -> RunSummary:
    """Read what `render_json` wrote.

    Guarantee: strict; a missing, unknown, doubled or mistyped field is refused with its path. A field
    with a default
    may be missing: it came after the report was written.
    Raises: StoreError
    """
    try:
        return record_codec.from_json(RunSummary, text, "report")
    except RecordError as error:
        raise StoreError(f"{error}; write it again with `ffm-secure report`") from None


def write_audit(audit: AuditSummary, folder: Path, *, name: str, notes: Sequence[str] = ()) -> Path:
    """Write the audit of one update to a new folder: report.html, report.json, and its pictures as PNG;
    return the page.

    Raises:
      StoreError: the folder exists, so that no earlier audit is written over.
    """
    if folder.exists():
        raise StoreError(f"{folder} exists: --out names a new folder")
    create_folder(folder)
    plain = json.dumps(record_codec.to_plain(audit), indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    contents = _pictures(audit) | {
        Path("report.json"): plain.encode("utf-8"),
        Path("report.html"): render_audit_html(audit, name, notes).encode("utf-8"),
    }
    for path, content in contents.items():
        write_atomic(folder / path, content)
    return folder / "report.html"


def _pictures(audit: AuditSummary) -> dict[Path, bytes]:
    """Return the true and the recovered pictures of every finding as files."""
    files = {}
    for finding in audit.findings:
        for number, pair in enumerate(finding.pictures, start=1):
            for kind, address in (("truth", pair.truth), ("recovered", pair.recovered)):
                content = base64.b64decode(address.partition(",")[2])
                files[Path(f"{finding.attack}_{number}_{kind}.png")] = content
    return files


def write(summary: RunSummary, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into `folder` and return their paths.

    Guarantee: a reader, or a crash at any moment, sees the old file or the new one, never a part of one.
    """
    create_folder(folder)
    page, data = folder / "report.html", folder / "report.json"
    contents = {data: render_json(summary), page: render_html(summary)}
    for path, text in contents.items():
        write_atomic(path, text.encode("utf-8"))
    return page, data
