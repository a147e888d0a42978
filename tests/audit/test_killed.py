"""An audit killed by the system, at random moments, ends with the rows of one that ran through."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest

from kvfloor.audit.run import run
from tests.audit.replaying import small, without_times

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.audit.test_killed", "kvfloor.audit.engine", "kvfloor.audit.worker"])


def audit(out: Path) -> None:
    run(small(out, texts=("mixture-0",), continuation=512), lambda total, text: None)


def killed(out: Path, seconds: float) -> bool:
    """Start the audit, kill it after so many seconds, and return True if it was killed before its end."""
    process = CONTEXT.Process(target=audit, args=(out,))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_rows_are_the_same_after_kills(tmp_path: Path, kills: int) -> None:
    audit(tmp_path / "whole")
    whole = without_times(tmp_path / "whole")
    rng, count, audits = random.Random(kills), 0, 0
    rows: set[int] = set()  # on the disk when the audit was killed
    while count < kills:
        out, longest = tmp_path / str(audits), 2.0
        audits += 1
        while killed(out, rng.uniform(0.2, longest)):
            count += 1
            rows.add(sum(path.read_bytes().count(b"\n") for path in out.glob("*s.jsonl")))
            longest *= 1.2  # on a slow machine, a start may need longer until its first row
        assert without_times(out) == whole
    assert len(rows) > kills // 20
