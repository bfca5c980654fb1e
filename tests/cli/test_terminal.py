"""What reaches a terminal: no character it would obey, whoever wrote it;
and nothing private when something breaks.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from attacks.command import main as attacks_main
from attacks.facts import printable as attacks_printable
from ffm_secure.cli import app as cli
from ffm_secure.display.console import SafeConsole
from ffm_secure.display.printable import printable
from ffm_secure.config import run_file
from ffm_secure.site.site_log import SiteLog
from tests.federation.helpers import call, make, table

CLEAR = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202ehidden\u2028\r"
OBEYED = set("\x1b\x07\x9b\u202e\u2028\r\x00\x7f\x08")


@given(text=st.text())
def test_no_character_that_moves_a_terminal_is_left(text: str) -> None:
    for safe in (printable(text), attacks_printable(text)):
        kinds = {unicodedata.category(character) for character in safe if character not in "\n\t"}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert not OBEYED & set(safe)
        safe.encode()


@given(text=st.text(st.characters(categories=["L", "N", "P", "S", "M"])))
def test_ordinary_text_of_any_language_is_left_alone(text: str) -> None:
    assert printable(text) == text


def test_lines_and_the_cells_of_tables_are_safe() -> None:
    out = io.StringIO()
    console = SafeConsole(file=out, highlight=False, markup=False)
    console.print(f"line {CLEAR}")
    table = Table("what", CLEAR)
    table.add_row(CLEAR, "b")
    console.print(table)
    assert not OBEYED & set(out.getvalue())


def data_set(folder: Path) -> Path:
    """Return a folder of texts whose README holds a licence that clears the screen."""
    folder.mkdir()
    for part in ("train", "validation"):
        rows = "".join(f"note {number},{number % 2}\n" for number in range(20))
        (folder / f"{part}.csv").write_text(f"text,label\n{rows}")
    (folder / "README.md").write_text(f"**License:** mit {CLEAR}\n")
    return folder


def test_the_licence_line_of_a_data_set_is_safe(tmp_path: Path) -> None:
    data = data_set(tmp_path / "rows")
    config = make(
        task={**table()["task"], "kind": "text_classification", "data": str(data), "max_length": 8},
        model={"name": "builtin:tiny-bert", "trainable": {"kind": "lora", "rank": 2}},
    )
    (tmp_path / "run.toml").write_text(run_file.dump(config))
    outcome = call("plan", str(tmp_path / "run.toml"))
    assert outcome.returncode == 0, outcome.stderr
    assert "owned" in outcome.stdout
    assert not OBEYED & set(outcome.stdout)


def test_errors_are_safe(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('"\\u001b[2J" = 1\n')
    outcome = call("plan", str(tmp_path / "run.toml"))
    assert outcome.returncode == 2
    assert "[2J: unknown key" in outcome.stderr
    assert not OBEYED & set(outcome.stderr)


def test_errors_of_single_attacks_are_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attacks_main(["run", "llg", "--observation", str(tmp_path / CLEAR.replace("\x00", ""))])
    assert not OBEYED & set(capsys.readouterr().err)


def test_an_unforeseen_error_shows_where_it_arose_and_not_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        record = "a private note"
        raise LookupError(record)

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    message = capsys.readouterr().err
    assert caught.value.code == 1
    assert "unexpected LookupError" in message
    assert "in broken" in message
    assert "private note" not in message
    assert not sys.flags.dev_mode


def test_a_line_of_a_sites_log_is_safe(tmp_path: Path) -> None:
    """A coordinator names what it proposes, and whoever reads the file reads it in a terminal."""
    log = SiteLog(tmp_path / "site.log")
    log.note(f"joined {CLEAR}")
    log.refuse(f"refused {CLEAR}\nand forged a second line")
    log.close()
    written = (tmp_path / "site.log").read_text()
    assert not OBEYED & set(written)
    assert len(written.splitlines()) == 2
