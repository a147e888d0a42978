"""Docstrings of the package and of the rooms beside it begin with a verb; no two classes have one name."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import kvfloor

SOURCE = Path(kvfloor.__file__).parent
ROOT = SOURCE.parents[1]
ROOMS = (SOURCE, *(ROOT / room for room in ("survey", "characterize", "builtin_model", "bench", "examples")))
REFUSED = {"What", "How", "Whether", "Which", "Where", "Those", "That", "As", "The", "A", "An", "One"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def offenders(tree: ast.AST) -> list[str]:
    """List "line: docstring's first line" of every docstring that begins with a refused word."""
    found = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and text.split()[0].strip("`*,.:;") in REFUSED:
            found.append(f"{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    return found


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_a_refused_word_is_found_in_every_kind_of_docstring(word: str) -> None:
    said = f'"""{word} it is."""'
    text = f"{said}\nclass C:\n    {said}\n    def f(self):\n        {said}\n"
    assert len(offenders(ast.parse(text))) == 3
    assert offenders(ast.parse(f'"""Answer {word.lower()} question."""\ndef f(): return "{word} text"')) == []


def test_every_docstring_begins_with_what_is_done() -> None:
    found = [f"{path.relative_to(ROOT)}:{text}" for path in _files() for text in offenders(_tree(path))]
    assert not found, f"{len(found)} docstrings begin with a word of {sorted(REFUSED)}:\n" + "\n".join(sorted(found))


def repeated(trees: list[ast.AST]) -> list[str]:
    """List the names that more than one class of these files bears."""
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in names.items() if count > 1)


def test_a_repeated_class_name_is_found_within_and_across_files() -> None:
    one, other = ast.parse("class A: pass"), ast.parse("def f():\n    class A: pass\nclass B: pass")
    assert repeated([one]) == repeated([other]) == [] and repeated([one, other]) == ["A"]


def test_no_two_classes_bear_one_name() -> None:
    assert repeated([_tree(path) for path in _files()]) == []


def test_every_room_has_files() -> None:
    assert all(any(path.is_relative_to(room) for path in _files()) for room in ROOMS)


def _files() -> list[Path]:
    return [path for room in ROOMS for path in sorted(room.rglob("*.py"))]


def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text())
