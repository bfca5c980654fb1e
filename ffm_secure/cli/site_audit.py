"""A site's audit of itself in the terminal."""

from __future__ import annotations

from pathlib import Path

from ffm_secure.cli.audit_table import audit_lines
from ffm_secure.config import run_file
from ffm_secure.display.console import clear_errors, say
from ffm_secure.display.progress import AuditBar
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.site.folder import SiteFolder
from ffm_secure.site.own_record import OBSERVATIONS, RECORDS, RUN_FILE


def audit(folder: Path, *, run: str, budget: str, out: Path | None, json: bool, quiet: bool) -> None:
    """Attack what left the site in a run."""
    from ffm_secure.auditing.own_site import audit_own_rounds  # with the model libraries
    from ffm_secure.report.document import write_audit

    if budget not in ("quick", "standard", "exhaustive"):
        raise ConfigError(
            "site audit", [f"--budget = {budget!r}: must be one of 'quick', 'standard', 'exhaustive'"]
        )
    place = SiteFolder(place=folder.resolve())
    place.read()
    name, record = _chosen(place.place, run)
    if out is not None and out.exists():
        raise ConfigError("site audit", [f"--out = {out}: exists, must be a new folder"])
    with clear_errors(), AuditBar(quiet=quiet or json) as bar:
        summary = audit_own_rounds(record, place.place, budget=budget, watch=bar.watch)
        if out is not None:
            write_audit(summary, out, name=name, notes=())
    lines = [f"{name}: attacked is what left this site, with its own rows to score by", *audit_lines(summary)]
    if out is not None:
        lines.append(f"  report   {out / 'report.html'}; what was recovered: {out / 'internal.html'}")
    say(summary, [*lines, "all of it stays here"], json=json, quiet=quiet)


def _chosen(place: Path, run: str) -> tuple[str, Path]:
    """Return the one run that was recorded, or the one of a name.

    Raises:
      StoreError, ConfigError: nothing was recorded, or it has to be said which run.
    """
    recorded = {}
    for path in sorted((place / RECORDS).glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime):
        if any((path.parent / OBSERVATIONS).glob("round-*")):
            recorded[run_file.load(path).name] = path.parent
    if not recorded:
        raise StoreError(
            f"{place / RECORDS}: nothing is recorded; say record.rounds = 3 in site.toml before a run begins"
        )
    if not run and len(recorded) == 1:
        return next(iter(recorded.items()))
    if run not in recorded:
        raise ConfigError("site audit", [f"--run = {run[:80]!r}: must be one of {', '.join(recorded)}"])
    return run, recorded[run]
