"""Docstrings of the package begin with what is done, a verb and its object."""

from __future__ import annotations

import ast
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


def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text())
