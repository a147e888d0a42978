"""Follow the pages "Adding a ...": write their files, apply their changes to a copy, run their commands."""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs").glob("adding-a-*.md"))
# Tests of the repository that a new entry of a table could break, run on the copy once the page was followed.
TABLE_TESTS = ["tests/methods/test_registry.py", "tests/test_docs.py", "tests/check/test_conformance.py", "-k"]
AFTERWARDS = {
    "adding-a-policy.md": [*TABLE_TESTS, "test_registry or every_part or examples.md or every_second"],
    "adding-a-sketch.md": [*TABLE_TESTS, "test_registry or every_part or examples.md or running_mean"],
    "adding-a-task.md": ["tests/tasks", "tests/audit/test_plan.py"],
    "adding-a-barrier.md": ["tests/game/test_game.py", "tests/report/test_barriers_page.py"],
}
SHORT = {"adding-a-policy.md", "adding-a-task.md"}
"""Pages whose commands are run by the quick test."""
BLOCK = re.compile(r'^```(python|diff|console)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Guide:
    """A page that is followed in `folder`, where the package, its tests and its docs were copied.

    commands: True if the page's commands are run; False: its files are written and its changes applied, no more.
    """

    text: str
    folder: Path
    commands: bool = True

    def follow(self) -> None:
        """Do what the page says, from its first block to its last."""
        moved = False
        for kind, title, body in BLOCK.findall(self.text):
            if kind == "python":
                (self.folder / title).write_text(body, encoding="utf-8")
            elif kind == "diff":
                if not moved:
                    self.move()
                    moved = True
                self.apply(title, body)
            elif self.commands:
                self.run(body)

    def move(self) -> None:
        """Move the first file to where the page's sentence "Move the ... to `PATH`" says, if there is one."""
        target = re.search(r"Move the \w+ to `([^`]+)`", self.text)
        if target is not None:
            first = next(title for kind, title, _ in BLOCK.findall(self.text) if kind == "python")
            (self.folder / first).rename(self.folder / target[1])

    def apply(self, title: str, body: str) -> None:
        """Apply a diff whose hunks are parted by empty lines; each hunk's old lines stand there exactly once."""
        path = self.folder / title
        text = "\n" + path.read_text(encoding="utf-8")
        for hunk in body.rstrip("\n").split("\n\n"):
            lines = hunk.split("\n")
            old, new = ("".join(f"{x[1:]}\n" for x in lines if x[0] in f" {sign}") for sign in "-+")
            assert text.count(f"\n{old}") == 1, f"{title}: these lines should stand there once:\n{old}"
            text = text.replace(f"\n{old}", f"\n{new}")
        path.write_text(text[1:], encoding="utf-8")

    def run(self, body: str) -> None:
        """Run the lines after "$ ", and compare what each prints with the lines below it."""
        for command, wanted in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.MULTILINE):
            printed = self.call(shlex.split(command))
            assert doctest.OutputChecker().check_output(wanted, printed, FLAGS), f"{command}\n{printed}"

    def call(self, words: list[str]) -> str:
        """Return what a `kvfloor` or `python` command prints; it must succeed."""
        start = {"kvfloor": ["-c", "from kvfloor.cli import main; main()"], "python": []}[words[0]]
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, *start, *words[1:]], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def guide(request: pytest.FixtureRequest, tmp_path: Path) -> Guide:
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return Guide((ROOT / "docs" / request.param).read_text(encoding="utf-8"), tmp_path)


@pytest.mark.parametrize("guide", PAGES, indirect=True, ids=PAGES)
def test_a_guides_changes_fit_and_its_commands_print_what_it_says(guide: Guide, request: pytest.FixtureRequest) -> None:
    """The commands of two guides take a minute; the slow test runs them too."""
    followed = replace(guide, commands=request.node.callspec.id in SHORT)
    followed.follow()
    assert all(ast.parse(path.read_text(encoding="utf-8")) for path in guide.folder.glob("src/**/*.py"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guide", PAGES, indirect=True, ids=PAGES)
def test_the_repositorys_tests_hold_after_a_guide(guide: Guide, request: pytest.FixtureRequest) -> None:
    guide.follow()
    guide.call(["python", "-m", "pytest", "-q", "-m", "not slow", *AFTERWARDS[request.node.callspec.id]])


SMALL = """
```python title="one.py"
number = 1
print(number)
```
```console
$ python one.py
1
```
```diff title="one.py"
 number = 1
+number += 1
```
```console
$ python one.py
2
```
"""


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("", ""),
        ("\n2\n", "\n3\n"),  # another output
        (" number = 1\n+", " number = 2\n+"),  # a change of lines that are not there
        ("number += 1", "raise ValueError"),  # a command that fails
        ("$ python one.py\n1", "$ python two.py\n1"),
    ],
)
def test_a_wrong_guide_is_noticed(line: str, instead: str, tmp_path: Path) -> None:
    assert line in SMALL
    right = line == instead
    with nullcontext() if right else pytest.raises(AssertionError):
        Guide(SMALL if right else SMALL.replace(line, instead), tmp_path).follow()
