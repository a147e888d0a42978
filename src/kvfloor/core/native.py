"""Compile a kernel in C with the system's C compiler, once for each machine and version of its source.

A compiled file has instructions that not all processors have, so its name tells which ones, beside a digest of what it
was made from. Where there is no compiler, no folder that can be written, or anything fails, there is no kernel: what a
kernel computes is defined in torch, which computes it more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

OPTIONS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""Options that all kernels are compiled with, beside those for instructions and for fused operations."""

_SECONDS = 120.0


def compiler() -> list[str]:
    """Return the command of the C compiler: that of the environment's CC, or `cc`."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def instructions() -> tuple[str, ...]:
    """Return the options for the instructions beyond the least that all processors of this kind have."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    return ("-mavx2", "-mfma") if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ()


def if_possible(load: Callable[[], ctypes.CDLL | None]) -> ctypes.CDLL | None:
    """Return the kernel that `load` loads; None where it cannot be had."""
    try:
        return load()
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def compiled(source: Path, name: str, folder: Path, options: Sequence[str]) -> ctypes.CDLL:
    """Return the compiled form of `source` in a folder, which is for this user alone; compile it if it is missing.

    source   the file to compile; the headers in its folder belong to it
    name     how the compiled file's name begins
    options  options of the compiler, those for instructions included
    Raises OSError or SubprocessError where that fails, and PermissionError if others can write to the folder or file.
    """
    given = (*compiler(), *options, sys.platform, platform.machine())
    sources = (file.read_text() for file in sorted({source, *source.parent.glob("*.h")}))
    digest = hashlib.sha256("\0".join((*given, *sources)).encode()).hexdigest()[:24]
    path = folder / f"{name}-{digest}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            target = Path(made) / path.name
            command = [*compiler(), *options, str(source), "-o", str(target), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
            target.replace(path)
    _require_own(folder)
    _require_own(path)
    return ctypes.CDLL(str(path))


def _require_own(path: Path) -> None:
    """Raise PermissionError unless a file or folder is this user's, and nobody else can write to it."""
    about = path.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise PermissionError(f"others can write to {path}, so what it holds is not run")
