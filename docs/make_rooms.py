"""Draw the rooms of `ffm_secure` and what they import, from the code itself.

Run: python docs/make_rooms.py    prints rooms, floors and arrows, of folders and of files
`docs/make_site.py` puts the picture and the table on a page of the site.

A room is a folder, or a file that stands alone. It is drawn above every room that it imports; its floor is
the length of the longest way down.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ffm_secure"
SIDES = {
    "site": ("#b3261e", "touches private rows"),
    "server": ("#1a5fb4", "never reaches a private row"),
    "both": ("#5e5c64", "carries bytes between the two"),
    "above": ("#8a5a00", "starts runs and reads records"),
    "shared": ("#26774f", "knows neither side"),
}
SIDE_OF_ROOM = {"site": "site", "data": "site", "server": "server", "engines": "both"}
WIDTH, BOX_HEIGHT, ROW, GAP, MARGIN = 960, 34, 64, 14, 20

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How many rooms there are, on how many floors, with how many arrows between them."""

    rooms: int
    floors: int
    arrows: int


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, modules: Iterable[str]) -> frozenset[str]:
    """Return the modules of the package that a file imports, wherever in it; not for annotations alone."""
    known = set(modules)
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    annotations_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            annotations_only |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in annotations_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= known else {node.module} | inner  # a folder is no more than its files
    own = module_name(path)
    return frozenset(name for name in names & known if name not in (own, PACKAGE))


def files() -> Graph:
    """Return which file imports which, inside the package; the package's own two doors are left out."""
    paths = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    doors = (PACKAGE, f"{PACKAGE}.__main__")
    return {name: imports_of(path, paths) for name, path in paths.items() if name not in doors}


def room_of(module: str) -> str:
    """Return the folder, or the file standing alone, that a module belongs to."""
    return module.split(".")[1]


def rooms(modules: Graph) -> Graph:
    """Join the files of every folder."""
    graph: dict[str, set[str]] = {}
    for module, imported in modules.items():
        here = graph.setdefault(room_of(module), set())
        here |= {room_of(name) for name in imported} - {room_of(module)}
    return {room: frozenset(imported) for room, imported in graph.items()}


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of every room;
    rooms that import each other in a circle share the highest one they can reach.
    """
    heights = dict.fromkeys(graph, 0)
    for _ in graph:
        raised = {
            room: max((heights[below] + 1 for below in imported if below in graph), default=0)
            for room, imported in graph.items()
        }
        if raised == heights:
            break
        heights = raised
    return heights


def measure(graph: Graph) -> Measure:
    """Count rooms, floors and arrows."""
    return Measure(
        rooms=len(graph),
        floors=max(floors(graph).values()) + 1,
        arrows=sum(len(imported) for imported in graph.values()),
    )


def direct(graph: Graph) -> dict[str, set[str]]:
    """Return the arrows that no longer way down implies."""

    def reached(room: str, visited: set[str]) -> set[str]:
        for below in graph[room] - visited:
            visited.add(below)
            reached(below, visited)
        return visited

    return {
        room: {
            below
            for below in imported
            if not any(below in reached(other, set()) for other in imported if other != below)
        }
        for room, imported in graph.items()
    }


def purpose(room: str) -> str:
    """Return the first line of a room's docstring."""
    path = ROOT / PACKAGE / room / "__init__.py"
    if not path.exists():
        path = ROOT / PACKAGE / f"{room}.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def side_of(room: str, heights: Mapping[str, int]) -> str:
    """Return which side of the wall a room is on; whoever stands above the engines is on none."""
    if room in SIDE_OF_ROOM:
        return SIDE_OF_ROOM[room]
    return "above" if heights[room] > heights.get("engines", 0) else "shared"


def _places(heights: Mapping[str, int]) -> dict[str, tuple[float, float, float]]:
    """Return left edge, top edge and width of every box."""
    top = max(heights.values())
    places = {}
    for floor in range(top + 1):
        row = sorted(room for room, height in heights.items() if height == floor)
        width = min(150.0, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / max(1, len(row)))
        start = (WIDTH - width * len(row) - GAP * (len(row) - 1)) / 2
        for position, room in enumerate(row):
            places[room] = (start + position * (width + GAP), MARGIN + (top - floor) * ROW, width)
    return places


def svg(graph: Graph) -> str:
    """Return the picture: importers above, imported below, only arrows that no longer way implies."""
    heights = floors(graph)
    places = _places(heights)
    height = MARGIN * 2 + ROW * max(heights.values()) + BOX_HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="13">',
        f"<title>The rooms of {PACKAGE} and what they import</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for room, below in sorted(direct(graph).items()):
        left, top, width = places[room]
        for other in sorted(below):
            other_left, other_top, other_width = places[other]
            parts.append(
                f'<line x1="{left + width / 2:.1f}" y1="{top + BOX_HEIGHT}" '
                f'x2="{other_left + other_width / 2:.1f}" y2="{other_top}" '
                'stroke="#9a9996" stroke-width="1"/>'
            )
    for room, (left, top, width) in places.items():
        colour = SIDES[side_of(room, heights)][0]
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{colour}"/><text x="{left + width / 2:.1f}" y="{top + 22}" fill="#ffffff" '
            'text-anchor="middle">'
            f"{html.escape(room)}</text>"
        )
    left = float(MARGIN)
    for colour, words in SIDES.values():
        parts.append(
            f'<rect x="{left:.0f}" y="{height - 26}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{left + 20:.0f}" y="{height - 14}" fill="#241f31">{words}</text>'
        )
        left += 34 + 6.0 * len(words)
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(graph: Graph, modules: Graph) -> str:
    """Return the page of the site: the picture, the counts and a table of all rooms."""
    heights = floors(graph)
    folders, single = measure(graph), measure(modules)
    lines = [
        "# The rooms as built",
        "",
        (
            f"Made from the imports of the code: {folders.rooms} rooms on {folders.floors} floors with "
            f"{folders.arrows} arrows, {single.rooms} files on {single.floors} floors with {single.arrows} "
            "arrows. A room stands above what it imports; an arrow that a longer way implies is not drawn."
        ),
        "",
        "![rooms in rows, the loop and the command line above, records and configuration below](rooms.svg)",
        "",
        "| floor | room | what it is | imports |",
        "|---|---|---|---|",
    ]
    for room in sorted(graph, key=lambda name: (-heights[name], name)):
        imported = ", ".join(f"`{name}`" for name in sorted(graph[room])) or "nothing of the package"
        lines.append(f"| {heights[room]} | `{room}` | {purpose(room).replace('|', '/')} | {imported} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the counts."""
    modules = files()
    for name, graph in (("folders", rooms(modules)), ("files", modules)):
        counted = measure(graph)
        print(f"{name}: {counted.rooms} rooms, {counted.floors} floors, {counted.arrows} arrows")


if __name__ == "__main__":
    main()
