"""Collect the pages of the documentation site in `build/pages` and its navigation in `build/site.yml`.

Run: python docs/make_site.py [--without-notebooks], then: mkdocs build --strict --config-file build/site.yml

The hand-written pages are copied, one page of reference is made for every module that has something public,
and the notebooks are executed and rendered. MkDocs is handed plain Markdown, so another generator can take
its place.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
from pathlib import Path

import make_rooms

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
PACKAGES = ("ffm_secure", "defenses", "attacks")
COPIED = ("*.md", "*.svg", "*.json", "*.css")
FROM_ROOT = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SECTIONS: dict[str, list[str]] = {
    "Start": ["index.md", "tutorial.md", "your_own_csv.md", "run_file.md"],
    "Use": [
        "data.md",
        "models.md",
        "inputs.md",
        "prompts.md",
        "image_text.md",
        "lora.md",
        "pretraining.md",
        "streams.md",
        "personal.md",
        "distillation.md",
        "fewer_bytes.md",
        "synthetic.md",
        "experiments.md",
        "tracking.md",
        "alone/dp_sgd.md",
        "alone/trainer.md",
        "alone/ledger.md",
        "alone/secagg.md",
        "alone/audit.md",
        "deploy.md",
    ],
    "Trust": [
        "threat_model.md",
        "evidence.md",
        "formats.md",
        "mistakes.md",
        "malicious_clients.md",
        "shared_noise.md",
        "queries.md",
        "attacks.md",
        "secagg.md",
        "he.md",
        "security.md",
    ],
    "Inside": ["architecture.md", "rooms.md", "extending.md", "contributing.md"],
}
Navigation = list[dict[str, object] | str]


def title(page: Path) -> str:
    """Return the first heading of a page."""
    line = next(line for line in page.read_text().splitlines() if line.startswith("# "))
    return line.removeprefix("# ").strip()


def with_titles(text: str) -> str:
    """Write the file name of a block (after three backticks:
    language, name) as the title that MkDocs expects.
    """
    return re.sub(r"^```(\w+) ([\w./-]+)$", r'```\1 title="\2"', text, flags=re.MULTILINE)


def copy_pages() -> None:
    """Copy what is written by hand, and what readers of a repository expect at its root."""
    for pattern in COPIED:
        for path in (ROOT / "docs").rglob(pattern):
            target = PAGES / path.relative_to(ROOT / "docs")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                target.write_text(with_titles(path.read_text()))
            else:
                shutil.copyfile(path, target)
    for source, target_name in FROM_ROOT.items():
        text = (ROOT / source).read_text()
        (PAGES / target_name).write_text(text.replace("](docs/", "]("))


def draw_rooms() -> None:
    """Draw the rooms and their imports as the code has them now."""
    modules = make_rooms.files()
    graph = make_rooms.rooms(modules)
    (PAGES / "rooms.svg").write_text(make_rooms.svg(graph))
    (PAGES / "rooms.md").write_text(make_rooms.page(graph, modules))


def is_public(path: Path) -> bool:
    """Say whether a module shows anything: a class or function of its own without a leading underscore."""
    tree = ast.parse(path.read_text())
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    shown = any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)
    return shown or (path.name == "__init__.py" and ast.get_docstring(tree) is not None)


def reference(folder: Path) -> Navigation:
    """Write a page for every public module below a folder; return the folder's part of the navigation."""
    navigation: Navigation = []
    modules = sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name))
    for path in modules:
        if path.name == "__main__.py" or not is_public(path):
            continue
        is_package = path.name == "__init__.py"
        parts = path.relative_to(ROOT).with_suffix("").parts[: -1 if is_package else None]
        page = PAGES / "reference" / Path(*parts) / "index.md"
        if not is_package:
            page = page.parent.with_suffix(".md")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"::: {'.'.join(parts)}\n")
        name = page.relative_to(PAGES).as_posix()
        navigation.append(name if is_package else {parts[-1]: name})
    for child in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        inner = reference(child)
        if inner:
            navigation.append({child.name: inner})
    return navigation


def notebooks(execute: bool) -> list[str]:
    """Execute the notebooks and render them as pages; return the pages' names."""
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    folder = PAGES / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    home = ROOT / "build" / "notebooks" / "home"  # never the ledger of whoever builds the site
    shutil.rmtree(home, ignore_errors=True)
    os.environ["FFM_SECURE_HOME"] = str(home)
    names = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        if execute:
            work = ROOT / "build" / "notebooks" / path.stem
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            processor = ExecutePreprocessor(timeout=1500, kernel_name="python3")
            processor.preprocess(book, {"metadata": {"path": str(work)}})
        for cell in book.cells:  # what is written to stderr is about this machine, not about the notebook
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        body, extra = MarkdownExporter().from_notebook_node(book, {"unique_key": path.stem})
        (folder / f"{path.stem}.md").write_text(body)
        for name, content in extra.get("outputs", {}).items():
            (folder / name).write_bytes(content)
        names.append(f"notebooks/{path.stem}.md")
    return names


def navigation(books: list[str], modules: Navigation) -> Navigation:
    """Put the pages in the order in which a reader meets them."""
    parts: Navigation = [{name: list(pages)} for name, pages in SECTIONS.items()]
    decisions = sorted(path.relative_to(PAGES).as_posix() for path in (PAGES / "decisions").glob("*.md"))
    results = sorted(path.relative_to(PAGES).as_posix() for path in (PAGES / "results").glob("*.md"))
    parts.insert(2, {"Notebooks": list(books)})
    parts += [
        {"Results": list(results)},
        {"Reference": modules},
        {"Decisions": list(decisions)},
        {"Release notes": "changelog.md"},
    ]
    return parts


def main() -> None:
    """Make everything anew."""
    parser = argparse.ArgumentParser(description="Collect the pages of the documentation site.")
    parser.add_argument(
        "--without-notebooks", action="store_true", help="render the notebooks, do not execute them"
    )
    arguments = parser.parse_args()
    shutil.rmtree(PAGES, ignore_errors=True)
    copy_pages()
    draw_rooms()
    modules: Navigation = [{package: reference(ROOT / package)} for package in PACKAGES]
    books = notebooks(execute=not arguments.without_notebooks)
    site = {
        "INHERIT": "../docs/mkdocs.yml",
        "docs_dir": "pages",
        "site_dir": "site",
        "nav": navigation(books, modules),
    }
    (ROOT / "build" / "site.yml").write_text(json.dumps(site, indent=1))


if __name__ == "__main__":
    main()
