"""The wall between server and sites: walked by imports, and by the objects that hang on a running server."""

from __future__ import annotations

import ast
import gc
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from defenses.dp import Ledger
from defenses.secagg import Identity
from ffm_secure.data.dataset import Dataset, Examples
from ffm_secure.engines import simulation
from ffm_secure.protection.encrypted import SharedKey
from ffm_secure.site.client_state import ClientStateStore
from ffm_secure.site.site import Site
from ffm_secure.site.site_ledger import SiteLedger
from ffm_secure.site.trainer import SiteData, SiteTrainer
from tests.federation.helpers import RECORD, SECAGG, finish, make, prepared

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ffm_secure"
OF_A_SITE = (
    Dataset, Examples, Identity, Ledger, Site, SiteData, SiteLedger, SiteTrainer, ClientStateStore, SharedKey,
)  # fmt: skip
# room -> rooms it may never import, not even through another file of its own room
CLOSED_TO = {
    "server": ("data", "site", "engines", "auditing", "cli"),
    "site": ("server", "engines", "auditing", "cli"),
    "transport": ("data", "site", "server", "engines"),
    "protection": ("data", "site", "server", "engines"),
    "privacy": ("data", "site", "server", "engines"),
    "aggregation": ("data", "site", "server", "engines"),
    "strategies": ("data", "site", "server", "engines"),
    "lifecycle": ("data", "site", "server", "engines"),
    "tasks": ("data", "site", "server", "engines", "protection", "privacy"),
    "trainable": ("data", "site", "server", "engines", "protection", "privacy", "strategies"),
    "models": ("data", "site", "server", "engines", "protection", "privacy"),
    "config": ("data", "site", "server", "engines", "protection", "privacy", "models", "tasks"),
    "data": ("site", "server", "engines", "protection", "privacy"),
    "coordinator": ("data", "site", "engines", "auditing", "cli"),
    "agreed": ("data", "site", "server", "engines", "auditing", "cli"),
    "display": ("data", "site", "engines", "auditing", "cli"),
    "certificate": ("data", "server", "engines", "protection", "auditing"),
    "report": ("data", "site", "server", "engines", "protection", "auditing"),
    "tracking": ("data", "site", "server", "engines", "protection", "privacy", "models", "tasks", "auditing"),
}
# functions that only an engine which plays everybody may call
ONLY_ENGINES = {"ffm_secure.protection.enrolment"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Return the modules of this package that a module imports, wherever in the file."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {item for item in inner if item in MODULES} or {node.module}
    return {target for target in targets if target in MODULES}


def type_checking_only(name: str) -> set[str]:
    """Return the modules that are imported for annotations alone."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom) and inner.module:
                    targets.add(inner.module)
    return targets


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else ""


def reached(name: str) -> set[str]:
    """Return every module of this package that importing one leads to."""
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        for target in imports(current):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


@pytest.mark.parametrize("closed", sorted(CLOSED_TO))
def test_no_way_leads_from_a_room_to_what_it_is_closed_to(closed: str) -> None:
    wrong = [
        f"{name} reaches {target}"
        for name in MODULES
        if room(name) == closed
        for target in reached(name)
        if room(target) in CLOSED_TO[closed]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_planted_import_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = imports
    monkeypatch.setitem(
        globals(), "imports",
        lambda name: real(name) | ({"ffm_secure.site.site"} if name == "ffm_secure.tasks.base" else set()),
    )  # fmt: skip
    assert any(room(target) == "site" for target in reached("ffm_secure.server.rounds"))


def test_only_engines_and_the_audit_deal_out_data_and_keys() -> None:
    for name in MODULES:
        for target in imports(name):
            if target in ONLY_ENGINES:
                assert room(name) == "engines", f"{name} imports {target}"
            if room(target) == "data" and room(name) != "data":
                assert room(name) in ("engines", "site", "auditing", "cli", "tracking") or name in (
                    "ffm_secure.api",
                    "ffm_secure",
                ), f"{name} imports {target}"


def test_there_is_no_circle() -> None:
    refuse_circles({name: imports(name) - type_checking_only(name) - {name} for name in MODULES})


def test_there_is_no_circle_of_rooms() -> None:
    """A file that stands alone is a room; what is imported for annotations alone counts, too."""
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        parts = name.split(".")
        if len(parts) == 1 or parts[1] == "__main__":
            continue  # the two doors of the package
        here = graph.setdefault(parts[1], set())
        here |= {target.split(".")[1] for target in imports(name) if "." in target} - {parts[1]}
    refuse_circles(graph)
    with pytest.raises(AssertionError, match="server -> federation"):
        refuse_circles({**graph, "server": graph["server"] | {"federation"}})


def refuse_circles(graph: dict[str, set[str]]) -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in finished:
            return
        for target in graph[name]:
            if not name.startswith(target + "."):  # a package's own door
                visit(target, (*path, name))
        finished.add(name)

    for name in graph:
        visit(name, ())


def hanging_on(root: object) -> Iterator[object]:
    """Walk every object that can be reached from one, without classes, modules and functions' globals."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        current = waiting.pop()
        yield current
        if isinstance(current, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType):
            if isinstance(current, types.FunctionType):
                cells = [cell.cell_contents for cell in current.__closure__ or () if cell != types.CellType()]
                waiting += [item for item in cells if id(item) not in seen]
                seen |= {id(item) for item in cells}
            continue
        for item in gc.get_referents(current):
            if id(item) not in seen and not isinstance(item, type | types.ModuleType | types.FrameType):
                seen.add(id(item))
                waiting.append(item)


@pytest.mark.parametrize("protection", ["none", "secagg", "bfv"])
def test_nothing_of_a_site_hangs_on_the_server(protection: str, tmp_path: Path) -> None:
    if protection == "bfv":
        pytest.importorskip("tenseal", reason="the extra 'he' is not installed")
    kind = SECAGG if protection == "secagg" else {"kind": protection, "threshold": 3}
    ready = simulation.build(prepared(make(privacy=RECORD, protection=kind)), tmp_path)
    finish(ready, tmp_path)
    private = {id(site.data.examples) for site in ready.sites}
    for thing in hanging_on(ready.server):
        assert not isinstance(thing, OF_A_SITE), f"a {type(thing).__name__} can be reached from the server"
        assert id(thing) not in private, "private rows can be reached from the server"


def test_the_walk_finds_what_does_hang_on_the_server(tmp_path: Path) -> None:
    ready = simulation.build(prepared(make(privacy=RECORD)), tmp_path)
    ready.server.run_id = ready.sites[0]
    assert any(isinstance(thing, Site) for thing in hanging_on(ready.server))
    assert any(isinstance(thing, torch.Tensor) for thing in hanging_on(ready.server))


def test_sites_do_not_reach_each_other_or_the_server(tmp_path: Path) -> None:
    ready = simulation.build(prepared(make(privacy=RECORD)), tmp_path)
    others = {id(site.data.examples) for site in ready.sites[1:]}
    for thing in hanging_on(ready.sites[0]):
        assert thing is not ready.server
        assert id(thing) not in others
