"""The site: every page has a place in it, docstrings keep their form,
the picture of the rooms is of this code.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of docs/, whose neighbours it imports by name."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def graph(**arrows: str) -> dict[str, frozenset[str]]:
    return {room: frozenset(imported.split()) for room, imported in arrows.items()}


def test_a_room_stands_above_what_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = script("make_rooms", monkeypatch)
    small = graph(loop="server engines", server="records", engines="site records", site="records", records="")
    assert rooms.floors(small) == {"loop": 3, "server": 1, "engines": 2, "site": 1, "records": 0}
    assert rooms.measure(small) == rooms.Measure(rooms=5, floors=4, arrows=6)
    assert rooms.direct(small) == {
        "loop": {"server", "engines"},
        "server": {"records"},
        "engines": {"site"},  # the arrow to the records is implied by the way over the site
        "site": {"records"},
        "records": set(),
    }


def test_a_circle_does_not_hang_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = script("make_rooms", monkeypatch)
    circle = graph(first="second", second="first", engines="first")
    assert set(rooms.floors(circle)) == set(circle)
    assert "second" in rooms.svg(circle)


def test_the_picture_shows_every_room_and_the_table_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = script("make_rooms", monkeypatch)
    modules = rooms.files()
    built = rooms.rooms(modules)
    folders = {path.parent.name for path in (ROOT / "ffm_secure").glob("*/__init__.py")}
    assert folders <= set(built)
    picture, page = rooms.svg(built), rooms.page(built, modules)
    assert [room for room in built if f">{room}</text>" not in picture] == []
    assert [room for room in built if not rooms.purpose(room)] == []
    assert [room for room in built if f"| `{room}` |" not in page] == []


def test_every_page_has_one_place_in_the_navigation(monkeypatch: pytest.MonkeyPatch) -> None:
    site = script("make_site", monkeypatch)
    listed = [page for pages in site.SECTIONS.values() for page in pages]
    assert len(listed) == len(set(listed))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    written |= {f"alone/{path.name}" for path in (ROOT / "docs" / "alone").glob("*.md")}
    made = {"rooms.md", *site.FROM_ROOT.values()} - {
        "changelog.md"
    }  # the release notes have a tab of their own
    assert set(listed) == written | made
    folders = {path.name for path in (ROOT / "docs").iterdir() if path.is_dir() and any(path.glob("*.md"))}
    assert folders == {"alone", "decisions", "results"}  # `navigation` lists what is in the last two


def test_a_block_keeps_its_file_name_as_a_title(monkeypatch: pytest.MonkeyPatch) -> None:
    with_titles = script("make_site", monkeypatch).with_titles
    assert with_titles("```toml run.toml\na = 1\n```\n") == '```toml title="run.toml"\na = 1\n```\n'
    plain = "```python\na = 1\n```\n```\nwords and more\n```\n"
    assert with_titles(plain) == plain


def test_promises_and_examples_of_a_docstring_keep_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("griffe")
    stand_in.__dict__.update(Extension=object, Object=SimpleNamespace, Module=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "griffe", stand_in)
    as_markdown = script("docstrings", monkeypatch).as_markdown
    text = (
        "Count.\n\nGuarantee: never\nless than 0.\nSource: counting.\n\n>>> count([1])\n1\n\nTwo "
        "kinds:\n- one\n- two"
    )
    assert re.split(r"\n{2,}", as_markdown(text)) == [
        "Count.",
        "**Guarantee.** never\nless than 0.",
        "**Source.** counting.",
        "```pycon\n>>> count([1])\n1\n```",
        "Two kinds:",
        "- one\n- two",
    ]
