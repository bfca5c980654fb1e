"""Open the folder of a site: its policy, its identity, its ledger and its rows, behind one session."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from defenses.dp import Ledger
from defenses.errors import ProtocolError, TamperedError
from ffm_secure.agreed.loaded_model import load_model
from ffm_secure.errors import ConfigError, StoreError
from ffm_secure.site.folder import LOG, SiteFolder, every_problem
from ffm_secure.site.lifetime import require_budget
from ffm_secure.site.session import SiteSession
from ffm_secure.site.site_file import SiteFile
from ffm_secure.site.site_log import SiteLog
from ffm_secure.site.workplace import Belongings, LoadModel

_NOT_AUTHENTIC = (
    "is an older copy, or was changed; a ledger never goes back: put the newest one in its place, "
    "or make a new site for other rows"
)


def open_session(
    folder: Path, *, clock: Callable[[], float] = time.time, load: LoadModel = load_model
) -> SiteSession:
    """Open the folder that `ffm-secure site init` made, and answer for it from now on; one process at a time.

    Raises:
      ConfigError: every problem of the folder at once, each with who must do what.
      StoreError: another process serves it.
    """
    place = SiteFolder(place=folder.resolve())
    site = place.read()
    lock = place.lock()
    try:
        return _open(place, site, lock, clock, load)
    except BaseException:
        os.close(lock)
        raise


def _open(
    place: SiteFolder, site: SiteFile, lock: int, clock: Callable[[], float], load: LoadModel
) -> SiteSession:
    require_ready(place, site, now=clock())
    roster, identity, rounds = place.roster(site, now=clock()), place.identity(), place.rounds()
    try:
        rounds.accept_roster(roster.statement.federation, roster.statement.serial)
    except ProtocolError:
        raise StoreError(
            f"roster: serial {roster.statement.serial} is older than one this site had; ask the "
            "operator for the newest"
        ) from None
    ledger = open_ledger(place, site)
    log = SiteLog(place.place / LOG)
    own = Belongings(
        file=site,
        base=place.place,
        identity=identity,
        roster=roster,
        ledger=ledger,
        clock=clock,
        load=load,
    )

    def release() -> None:
        ledger.close()
        log.note("stopped")
        log.close()
        os.close(lock)

    statement = roster.statement
    names = ", ".join(roster.names)
    log.note(f"started as {site.name} of {statement.federation}; roster {statement.serial}: {names}")
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


def open_ledger(place: SiteFolder, site: SiteFile) -> Ledger:
    """Open the site's ledger, check every row of it, and its budget.

    Raises:
      StoreError: it was changed, is an older copy, or holds another budget than the site's file.
    """
    path = place.ledger_path(site)
    try:
        ledger = Ledger.open(path, create=True)
    except TamperedError:
        raise StoreError(f"{path}: {_NOT_AUTHENTIC}") from None
    try:
        ledger.verify()
        require_budget(ledger, site)
    except TamperedError:
        ledger.close()
        raise StoreError(f"{path}: {_NOT_AUTHENTIC}") from None
    except BaseException:
        ledger.close()
        raise
    return ledger


def _require_data(place: SiteFolder, site: SiteFile) -> None:
    for setting, name in (("data", site.data), ("public", site.public)):
        path = place.place / Path(name).expanduser()
        if name and not path.exists():
            raise StoreError(f"{setting} = {name!r}: there is no {path}; correct it in site.toml")
