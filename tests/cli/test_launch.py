"""Several processes run one command: the first failure ends them all, and only rank 0 is heard."""

from __future__ import annotations

import sys

import pytest

from kvfloor.cli.launch import launch
from tests.cli.running import kvfloor

SLEEP = "import os, sys, time; rank = os.environ['RANK']; "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", SLEEP + code]


def test_only_rank_0_is_heard_and_every_rank_knows_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    told = "print(rank, os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'].isdigit())"
    assert launch(3, python(told)) == 0
    assert capfd.readouterr().out == "0 0 3 True\n"


@pytest.mark.parametrize("failing", ["0", "1"])
def test_the_first_failure_ends_all(failing: str) -> None:
    assert launch(2, python(f"sys.exit(3) if rank == '{failing}' else time.sleep(600)")) == 3


def test_a_rank_that_a_signal_ends_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, python("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(600)")) == 2
    assert capfd.readouterr().err == "kvfloor: rank 1 was ended by SIGKILL: is there memory for its part?\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tp", "1"], "--tp 1: give at least 2 processes"),
        (["--tp", "two"], "--tp 'two': give a number of processes, such as 2, or auto"),
        (["--tp", "2", "--device-map", "auto"], "--tp divides every layer, --device-map puts each on one device"),
        (["--tp", "2", "--engine", "ray"], "--engine ray has the whole model in each worker"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_starts(arguments: list[str], told: str) -> None:
    run = kvfloor("audit", *arguments)
    assert run.returncode == 2
    assert told in run.stderr


def test_the_number_of_processes_that_torchrun_started_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "torchrun has started 3 processes" in kvfloor("audit", "--tp", "2").stderr
    assert "torchrun has started 3 processes" in kvfloor("audit").stderr
