"""The order of imports: no circles of files, and rooms of the engine that build on those below only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jblock", "serving", "checkpoints")
# Lowest first: what stands in a line may import what stands above it, and its own room.
ENGINE = (
    ("stats_records",),
    ("api", "config", "signature"),
    ("platform_defaults",),
    ("kv_cache", "structured_output"),
    ("adapters",),
    ("weights",),
    ("graph",),
    ("programs",),
    ("scheduling",),
    ("runner",),
    ("spans", "speculation"),
    ("stats", "model_infos", "watchdog", "constrained"),
    ("loop", "compile_tiers"),
    ("model_updates",),
    ("engine",),
    ("groups",),
    ("factory",),
)
# jblock.engine.process stands beside all of that: it imports the boundary alone.


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(p): p
    for package in PACKAGES
    for p in sorted((ROOT / package).rglob("*.py"))
    if "_pb2" not in p.name
}


def imports(name: str) -> Iterator[str]:
    """Modules of ours that a module imports anywhere in it, for types alone too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected parts of more than one node."""
    reach = {n: set(graph[n]) for n in graph}
    for middle in graph:
        for n in graph:
            if middle in reach[n]:
                reach[n] |= reach[middle]
    found = {frozenset(m for m in reach[n] if n in reach[m]) for n in graph if n in reach[n]}
    return sorted(sorted(c) for c in found)


def test_no_circle_of_files():
    assert circles(GRAPH) == []


def folder(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


@pytest.mark.parametrize("package", ["jblock.engine"])
def test_no_circle_of_folders(package):
    rooms: dict[str, set[str]] = {}
    for name, used in GRAPH.items():
        if name.startswith(f"{package}.") and folder(name) != package:
            own = rooms.setdefault(folder(name), set())
            own |= {folder(u) for u in used if u.startswith(f"{package}.")} - {
                folder(name),
                package,
            }
    assert circles({n: used & rooms.keys() for n, used in rooms.items()}) == []


def room(name: str) -> str:
    return name.split(".")[2]


def test_rooms_of_the_engine_build_on_those_below():
    level = {name: i for i, names in enumerate(ENGINE) for name in names}
    wrong = [
        f"{name} imports {used}"
        for name in GRAPH
        if name.startswith("jblock.engine.") and room(name) != "process"
        for used in sorted(GRAPH[name])
        if used.startswith("jblock.engine.")
        and room(used) != room(name)
        and level[room(used)] >= level[room(name)]
    ]
    assert wrong == []


def test_every_room_has_its_place():
    named = {n for names in ENGINE for n in names} | {"process"}
    there = {p.stem for p in (ROOT / "jblock/engine").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert there - {"__init__", "__pycache__"} <= named


@pytest.mark.parametrize(
    "name",
    ["jblock.engine.process.client", "jblock.scheduler.cluster", "jblock.scheduler.pipeline"],
)
def test_engine_processes_are_told_from_outside_without_jax(name):
    """The server's process imports the engine's boundary and the scheduler, and no jax with them."""
    seen, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += GRAPH[name]
    assert not any(
        isinstance(node, ast.Import | ast.ImportFrom)
        and "jax" in {(getattr(node, "module", None) or node.names[0].name).split(".")[0]}
        for name in seen
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
    )


def test_files_stay_small():
    """A file is one idea."""
    lines = sorted(
        len(path.read_text().splitlines())
        for name, path in MODULES.items()
        if name.startswith("jblock.engine.") and path.name != "__init__.py"
    )
    assert lines[-1] <= 400
    assert lines[len(lines) // 2] < 150
    flat = [p for p in (ROOT / "jblock/engine").glob("*.py") if p.name != "__init__.py"]
    assert len(flat) <= 16
