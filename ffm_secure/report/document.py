"""Turn a run's summary into report.json and report.html: pure, byte-stable, read back without loss."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ffm_secure import record_codec
from ffm_secure.errors import RecordError, StoreError
from ffm_secure.records import AuditSummary, RunSummary
from ffm_secure.report.details import render_audit_html, render_details_html, render_internal_html
from ffm_secure.report.page import render_html
from ffm_secure.report.release import released, released_audit

from ffm_secure.storage.durable import create_folder, write_atomic
from ffm_secure.record_codec import read_regular

__all__ = ["from_json", "is_there", "read", "render_html", "render_json", "write", "write_audit"]

PUBLIC_DATA, INTERNAL_DATA = "report.json", "internal.json"


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
    """Write the audit of one update to a new folder and return the page that may leave.

    report.html and report.json say how each attack ended; internal.html and internal.json show scores and
    what was recovered, pictures beside them as PNG.

    Raises:
      StoreError: the folder exists, so that no earlier audit is written over.
    """
    if folder.exists():
        raise StoreError(f"{folder} exists: --out names a new folder")
    create_folder(folder)
    public = released_audit(audit)
    texts = {
        INTERNAL_DATA: _audit_json(audit),
        PUBLIC_DATA: _audit_json(public),
        "internal.html": render_audit_html(audit, name, notes, internal=True),
        "report.html": render_audit_html(public, name, notes),
    }
    contents = _pictures(audit) | {Path(file): text.encode("utf-8") for file, text in texts.items()}
    for path, content in contents.items():
        write_atomic(folder / path, content)
    return folder / "report.html"


def _audit_json(audit: AuditSummary) -> str:
    return json.dumps(record_codec.to_plain(audit), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _pictures(audit: AuditSummary) -> dict[Path, bytes]:
    """Return the true and the recovered pictures of every finding as files."""
    files = {}
    for finding in audit.findings:
        for number, pair in enumerate(finding.pictures, start=1):
            for kind, address in (("truth", pair.truth), ("recovered", pair.recovered)):
                content = base64.b64decode(address.partition(",")[2])
                files[Path(f"internal_{finding.attack}_{number}_{kind}.png")] = content
    return files


def write(summary: RunSummary, folder: Path, *, internal: bool = True) -> tuple[Path, ...]:
    """Write the report into `folder`: what may leave as report.html, details.html and report.json, and unless
    told not to everything as internal.html and internal.json. Return their paths, the public page first.

    Guarantee: a reader, or a crash at any moment, sees the old file or the new one, never a part of one. A
    summary that is public already writes nothing internal.

    Raises:
      StoreError: a folder lies where a file belongs; nothing is written then.
    """
    create_folder(folder)
    public = released(summary)
    contents = {
        PUBLIC_DATA: render_json(public),
        "details.html": render_details_html(public),
        "report.html": render_html(public),
    }
    if internal and summary.view == "internal":
        everything = {
            INTERNAL_DATA: render_json(summary),
            "internal.html": render_internal_html(summary),
        }
        contents = everything | contents
    in_the_way = [name for name in contents if (folder / name).is_dir()]
    if in_the_way:
        names = ", ".join(in_the_way)
        raise StoreError(f"{folder}: {names}: a folder lies where the report is written; move it away")
    for name, text in contents.items():
        write_atomic(folder / name, text.encode("utf-8"))
    return tuple(folder / name for name in reversed(contents))


def is_there(folder: Path) -> bool:
    """Tell whether a run has left a report."""
    return (folder / INTERNAL_DATA).is_file() or (folder / PUBLIC_DATA).is_file()


def read(folder: Path) -> RunSummary:
    """Read the summary of a run: all of it where its internal part lies there, else what was released.

    Raises:
      StoreError: there is none, or it is damaged.
    """
    path = folder / (INTERNAL_DATA if (folder / INTERNAL_DATA).is_file() else PUBLIC_DATA)
    try:
        return from_json(read_regular(path).decode())
    except OSError:
        raise StoreError(f"{folder}: has no report yet; finish the run first (ffm-secure run)") from None
    except ValueError as error:
        raise StoreError(f"{path}: is damaged: {error}") from None
