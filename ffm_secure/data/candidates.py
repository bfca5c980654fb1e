"""Public candidate texts that private records vote on: read from a file everybody has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defenses.dp.records import canonical_text
from ffm_secure.config.run_file import RunConfig
from ffm_secure.data.builtin_sets import builtin_table
from ffm_secure.data.columns import Choices, check_text, require_columns, text_columns
from ffm_secure.data.files import read_table
from ffm_secure.data.table import Table
from ffm_secure.errors import DataError

_MOST = 100_000  # candidates of one file


def read_candidates(config: RunConfig, base: Path) -> tuple[str, ...]:
    """Return the candidates a run file names, each once, in the order of the file; none where it names none.

    Raises:
      DataError: there is no such file, no single column of text in it, or a blank or too many of them.
    """
    name = config.federation.lifecycle.votes.candidates
    if not name:
        return ()
    table = _table(name, base)
    chosen = (config.task.text_column,) if config.task.text_column in table.columns else ()
    columns = text_columns(table, Choices(kind=config.task.kind, text=chosen))
    require_columns(table, columns)
    if len(columns) != 1:
        raise DataError(f"{name}: candidates are single texts, and {', '.join(columns)} are a pair")
    check_text(table, columns)
    texts = tuple(dict.fromkeys(map(str, table.columns[columns[0]])))
    if not all(text.strip() for text in texts):
        raise DataError(f"{name}: has a blank candidate, which nobody can vote for; take it out")
    if len(texts) > _MOST:
        raise DataError(f"{name}: has {len(texts):,} candidates; at most {_MOST:,}")
    return texts


def _table(name: str, base: Path) -> Table:
    if name.startswith("builtin:"):
        return builtin_table(name)
    path = base / Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"federation.lifecycle.votes.candidates = {name!r}: there is no file {path}")
    return read_table(path)


def refuse_private_candidates(candidates: Sequence[str], texts: Sequence[str]) -> None:
    """Refuse candidates that say what a private row says, as ledgers compare rows.

    Raises:
      DataError: how many do; which ones is not said.
    """
    private_now = set(map(canonical_text, texts))
    shared = sum(canonical_text(text) in private_now for text in candidates)
    if shared:
        raise DataError(
            f"federation.lifecycle.votes.candidates: {shared:,} of {len(candidates):,} candidates are "
            "private rows of this run, and what is kept is published; give public texts"
        )
