"""A name that a docstring shows in backticks exists:
in the code beside it, in what a file imports, or as a file.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffm_secure", "defenses", "attacks")
QUOTED = re.compile(r"`+([^`\n]+)`+")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?[\w-]+\.(py|md|toml|json|txt|ipynb)")
ELSEWHERE = frozenset({  # names of other packages and formats that no line of ours spells
    "PeftModel", "from_pretrained", "DatasetDict", "save_to_disk", "NaN", "Infinity",
})  # fmt: skip


def documented(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def names_in_code(tree: ast.AST) -> Iterator[str]:
    """Yield every identifier a file spells, and its strings of one word (kinds, keys, file names),
    docstrings left out.
    """
    docstrings = {
        id(node.body[0].value)
        for node in documented(tree)
        if node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield from name.split(".")
                if other:
                    yield other
            case ast.Constant(value=str(text)) if id(node) not in docstrings and " " not in text:
                yield text
                yield from re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text)


@cache
def sources() -> dict[Path, ast.Module]:
    return {
        path: ast.parse(path.read_text())
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def file_names() -> frozenset[str]:
    """Return how files can be named without their folder."""
    folders = (*PACKAGES, "tests", "docs", "examples", "benchmarks")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*.*"))


@cache
def known() -> frozenset[str]:
    """Return what exists: identifiers of our code, our modules, and Python's own names."""
    names = {name for tree in sources().values() for name in names_in_code(tree)}
    names |= {part for path in sources() for part in path.relative_to(ROOT).with_suffix("").parts}
    return frozenset(names | set(dir(builtins)) | ELSEWHERE)


def missing(docstring: str, exists: frozenset[str]) -> list[str]:
    """Return the names and files of a docstring that do not exist."""
    wrong = []
    for quoted in QUOTED.findall(docstring):
        text = quoted.strip().removesuffix("()")
        if text.endswith("_"):  # what several names begin with
            continue
        if PATH.fullmatch(text):
            if text not in exists and not (ROOT / text).exists() and text not in file_names():
                wrong.append(text)
        elif NAME.fullmatch(text) and not set(text.split(".")) <= exists:
            wrong.append(text)
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_names_in_docstrings_exist(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: `{name}`"
        for path, tree in sources().items()
        if path.relative_to(ROOT).parts[0] == package
        for node in documented(tree)
        for name in missing(ast.get_docstring(node) or "", known())
    ]
    assert not wrong, "\n".join(wrong)


def test_a_name_that_is_gone_is_caught() -> None:
    text = (
        "See `clip_vector`, ``Clipping.factors()``, `defenses/dp/clip.py`, `code_for` and "
        "`defenses/dp/clop.py`."
    )
    assert missing(text, known()) == ["code_for", "defenses/dp/clop.py"]
