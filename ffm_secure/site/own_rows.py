"""The rows of one site: its own private ones, and public ones that everybody may see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from defenses.dp.records import RecordKey
from ffm_secure.config.run_file import RunConfig, Split
from ffm_secure.data.checks import require_sound
from ffm_secure.data.builtin_sets import builtin_table
from ffm_secure.data.dataset import Dataset, load_task
from ffm_secure.data.files import read_source
from ffm_secure.data.memory import Memory
from ffm_secure.data.persons import bounded_persons
from ffm_secure.data.row_names import named
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError
from ffm_secure.site.site_file import SiteFile


def load_rows(site: SiteFile, config: RunConfig, base: Path, key: RecordKey) -> Dataset:
    """Read a site's rows, name them for its ledger, and leave out what is beyond the bound on a person.

    Guarantee: no row of the site's own becomes public, and no class is learned from it.
    Raises:
      DataError: what is wrong with the rows, and what to do.
    """
    task = replace(config.task, split=Split(), clients=1)
    privacy = config.privacy

    def read(table: Table) -> Dataset:
        rows = Memory(train=table, validation=table, name=f"rows of {site.name}")
        return load_task(
            task, base=base, seed=config.seed, rows=rows, key=key, person_column=privacy.person_column
        )

    # Each table by itself: one may hold class names where the other holds numbers.
    dataset = replace(
        read(_private(site, config, base)), validation=read(_public(site, config, base)).validation
    )
    dataset = bounded_persons(named(dataset, key, person_column=privacy.person_column), privacy, key)
    require_sound(dataset, replace(config, task=task))
    return dataset


def _private(site: SiteFile, config: RunConfig, base: Path) -> Table:
    path = base / Path(site.data).expanduser()
    train, validation = _read(path, "data", config)
    if validation is not None:
        raise DataError(
            f"{path}: holds a validation part beside its training part; give this site's own rows alone "
            "as data, "
            "and public rows as public"
        )
    return train


def _public(site: SiteFile, config: RunConfig, base: Path) -> Table:
    if site.public:
        train, validation = _read(base / Path(site.public).expanduser(), "public", config)
        return train if validation is None else validation
    if config.task.data.startswith("builtin:"):
        return builtin_table(config.task.data)
    raise DataError(
        "public = '': this run needs public rows at every site; ask the coordinator for its file of "
        "them and name "
        "it in site.toml"
    )


def _read(path: Path, setting: str, config: RunConfig) -> tuple[Table, Table | None]:
    if not path.exists():
        raise DataError(f"{setting} = {str(path)!r}: there is no such file; correct it in site.toml")
    try:
        return read_source(path, config.task.encoding)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
