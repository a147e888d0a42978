"""Keep the house in order: imports go down from floor to floor, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src/kvfloor"

# A room is a folder or module directly under kvfloor/. It imports rooms on lower floors only.
FLOORS = (
    {"version", "validation", "files", "splitting", "logits"},
    {"core", "floors", "tasks", "models", "statistics"},
    {"certify"},
    {"methods"},
    {"game", "hf"},
    {"audit", "check", "planning", "vllm"},
    {"bench", "report", "training"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return every module's dotted name below `package`, and its file."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of kvfloor that module `name` imports when it runs, late imports included."""
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            base = ["kvfloor", *above[: len(above) - node.level + 1]] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            named = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in named:
            if full.split(".")[0] == "kvfloor":
                target = full.partition(".")[2]
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target not in ("", name):
                    yield target


def arrows_up(known: dict[str, Path]) -> list[str]:
    """Return the imports that go from a room to another one on the same floor or above."""
    wrong = []
    for name in known:
        room = name.partition(".")[0]
        for target in imports(name, known):
            below = target.partition(".")[0]
            if name and below != room and FLOOR[below] >= FLOOR[room]:
                wrong.append(f"{name} imports {target}")
    return sorted(set(wrong))


def circle(known: dict[str, Path]) -> list[str]:
    """Return the modules of one import circle, or an empty list where there is none."""
    graph = {name: sorted(set(imports(name, known))) for name in known}
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in graph[name]:
            found = follow(target, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in modules() if name} == set(FLOOR)


def test_no_import_goes_up() -> None:
    assert arrows_up(modules()) == []


def test_no_import_goes_in_a_circle() -> None:
    assert circle(modules()) == []


def test_both_faults_are_found(tmp_path: Path) -> None:
    """The mutants: a lower room that imports a higher one, late, and two modules that import each other."""
    for room in ("core", "methods"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "core/one.py").write_text("def late():\n    from kvfloor.methods import two\n")
    (tmp_path / "methods/two.py").write_text("from kvfloor.core.one import late\n")
    known = modules(tmp_path)
    assert arrows_up(known) == ["core.one imports methods.two"]
    assert set(circle(known)) == {"core.one", "methods.two"}
