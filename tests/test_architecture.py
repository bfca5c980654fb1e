"""Rooms have one-way doors: who may import whom, and how large things may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffm_secure", "defenses", "attacks")
INDEPENDENT = ("dp", "secagg", "he")
SHARED = ("defenses.random_source", "defenses.errors")
HEAVY = {  # optional or heavy packages and the only places that may import them
    "tenseal": ("defenses/he/",),
    "nvflare": ("ffm_secure/engines/nvflare/",),
    "flwr": ("ffm_secure/engines/flower/",),
    "mlflow": ("ffm_secure/tracking/mlflow_run.py",),
    "wandb": ("ffm_secure/tracking/wandb_run.py",),
    "tensorboardX": ("ffm_secure/tracking/tensorboard.py",),
    "opacus": (),  # tests and benchmarks compare with it; nothing here runs on it
    "peft": ("ffm_secure/trainable/", "ffm_secure/models/backbone.py", "attacks/command.py"),
    "transformers": (
        "ffm_secure/models/",
        "ffm_secure/trainable/",
        "ffm_secure/tasks/",
        "attacks/",
    ),
}
NETWORK = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "requests",
    "httpx",
    "aiohttp",
    "grpc",
    "datasets",
}
NETWORK |= {"huggingface_hub", "websockets", "zmq"}
NETWORK_DOORS = (  # what a run file names is fetched in two places; engines carry bytes between machines
    "ffm_secure/models/backbone.py",
    "ffm_secure/data/hub.py",
    "ffm_secure/cli/publish.py",  # a command of its own, which names the one place it sends to
    "ffm_secure/engines/",
    "ffm_secure/transport/",
)
LONGEST_FILE, LONGEST_FUNCTION = 600, 80


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield every absolute module a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(name: str) -> str:
    return name.split(".")[0]


def forbidden(path: Path, module: str) -> str:
    """Return why `path` may not import `module`, or an empty string."""
    place = path.relative_to(ROOT).as_posix()
    room, target = place.split("/")[0], rooms(module)
    if target not in PACKAGES:
        return ""
    if room == "defenses":
        return _inside_defenses(place, module) if target == "defenses" else "defenses imports only defenses"
    if room == "attacks":
        return "" if target == "attacks" else "attacks imports only attacks"
    if target == "attacks" and not place.startswith("ffm_secure/auditing/"):
        return "only ffm_secure/auditing imports attacks"
    importers = (
        "ffm_secure/cli/commands.py",
        "ffm_secure/cli/released_commands.py",
        "ffm_secure/cli/app.py",
        "ffm_secure/cli/site_audit.py",
        "ffm_secure/__init__.py",
        "ffm_secure/api.py",
    )
    if (
        (module + ".").startswith("ffm_secure.auditing.")
        and place not in importers
        and not place.startswith("ffm_secure/auditing/")
    ):
        return "only the command line and the package's door import the audit"
    if (module + ".").startswith("ffm_secure.cli.app.") and place not in (
        "ffm_secure/cli/app.py",
        "ffm_secure/cli/__init__.py",
        "ffm_secure/__main__.py",
    ):
        return "nobody imports the command line but its own entry point"
    return ""


def _inside_defenses(place: str, module: str) -> str:
    room = place.split("/")[1] if place.count("/") > 1 else ""
    for other in INDEPENDENT:
        if room in INDEPENDENT and other != room and (module + ".").startswith(f"defenses.{other}."):
            return f"defenses/{room} and defenses/{other} are independent"
    return ""


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}: {reason}"
        for path in files(package)
        for module in imported(path)
        if (reason := forbidden(path, module))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("defenses/dp/x.py", "ffm_secure.records"),
        ("defenses/dp/x.py", "defenses.secagg.ring"),
        ("attacks/x.py", "defenses.dp"),
        ("ffm_secure/site/trainer.py", "attacks.span"),
        ("ffm_secure/federation.py", "ffm_secure.auditing.run_audit"),
    ],
)
def test_planted_import_is_caught(place: str, module: str) -> None:
    assert forbidden(ROOT / place, module)


@pytest.mark.parametrize("package", PACKAGES)
def test_heavy_packages_have_one_door(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files(package)
        for module in imported(path)
        if (doors := HEAVY.get(rooms(module))) is not None
        and not path.relative_to(ROOT).as_posix().startswith(doors)
    ]
    assert not wrong, "\n".join(wrong)


def reaches_the_network(place: str, module: str) -> bool:
    """Say whether a file imports what opens connections without being one of the doors."""
    return rooms(module) in NETWORK and not place.startswith(NETWORK_DOORS)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_network_has_few_doors(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files(package)
        for module in imported(path)
        if reaches_the_network(path.relative_to(ROOT).as_posix(), module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["urllib.request", "requests", "http.client", "socket"])
def test_a_planted_connection_is_caught(module: str) -> None:
    assert reaches_the_network("ffm_secure/report/page.py", module)
    assert reaches_the_network("defenses/dp/x.py", module)
    assert not reaches_the_network("ffm_secure/data/hub.py", module)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_grows_too_long(package: str) -> None:
    wrong = []
    for path in files(package):
        text = path.read_text()
        if len(text.splitlines()) > LONGEST_FILE:
            wrong.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped = _docstring_lines(node)
                length = (node.end_lineno or node.lineno) - node.lineno + 1 - skipped
                if length > LONGEST_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return (first.end_lineno or first.lineno) - first.lineno + 1
    return 0


@pytest.mark.parametrize("package", PACKAGES)
def test_no_unsafe_loading(package: str) -> None:
    bad = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files(package)
        for module in imported(path)
        if rooms(module) in bad
    ]
    assert not wrong, "\n".join(wrong)


def test_the_loop_fits_on_a_page() -> None:
    tree = ast.parse((ROOT / "ffm_secure" / "federation.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    assert (loop.end_lineno or 0) - loop.lineno < 60


# ------------------------------------------------------------------------------------- how a page reads

LONGEST_LINE = 110
# words for what happened to a value; a local name says what the value is
SAID_OF_EVERYTHING = {"done", "drawn", "found", "given", "got", "kept", "made", "obj"}
SAID_OF_EVERYTHING |= {"res", "ret", "said", "seen", "taken", "tmp", "told", "tried"}
# nests per 100 statements; the page builders of report/ are expressions by nature: a bound of their own
DENSEST = {"ffm_secure": 5.0, "attacks": 5.0, "defenses": 5.0, "ffm_secure/report": 21.0}
NESTS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.IfExp


def long_lines(text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), start=1) if len(line) > LONGEST_LINE]


def empty_names(tree: ast.AST) -> list[str]:
    """List the local names and arguments that say nothing of their value;
    a class's own fields are no locals.
    """
    fields = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields |= {id(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            names.append(node.id)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
    return sorted(SAID_OF_EVERYTHING.intersection(names))


def nests_per_100_statements(trees: list[ast.Module]) -> float:
    """Count comprehensions and ternaries: what stands inside a statement and has to be read inside out."""
    nests = statements = 0
    for tree in trees:
        for node in ast.walk(tree):
            nests += isinstance(node, NESTS)
            statements += isinstance(node, ast.stmt)
    return 100 * nests / statements


def is_bare(annotation: ast.expr | None) -> bool:
    """Say whether an annotation is `Any`, alone or as one side of a union."""
    if isinstance(annotation, ast.BinOp):
        return is_bare(annotation.left) or is_bare(annotation.right)
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def bare_annotations(tree: ast.AST) -> list[int]:
    """List the lines that annotate something with nothing but `Any`."""
    lines = []
    for node in ast.walk(tree):
        annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotation = node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign):
            annotation = node.annotation
        if is_bare(annotation):
            lines.append(node.lineno)
    return lines


def test_every_line_fits_beside_another_page() -> None:
    wrong = []
    for folder in (*PACKAGES, "tests", "benchmarks", "docs", "examples"):
        for path in files(folder):
            wrong += [f"{path.relative_to(ROOT)}:{number}" for number in long_lines(path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_a_local_name_says_what_its_value_is(package: str) -> None:
    wrong = {}
    for path in files(package):
        place = path.relative_to(ROOT).as_posix()
        names = empty_names(ast.parse(path.read_text()))
        if names:
            wrong[place] = names
    assert not wrong


@pytest.mark.parametrize("package", sorted(DENSEST))
def test_statements_are_read_from_left_to_right(package: str) -> None:
    apart = [ROOT / other for other in DENSEST if other.startswith(f"{package}/")]
    trees = []
    for path in files(package):
        if not any(path.is_relative_to(other) for other in apart):
            trees.append(ast.parse(path.read_text()))
    assert nests_per_100_statements(trees) <= DENSEST[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_any_stands_alone_in_one_list_only(package: str) -> None:
    """`foreign.py` names what libraries hand over without a type, each with its reason."""
    wrong = []
    for path in files(package):
        wrong += [
            f"{path.relative_to(ROOT)}:{line}" for line in bare_annotations(ast.parse(path.read_text()))
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_for_any_has_its_reason(package: str) -> None:
    aliases = 0
    for path in files(package):
        for line in path.read_text().splitlines():
            if line.replace(": TypeAlias", "").split("#")[0].rstrip().endswith(" = Any"):
                aliases += 1
                assert "  # " in line, f"{path.relative_to(ROOT)}: {line} has no reason"
    assert aliases <= 12


def test_planted_pages_are_caught() -> None:
    assert long_lines("x" * 111) == [1]
    assert not long_lines("x" * 110)
    assert empty_names(ast.parse("def f(seen):\n    for kept in seen:\n        found = kept")) == [
        "found",
        "kept",
        "seen",
    ]
    assert not empty_names(ast.parse("def f(rows):\n    gradients = rows"))
    assert nests_per_100_statements([ast.parse("x = [a if b else c for a in d]")]) == 200
    assert bare_annotations(ast.parse("def f(a: Any, b: dict[str, Any]) -> Any | None: ...")) == [1, 1]
    assert not bare_annotations(ast.parse("def f(a: dict[str, Any]) -> None: ..."))


def test_the_top_of_the_house_stays_small() -> None:
    """A file that fits no room is a room that is missing."""
    top = [path.name for path in (ROOT / "ffm_secure").glob("*.py") if not path.name.startswith("__")]
    assert len(top) <= 10, sorted(top)
