"""Every option of every command under hostile values; the options themselves follow from the tables."""

from __future__ import annotations

import os
import time
import typing
from pathlib import Path

import pytest
import typer

from kvfloor import cli, models
from kvfloor.audit.protocols import PROTOCOLS, Protocol
from kvfloor.cli import commands
from kvfloor.cli.break_options import with_options
from kvfloor.cli.options import real, whole
from kvfloor.floors import ATTENTIONS, METRICS
from kvfloor.game import ARGUMENTS, BARRIERS
from tests.cli.running import kvfloor

HUGE = "1" + 309 * "0"
NEVER = [
    HUGE,
    f"-{HUGE}",
    "nan",
    "inf",
    "-inf",
    "1e309",
    "",
    " ",
    "9" * 100_000,
    "x" * 100_000,
    "٣",
    "²",
    "1_0",
    "0x10",
    "5 5",
]
"""No number that any option takes; below those that only some take."""
SOMETIMES = ["0", "-1", "0.5", "1e5", "9223372036854775808", "-0"]
FOR_PYTHON_ALONE = {"hidden_seed", "isolated", "sides"}

# What a command needs besides, and what stops it before any work once its options are read.
BASES = {
    "audit": ({"--model": "/nowhere"}, "no model at"),
    "merge": ({"/nowhere": None, "--out": "out"}, "holds no audit"),
    "floors": ({"--n": "8", "--d": "4"}, "the worst case"),
    "break": ({"nonsense@8": None}, "nonsense"),
    "plan": ({"--context": "8", "--model": "/nowhere"}, "no model at"),
}
FITTING = {  # what an option needs beside it
    ("audit", "--workers"): {"--engine": "ray"},
    ("floors", "--epsilon"): {"--metric": "max"},
    ("floors", "--caches"): {"--attention": "tensor"},
    ("floors", "--ratio"): {"--attention": "visual"},
    ("break", "--codebook"): {"--n": "8", "--d": "4"},
    ("break", "--radius"): {"--barrier": "packing"},
    ("break", "--window"): {"--barrier": "window"},
    ("break", "--caches"): {"--barrier": "tensor"},
    ("break", "--runs"): {"--barrier": "probing"},
}


def options(command: str) -> dict[str, str]:
    """Long name -> metavar of a command's options."""
    if command == "break":
        alone = typer.Typer(add_completion=False)
        alone.command()(with_options(commands._play))
        found: typing.Any = typer.main.get_command(alone)
    else:
        found = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    return {p.opts[0]: p.metavar or "" for p in found.params if p.opts[0].startswith("--")}


NUMERIC = [(name, option) for name in BASES for option, kind in options(name).items() if kind in ("<int>", "<float>")]


def called(command: str, option: str, value: str, tmp_path: Path) -> tuple[int, str, str]:
    base, _ = BASES[command]
    given = base | FITTING.get((command, option), {}) | {option: value}
    words = [word for pair in given.items() for word in pair if word is not None]
    run = kvfloor(command, *words, cwd=tmp_path)
    return run.returncode, run.stdout, run.stderr


def one_line(code: int, out: str, err: str) -> None:
    assert code == 2 and out == ""
    assert err.startswith("kvfloor: ") and err.count("\n") == 1 and len(err) < 2100
    assert "Traceback" not in err and err.isprintable() is False and err[:-1].isprintable()


def test_the_numeric_options_are_found() -> None:
    assert len(NUMERIC) > 20 and {("audit", "--n"), ("floors", "--heads"), ("break", "--runs")} <= set(NUMERIC)


@pytest.mark.parametrize(("command", "option"), NUMERIC)
def test_no_hostile_number_gets_by(command: str, option: str, tmp_path: Path) -> None:
    for value in NEVER:
        code, out, err = called(command, option, value, tmp_path)
        one_line(code, out, err)
        assert f"'{option}'" in err and "give a " in err and repr(value[:40]) in err, (value[:40], err)


@pytest.mark.parametrize(("command", "option"), NUMERIC)
def test_a_number_is_taken_or_refused_by_name(command: str, option: str, tmp_path: Path) -> None:
    refused = 0
    for value in SOMETIMES:
        code, out, err = called(command, option, value, tmp_path)
        taken = BASES[command][1] in (err if code else out)
        if not taken:
            one_line(code, out, err)
            assert option.removeprefix("--") in err, err
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("+7", 7), ("007", 7), ("9223372036854775807", 2**63 - 1)])
def test_whole_numbers_in_plain_digits(text: str, number: int) -> None:
    assert whole()["parser"](text) == number


@pytest.mark.parametrize("text", ["-1", "9223372036854775808", "1.0", "", "１", "1\n"])
def test_other_whole_numbers_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="whole number from 0 to"):
        whole()["parser"](text)
    with pytest.raises(typer.BadParameter, match="from 3 to 5"):
        whole(3, 5)["parser"]("6")


