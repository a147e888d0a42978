"""Turn docstrings into Markdown: put aligned columns into a fenced block that keeps their alignment."""

from __future__ import annotations

import inspect
import re


def fenced(text: str) -> list[str]:
    """Return the lines of a docstring, with aligned columns inside a code fence."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        rows = paragraph.splitlines()
        aligned = [bool(re.search(r"\S {2,}\S", row)) or row.startswith("  ") for row in rows]
        if any(aligned):
            first, last = aligned.index(True), len(aligned) - 1 - aligned[::-1].index(True)
            before, after = rows[:first], rows[last + 1 :]
            lines += [*before, *([""] if before else []), "```text", *rows[first : last + 1], "```", ""]
            lines += [*after, *([""] if after else [])]
        else:
            lines += [*rows, ""]
    return lines
