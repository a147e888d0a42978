"""What every benchmark asks first: do the tests of what it times pass?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def green(*tests: str) -> bool:
    """Whether these test folders or files pass, slow ones left out; if not, stderr says that there are no figures."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *tests], cwd=ROOT)
    if run.returncode:
        print("the tests of what is timed are red: no figures", file=sys.stderr)
    return run.returncode == 0