@pytest.mark.parametrize(("text", "number"), [("0.5", 0.5), (".5", 0.5), ("-1e-3", -0.001), ("2.", 2.0), ("3", 3.0)])
def test_decimal_numbers(text: str, number: float) -> None:
    assert real()["parser"](text) == number


def test_every_argument_of_a_barrier_is_an_option_or_for_python_alone() -> None:
    taken = {name for barrier in BARRIERS.values() for name in barrier.arguments}
    assert taken == set(ARGUMENTS) | FOR_PYTHON_ALONE
    assert {f"--{name}" for name in ARGUMENTS} <= set(options("break"))


def test_help_lists_what_the_tables_have() -> None:
    said = " ".join(kvfloor("break", "--help").stdout.split())
    assert f"{', '.join(BARRIERS)}, or all." in said
    assert "1024 unless given" in said and "64 (packing: 8) unless given" in said
    said = " ".join(kvfloor("floors", "--help").stdout.split())
    assert ", ".join(ATTENTIONS) in said and ", ".join(METRICS[1:]) in said
    assert set(typing.get_args(Protocol)) == set(PROTOCOLS)
    assert all(
        f"{name}: {words}" in " ".join(kvfloor("audit", "--help").stdout.split()) for name, words in PROTOCOLS.items()
    )


def test_a_new_barrier_and_its_argument_reach_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(method: str, *, n: int = 7, depth: int | None = None) -> None:
        """Nothing."""

    monkeypatch.setitem(BARRIERS, "twice", type(BARRIERS["spike"])(play, "twice", 8))  # type: ignore[arg-type]
    monkeypatch.setitem(ARGUMENTS, "depth", "How deep")
    said = " ".join(kvfloor("break", "--help").stdout.split())
    assert "visual, twice, or all" in said and "1024 (twice: 7) unless given" in said
    assert "--depth <int> twice: how deep." in said


HOSTILE_LISTS = [
    (("--contexts", value), "--contexts") for value in ("0", "-1", "1,x", "٣", "9" * 5000, HUGE, "1048577", "nan")
] + [
    (("--budgets", value), "budget")
    for value in (
        "0",
        "-1",
        "٣",
        "9" * 5000,
        HUGE,
        HUGE + "GiB",
        "1e9",
        "101%",
        "0%",
        "nan%",
        "64MiBs",
        "9" * 400 + "%",
    )
]


@pytest.mark.parametrize(("words", "told"), HOSTILE_LISTS, ids=range(len(HOSTILE_LISTS)))
def test_hostile_lists(words: tuple[str, str], told: str, tmp_path: Path) -> None:
    run = kvfloor("audit", "--model", "/nowhere", *words, cwd=tmp_path)
    one_line(run.returncode, run.stdout, run.stderr)
    assert told in run.stderr


def special(kind: str, path: Path) -> Path:
    """A file that is none that can be read, or not in bounded time and memory."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 64)
    elif kind == "empty":
        path.touch()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 40 * 2**30)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    return path


KINDS = ["fifo", "folder", "garbage", "empty", "sparse", "zero", "loop", "missing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--prompts", "--model", "--out"])
def test_special_files_are_refused_at_once(option: str, kind: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path / "it")
    if option == "--out" and kind in ("folder", "missing"):
        return  # a good folder
    begin = time.monotonic()
    run = kvfloor("audit", option, str(path), cwd=tmp_path)
    one_line(run.returncode, run.stdout, run.stderr)
    assert "it" in run.stderr and time.monotonic() - begin < 20


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_a_model_with_a_special_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models.builtin_path().iterdir():
        if file.is_file() and file.name != name:
            (folder / file.name).symlink_to(file)
    special(kind, folder / name)
    if name == "generation_config.json" and kind in ("folder", "garbage", "empty"):
        return  # transformers goes on without one that it cannot read
    begin = time.monotonic()
    run = kvfloor("audit", "--model", str(folder), cwd=tmp_path)
    one_line(run.returncode, run.stdout, run.stderr)
    assert str(folder) in run.stderr and time.monotonic() - begin < 20


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "mine.jsonl"
    path.write_text("{}")
    monkeypatch.setattr(os, "open", denied)
    run = kvfloor("audit", "--prompts", str(path), cwd=tmp_path)
    one_line(run.returncode, run.stdout, run.stderr)
    assert "Permission denied" in run.stderr and "mine.jsonl" in run.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "' + "9" * 5 + '", "answer": ' + "9" * 9999 + "}", "line 1"),
        ("[" * 100_000, "line 1"),
        (r'{"prompt": "\ud800", "answer": "y"}', "surrogate"),
        ("\x00", "zero bytes"),
    ],
)
def test_hostile_prompts_are_named_by_their_line(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(line)
    run = kvfloor("audit", "--prompts", "mine.jsonl", cwd=tmp_path)
    one_line(run.returncode, run.stdout, run.stderr)
    assert told in run.stderr


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kvfloor("break", "window@8", "--n", str(2**45), "--d", "64")
    one_line(run.returncode, run.stdout, run.stderr)
