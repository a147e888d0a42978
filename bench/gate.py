"""Run the tests of the timed code before a benchmark prints figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def green(*tests: str) -> bool:
    """Return True if these test folders or files pass without their slow tests; otherwise say so on stderr."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *tests], cwd=ROOT)
    if run.returncode:
        print("the tests of what is timed are red: no figures", file=sys.stderr)
    return run.returncode == 0
