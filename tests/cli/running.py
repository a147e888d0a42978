"""Run the command line in this process, with the exit code and the text that scripts see."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kvfloor import cli


@dataclass(frozen=True)
class Run:
    returncode: int
    stdout: str
    stderr: str


def kvfloor(*arguments: str, cwd: Path | None = None) -> Run:
    """Run the command in this process, from folder `cwd`."""
    out, err = io.StringIO(), io.StringIO()
    before, here, path = sys.argv, Path.cwd(), list(sys.path)
    try:
        os.chdir(cwd or here)
        sys.argv = ["kvfloor", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        sys.argv, sys.path[:] = before, path
        os.chdir(here)
    return Run(code, out.getvalue(), err.getvalue())
