"""`python -m characterize` lists every script with its subject, and runs those that are named."""

import subprocess
import sys
from pathlib import Path

import pytest

from characterize import __main__ as evidence

ROOT = Path(evidence.__file__).parents[1]


def test_every_script_is_listed_with_its_subject(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["characterize"])
    assert evidence.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == evidence.NAMES
    assert {path.stem for path in (ROOT / "characterize").glob("*.tsv")} - {"certified_heads"} <= set(evidence.NAMES)
    assert all(len(line.split()) > 5 for line in lines)


def test_an_unknown_name_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["characterize", "race_looks", "no_such"])
    monkeypatch.setattr(subprocess, "run", lambda *a, **b: pytest.fail("it ran"))
    assert evidence.main() == 2
    assert "no_such" in capsys.readouterr().err


def test_scripts_run_in_turn_and_failures_are_named(monkeypatch, capsys):
    ran = []

    def run(command, **given):
        ran.append(command[-1])
        assert given["cwd"] == ROOT
        return subprocess.CompletedProcess(command, returncode=1 if "window_law" in command[-1] else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["characterize", "race_looks", "window_law"])
    assert evidence.main() == 1
    assert ran == ["characterize.race_looks", "characterize.window_law"]
    assert capsys.readouterr().out.splitlines()[-1] == "failed: window_law"
    monkeypatch.setattr(sys, "argv", ["characterize", "all"])
    evidence.main()
    assert ran[2:] == [f"characterize.{name}" for name in evidence.NAMES]
