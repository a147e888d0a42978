"""Time what a user waits for before any attention: the import, the command line's help, the install, the audit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvfloor.bench.gate import checkout
from kvfloor.bench.records import BenchRow
from kvfloor.bench.request import BenchRequest, Found
from kvfloor.bench.targets import judged
from kvfloor.bench.timing import Timed, Witness, interleaved

TORCH, OURS, HELP = "import torch", "import kvfloor and parse a method, after torch", "kvfloor --help"
AUDIT, INSTALL = "kvfloor audit", "pip install (kvfloor alone, built from the checkout)"
_IMPORTS = """
from time import perf_counter as now
begun = now()
import torch
between = now()
import kvfloor
kvfloor.parse("h2o@64")  # names of kvfloor are loaded at their first use
print(between - begun, now() - between)
"""
LACKS_SOURCE = "install: needs a checkout, and pip and setuptools in this environment"
QUICK_AUDIT = "audit: left out of a quick run; a full one takes the default audit's minutes"


def startup(request: BenchRequest) -> Iterator[Found]:
    """Yield the rows of the import beyond torch's, of the help, of the install, and of the default audit."""
    module = [sys.executable, "-m", "kvfloor"]
    spent: dict[str, list[float]] = {TORCH: [], OURS: []}

    def imports() -> None:
        for name, seconds in zip(spent, _run([sys.executable, "-c", _IMPORTS]).split(), strict=True):
            spent[name].append(float(seconds) * 1e3)

    runs: dict[str, Callable[[], object]] = {"": imports, HELP: lambda: _run([*module, "--help"])}
    timed = interleaved(runs, min(request.turns, 12), request.seconds)
    first = Timed({name: tuple(ms[1:]) for name, ms in spent.items()}, timed.threads, timed.share)
    yield BenchRow.timed(first, TORCH, **_fields())
    yield judged(BenchRow.timed(first, OURS, **_fields()), "import")
    yield judged(BenchRow.timed(timed, HELP, **_fields()), "help")
    yield from _install()
    if request.quick:
        yield QUICK_AUDIT
        return
    with tempfile.TemporaryDirectory() as folder:
        yield judged(_once(AUDIT, [*module, "audit", "--out", str(Path(folder) / "audit"), "--json"]), "audit")


def _fields() -> dict[str, Any]:
    return {"part": "start", "model": "builtin", "context": 0, "dtype": "float32"}


def _run(line: list[str]) -> str:
    """Run a command and return what it prints. Raises ValueError with its last words if it fails."""
    run = subprocess.run(line, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{' '.join(line)} failed with exit code {run.returncode}: {run.stderr.strip()[-300:]}")
    return run.stdout


def _once(name: str, line: list[str]) -> BenchRow:
    """Return the row of one call of a command, without an interval."""
    witness = Witness()
    witness.look()
    begin = time.perf_counter()
    _run(line)
    ms = (time.perf_counter() - begin) * 1e3
    witness.look()
    found = Timed({name: (ms,)}, 1, witness.share)
    return BenchRow(name=name, threads=found.threads, turns=1, ms=ms, crowded=found.crowded, **_fields())


def _install() -> Iterator[Found]:
    """Yield the row of building and installing kvfloor from a copy of its checkout, without the network.

    A build leaves files beside the sources, so it gets sources of its own.
    """
    root = checkout()
    if root is None or find_spec("pip") is None or find_spec("setuptools") is None:
        yield LACKS_SOURCE
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / name, copy)
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        line += ["--no-build-isolation", "--no-cache-dir", "--target", str(Path(folder) / "installed"), str(copy)]
        try:
            yield _once(INSTALL, line)
        except ValueError as error:
            yield f"install: {error}"
