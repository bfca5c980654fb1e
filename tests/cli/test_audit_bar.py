"""The bar of an audit names the attack that is tried and the time left; quiet commands show none."""

from __future__ import annotations

import io

import pytest

from ffm_secure.display.console import SafeConsole
from ffm_secure.display.progress import AuditBar


@pytest.fixture(autouse=True)
def terminal_that_can_move_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # a dumb one shows no bar, whatever is forced


def shown(*, quiet: bool, terminal: bool = True) -> str:
    screen = io.StringIO()
    with AuditBar(quiet=quiet, console=SafeConsole(file=screen, force_terminal=terminal, width=120)) as bar:
        bar.watch("span", 3, 44)
        bar.progress.refresh()
    return screen.getvalue()


def test_the_bar_names_the_attack_its_place_and_the_time_left() -> None:
    text = shown(quiet=False)
    assert "auditing: span" in text
    assert "3/44" in text
    assert "left" in text


@pytest.mark.parametrize(("quiet", "terminal"), [(True, True), (False, False)])
def test_a_quiet_command_and_a_file_are_shown_no_bar(quiet: bool, terminal: bool) -> None:
    assert "span" not in shown(quiet=quiet, terminal=terminal)
