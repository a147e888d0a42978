"""An audit of a sharded model has the rows of the whole model, and an error on one rank ends all ranks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ASKED = (
    "--texts",
    "mixture-0",
    "--continuation",
    "512",
    "--contexts",
    "512",
    "--tasks",
    "recall",
    "--n",
    "32",
    "--facts",
    "0",
)
FAULTY = """
import os
from dataclasses import dataclass
from kvfloor.methods.policies.window import Window

@dataclass(frozen=True)
class Faulty(Window):
    name = "faulty"
    def open(self, *arguments, **named):
        if os.environ.get("RANK") == "1":
            raise KeyError("no such thing")
        return super().open(*arguments, **named)
"""


def audit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfloor", "audit", *ASKED, *arguments, "--out", str(folder / "out")],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]


def test_rows_are_those_of_the_whole_model(tmp_path: Path) -> None:
    for name, more in (("whole", ()), ("sharded", ("--tp", "2"))):
        (tmp_path / name).mkdir()
        run = audit(tmp_path / name, "--methods", "random,h2o", "--budgets", "64,512KiB", *more)
        assert run.returncode == 0, run.stderr
    assert run.stdout.count("report: ") == 1  # the other rank prints nothing
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for ours, theirs in zip(records(sharded, "nats.jsonl"), records(whole, "nats.jsonl"), strict=True):
        assert statistics.fmean(ours["kl"]) == pytest.approx(statistics.fmean(theirs["kl"]), abs=3e-6)
        assert 0 <= ours["state_bytes"] - theirs["state_bytes"] <= 1000  # each rank's own counters, 4 layers
        same = ("method", "budget_tokens", "floor_bytes", "context", "text")
        assert [ours[field] for field in same] == [theirs[field] for field in same]
    for ours, theirs in zip(records(sharded, "rows.jsonl"), records(whole, "rows.jsonl"), strict=True):
        same = ("method", "outcomes", "budget_tokens", "floor_bytes")
        assert [ours[field] for field in same] == [theirs[field] for field in same]
        for mine, other in zip(ours["output_error_by_head"], theirs["output_error_by_head"], strict=True):
            assert mine == pytest.approx(other, abs=1e-3)
    for name in ("floors.jsonl", "text_floors.jsonl"):
        assert records(sharded, name) == records(whole, name)


def test_an_error_on_one_rank_ends_the_audit_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY, encoding="utf-8")
    run = audit(tmp_path, "--tp", "2", "--methods", "faulty:Faulty", "--budgets", "64")
    assert run.returncode == 2
    assert run.stderr.count("kvfloor: ") == 1
    assert "kvfloor: rank 1: KeyError: 'no such thing'" in run.stderr


def test_kv_heads_that_ranks_cannot_share_are_refused_once(tmp_path: Path) -> None:
    run = audit(tmp_path, "--tp", "3", "--methods", "window", "--budgets", "64")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "2 kv heads, which 3 ranks cannot share evenly" in run.stderr
