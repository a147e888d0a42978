"""Compile the kernel of certified reads with the system's C compiler, once for each machine and version of its source.

The compiled file is kept in the folder `kernels` of the cache folder. It has instructions that not all processors have,
so its name tells which ones, beside a digest of what it was made from. Where there is no compiler, no folder that can
be written, or anything fails, there is no kernel: torch computes the same, more slowly.
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
from functools import lru_cache
from pathlib import Path

import torch

from kvfloor.models.gguf import cache_folder

SOURCE = Path(__file__).parent / "native" / "certify.c"
"""The file that is compiled; it includes others of its folder."""

OPTIONS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_SECONDS = 120.0


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, which is made first if it is missing; None where it cannot be had."""
    try:
        return loaded(cache_folder() / "kernels")
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def compiler() -> list[str]:
    """Return the command of the C compiler: that of the environment's CC, or `cc`."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def instructions() -> tuple[str, ...]:
    """Return the options for the instructions beyond the least that all processors of this kind have."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    return ("-mavx2", "-mfma") if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ()


def loaded(folder: Path) -> ctypes.CDLL:
    """Return the compiled kernel in a folder, which is for this user alone; compile it there if it is missing."""
    given = (*compiler(), *OPTIONS, *instructions(), sys.platform, platform.machine())
    sources = (file.read_text() for file in sorted(SOURCE.parent.glob("*.[ch]")))
    digest = hashlib.sha256("\0".join((*given, *sources)).encode()).hexdigest()[:24]
    path = folder / f"certify-{digest}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            target = Path(made) / path.name
            command = [*compiler(), *OPTIONS, *instructions(), str(SOURCE), "-o", str(target), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
            target.replace(path)
    _require_own(folder)
    _require_own(path)
    found = ctypes.CDLL(str(path))
    found.size_of_given.restype = ctypes.c_int64
    found.certify.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    for name in ("want", "refine"):
        getattr(found, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    found.unsure.argtypes = (ctypes.c_void_p, ctypes.c_int64, *3 * (ctypes.c_void_p,))
    found.unsure.restype = ctypes.c_int64
    found.release.argtypes = (ctypes.c_void_p,)
    found.exponentials.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return found


def _require_own(path: Path) -> None:
    """Raise PermissionError unless a file or folder is this user's, and nobody else can write to it."""
    about = path.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise PermissionError(f"others can write to {path}, so what it holds is not run")
