"""Run a benchmark: the gate, then the parts in order, every row shown and kept as it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvfloor.bench.append import append
from kvfloor.bench.decode_read import read
from kvfloor.bench.gate import BRIEF, checkout, require_green
from kvfloor.bench.kvpress_beside import beside_kvpress
from kvfloor.bench.machine import machine, machine_line
from kvfloor.bench.one_token import OURS, token
from kvfloor.bench.prompt import prompt
from kvfloor.bench.records import BenchDocument, BenchRow
from kvfloor.bench.request import BenchRequest, Part, threads
from kvfloor.bench.show import heading, shown
from kvfloor.bench.startup import startup

RUNS: dict[str, Part] = {
    "read": read,
    "token": token,
    "prefill": prompt,
    "append": append,
    "start": startup,
    "kvpress": beside_kvpress,
}
"""Map each part's name, as in PARTS, to the function that measures it."""

TESTS: dict[str, tuple[str, ...]] = {
    "read": ("tests/core/test_attend.py", "tests/core/test_partial.py"),
    "token": ("tests/core/test_one_token.py", "tests/hf/test_exact.py", "tests/hf/test_compressed.py")
    + ("tests/hf/test_generate.py", "tests/methods/stores"),
    "prefill": ("tests/core/test_bounded.py", "tests/core/test_slots.py"),
    "append": ("tests/methods/test_heavy_hitters.py", "tests/methods/test_key_policies.py")
    + ("tests/methods/test_clusters.py", "tests/methods/test_subgen.py", "tests/methods/test_value_sum.py"),
    "start": ("tests/cli/test_cli.py",),
    "kvpress": ("tests/hf/test_compressed.py", "tests/methods/test_heavy_hitters.py")
    + ("tests/methods/test_key_policies.py",),
}
"""Map each part to the tests of what it times; all run before the first part."""


def plan(request: BenchRequest, root: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tests that must pass in a checkout, and the methods whose laws must hold without one."""
    names = request.names()
    chosen = BRIEF if request.quick else tuple(dict.fromkeys(test for name in names for test in TESTS[name]))
    methods = ("exact",) if request.quick else ("exact", *(text.replace("@512", "@64") for text in OURS[1:]))
    return (chosen if root is None else tuple(test for test in chosen if (root / test).exists())), methods


def run(request: BenchRequest, say: Callable[[str], None]) -> BenchDocument:
    """Measure all parts of a request and return the document; every row is passed to `say` as text when it is there.

    With `request.path` the document is written there after every part, and marked incomplete until the last. After a
    KeyboardInterrupt the rows so far are written before it goes on. Raises ValueError for impossible wishes before
    anything runs, and Red, with no figure given, if a test of the timed code fails.
    """
    request.check()
    root = checkout()
    tests, methods = plan(request, root)
    say("running the tests of what is timed" if root is not None else "checking the laws of what is timed")
    gate = require_green(tests, methods, root)
    with threads(request.threads or machine()["threads"]):
        document = BenchDocument(request.command, request.quick, gate, request.names(), machine())
        say(machine_line(dict(document.machine)))
        say(f"passed before anything was timed: {gate}")
        try:
            for name in request.names():
                say("")
                say(heading(name))
                _measure(RUNS[name], request, document, say)
                _write(request, document)
            document.complete = True
        except KeyboardInterrupt:
            where = "" if request.path is None else f" in {str(request.path)!r}, marked incomplete"
            say(f"stopped; {len(document.rows)} rows{where}")
            raise
        finally:
            _write(request, document)
    return document


def _measure(part: Part, request: BenchRequest, document: BenchDocument, say: Callable[[str], None]) -> None:
    for found in part(request):
        if isinstance(found, BenchRow):
            document.rows.append(found)
        elif isinstance(found, str):
            if found in document.skipped:
                continue
            document.skipped.append(found)
        else:
            document.profiles.append(found)
        say(shown(found))


def _write(request: BenchRequest, document: BenchDocument) -> None:
    if request.path is not None:
        document.write(request.path)
