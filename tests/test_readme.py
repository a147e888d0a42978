"""The README is short, and its example prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_example_and_its_output() -> None:
    text = README.read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert text[: text.index(output)].count("\n") < 40
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 140 or line.startswith("|") for line in lines)
