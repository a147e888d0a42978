"""Run the tests of the timed code before a benchmark prints figures."""

from __future__ import annotations

import sys
from pathlib import Path

from kvfloor.bench.gate import Red, require_green

ROOT = Path(__file__).resolve().parent.parent


def green(*tests: str) -> bool:
    """Return True if these test folders or files pass without their slow tests; otherwise say so on stderr."""
    try:
        require_green(tests, (), ROOT)
    except Red as red:
        print(red, file=sys.stderr)
        return False
    return True
