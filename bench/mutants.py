"""Count the one-change mutants that the tests miss: `python bench/mutants.py src/kvfloor/core --sample 40`.

A mutant is a module with one change: a comparison turned, `and` for `or`, a constant moved by one, an operator or a
truth value exchanged, a condition negated, a returned value replaced by None. A seeded sample of all mutants is drawn.
Each one is written into a copy of the repository, where the tests of that module run until the first failure, and
then the laws of some methods. The share of killed mutants comes with its Wilson interval.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvfloor.statistics import wilson_interval

Outcome = Literal["killed", "SURVIVED", "TIMED OUT"]

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "docs", "examples", "pyproject.toml", "README.md")
BESIDE = {
    "arena": ("core/test_slots", "core/test_stretches", "core/test_restoring", "core/test_bounded"),
    "attend": ("core/test_step_partial",),
    "blocked": (
        "core/test_bounded",
        "core/test_one_token",
        "core/test_state",
        "core/test_rotation",
        "methods/test_selectors",
    ),
    "bounded": (
        "core/test_forget",
        "core/test_one_token",
        "core/test_state",
        "methods/test_value_sum",
        "core/test_restoring",
    ),
    "broken": ("core/test_doors",),
    "decoding": ("core/test_pool",),
    "exact": ("core/test_state", "core/test_method", "core/test_forget", "core/test_restoring"),
    "fields": ("core/test_message", "core/test_restoring"),
    "message": ("core/test_restoring",),
    "method": ("core/test_budget_for", "methods/test_registry"),
    "layout": ("core/test_pool",),
    "policy": ("core/test_bounded", "methods/test_registry", "methods/test_observation"),
    "pool": ("core/test_decoding", "core/test_attend_blocks"),
    "selector": ("methods/test_selectors", "methods/test_pages", "core/test_method"),
    "watching": (
        "core/test_bounded",
        "core/test_one_token",
        "core/test_tiles",
        "core/test_rotation",
        "methods/test_observation",
        "methods/test_last_query",
    ),
    "slots": (
        "core/test_forget",
        "core/test_one_token",
        "core/test_bounded",
        "core/test_rotation",
        "core/test_restoring",
    ),
    "spec": ("core/test_state", "core/test_rotation"),
    "state": ("core/test_forget", "core/test_one_token", "core/test_doors", "core/test_restoring", "core/test_broken"),
    "stretches": ("core/test_restoring", "methods/test_quantized"),
    "summary": ("methods/test_value_sum", "methods/test_moments", "methods/test_taylor", "core/test_method"),
    "tiles": ("methods/test_observation",),
}
"""Module of the core -> the tests that cover it, beside its own `tests/core/test_<module>.py`."""

LAWS = tuple(
    f"tests/check/test_conformance.py::test_method_keeps_its_laws[{text}]"
    for text in ("exact", "window@32", "h2o@32", "snapkv@32", "random@32", "window+moments@32", "exact|pages", "quant")
)
"""The laws of some methods, which every survivor of a module's own tests is tried against next."""

TURNED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}


@dataclass(frozen=True)
class Mutant:
    """Hold one module's source with one change at `line`."""

    path: Path
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the changed copies of one node."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for kind in TURNED.get(type(op), ()):
                yield ast.Compare(node.left, [*node.ops[:i], kind(), *node.ops[i + 1 :]], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.BoolOp | ast.BinOp):
        for kind in TURNED.get(type(node.op), ()):
            changed = copy.copy(node)
            changed.op = kind()  # type: ignore[assignment]
            yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.If | ast.IfExp):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))


