"""Docstrings of the package begin with what is done, a verb and its object; a class's name is its alone."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import kvfloor

SOURCE = Path(kvfloor.__file__).parent
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
    found = [f"{path.relative_to(SOURCE)}:{text}" for path in SOURCE.rglob("*.py") for text in offenders(_tree(path))]
    assert not found, f"{len(found)} docstrings begin with a word of {sorted(REFUSED)}:\n" + "\n".join(sorted(found))


def repeated(trees: list[ast.AST]) -> list[str]:
    """List the names that more than one class of these files bears."""
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in names.items() if count > 1)


def test_a_repeated_class_name_is_found_within_and_across_files() -> None:
    one, other = ast.parse("class A: pass"), ast.parse("def f():\n    class A: pass\nclass B: pass")
    assert repeated([one]) == repeated([other]) == [] and repeated([one, other]) == ["A"]


def test_no_two_classes_bear_one_name() -> None:
    rooms = [SOURCE, *(SOURCE.parents[1] / room for room in ("survey", "characterize", "builtin_model", "bench"))]
    assert repeated([_tree(path) for room in rooms for path in sorted(room.rglob("*.py"))]) == []


def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text())
