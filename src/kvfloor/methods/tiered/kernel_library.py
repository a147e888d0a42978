"""Compile the kernel of certified reads with the system's C compiler, once for each machine and version of its source.

The compiled file is kept in the folder `kernels` of the cache folder (`core.native`). Where it cannot be had, there is
no kernel: torch computes the same, more slowly.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from kvfloor.core import native
from kvfloor.core.native import instructions
from kvfloor.models.gguf import cache_folder

SOURCE = Path(__file__).parent / "native" / "certify.c"
"""The file that is compiled; it includes others of its folder."""

OPTIONS = (*native.OPTIONS, "-ffp-contract=fast")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, which is made first if it is missing; None where it cannot be had."""
    return native.if_possible(lambda: loaded(cache_folder() / "kernels"))


def loaded(folder: Path) -> ctypes.CDLL:
    """Return the compiled kernel in a folder, which is for this user alone; compile it there if it is missing."""
    found = native.compiled(SOURCE, "certify", folder, (*OPTIONS, *instructions()))
    found.size_of_given.restype = ctypes.c_int64
    found.certify.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    for name in ("want", "refine"):
        getattr(found, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    found.unsure.argtypes = (ctypes.c_void_p, ctypes.c_int64, *3 * (ctypes.c_void_p,))
    found.unsure.restype = ctypes.c_int64
    found.release.argtypes = (ctypes.c_void_p,)
    found.exponentials.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return found
