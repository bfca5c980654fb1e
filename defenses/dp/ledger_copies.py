"""A ledger for somebody who only looks: a copy of its own, as it stands or as it stood."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from defenses.dp.ledger import Ledger
from defenses.dp.ledger_file import Head, LedgerFile
from defenses.errors import TamperedError


@contextmanager
def ledger_copy(path: Path) -> Iterator[Path]:
    """Copy a ledger with its anchor, without its key, into a folder that is gone afterwards.

    Guarantee: the original is neither written nor locked for long, and may lie where nobody can write.

    Raises: TamperedError when it is no readable database.
    """
    with TemporaryDirectory(prefix="ffm-ledger-") as folder:
        copy = Path(folder) / "ledger.sqlite"
        try:
            original = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            with closing(original), closing(sqlite3.connect(copy)) as target:
                original.backup(target)
        except sqlite3.Error:
            raise TamperedError from None
        head = path.with_name(path.name + ".head")
        if head.is_file():
            shutil.copyfile(head, copy.with_name(copy.name + ".head"))
        yield copy


def ledger_as_of(path: Path, head: Head) -> Ledger:
    """Open a ledger as it stood when `head` was its last row; it answers, and takes no charge.

    Raises: TamperedError when it is not authentic, or never had this head.
    """
    file = LedgerFile(path, create=False, until=head.sequence)
    ledger = Ledger(file, str)
    try:
        ledger.verify(head)
    except BaseException:
        ledger.close()
        raise
    return ledger
