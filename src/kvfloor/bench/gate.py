"""Run the tests of the timed code, or the shipped conformance checks, before a benchmark gives figures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import kvfloor
from kvfloor.bench.machine import cores

BRIEF = (
    "tests/core/test_attend.py",
    "tests/core/test_attend_few.py",
    "tests/core/test_log_masses.py",
    "tests/core/test_one_token.py",
    "tests/hf/test_exact.py",
    "tests/hf/test_compressed.py",
    "tests/methods/test_heavy_hitters.py",
)
"""Files of tests that a quick run asks for."""


class Red(Exception):
    """Say that a test or a law of the timed code fails, so that no figure may be given."""


def checkout() -> Path | None:
    """Return the folder of the checkout that kvfloor is imported from, if it has tests and pytest; else None."""
    root = Path(kvfloor.__file__).resolve().parents[2]
    there = (root / "tests/core").is_dir() and (root / "pyproject.toml").is_file()
    return root if there and find_spec("pytest") is not None else None


def require_green(tests: Sequence[str], methods: Sequence[str], root: Path | None) -> str:
    """Run the tests in a checkout, or without one the laws of the methods; return a line that says what passed.

    tests    folders and files below the checkout's folder; their slow tests are left out
    methods  texts of the timed methods, each checked as `kvfloor check` does
    root     the checkout's folder; None for an installed package without its tests
    Raises Red with one line if a test or a law fails.
    """
    if root is None:
        return _laws(methods)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    if find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(cores(), 8)), "--dist", "loadfile"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = f"pytest -x -m 'not slow' {' '.join(tests)}"
    if run.returncode:
        lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise Red(f"the tests of what is timed are red: no figures ({said}: {'; '.join(lines) or run.stderr[-300:]})")
    return said


def _laws(methods: Sequence[str]) -> str:
    """Check the laws of the methods, and return a line that says so. Raises Red at the first method that breaks one."""
    from kvfloor.check import run_checks
    from kvfloor.methods.grammar import parse

    for text in methods:
        broken = run_checks(parse(text)).failed
        if broken:
            raise Red(f"{text} breaks its law {broken[0]['check']}: no figures (kvfloor check {text!r})")
    return f"kvfloor check of {', '.join(methods)}"