def _skipped(node: ast.AST) -> bool:
    """Return True for asserts, raises and guards of annotations, whose mutants no test should notice."""
    return isinstance(node, ast.Assert | ast.Raise) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yield every node below `tree` as (parent, field, place in the field's list)."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        several = isinstance(value, list)
        for i, node in enumerate(value if several else [value]):
            if isinstance(node, ast.AST) and not _skipped(node):
                yield tree, name, i if several else None
                yield from sites(node)


def mutants(path: Path) -> list[Mutant]:
    """Return every one-change mutant of a module; `path` is relative to the repository."""
    tree, found = ast.parse((ROOT / path).read_text()), []
    for parent, name, place in list(sites(tree)):
        held = getattr(parent, name)
        node = held if place is None else held[place]
        for changed in changes(node):
            ast.copy_location(changed, node)
            swapped = changed if place is None else [*held[:place], changed, *held[place + 1 :]]
            setattr(parent, name, swapped)
            source = ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, name, held)
            line = getattr(node, "lineno", 0)
            before, after = (ast.unparse(x).splitlines()[0][:90] for x in (node, changed))
            found.append(Mutant(path, line, before, after, source))
    return found


def tests_of(path: Path) -> list[str]:
    """Return the test files that cover a module, if they exist."""
    own = Path("tests") / path.relative_to("src/kvfloor").with_name(f"test_{path.name}")
    beside = [Path("tests") / f"{name}.py" for name in BESIDE.get(path.stem, ())] if path.parent.name == "core" else []
    return [str(file) for file in (own, *beside) if (ROOT / file).exists()]


def outcome(tests: list[str], where: Path, seconds: int | None = None) -> Outcome:
    """Run the tests in the copy at `where` until the first failure.

    Raises RuntimeError if pytest gave no verdict: such a run shows nothing about the mutant.
    """
    environment = os.environ | {
        "PYTHONPATH": str(where / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, timeout=seconds, text=True)
    except subprocess.TimeoutExpired:
        return "TIMED OUT"
    if done.returncode not in (0, 1, 2):  # 2: a module that cannot be imported
        raise RuntimeError(f"pytest ended with {done.returncode} on {tests}: {done.stdout}{done.stderr}")
    return "killed" if done.returncode else "SURVIVED"


def tried(mutant: Mutant, tests: list[str], where: Path, seconds: int) -> Outcome:
    """Write the mutant into the copy at `where`, run its tests, and put the module back."""
    file = where / mutant.path
    whole = file.read_text()
    file.write_text(mutant.source)
    try:
        found = outcome(tests, where, seconds)
        return outcome([*LAWS], where, seconds) if found == "SURVIVED" else found
    finally:
        file.write_text(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("src/kvfloor/core"))
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=300, help="longest run of one mutant's tests")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at once, each in a copy of its own")
    parser.add_argument("--trusted", action="store_true", help="do not first run the tests without a mutant")
    asked = parser.parse_args()
    files = [asked.folder] if asked.folder.suffix else sorted(asked.folder.rglob("*.py"))
    tests = {file: tests_of(file) for file in files}
    every = [mutant for file in files if tests[file] for mutant in mutants(file)]
    drawn = random.Random(asked.seed).sample(every, min(asked.sample, len(every)))
    count: Counter[Outcome] = Counter()
    copies: queue.Queue[Path] = queue.Queue()

    def tried_in_a_copy(mutant: Mutant) -> Outcome:
        """Try the mutant in the first copy that is free."""
        where = copies.get()
        try:
            return tried(mutant, tests[mutant.path], where, asked.seconds)
        finally:
            copies.put(where)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        for job in range(asked.jobs):
            where = Path(folder) / str(job)
            where.mkdir()
            for name in COPIED:
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, where / name)
            copies.put(where)
        used = sorted({test for mutant in drawn for test in tests[mutant.path]}) + list(LAWS)
        if not asked.trusted and outcome(used, where) != "SURVIVED":
            raise SystemExit("the tests fail without any mutant: mend them first")
        for mutant, found in zip(drawn, pool.map(tried_in_a_copy, drawn), strict=True):
            count[found] += 1
            print(f"{found:9}", mutant, flush=True)
    judged = count["killed"] + count["SURVIVED"]
    print(f"{count['killed']} of {judged} killed, {count['TIMED OUT']} timed out, of {len(every)} mutants in all")
    if judged:
        low, high = wilson_interval(count["killed"], judged)
        print(f"score {count['killed'] / judged:.2f}, 95 % interval [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
