"""Open the folder of a site: its policy, its identity, its ledger and its rows, behind one session."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from defenses.dp import Ledger
from defenses.dp.ledger_file import Head
from defenses.errors import ProtocolError, TamperedError
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.site.folder import LOG, SiteFolder, every_problem
from ffm_secure.site.lifetime import require_budget
from ffm_secure.site.session import SiteSession
from ffm_secure.site.site_file import SiteFile
from ffm_secure.site.site_log import SiteLog
from ffm_secure.site.workplace import Belongings
from ffm_secure.storage.durable import write_atomic

ANCHOR = "ledger.anchor"


def open_session(folder: Path, *, clock: Callable[[], float] = time.time) -> SiteSession:
    """Open the folder that `ffm-secure site init` made, and answer for it from now on; one process at a time.

    Raises:
      ConfigError: every problem of the folder at once, each with who must do what.
      StoreError: another process serves it.
    """
    place = SiteFolder(place=folder.resolve())
    site = place.read()
    lock = place.lock()
    try:
        return _open(place, site, lock, clock)
    except BaseException:
        os.close(lock)
        raise


def _open(place: SiteFolder, site: SiteFile, lock: int, clock: Callable[[], float]) -> SiteSession:
    require_ready(place, site, now=clock())
    roster, identity, rounds = place.roster(site, now=clock()), place.identity(), place.rounds()
    try:
        rounds.accept_roster(roster.statement.federation, roster.statement.serial)
    except ProtocolError:
        raise StoreError(
            f"roster: serial {roster.statement.serial} is older than one this site had; ask the "
            "operator for the newest"
        ) from None
    ledger = Ledger.open(place.ledger_path(site), create=True)
    try:
        require_budget(ledger, site)
        check_anchor(place.place, ledger)
    except BaseException:
        ledger.close()
        raise
    log = SiteLog(place.place / LOG)
    own = Belongings(
        file=site,
        base=place.place,
        identity=identity,
        roster=roster,
        ledger=ledger,
        clock=clock,
        anchor=lambda: write_anchor(place.place, ledger),
    )

    def release() -> None:
        ledger.close()
        log.note("stopped")
        log.close()
        os.close(lock)

    log.note(f"started as {site.name} of {roster.statement.federation}")
    return SiteSession(place, own, rounds, log, clock=clock, release=release)


def require_ready(place: SiteFolder, site: SiteFile, *, now: float) -> None:
    """Look at everything a site needs before it is served.

    Raises:
      ConfigError: with every problem at once.
    """
    problems = every_problem(
        {
            "identity": place.identity,
            "rounds": place.rounds,
            "roster": lambda: place.roster(site, now=now),
            "data": lambda: _require_data(place, site),
            "allowed": place.allowed,
        }
    )
    if problems:
        raise ConfigError(str(place.place), problems)


def _require_data(place: SiteFolder, site: SiteFile) -> None:
    for setting, name in (("data", site.data), ("public", site.public)):
        path = place.place / Path(name).expanduser()
        if name and not path.exists():
            raise StoreError(f"{setting} = {name!r}: there is no {path}; correct it in site.toml")


def write_anchor(folder: Path, ledger: Ledger) -> None:
    """Note where the ledger stands, so that an older copy put in its place is seen."""
    head = ledger.head()
    content = {"format": 1, "sequence": head.sequence, "hash": head.hash}
    write_atomic(folder / ANCHOR, json.dumps(content).encode() + b"\n")


def check_anchor(folder: Path, ledger: Ledger) -> None:
    """Refuse a ledger that holds less than it did.

    Raises:
      StoreError: it is an older copy, or was changed.
    """
    path = folder / ANCHOR
    if not path.is_file():
        ledger.verify()
        return
    try:
        content = json.loads(path.read_bytes())
        anchor = Head(sequence=int(content["sequence"]), hash=str(content["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{path}: is damaged; compare the ledger with the newest receipt you have") from None
    try:
        ledger.verify(anchor)
    except TamperedError:
        raise StoreError(
            "the ledger is older than this site's last round, or was changed: a ledger never goes "
            "back; put the newest "
            "one in its place, or make a new site for other rows"
        ) from None
