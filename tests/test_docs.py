"""What the documentation shows is run: every block of the tutorial, the README's Python, the notebooks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    ran = 0
    for block in BLOCK.finditer((ROOT / "docs" / "tutorial.md").read_text()):
        kind, body = block["kind"].split(), block["body"]
        if kind[0] == "toml":
            (tmp_path / kind[1]).write_text(body)
        elif kind[0] == "python":
            exec(compile(body, "tutorial.md", "exec"), space)  # noqa: S102
            ran += 1
    assert ran >= 5
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000


def python_blocks(page: Path) -> list[str]:
    return [block["body"] for block in BLOCK.finditer(page.read_text()) if block["kind"].strip() == "python"]


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)  # noqa: S102
    assert "epsilon 8" in capsys.readouterr().out
    assert python_blocks(ROOT / "docs" / "index.md") == blocks


def test_the_readme_shows_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for command in ("plan", "run", "audit", "ledger", "report", "doctor", "epsilon", "sigma"):
        assert f"ffm-secure {command}" in text, command
    for promised in re.findall(r"`(docs/[\w/.]+|examples/[\w/.-]+)`", text):
        assert (ROOT / promised).exists(), promised


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    ]
    assert len(links) > 10
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_are_stored_without_output(path: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code) < 60
    client.NotebookClient(
        book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
