"""The page on extending is run as it stands: each file alone, at most forty lines, touching no other file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.registry import ATTACKS
from ffm_secure.registry import AXES
from tests.test_docs import BLOCK, ROOT

PAGE = ROOT / "docs" / "extending.md"
LONGEST = 40
SECTIONS = (
    "An attack",
    "A strategy",
    "Something to train",
    "An algorithm",
    "A query",
    "A compression",
    "An engine",
)


def blocks() -> list[tuple[list[str], str]]:
    """Return language and name, and body, of every block of the page."""
    return [(block["kind"].split(), block["body"]) for block in BLOCK.finditer(PAGE.read_text())]


@pytest.fixture
def registries() -> Iterator[None]:
    """Take out of the registries what a test put in, and forget the modules it wrote."""
    attacks, kinds = dict(ATTACKS), {name: dict(axis.kinds) for name, axis in AXES.items()}
    modules = set(sys.modules)
    yield
    ATTACKS.clear()
    ATTACKS.update(attacks)
    for name, axis in AXES.items():
        axis.kinds.clear()
        axis.kinds.update(kinds[name])
    names = {Path(kind[1]).stem for kind, _ in blocks() if len(kind) > 1}
    for name in (set(sys.modules) - modules) & names:
        del sys.modules[name]


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, object] = {}
    for kind, body in blocks():
        if len(kind) > 1:
            (tmp_path / kind[1]).write_text(body)
        else:
            exec(compile(body, PAGE.name, "exec"), space)  # noqa: S102


def test_each_extension_is_one_short_file() -> None:
    files = {kind[1]: body for kind, body in blocks() if len(kind) > 1 and kind[1].endswith(".py")}
    lengths = {name: len(body.splitlines()) for name, body in files.items()}
    assert len(files) == len(SECTIONS)
    assert max(lengths.values()) <= LONGEST, lengths
    assert [f"## {section}" in PAGE.read_text() for section in SECTIONS] == [True] * len(SECTIONS)
