"""What the documentation shows is run: every block of the tutorial, the README's Python, the notebooks."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BY_FOLDER = ("decisions", "results")  # whose pages the site lists by themselves
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


FOLDERS = "ffm_secure|defenses|attacks|tests|benchmarks|docs|examples|experiments|notebooks|requirements"
PATH = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*\w")
MODULE = re.compile(r"(?<![\w/.])(?:ffm_secure|defenses|attacks|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w(])")


def gone(text: str) -> list[str]:
    """Return the files and modules that a page names and the repository does not have."""
    paths = [path for path in PATH.findall(text) if not any(map(Path.exists, candidates(path)))]
    modules = [
        name for name in MODULE.findall(text) if not name.endswith((".md", ".py")) and not importable(name)
    ]
    return [*paths, *modules]


def candidates(path: str) -> list[Path]:
    return [ROOT / path, ROOT / f"{path}.py"]


def importable(name: str) -> bool:
    """Say whether a dotted name is a module, or a name that the source of its module spells."""
    if has_module(name):
        return True
    module, _, member = name.rpartition(".")
    spec = importlib.util.find_spec(module) if has_module(module) else None
    if spec is None or spec.origin is None:
        return False
    return re.search(rf"\b{member}\b", Path(spec.origin).read_text()) is not None


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_every_file_and_module_a_page_names_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    wrong = [f"{page.relative_to(ROOT)}: {name}" for page in pages for name in gone(page.read_text())]
    assert wrong == []


def test_every_test_a_page_names_exists() -> None:
    known = set()
    for path in (ROOT / "tests").rglob("*.py"):
        known |= {path.stem, *re.findall(r"def (test_\w+)", path.read_text())}
    wrong = {}
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        names = set(re.findall(r"\b(test_\w+)", page.read_text()))
        # a name that ends in _ is the beginning of one, or of several
        missing = [name for name in names - known if not _begins_one_of(name, known)]
        if missing:
            wrong[page.name] = missing
    assert not wrong


def _begins_one_of(name: str, known: set[str]) -> bool:
    return name.endswith("_") and any(other.startswith(name) for other in known)


def test_every_row_between_machines_names_its_test() -> None:
    text = (ROOT / "docs" / "threat_model.md").read_text()
    table = text[text.index("| who | tries |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    assert [row for row in table if "test_" not in row.rsplit("|", 2)[1]] == []


def test_the_picture_of_the_rooms_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "ffm_secure"
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    rooms += [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    assert [room for room in rooms if room not in text] == []


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    """The site's build ends at a page that nothing leads to; this is seen without a build."""
    script = (ROOT / "docs" / "make_site.py").read_text()
    docs = ROOT / "docs"
    pages = [path.relative_to(docs) for path in docs.rglob("*.md") if path.parent.name not in BY_FOLDER]
    assert [str(page) for page in pages if f'"{page}"' not in script] == []


def test_every_decision_has_a_number_of_its_own() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [page.name[:4] for page in pages]
    assert [number for number in numbers if not number.isdigit() or numbers.count(number) > 1] == []
    assert [page.name for page in pages if not page.read_text().startswith(f"# {page.name[:4]}")] == []


def test_a_file_that_moved_is_caught() -> None:
    text = (
        "`defenses/dp/clip.py`, `defenses/dp/clop.py`, `python -m benchmarks.he`, "
        "`defenses.dp.clip.clop`, `docs/he.md`"
    )
    assert gone(text) == ["defenses/dp/clop.py", "defenses.dp.clip.clop"]


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = [
    pytest.param(path, marks=[pytest.mark.slow] if number else []) for number, path in enumerate(NOTEBOOKS)
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_stored_without_output(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code) < 60


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    """The first by default; building the documentation executes all of them too."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    book = nbformat.read(path, as_version=4)
    client.NotebookClient(
        book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
