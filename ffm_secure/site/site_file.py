"""`site.toml`: what a site's own people decided; it is never sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ffm_secure.config.schema import dump_toml, load_file, option
from ffm_secure.transport.roster import KEY_PATTERN, NAME, NAME_HELP

PROTECTIONS: Final = ("secagg", "bfv", "ckks", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LifetimeBudget:
    """What every row may spend in its whole life, in all runs."""

    unit: str = option("record", choices=("record", "person", "client"))
    epsilon: float = option(above=0.0, maximum=1e6, help="what every row may spend in its whole life")
    delta: float = option(1e-5, above=0.0, below=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The least this site insists on, whatever it is asked."""

    smallest_cohort: int = option(3, minimum=2, help="fewest sites whose sum may be opened")
    colluders: int = option(1, minimum=0, help="sites that may work with the coordinator and learn nothing")
    largest_epsilon: float = option(above=0.0, maximum=1e6, help="largest privacy.epsilon of a run")
    largest_delta: float = option(1e-5, above=0.0, below=1.0)
    largest_clip: float = option(1.0, above=0.0, maximum=1e9)
    protections: tuple[str, ...] = option(("secagg",), choices=PROTECTIONS)
    backbones: tuple[str, ...] = option((), help="digests of models; empty: those of the runs allowed here")
    without_guarantee: bool = option(False, help="take part in runs that promise nothing: fictitious rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAudit:
    """What this site keeps of what left it, for `ffm-secure site audit`; it stays in the site's folder."""

    rounds: int = option(
        0, minimum=0, maximum=1000, help="rounds of a run to keep, with the rows behind them"
    )
    mebibytes: int = option(256, minimum=1, maximum=1 << 20, help="largest size of what is kept of a run")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFile:
    """Everything `site.toml` says."""

    format: int = option(choices=(1,))
    name: str = option(pattern=NAME, help=NAME_HELP)
    data: str = option(help="this site's own rows: a file or folder; only this site reads it")
    public: str = option("", help="public rows, the same at every site; empty: those of a builtin data set")
    operator: str = option(pattern=KEY_PATTERN, help="the operator's key, as `operator init` printed it")
    ledger: str = option("ledger.sqlite", help="this site's ledger; give the one of all runs on these rows")
    budget: LifetimeBudget
    policy: Policy
    record: SelfAudit = option(SelfAudit())


def load(path: Path) -> SiteFile:
    """Read a site's file.

    Raises:
      ConfigError: with every problem at once.
    """
    return load_file(SiteFile, path)


def dump(site: SiteFile) -> str:
    """Write a site's file as TOML that `load` reads back to an equal value."""
    return dump_toml(site)
