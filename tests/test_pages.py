"""Pages name only commands, options, targets, files and pages that exist. What examples print is in test_docs.py."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kvfloor.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = {"cli.md"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in DOCS.rglob("*.md") if p.name not in GENERATED),
]
HISTORY = {"log.md"}  # says what was run then, under the names of then
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def without_outputs(text: str) -> str:
    return re.sub(r"\\\n\s*", " ", text)  # a command that goes on in the next line


def lines_of_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each line of a fence that calls kvfloor."""
    for fence in re.findall(r"^```[^\n]*\n(.*?)^```", without_outputs(text), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^(?:\$ )?(?:\S*/)?kvfloor +(.*)$", fence, re.MULTILINE):
            yield shlex.split(line, comments=True)


def inline_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each `kvfloor ...` within a sentence, where arguments may be left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for words in re.findall(r"`kvfloor +([^`]*)`", prose):
        yield " ".join(words.replace("\\|", "|").split()).split(" ")


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that the words name and its own words."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("kvfloor", [], resilient_parsing=True)
    _, command, rest = group.resolve_command(context, list(words))
    return command, rest


def complaint(words: list[str]) -> str:
    """Return what the command line says against the words, or nothing; nothing is run."""
    if words[0].startswith("--"):
        return "" if words[0] in ("--version", "--help") else f"no such option {words[0]}"
    try:
        command, rest = command_of(words)
        command.make_context(words[0], rest)
    except Exception as error:
        return f"{' '.join(words)}: {getattr(error, 'message', error)}"
    return ""


def unknown_options(words: list[str]) -> list[str]:
    """Return the options among the words that the command does not have."""
    if words[0].startswith("--"):
        return [one for one in words if one not in ("--version", "--help")]
    try:
        command, rest = command_of(words)
    except Exception as error:
        return [f"{words[0]}: {getattr(error, 'message', error)}"]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_is_understood(name: str) -> None:
    text = text_of(name)
    assert [said for words in lines_of_commands(text) if (said := complaint(words))] == []
    assert [option for words in inline_commands(text) for option in unknown_options(words)] == []


def test_wrong_command_lines_are_noticed() -> None:
    fence = "```\nkvfloor audit --budget 64\n$ kvfloor floors --n 4\nkvfloor fly\n```\n"
    page = f"Try `kvfloor break window@8 --wall`.\n{fence}"
    said = [complaint(words) for words in lines_of_commands(page)]
    assert len(said) == 3 and all(said)
    assert [unknown_options(words) for words in inline_commands(page)] == [["--wall"]]


def test_the_pages_have_command_lines() -> None:
    assert sum(len(list(lines_of_commands(text_of(name)))) for name in NAMES) >= 20


@pytest.mark.parametrize("name", [name for name in NAMES if Path(name).name not in HISTORY])
def test_every_make_target_exists(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    fences = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL))
    named = re.findall(r"`make ([\w-]+)", text_of(name)) + re.findall(r"^make ([\w-]+)", fences, re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("name", [name for name in NAMES if Path(name).name not in HISTORY])
def test_every_link_leads_to_a_file(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"`[^`]*`", "", text_of(name)))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_page_is_in_the_sites_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)) == pages


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ('<img alt="x" src=//example/x.png>', ["//example/x.png"]),
        ('<link rel="stylesheet" href="https://fonts.example/css">', ["https://fonts.example/css"]),
        ("a { background: url('http://example/x.png') }", ["http://example/x.png"]),
        ('<a href="https://example/page">read</a> <script src="local.js"></script>', []),
        ('<link rel="canonical" href="https://example/">', []),
    ],
)
def test_what_a_page_loads_from_the_network_is_found(page: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    run = subprocess.run([sys.executable, DOCS / "offline.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == bool(found)
    assert [line.rpartition(" ")[2] for line in run.stderr.splitlines()] == found
